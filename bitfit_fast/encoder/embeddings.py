"""Drop-ins for a model's embeddings.

Rows wait for the LayerNorm behind them, which reads and adds them itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..kernels._constants import MOST_TABLES
from ..modules import LayerNorm
from ..ops.dropout import dropout, new_seed
from ..ops.embedding import embedding_layer_norm, gathers
from ..stand_in import StandIn
from .parts import hooked

__all__ = [
    "Dropout",
    "Embedding",
    "Gathered",
    "Onward",
    "waiting_tables",
]


@dataclass
class Onward:
    """What comes behind the LayerNorm of the embeddings, in one batch.

    Attributes
    ----------
    dtype : torch.dtype
        In which what follows takes the normalised sum.
    p : float
        Probability with which the dropout behind it drops an element.
    seed : Tensor or None
        Of that dropout.
    done : bool
        Whether the LayerNorm took that dropout along.
    """

    dtype: torch.dtype
    p: float = 0.0
    seed: Tensor | None = None
    done: bool = False


class Gathered(StandIn):
    """A sum of rows of tables, not yet read, in the place of a tensor.

    Parameters
    ----------
    ids : list of Tensor
        int64, of one shape.
    tables : list of Tensor
        `[V, N]`, frozen, one for each of `ids`.
    onward : Onward
        What comes behind its LayerNorm.
    """

    def __init__(self, ids: list[Tensor], tables: list[Tensor], onward: Onward) -> None:
        self._ids, self._tables, self._onward = ids, tables, onward
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
        """Return its LayerNorm, with the dropout behind it, in one pass."""
        if self._tensor is not None or used_again or gamma.requires_grad:
            return ops.layer_norm(self.tensor(), gamma, beta, eps)
        to = self._onward
        to.done = True
        given = self._ids, self._tables, gamma, beta, to.p, to.seed, eps, to.dtype
        return embedding_layer_norm(*given)

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
            return Gathered(ids, tables, self._onward)
        return super()._plus(other)


class Embedding(nn.Embedding):
    """`nn.Embedding` that leaves its rows to a LayerNorm, where that is told to take them."""

    _replaces = nn.Embedding
    #: What comes behind the LayerNorm of these rows; None where they do not wait for it.
    _onward: Onward | None = None

    def forward(self, input: Tensor) -> Any:
        """Return rows of the table, or a `Gathered`."""
        if (
            self._onward is None
            or self.weight.requires_grad
            or self.max_norm is not None
            or input.dtype != torch.int64
            or not input.numel()
        ):
            return super().forward(input)
        return Gathered([input], [self.weight], self._onward)


class Dropout(nn.Dropout):
    """`nn.Dropout` that keeps a seed for its backward pass, and no mask."""

    _replaces = nn.Dropout
    #: Where its seed is, and whether elements are dropped already; None draws a seed.
    _onward: Onward | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x with elements dropped, in training."""
        if not self.training or not 0 < self.p < 1 or not x.numel():
            return super().forward(x)
        onward = self._onward
        if onward is None or onward.seed is None:
            return dropout(x, self.p, new_seed(x.device))
        return x if onward.done else dropout(x, onward.p, onward.seed)


def waiting_tables(embeddings: nn.Module) -> list[Embedding]:
    """Return the tables whose rows the LayerNorm behind them can read and add itself.

    That saves launches, and is done where they matter.
    """
    words = getattr(embeddings, "word_embeddings", None)
    if type(words) is not Embedding or not gathers(words.weight):
        return []
    tables = [m for m in embeddings.children() if type(m) is Embedding]
    norm = getattr(embeddings, "LayerNorm", None)
    dtypes = {module.weight.dtype for module in (norm, *tables) if module is not None}
    plain = type(norm) is LayerNorm and dtypes == {torch.float32}
    if not plain or any(map(hooked, embeddings.modules())):
        return []
    return tables
