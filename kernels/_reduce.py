"""The second stage of every column sum: partial rows become one row, in a fixed order.

    out[s, n] = sum_p partial[s, p, n]

fp32 in and out. Reads `S P N`, writes `S N` numbers of 4 bytes. No atomics: the order of the
additions depends on the shapes alone, so the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, device_guard

__all__ = ["add_partial_rows"]

# a line of the cache wide; high, because few programs share this work and each waits for its loads
_BLOCK_P, _BLOCK_N = 128, 32


@triton.jit(do_not_specialize=["P"])
def _add_partial_rows_kernel(
    partial_ptr,  # [S, P, N]
    out_ptr,  # [S, N]
    P,
    N,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    segment = tl.program_id(0).to(tl.int64)
    in_row = cols < N
    acc = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        rows = first + tl.arange(0, BLOCK_P)
        at = (segment * P + rows[:, None]) * N + cols[None, :]
        acc += tl.load(partial_ptr + at, mask=(rows < P)[:, None] & in_row[None, :], other=0.0)
    tl.store(out_ptr + segment * N + cols, tl.sum(acc, axis=0), mask=in_row)


def add_partial_rows(partial: Tensor) -> Tensor:
    """Add the partial rows of each segment.

    Parameters
    ----------
    partial : Tensor
        `[S, P, N]` fp32, contiguous; every row is written.

    Returns
    -------
    Tensor
        `[S, N]` fp32.
    """
    segments, rows, columns = partial.shape
    if rows == 1:
        return partial[:, 0]
    out = torch.empty(segments, columns, dtype=torch.float32, device=partial.device)
    if out.numel() == 0:
        return out
    grid = (segments, cdiv(columns, _BLOCK_N))
    with device_guard(partial):
        _add_partial_rows_kernel[grid](
            partial, out, rows, columns, BLOCK_P=_BLOCK_P, BLOCK_N=_BLOCK_N, num_warps=8
        )
    return out
