"""What every launcher needs: the device guard, the size of the device, the interpreter switch."""

from __future__ import annotations

import contextlib
import functools
import os

import torch
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "cdiv",
    "column_config",
    "device_guard",
    "next_power_of_2",
    "processors",
    "product_config",
]

#: Whether Triton runs kernels in its interpreter; it reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


#: Programs for each multiprocessor: enough loads in flight to hide the memory's latency.
_PROGRAMS_PER_PROCESSOR = 8
#: Tiles that a program should add before it writes its partial row.
_TILES_PER_PROGRAM = 4


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


def column_config(rows: int, columns: int, processors: int, segments: int = 1) -> dict[str, int]:
    """Return the launch configuration of a pass that sums columns on its way.

    Parameters
    ----------
    rows, columns, segments : int
        Shape of the problem; `rows` is the average of a segment.
    processors : int
        Multiprocessors of the device.

    Returns
    -------
    dict
        Tile sizes `BLOCK_M` and `BLOCK_N`, `num_warps`, and P, the partial rows of a segment.
    """
    # eight 16-bit elements of a row make a 16-byte load; a thread has two of them
    block_m, block_n = 32, min(128, max(16, next_power_of_2(columns)))
    wanted = cdiv(_PROGRAMS_PER_PROCESSOR * processors, max(1, cdiv(columns, block_n) * segments))
    useful = cdiv(rows, block_m * _TILES_PER_PROGRAM)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": 8,
        "P": max(1, min(wanted, useful)),
    }


def product_config(
    rows: int, columns: int, inner: int, itemsize: int, processors: int
) -> dict[str, int]:
    """Return the launch configuration of a kernel that makes a product's tiles.

    Parameters
    ----------
    rows, columns, inner : int
        M, N and K.
    itemsize : int
        Bytes of an element of the factors.
    processors : int
        Multiprocessors of the device.
    """
    # two heights and no more, since each is compiled
    few = cdiv(rows, 128) * cdiv(columns, 128) < 2 * processors
    # without matrix units, as in fp32, threads hold parts of both factors in registers
    wide = itemsize == 4
    # rows that begin anywhere are read element by element, each with a register of its own
    even = inner % 64 == 0
    return {
        "BLOCK_M": 64 if few or wide else 128,
        "BLOCK_N": 128,
        "BLOCK_K": 16 if wide else 64 if even else 32,
        "GROUP_M": 8,
        # four warps multiply 64 rows at once, and all columns: that reads shared memory the least
        "num_warps": 4 if few and even and not wide else 8,
        "num_stages": 3,
    }
