"""The gradients that a backward pass comes by, on their way to autograd or to where they add up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import sums
from .stack import KEY, ROLES

__all__ = ["Gradients"]


class Gradients:
    """The gradients of all biases, in one backward pass.

    Second stages of sums run together, where they are launches.

    Parameters
    ----------
    biases : sequence of Tensor or None
        Eight a layer, in the order of `ROLES`.
    needs : sequence of bool
        Whether each needs a gradient.
    embedding_beta : Tensor or None
        The bias of the embeddings' LayerNorm, if it needs one.
    sinks : sequence of Tensor or None
        Where gradients are added, of each bias and, with one more, of the embeddings'; None
        hands them to autograd.
    overwrites : bool
        Whether they take the place of what is in the sinks.
    dy : Tensor
        What the backward pass begins with.
    few : bool
        Whether memory is to be saved.
    """

    def __init__(
        self,
        biases: Sequence[Tensor | None],
        needs: Sequence[bool],
        embedding_beta: Tensor | None,
        sinks: Sequence[Tensor | None] | None,
        overwrites: bool,
        dy: Tensor,
        few: bool,
    ) -> None:
        self.needs, self.embedding_beta = needs, embedding_beta
        #: By which `partial` knows the embeddings' bias
        self.embedding_index = len(needs)
        self._biases, self._sinks, self._overwrites = biases, sinks or (), overwrites
        self._found: list[Tensor | None] = [None] * len(biases)
        self._of_embeddings: Tensor | None = None
        self._sums: sums.Sums | None = None
        self._deferred: set[int] = set()
        if sums.defers(dy) and any(needs):
            self._sums = self._together(few, dy.device)

    def _together(self, few: bool, device: torch.device) -> sums.Sums:
        """Return what lets second stages run together, straight into the sinks if it can be."""
        needs = (*self.needs, self.embedding_beta is not None)
        places = {i: s for i, s in enumerate(self._sinks) if s is not None and needs[i]}
        owners = {sink.untyped_storage().data_ptr() for sink in places.values()}
        of_sinks = len(owners) == 1 and len(places) == sum(needs)
        if not of_sinks:
            places = self._own_places(device)
        return sums.Sums(places, few, self._overwrites and of_sinks)

    def _own_places(self, device: torch.device) -> dict[int, Tensor]:
        """Return gradients of zero, in one piece of memory."""
        needed = {i: b for i, b in enumerate(self._biases) if b is not None and self.needs[i]}
        if self.embedding_beta is not None:
            needed[self.embedding_index] = self.embedding_beta
        # at 64 bytes, as in tensors that PyTorch makes
        sizes = [-(-bias.numel() // 16) * 16 for bias in needed.values()]
        parts = torch.zeros(sum(sizes), dtype=torch.float32, device=device).split(sizes)
        return {i: part[: len(bias)] for (i, bias), part in zip(needed.items(), parts)}

    @property
    def defers(self) -> bool:
        """Whether kernels may leave partial rows in `partial`, for sums to be made of later."""
        return self._sums is not None

    def needed(self, index: int | None) -> bool:
        """Return whether there is such a bias, and it needs a gradient."""
        return index is not None and self.needs[index]

    def note(self, index: int | None, gradient: Tensor) -> None:
        """Note the gradient of a bias, if it is needed."""
        if index is not None and self.needs[index]:
            self._found[index] = gradient

    def note_embedding_beta(self, gradient: Tensor) -> None:
        """Note the gradient of the embeddings' bias."""
        self._of_embeddings = gradient

    def partial(self, indices: Sequence[int | None], rows: int, columns: int) -> Tensor:
        """Return where partial rows of these biases' sums go; see `Sums.take`."""
        assert self._sums is not None
        self._deferred.update(i for i in indices if i is not None)
        return self._sums.take(indices, rows, columns)

    def reserve(self, size: int) -> None:
        """Make sure that so many numbers are there for what is asked for next."""
        assert self._sums is not None
        self._sums.reserve(size)

    def finish(self) -> list[Tensor | None]:
        """Fill the sinks; return what is left for autograd, that of the embeddings' bias first."""
        if self._sums is not None:
            self._sums.add()
            self._finish_embedding_beta(self._sums)
        for index, (bias, needed) in enumerate(zip(self._biases, self.needs)):
            if not needed or self._found[index] is not None:
                continue
            if self._sums is not None and index in self._deferred:
                place = self._sums.places[index]
                self._found[index] = None if self._is_sink(place, index) else place
                continue
            if bias is None or index % len(ROLES) != KEY:  # that of keys is zero
                raise RuntimeError(f"the backward pass came by no gradient of bias {index}")
            self._found[index] = torch.zeros_like(bias)
        into, added = [], []
        for index, sink in enumerate(self._sinks[: len(self._found)]):
            gradient = self._found[index]
            if sink is not None and gradient is not None:
                into.append(sink)
                added.append(gradient)
                self._found[index] = None
        if into and self._overwrites:
            torch._foreach_copy_(into, added)
        elif into:
            torch._foreach_add_(into, added)
        return [self._of_embeddings, *self._found]

    def _finish_embedding_beta(self, together: sums.Sums) -> None:
        """Hand the deferred gradient of the embeddings' bias on, unless it is in its sink."""
        index, beta = self.embedding_index, self.embedding_beta
        if beta is None or index not in self._deferred:
            return
        place = together.places[index]
        if not self._is_sink(place, index):
            self._of_embeddings = place
        elif beta.grad is None:
            beta.grad = place

    def _is_sink(self, place: Tensor, index: int) -> bool:
        return index < len(self._sinks) and place is self._sinks[index]
