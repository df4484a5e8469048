"""Embeddings whose rows wait for the LayerNorm behind them, which reads and adds them itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..kernels._constants import MOST_TABLES
from ..ops.embedding import embedding_layer_norm
from ..stand_in import StandIn

__all__ = ["Embedding", "Gathered"]


class Gathered(StandIn):
    """A sum of rows of tables, not yet read, in the place of a tensor.

    Parameters
    ----------
    ids : list of Tensor
        int64, of one shape.
    tables : list of Tensor
        `[V, N]`, frozen, one for each of `ids`.
    dtype : torch.dtype
        In which what follows takes the normalised sum.
    """

    def __init__(self, ids: list[Tensor], tables: list[Tensor], dtype: torch.dtype) -> None:
        self._ids, self._tables, self._dtype = ids, tables, dtype
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """Return the tensor; computed once."""
        if self._tensor is None:
            parts = [F.embedding(ids, table) for ids, table in zip(self._ids, self._tables)]
            self._tensor = sum(parts[1:], parts[0])
        return self._tensor

    def normalised(
        self, gamma: Tensor, beta: Tensor | None, eps: float, used_again: bool
    ) -> Tensor:
        """Return its LayerNorm in one pass."""
        if self._tensor is not None or used_again or gamma.requires_grad:
            return ops.layer_norm(self.tensor(), gamma, beta, eps)
        return embedding_layer_norm(self._ids, self._tables, gamma, beta, eps, self._dtype)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return torch.Size((*self._ids[0].shape, self._tables[0].shape[1]))

    def _plus(self, other: Any) -> Any:
        if (
            isinstance(other, Gathered)
            and self._tensor is None
            and other._tensor is None
            and other.shape == self.shape
            and len(self._ids) + len(other._ids) <= MOST_TABLES
        ):
            ids, tables = self._ids + other._ids, self._tables + other._tables
            return Gathered(ids, tables, self._dtype)
        return super()._plus(other)


class Embedding(nn.Embedding):
    """`nn.Embedding` that leaves its rows to a LayerNorm, where that is told to take them."""

    _replaces = nn.Embedding
    #: The dtype in which what follows takes the normalised sum; None where it takes tensors.
    _goes_on_in: torch.dtype | None = None

    def forward(self, input: Tensor) -> Any:
        """Return rows of the table, or a `Gathered`."""
        if (
            self._goes_on_in is None
            or self.weight.requires_grad
            or self.max_norm is not None
            or input.dtype != torch.int64
            or not input.numel()
        ):
            return super().forward(input)
        return Gathered([input], [self.weight], self._goes_on_in)
