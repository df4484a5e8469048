"""Ways to fine-tune: BitFit, and what it is compared with."""

from ..additions import remove
from .table import METHODS, Method, Option, prepare

__all__ = ["METHODS", "Method", "Option", "prepare", "remove"]
