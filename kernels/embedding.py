"""Rows of several tables, their sum and its LayerNorm in one pass: the embeddings of a model.

    s[m] = sum over t of tables[t][ids[t][m]]
    y = ((s - mean(s)) * rstd * gamma + beta) keep / (1 - p)

Words, positions and token types are the tables of BERT; one to three of them, `[V, N]` in fp32,
fp16 or bf16. The ids are `[M]` int64; one that its table has no row for gives a row of NaN. fp32
inside, y in any of these dtypes. Reads `M N` elements of each table, of small ones from the
cache, and writes `M N`; gathered and added one after the other, and cast behind it, they would be
read and written three times as often. Nothing is kept: the tables are frozen, and the gradient of
beta is a sum of dy, over what dropout keeps, which is drawn again from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._constants import MOST_TABLES, threshold
from ._dropout import kept
from ._launch import cdiv, device_guard, processors
from .layer_norm import layer_norm_config

__all__ = ["embedding_layer_norm"]


@triton.jit
def _row(ids_ptr, table_ptr, V, stride, rows, in_rows, cols, inside):
    """Load the rows that some ids ask for, NaN for those that are not there."""
    ids = tl.load(ids_ptr + rows, mask=in_rows, other=0)
    at = table_ptr + ids[:, None] * stride + cols.to(tl.int64)[None, :]
    there = (ids >= 0) & (ids < V)
    found = tl.load(at, mask=inside & there[:, None], other=0.0).to(tl.float32)
    return tl.where(there[:, None], found, float("nan"))


@triton.jit(do_not_specialize=["M", "V0", "V1", "V2", "threshold"])
def _embedding_layer_norm_kernel(
    ids0_ptr,  # [M], int64
    ids1_ptr,
    ids2_ptr,
    table0_ptr,  # [V0, N]
    table1_ptr,
    table2_ptr,
    gamma_ptr,  # [N]
    beta_ptr,  # [N]
    seed_ptr,  # [1], int64
    y_ptr,  # [M, N], contiguous
    M,
    N,
    V0,
    V1,
    V2,
    stride0,
    stride1,
    stride2,
    threshold,
    scale,
    eps,
    TABLES: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_rows, in_row = rows < M, cols < N
    inside = in_rows[:, None] & in_row[None, :]
    s = _row(ids0_ptr, table0_ptr, V0, stride0, rows, in_rows, cols, inside)
    if TABLES > 1:
        s += _row(ids1_ptr, table1_ptr, V1, stride1, rows, in_rows, cols, inside)
    if TABLES > 2:
        s += _row(ids2_ptr, table2_ptr, V2, stride2, rows, in_rows, cols, inside)
    s = tl.where(inside, s, 0.0)
    mean = tl.sum(s, axis=1) / N
    centred = tl.where(inside, s - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + eps)
    y = centred * rstd[:, None]
    y *= tl.load(gamma_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_BETA:
        y += tl.load(beta_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_DROPOUT:
        y = tl.where(kept(seed_ptr, rows, 0, threshold, BLOCK_N), y * scale, 0.0)
    to = rows[:, None] * N + cols.to(tl.int64)[None, :]
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=inside)


def embedding_layer_norm(
    gamma: Tensor,
    beta: Tensor | None,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    p: float,
    seed: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Add rows of tables, normalise the sums, and drop out.

    Parameters
    ----------
    gamma, beta : Tensor
        `[N]`, contiguous; `beta` may be None.
    ids : sequence of Tensor
        `[M]` int64, contiguous, of each table; no more than `MOST_TABLES`.
    tables : sequence of Tensor
        `[V, N]`, fp32, fp16 or bf16, with contiguous rows.
    p : float
        Probability of dropping an element, below 1.
    seed : Tensor or None
        `[1]` int64 on the device of the tables; needed with `p > 0`.
    eps : float
        Added to the variance.
    dtype : torch.dtype
        Of the output.

    Returns
    -------
    Tensor
        `[M, N]`.
    """
    rows, columns = len(ids[0]), tables[0].shape[1]
    y = torch.empty(rows, columns, dtype=dtype, device=tables[0].device)
    config = layer_norm_config(rows, columns, processors(y))
    config.pop("P")
    # in the places of tables that are not there stands the first one
    some = [*range(len(tables)), 0, 0][:MOST_TABLES]
    if y.numel():
        with device_guard(y):
            _embedding_layer_norm_kernel[(cdiv(rows, config["BLOCK_M"]),)](
                *(ids[i] for i in some),
                *(tables[i] for i in some),
                gamma,
                gamma if beta is None else beta,
                gamma if seed is None else seed,
                y,
                rows,
                columns,
                *(len(tables[i]) for i in some),
                *(tables[i].stride(0) for i in some),
                threshold(p),
                1 / (1 - p),
                eps,
                TABLES=len(tables),
                HAS_BETA=beta is not None,
                HAS_DROPOUT=p > 0,
                **config,
            )
    return y
