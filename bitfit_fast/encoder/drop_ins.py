"""Drop-ins for what is around a model's layers: its embeddings, and the dropouts of its head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..modules import LayerNorm, original
from ..ops._backend import uses_native
from ..ops.dropout import dropout, new_seed
from . import embeddings
from .parts import base_of, hooked

__all__ = ["Dropout", "put_drop_ins", "take_drop_ins"]

#: Elements from which on a kernel drops them sooner by a seed than PyTorch does one by one.
_MANY = 2**14


class Dropout(nn.Dropout):
    """`nn.Dropout` of a head that keeps a seed for its backward pass where a CPU has a kernel.

    PyTorch draws a mask element by element there, of which there are many behind all tokens.
    """

    _replaces = nn.Dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return x with elements dropped, in training."""
        drops = self.training and 0 < self.p < 1 and not self.inplace
        if not drops or x.numel() < _MANY or not uses_native(x):
            return super().forward(x)
        return dropout(x, self.p, new_seed(x.device))


_OF_EMBEDDINGS: tuple[Any, ...] = (LayerNorm, embeddings.Dropout, embeddings.Embedding)
_OF_HEADS: tuple[Any, ...] = (Dropout,)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    """Return the modules around a model's layers, with the drop-ins that they may have."""
    base: Any = base_of(model)
    yield from ((module, _OF_EMBEDDINGS) for module in base.embeddings.children())
    inside = set(base.modules())
    yield from ((module, _OF_HEADS) for module in model.modules() if module not in inside)


def put_drop_ins(model: nn.Module) -> None:
    """Let modules around a model's layers be drop-ins, in place."""
    for module, drop_ins in _places(model):
        for drop_in in drop_ins:
            if type(module) is drop_in._replaces and not hooked(module):
                module.__class__ = drop_in


def take_drop_ins(model: nn.Module) -> None:
    """Undo `put_drop_ins`."""
    for module, drop_ins in _places(model):
        if type(module) in drop_ins:
            module.__class__ = original(module)
