"""What every launcher needs: the device guard, the size of the device, the interpreter switch."""

from __future__ import annotations

import contextlib
import functools
import os

import torch
from torch import Tensor

__all__ = ["INTERPRETED", "cdiv", "device_guard", "next_power_of_2", "processors"]

#: Whether Triton runs kernels in its interpreter; it reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(tensor: Tensor) -> int:
    """Return the number of multiprocessors of the tensor's device; 2 under the interpreter."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 2


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which kernels launch on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
