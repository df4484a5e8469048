"""Freed memory stays with the process between steps on a CPU."""

from __future__ import annotations

import ctypes
import functools

__all__ = ["keep_freed_memory"]

#: Of glibc's malloc.h, with what they are set to: never give memory back, take some at a time,
#: and no mappings of their own for large tensors.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = (-1, -1), (-2, 64 << 20), (-4, 0)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for all of the process.

    By default it gives a step's large tensors back to the system, which hands them out again as
    new pages of zeros at the next step: a third of the time of a step in fp32 on a CPU with
    matrix units. The price is memory: freed pieces are not always of use for the next tensors,
    which may take a third more in all. Where the C library is another one, nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # the last on Windows
        return
    for what, value in (_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX):
        mallopt(what, value)
