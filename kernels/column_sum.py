"""Column sums: the bias gradient of a linear layer from the gradient of its output.

    db[s, n] = sum over rows m of segment s of dy[m, n] keep[m, n] / (1 - p)

`dy` is `[M, N]` in fp32, fp16 or bf16 with any strides, also 0 (an expanded gradient); `db` is
fp32, and so is the accumulation. Two stages: each program adds its share of the rows into one
partial row, then `_reduce` adds the partial rows. Reads `M N` elements of `dy` once, writes and
reads `S P N` fp32 numbers besides, where P is the number of partial rows of a segment.

With dropout the sum runs over what the mask of `_dropout` keeps, which is drawn again and never
stored. Rows are cut into S segments by offsets `[S + 1]`; a plain sum is the case of one segment.
Segment s is the rows from `offsets[s]` up to `offsets[s + 1]`, so it may be empty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._constants import threshold
from ._dropout import kept
from ._launch import cdiv, column_config, device_guard, processors
from ._reduce import add_partial_rows

__all__ = ["column_sum"]


@triton.jit(do_not_specialize=["M", "P", "threshold"])
def _column_sum_kernel(
    dy_ptr,  # [M, N]
    offsets_ptr,  # [S + 1], int64
    seed_ptr,  # [1], int64
    partial_ptr,  # [S, P, N], fp32
    M,
    N,
    P,
    stride_ym,
    stride_yn,
    threshold,
    scale,
    HAS_OFFSETS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_column = tl.program_id(1) * BLOCK_N
    cols = first_column + tl.arange(0, BLOCK_N)
    share = tl.program_id(2)
    segment = tl.program_id(0)  # the one axis that may have more than 65,535 programs
    in_row = cols < N
    if HAS_OFFSETS:
        first = tl.load(offsets_ptr + segment).to(tl.int64)
        end = tl.load(offsets_ptr + segment + 1).to(tl.int64)
    else:
        first = tl.zeros((), dtype=tl.int64)
        end = first + M
    steps = tl.cdiv(end - first, P * BLOCK_M).to(tl.int32)
    # row offsets are 64 bits wide: M * N may pass 2^31
    rows = first + share * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    wide = cols.to(tl.int64)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, steps):
        inside = (rows < end)[:, None] & in_row[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * stride_ym + wide * stride_yn, mask=inside, other=0.0)
        dy = dy.to(tl.float32)
        if HAS_DROPOUT:
            dy = tl.where(kept(seed_ptr, rows, first_column, threshold, BLOCK_N), dy * scale, 0.0)
        acc += dy
        rows += P * BLOCK_M
    row = (segment.to(tl.int64) * P + share) * N
    tl.store(partial_ptr + row + cols, tl.sum(acc, axis=0), mask=in_row)


def column_sum(
    dy: Tensor,
    offsets: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    partial: Tensor | None = None,
) -> Tensor:
    """Add the rows of a matrix, segment by segment.

    Parameters
    ----------
    dy : Tensor
        `[M, N]`, fp32, fp16 or bf16, any strides; it is only read.
    offsets : Tensor, optional
        `[S + 1]` int64 on the device of `dy`, ascending, from 0 to M.
    p : float
        Probability with which dropout dropped an element, below 1.
    seed : Tensor, optional
        `[1]` int64 on the device of `dy`; needed with `p > 0`.
    partial : Tensor, optional
        `[S, P, N]` fp32, contiguous: where partial rows go that the caller will add, and what is
        returned then.

    Returns
    -------
    Tensor
        fp32 `[N]`, or `[S, N]` with offsets. The same input gives the same bits.
    """
    rows, columns = dy.shape
    segments = 1 if offsets is None else offsets.numel() - 1
    config = column_config(cdiv(rows, max(1, segments)), columns, processors(dy), segments)
    size, later = (segments, config.pop("P"), columns), partial is not None
    if partial is None:
        partial = torch.empty(size, dtype=torch.float32, device=dy.device)
    partial_rows = partial.shape[1]
    if partial.numel():
        grid = (segments, cdiv(columns, config["BLOCK_N"]), partial_rows)
        with device_guard(dy):
            _column_sum_kernel[grid](
                dy,
                dy if offsets is None else offsets,
                dy if seed is None else seed,
                partial,
                rows,
                columns,
                partial_rows,
                dy.stride(0),
                dy.stride(1),
                threshold(p),
                1 / (1 - p),
                HAS_OFFSETS=offsets is not None,
                HAS_DROPOUT=p > 0,
                **config,
            )
    if later:
        return partial
    db = add_partial_rows(partial)
    return db[0] if offsets is None else db
