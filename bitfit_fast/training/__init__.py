"""Training: settings, backends, the loop."""

from .backends import BACKENDS
from .loop import train
from .settings import Settings

__all__ = ["BACKENDS", "Settings", "train"]
