"""Tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pinned", "sent"]


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor from which a copy to a device waits for nothing.

    From memory of the host that is not pinned it would wait for everything that a GPU has still
    to do, whatever `non_blocking` says.
    """
    pins = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory() if pins else tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the host to a GPU without waiting for it."""
    return pinned(tensor, device).to(device, non_blocking=device.type == "cuda")
