"""Where a faster way to train plugs in: what it does to the model, the batches, the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..data.batches import Batch, Collate
from ..errors import BitFitError, listed
from ..selection import Selection
from .modules import ModulesBackend
from .reference import ReferenceBackend
from .settings import Plan

__all__ = ["BACKENDS", "Backend", "Step", "choose_backend"]


class Step(Protocol):
    """One optimiser step, with the state that a resumed run needs.

    Attributes
    ----------
    steps : int
        Steps done so far.
    no_gradient : frozenset of str
        Selected parameters whose gradient is known to be zero and is not computed.
    """

    steps: int
    no_gradient: frozenset[str]

    def __call__(self, batch: Batch) -> Tensor:
        """Train on one batch and return the detached loss."""

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors by name."""

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue after `steps` steps."""


class Backend(Protocol):
    """A way to train."""

    name: str

    def refusal(self, model: nn.Module, selection: Selection, plan: Plan) -> str | None:
        """Return why this model, selection or plan cannot be trained this way, or None.

        Asked before the model moves to `plan.device`.
        """

    def patch(self, model: nn.Module, selection: Selection) -> tuple[Callable[[], None], str]:
        """Make the model fast, in place, with the same parameters and outputs.

        Returns what undoes it, which is called however training ends, and what to tell the
        user of it.
        """

    def collate(self, tokenizer: Any, plan: Plan) -> Collate:
        """Return how batches are formed from any number of examples.

        Which examples a batch has is not the backend's choice, so that results of backends
        can be compared.
        """

    def step(self, model: nn.Module, plan: Plan) -> Step:
        """Return the optimiser step."""


#: By name, the one to be preferred first.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (ReferenceBackend(), ModulesBackend())
}


def choose_backend(name: str, model: nn.Module, selection: Selection, plan: Plan) -> Backend:
    """Return the backend `name`, or for `auto` the first that takes the model.

    Raises
    ------
    BitFitError
        For an unknown name, or a backend that refuses the model; says why.
    """
    if name == "auto":
        return next(b for b in BACKENDS.values() if b.refusal(model, selection, plan) is None)
    if name not in BACKENDS:
        raise BitFitError(f"unknown backend '{name}'; valid ones are auto, {listed(BACKENDS)}")
    refusal = BACKENDS[name].refusal(model, selection, plan)
    if refusal is not None:
        raise BitFitError(f"backend '{name}' cannot train this model: {refusal}")
    return BACKENDS[name]
