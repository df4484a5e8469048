"""What a model's head looks at, as far as it is known."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import listed
from ..models.families import StackRow
from ..modules import original
from .parts import base_of, hooks_on

__all__ = ["fixed_refusal", "reads_first_only", "reads_padding"]

#: How the names of classes end whose head looks at nothing but tokens' outputs and labels.
_FIXED = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")


def reads_first_only(model: nn.Module, row: StackRow) -> bool:
    """Return whether the head reads first tokens and nothing else."""
    named = type(model).__name__.endswith(row.first)
    return named and _is_known_head(model) and not _reads_elsewhere(model)


def reads_padding(model: nn.Module, row: StackRow) -> bool:
    """Return whether the head looks at tokens of padding, or may."""
    named = type(model).__name__.endswith(row.padding)
    return named or _reads_elsewhere(model) or not _is_known_head(model)


def fixed_refusal(model: nn.Module) -> str | None:
    """Return why a patched model cannot run on packed inputs of a fixed size, or None.

    Its head may look at what it is called with, which is then of another shape.
    """
    config: Any = model.config
    head = type(model).__name__
    if not head.endswith(_FIXED) or not _is_known_head(model):
        return f"{head} may look at the padded batch"
    if config.output_hidden_states or config.output_attentions:
        return "hidden states or attentions are asked for"
    if found := hooks_on(model):
        return f"there are hooks on {listed(found, 3)}"
    return None


def _reads_elsewhere(model: nn.Module) -> bool:
    """Return whether a head that takes the first token, by its name, is told to read another."""
    # ELECTRA's may be
    reads = getattr(getattr(model, "config", None), "summary_type", "first")
    return type(model).__name__.endswith("ForMultipleChoice") and reads != "first"


def _is_known_head(model: nn.Module) -> bool:
    """Return whether a model's head is made by transformers, of its own parts and PyTorch's.

    Others may read what they like, whatever their name.
    """
    parts = [original(part) for part in model.children() if part is not base_of(model)]
    return type(model).__module__.startswith("transformers.models.") and all(
        part.__module__.startswith(("transformers.", "torch.")) for part in parts
    )
