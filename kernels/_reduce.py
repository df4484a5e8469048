"""The second stage of every column sum: partial rows become one row, in a fixed order.

    out[s, n] = sum_p partial[s, p, n]

fp32 in and out. Reads `S P N`, writes `S N` numbers of 4 bytes. No atomics: the order of the
additions depends on the shapes alone, so the same inputs give the same bits.

A backward pass has several of these a layer, each so small that its launch is what it takes.
`add_segments` does many at once, of different sizes, and adds them to where gradients lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, device_guard

__all__ = ["SEGMENT", "add_partial_rows", "add_segments"]

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


#: What `add_segments` is told of each sum: where its first partial row begins, how many there are,
#: how far they lie apart, how wide they are, and where the sum goes.
SEGMENT = ("first", "rows", "stride", "columns", "to")


@triton.jit
def _add_segments_kernel(
    partial_ptr,  # fp32
    table_ptr,  # [S, 5], int32
    out_ptr,  # fp32
    ADDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    about = table_ptr + tl.program_id(0) * 5
    columns = tl.load(about + 3)
    first_column = tl.program_id(1) * BLOCK_N
    if first_column >= columns:
        return
    start, P, stride, to = (
        tl.load(about),
        tl.load(about + 1),
        tl.load(about + 2),
        tl.load(about + 4),
    )
    cols = first_column + tl.arange(0, BLOCK_N)
    in_row = cols < columns
    acc = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        rows = first + tl.arange(0, BLOCK_P)
        at = start + rows[:, None] * stride + cols[None, :]
        acc += tl.load(partial_ptr + at, mask=(rows < P)[:, None] & in_row[None, :], other=0.0)
    out_at = out_ptr + to + cols
    total = tl.sum(acc, axis=0)
    if ADDS:
        total += tl.load(out_at, mask=in_row, other=0.0)
    tl.store(out_at, total, mask=in_row)


def add_segments(
    partial: Tensor, table: Tensor, widest: int, out: Tensor, adds: bool = True
) -> None:
    """Add partial rows, and each sum to what is there.

    Parameters
    ----------
    partial : Tensor
        fp32, contiguous, of fewer than 2^31 numbers: all partial rows.
    table : Tensor
        `[S, 5]` int32 on the device, contiguous: `SEGMENT` of each sum. No two go to one place.
    widest : int
        The most columns of any.
    out : Tensor
        fp32, contiguous; written from `to` of each sum on.
    adds : bool
        Whether sums are added to what is there; else they take its place.
    """
    grid = (len(table), cdiv(widest, _BLOCK_N))
    if grid[0] * grid[1]:
        with device_guard(partial):
            _add_segments_kernel[grid](
                partial, table, out, ADDS=adds, BLOCK_P=_BLOCK_P, BLOCK_N=_BLOCK_N, num_warps=8
            )


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
