"""The embeddings of a model in one pass: rows of frozen tables, their sum, its LayerNorm.

    y = LayerNorm(sum over t of tables[t][ids[t]])

Only the LayerNorm's bias can train; its gradient is a sum of that of y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels._constants import MAX_COLUMNS
from ._autograd import as_rows, contiguous, once, operation, shaped
from ._backend import uses_triton
from .column_sum import bias_gradient

__all__ = ["embedding_layer_norm", "gathers"]


def gathers(table: Tensor) -> bool:
    """Return whether a table's rows are worth leaving to one kernel, which saves launches."""
    return uses_triton(table, most=MAX_COLUMNS)


def definition(
    gamma: Tensor,
    beta: Tensor | None,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
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
    return F.layer_norm(total, total.shape[-1:], gamma.to(wide), beta, eps).to(dtype)


@operation(
    "embedding_layer_norm",
    "(Tensor gamma, Tensor? beta, Tensor[] ids, Tensor[] tables, float eps, ScalarType dtype) "
    "-> Tensor",
)
def _embedding_layer_norm(gamma, beta, ids, tables, eps, dtype):
    gamma, beta = contiguous(gamma, beta)
    if uses_triton(tables[0], dtype, most=MAX_COLUMNS):
        from ..kernels import embedding as kernel

        tables = [t if t.stride(1) == 1 else t.contiguous() for t in tables]
        return kernel.embedding_layer_norm(gamma, beta, contiguous(*ids), tables, eps, dtype)
    return definition(gamma, beta, ids, tables, eps, dtype).contiguous()


@_embedding_layer_norm.register_fake
def _(gamma, beta, ids, tables, eps, dtype):
    return tables[0].new_empty(ids[0].shape[0], tables[0].shape[1], dtype=dtype)


class _EmbeddingLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gamma: Tensor,
        beta: Tensor | None,
        ids: Sequence[Tensor],
        tables: Sequence[Tensor],
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        flat = [index.reshape(-1) for index in ids]
        y = _embedding_layer_norm(gamma, beta, flat, tables, eps, dtype)
        return shaped(y, torch.Size((*ids[0].shape, y.shape[1])))

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (None, bias_gradient(as_rows(dy)), None, None, None, None)


def embedding_layer_norm(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Add rows of frozen tables, and normalise the sums; only `beta` gets a gradient.

    Parameters
    ----------
    ids : sequence of Tensor
        `[...]` int64, of one shape, one for each table; up to `MOST_TABLES`.
    tables : sequence of Tensor
        `[V, N]`, floating point.
    gamma, beta : Tensor
        `[N]`; beta may be None.
    eps : float
        Added to the variance.
    dtype : torch.dtype
        Of the output.

    Returns
    -------
    Tensor
        `[..., N]`. It cannot be differentiated twice.
    """
    return _EmbeddingLayerNorm.apply(gamma, beta, ids, tables, eps, dtype)
