"""The frozen weights of a patched encoder, which copies of them or of parts of them stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BitFitError

__all__ = ["Weights"]

#: The mark of a weight that was changed before it was copied.
_CHANGED = -1, -1


class Weights:
    """Weights that must not change.

    Parameters
    ----------
    named : dict of str to Parameter
        The weights.
    owners : sequence of nn.Module
        The modules that hold them, in the same order.
    """

    def __init__(self, named: dict[str, nn.Parameter], owners: Sequence[nn.Module]) -> None:
        self._named, self._owners = named, owners
        self._marks: list[tuple[int, int]] = []
        self.mark()
        #: By which a weight that was overwritten with itself, as data-parallel wrappers do, is told
        #: from one that changed
        self._sums = [_sums(weight) for weight in named.values()]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take those of a copied model for unchanged that have the sums that they had."""
        vars(self).update(state)
        weights, before = [*self._named.values()], self._sums
        self._sums = [_sums(weight) for weight in weights]
        # another device may add in another order
        same = [torch.allclose(n, old.to(n), 1e-9, 1e-9) for n, old in zip(self._sums, before)]
        self._marks = [_mark(w) if as_was else _CHANGED for w, as_was in zip(weights, same)]

    def mark(self) -> None:
        """Take the weights as they are now for unchanged."""
        self._marks = [_mark(weight) for weight in self._named.values()]

    def check(self) -> None:
        """Check that no weight changed, and none trains.

        Raises
        ------
        BitFitError
            With the name of one that did.
        """
        for i, ((name, weight), owner) in enumerate(zip(self._named.items(), self._owners)):
            found = _mark(weight)
            written = found != self._marks[i] and found[1] == self._marks[i][1]
            if written and torch.equal(_sums(weight), self._sums[i]):
                self._marks[i] = found
            if owner._parameters["weight"] is not weight or found != self._marks[i]:
                raise BitFitError(
                    f"the weight {name} was changed after the encoder was patched; "
                    "unpatch the model before changing weights, and patch it again"
                )
            if weight.requires_grad:
                raise BitFitError(
                    f"the weight {name} trains now, and the patched encoder computes no gradient "
                    "of weights; unpatch the model first"
                )

    def separate(self) -> None:
        """Give weights that look at a part of one buffer memory of their own."""
        for weight in self._named.values():
            if weight.data.untyped_storage().nbytes() > weight.nbytes:
                weight.data = weight.data.clone()


def _mark(weight: Tensor) -> tuple[int, int]:
    """Return what is another number after a change in place, or of the memory."""
    return weight._version, weight.data_ptr()


@torch.no_grad()
def _sums(weight: Tensor) -> Tensor:
    """Return the sum of a weight's elements, and its length as a vector."""
    total = weight.sum(dtype=torch.float64)
    return torch.stack((total, torch.linalg.vector_norm(weight, dtype=torch.float64)))
