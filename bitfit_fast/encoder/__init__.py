"""Whole encoders as one operation: attention, stack, and how a model comes to run it."""

from .install import (
    LENGTHS,
    PRECISIONS,
    Encoder,
    encoder_of,
    fixed_refusal,
    for_model,
    install,
    refusal,
    uninstall,
)
from .stack import MEMORY

__all__ = [
    "LENGTHS",
    "MEMORY",
    "PRECISIONS",
    "Encoder",
    "encoder_of",
    "fixed_refusal",
    "for_model",
    "install",
    "refusal",
    "uninstall",
]
