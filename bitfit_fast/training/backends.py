"""Where a faster way to train plugs in: what it does to the model, the batches, the step."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..data.batches import Batch, Collate
from ..errors import BitFitError, listed
from ..selection import Selection
from .reference import ReferenceBackend
from .settings import Plan

__all__ = ["BACKENDS", "Backend", "Step", "choose_backend"]


class Step(Protocol):
    """One optimiser step, with the state that a resumed run needs.

    Attributes
    ----------
    steps : int
        Steps done so far.
    """

    steps: int

    def __call__(self, batch: Batch) -> Tensor:
        """Train on one batch and return the detached loss."""

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors by name."""

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue after `steps` steps."""


class Backend(Protocol):
    """A way to train."""

    name: str

    def refusal(self, model: nn.Module, selection: Selection) -> str | None:
        """Return why the model or selection cannot be trained this way, or None."""

    def patch(self, model: nn.Module, selection: Selection) -> None:
        """Make the model fast, in place, with the same parameters and outputs."""

    def collate(self, tokenizer: Any) -> Collate:
        """Return how batches are formed from examples."""

    def step(self, model: nn.Module, plan: Plan) -> Step:
        """Return the optimiser step."""


#: By name, the one to be preferred first.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (ReferenceBackend(),)}


def choose_backend(name: str, model: nn.Module, selection: Selection) -> Backend:
    """Return the backend `name`, or for `auto` the first that takes the model.

    Raises
    ------
    BitFitError
        For an unknown name, or a backend that refuses the model; says why.
    """
    if name == "auto":
        return next(b for b in BACKENDS.values() if b.refusal(model, selection) is None)
    if name not in BACKENDS:
        raise BitFitError(f"unknown backend '{name}'; valid ones are auto, {listed(BACKENDS)}")
    refusal = BACKENDS[name].refusal(model, selection)
    if refusal is not None:
        raise BitFitError(f"backend '{name}' cannot train this model: {refusal}")
    return BACKENDS[name]
