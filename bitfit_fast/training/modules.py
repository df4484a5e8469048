"""The reference step on a model with bias-only modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from ..additions import obstacle
from ..patching import patch, unpatch
from ..selection import WEIGHTS, Selection
from .measure import slow_in
from .reference import ReferenceBackend, without_memory_modes
from .settings import Plan

__all__ = ["ModulesBackend"]


class ModulesBackend(ReferenceBackend):
    """Drop-in modules with fused operations; padded batches, autograd, AdamW as before."""

    name = "modules"

    def refusal(self, model: nn.Module, selection: Selection, plan: Plan) -> str | None:
        """Return why drop-ins would not help, or None."""
        if WEIGHTS in selection.counts:
            return "its weights train"
        return obstacle(model) or without_memory_modes(plan)

    def patch(
        self, model: nn.Module, selection: Selection, plan: Plan
    ) -> tuple[Callable[[], None], str]:
        """Replace linear layers and LayerNorms with frozen weights."""
        said = [str(patch(model, selection)), slow_in(plan.precision, plan.device)]
        return partial(unpatch, model), "\n".join(filter(None, said))
