"""Kinds of tasks: labels of whole texts, spans of a text, tags of words; one table of them."""

from __future__ import annotations

from typing import Any

from .kind import Encoded, Kind
from .sequence import SEQUENCE
from .span import SPAN, span_loss
from .token import TOKEN

__all__ = ["KINDS", "Encoded", "Kind", "forward", "kind_of"]

#: By name; everything that depends on the kind of a task goes through its row.
KINDS: dict[str, Kind] = {kind.name: kind for kind in (SEQUENCE, SPAN, TOKEN)}


def kind_of(model_class: str) -> Kind:
    """Return the kind of task that a model class is for, by its name; else `sequence`."""
    return next((kind for kind in KINDS.values() if model_class.endswith(kind.head)), SEQUENCE)


def forward(model: Any, batch: dict[str, Any]) -> Any:
    """Run a model on a batch; the output has a `loss` where the batch has labels.

    The loss is the model's own, but for spans; see `span_loss`.
    """
    return span_loss(model, batch) if "start_positions" in batch else model(**batch)
