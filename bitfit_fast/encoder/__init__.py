"""Whole encoders as one operation: attention, stack, and how a model comes to run it."""

from .calls import LENGTHS, for_model
from .encoder import Encoder
from .heads import fixed_refusal
from .install import PRECISIONS, encoder_of, install, uninstall
from .parts import hooks_on
from .stack import MEMORY
from .support import refusal

__all__ = [
    "LENGTHS",
    "MEMORY",
    "PRECISIONS",
    "Encoder",
    "encoder_of",
    "fixed_refusal",
    "for_model",
    "hooks_on",
    "install",
    "refusal",
    "uninstall",
]
