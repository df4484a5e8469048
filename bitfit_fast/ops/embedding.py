"""The embeddings of a model in one pass: rows of frozen tables, their sum, its LayerNorm.

    y = dropout(LayerNorm(sum over t of tables[t][ids[t]]))

Only the LayerNorm's bias can train; its gradient is the sum of that of y, through the dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels._constants import MAX_COLUMNS
from ._autograd import as_rows, contiguous, once, operation, shaped
from ._backend import uses_native, uses_triton
from .column_sum import column_sum
from .dropout import drawn

__all__ = ["embedding_layer_norm", "gathers"]


def gathers(table: Tensor) -> bool:
    """Return whether there is a kernel to which a table's rows may be left.

    That saves launches, and on a CPU time between calls.
    """
    return uses_triton(table, most=MAX_COLUMNS) or _is_for_cpu(table)


def _is_for_cpu(*tables: Tensor) -> bool:
    plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in tables)
    return plain and uses_native(*tables)


def definition(
    gamma: Tensor,
    beta: Tensor | None,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    p: float,
    keep: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute it with PyTorch operations, in fp32 or, of float64, in float64."""
    wide = torch.promote_types(tables[0].dtype, torch.float32)
    parts = [F.embedding(index, table).to(wide) for index, table in zip(ids, tables)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    beta = None if beta is None else beta.to(wide)
    y = F.layer_norm(total, total.shape[-1:], gamma.to(wide), beta, eps)
    return (y if keep is None else torch.where(keep, y / (1 - p), 0)).to(dtype)


@operation(
    "embedding_layer_norm",
    "(Tensor gamma, Tensor? beta, Tensor[] ids, Tensor[] tables, float p, Tensor? seed, "
    "float eps, ScalarType dtype) -> Tensor",
)
def _embedding_layer_norm(gamma, beta, ids, tables, p, seed, eps, dtype):
    gamma, beta = contiguous(gamma, beta)
    if uses_triton(tables[0], dtype, most=MAX_COLUMNS):
        from ..kernels import embedding as kernel

        tables = [t if t.stride(1) == 1 else t.contiguous() for t in tables]
        given = (gamma, beta, contiguous(*ids), tables, p, seed, eps, dtype)
        return kernel.embedding_layer_norm(*given)
    if _is_for_cpu(*tables) and dtype in (torch.float32, torch.bfloat16):
        from ..kernels import native

        return native.embedding_layer_norm(gamma, beta, ids, tables, p, seed, eps, dtype)
    keep = drawn(ids[0].shape[0], tables[0].shape[1], p, seed)
    return definition(gamma, beta, ids, tables, p, keep, eps, dtype).contiguous()


@_embedding_layer_norm.register_fake
def _(gamma, beta, ids, tables, p, seed, eps, dtype):
    return tables[0].new_empty(ids[0].shape[0], tables[0].shape[1], dtype=dtype)


class _EmbeddingLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gamma: Tensor,
        beta: Tensor | None,
        ids: Sequence[Tensor],
        tables: Sequence[Tensor],
        p: float,
        seed: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        flat = [index.reshape(-1) for index in ids]
        y = _embedding_layer_norm(gamma, beta, flat, tables, p, seed, eps, dtype)
        ctx.p = p
        ctx.save_for_backward(seed)
        return shaped(y, torch.Size((*ids[0].shape, y.shape[1])))

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dbeta = column_sum(as_rows(dy), None, ctx.p, *ctx.saved_tensors)
        return (None, dbeta, *[None] * 6)


def embedding_layer_norm(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    p: float,
    seed: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Add rows of frozen tables, normalise the sums, and drop out; only `beta` gets a gradient.

    Parameters
    ----------
    ids : sequence of Tensor
        `[...]` int64, of one shape, one for each table; up to `MOST_TABLES`.
    tables : sequence of Tensor
        `[V, N]`, floating point.
    gamma, beta : Tensor
        `[N]`; beta may be None.
    p : float
        Probability of dropping an element, below 1.
    seed : Tensor or None
        `[1]` int64 on the tables' device; needed with `p > 0`.
    eps : float
        Added to the variance.
    dtype : torch.dtype
        Of the output.

    Returns
    -------
    Tensor
        `[..., N]`. It cannot be differentiated twice.
    """
    return _EmbeddingLayerNorm.apply(gamma, beta, ids, tables, p, seed, eps, dtype)
