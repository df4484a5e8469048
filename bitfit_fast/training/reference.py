"""The plain PyTorch BitFit: the definition that everything faster is compared with.

`requires_grad` chooses what trains, autograd computes its gradient, AdamW updates it. A
frozen weight gets no gradient, so autograd already leaves out the weight-gradient products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..additions import addition
from ..data.batches import Batch, Collate, move
from ..encoder import MEMORY
from ..errors import listed
from ..kinds import KINDS, forward
from ..selection import NO_GRADIENT, Selection
from .heap import keep_freed_memory
from .measure import slow_in
from .settings import Plan

__all__ = ["ReferenceBackend", "ReferenceStep"]


class ReferenceStep:
    """One optimiser step of the trained parameters.

    Parameters
    ----------
    model : nn.Module
        Its parameters with `requires_grad` train; its forward returns a `loss`.
    plan : Plan
        Learning rate, precision and clipping.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.no_gradient: frozenset[str] = getattr(model, NO_GRADIENT, frozenset())
        self.addition = addition(model)
        self.steps = 0
        if plan.device.type == "cpu":
            keep_freed_memory()
        self._begin()

    def _begin(self) -> None:
        """Take what trains from now on."""
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        # one pass over all of it, where PyTorch's other ways take a dozen
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=self.plan.lr, weight_decay=0.0, fused=True
        )

    def __call__(self, batch: Batch) -> Tensor:
        """Train on one batch; return its loss, detached, without waiting for the device."""
        if self.addition and self.addition.advance(self.model, self.steps, self.plan.steps):
            self._begin()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr_at(self.steps) * (self.addition.rate if self.addition else 1)
        self.optimizer.zero_grad()
        bf16 = self.plan.precision == "bf16"
        with torch.autocast(self.plan.device.type, torch.bfloat16, enabled=bf16):
            loss = forward(self.model, move(batch, self.plan.device)).loss
        penalty = self.addition.penalty(self.model) if self.addition else None
        (loss if penalty is None else loss + penalty).backward()
        if self.plan.grad_clip:
            nn.utils.clip_grad_norm_(self.trained.values(), self.plan.grad_clip)
        self.optimizer.step()
        # the fused optimiser does not; what a method writes into the weights goes by it
        torch.autograd.graph.increment_version(list(self.trained.values()))
        self.steps += 1
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors by name, for `restore`."""
        return {
            f"{key}/{name}": value
            for name, parameter in self.trained.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue after `steps` steps, from what `state` returned then."""
        self.steps = steps
        if self.addition:
            self._begin()
        for path, value in state.items():
            key, _, name = path.partition("/")
            parameter = self.trained[name]
            # the fused AdamW keeps its step counts where the parameters are, too
            self.optimizer.state[parameter][key] = value.to(parameter.device, copy=True)

    def close(self) -> None:
        """Leave the model as it is."""


def without_memory_modes(plan: Plan) -> str | None:
    """Refuse a plan that asks for less memory or a budget, which only the fast backend has."""
    if plan.token_budget:
        return f"it has no token budget, and {listed(plan.token_budget)} is asked for"
    if plan.memory == MEMORY[0]:
        return None
    return f"it has no memory modes, and '{plan.memory}' is asked for"


class ReferenceBackend:
    """Unchanged modules, padded batches, autograd, AdamW."""

    name = "reference"

    def refusal(self, model: nn.Module, selection: Selection, plan: Plan) -> str | None:
        """Return why this backend cannot train the model so, or None."""
        return without_memory_modes(plan)

    def patch(
        self, model: nn.Module, selection: Selection, plan: Plan
    ) -> tuple[Callable[[], None], str]:
        """Leave the model as it is."""
        return lambda: None, slow_in(plan.precision, plan.device) or ""

    def collate(self, tokenizer: Any, plan: Plan, kind: str = "sequence") -> Collate:
        """Pad each batch to its longest example."""
        return KINDS[kind].collate(tokenizer)

    def step(self, model: nn.Module, plan: Plan) -> ReferenceStep:
        """Return the reference step."""
        return ReferenceStep(model, plan)
