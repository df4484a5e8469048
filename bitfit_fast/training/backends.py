"""Where a faster way to train plugs in: what it does to the model, the batches, the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..data.batches import Batch, Collate
from ..errors import BitFitError, check_known
from ..selection import Selection
from .fast import FastBackend
from .modules import ModulesBackend
from .reference import ReferenceBackend
from .settings import Plan

__all__ = ["BACKENDS", "Backend", "Step", "check_backend", "choose_backend"]


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
        """Train on one batch, wherever it is, and return the detached loss."""

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors by name."""

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue after `steps` steps."""

    def close(self) -> None:
        """Let go of the model, which may be trained in another way then."""


class Backend(Protocol):
    """A way to train."""

    name: str

    def refusal(self, model: nn.Module, selection: Selection, plan: Plan) -> str | None:
        """Return why this model, selection or plan cannot be trained this way, or None.

        Asked before the model moves to `plan.device`.
        """

    def patch(
        self, model: nn.Module, selection: Selection, plan: Plan
    ) -> tuple[Callable[[], None], str]:
        """Make the model fast, in place, with the same parameters and outputs.

        Returns what undoes it, which is called however training ends, and what to tell the
        user of it.
        """

    def collate(self, tokenizer: Any, plan: Plan, kind: str = "sequence") -> Collate:
        """Return how batches are formed from any number of examples of a kind of task.

        Which examples a batch has is not the backend's choice, so that results of backends
        can be compared.
        """

    def step(self, model: nn.Module, plan: Plan) -> Step:
        """Return the optimiser step."""


#: By name, the one to be preferred first.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (FastBackend(), ReferenceBackend(), ModulesBackend())
}


def check_backend(name: str) -> None:
    """Check that there is a backend of this name.

    Raises
    ------
    BitFitError
        With the valid names.
    """
    check_known("backend", name, ("auto", *BACKENDS))


def choose_backend(
    name: str, model: nn.Module, selection: Selection, plan: Plan
) -> tuple[Backend, str]:
    """Return the backend `name`, or for `auto` the first that takes the model; and why that one.

    Raises
    ------
    BitFitError
        For an unknown name, or a backend that refuses the model; says why, and what `auto`
        would do.
    """
    check_backend(name)
    refusals = {key: b.refusal(model, selection, plan) for key, b in BACKENDS.items()}
    willing = [key for key, refusal in refusals.items() if refusal is None]
    if name == "auto" and willing:
        passed = list(refusals)[: list(refusals).index(willing[0])]
        why = "; ".join(f"{key} cannot train this model: {refusals[key]}" for key in passed)
        return BACKENDS[willing[0]], why or "the fastest, and it takes this model"
    if name == "auto":
        reasons = "; ".join(f"{key}: {refusal}" for key, refusal in refusals.items())
        raise BitFitError(f"no backend can train this model ({reasons})")
    if refusals[name] is not None:
        instead = f"; auto would take {willing[0]}" if willing else ""
        raise BitFitError(f"backend '{name}' cannot train this model: {refusals[name]}{instead}")
    return BACKENDS[name], "asked for"
