"""Whole encoders as one operation: attention, stack, and how a model comes to run it."""

from .install import PRECISIONS, Encoder, encoder_of, install, refusal, uninstall
from .stack import MEMORY

__all__ = ["MEMORY", "PRECISIONS", "Encoder", "encoder_of", "install", "refusal", "uninstall"]
