"""The one place where a study meets the table of fine-tuning methods."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..selection import METHODS, parse_terms

__all__ = ["METHODS", "PRESETS", "prepare", "symbols"]

#: Names of the paper for a choice of terms: name -> (method, terms).
PRESETS: dict[str, tuple[str, str]] = {
    "b_m2+b_q": ("bitfit", "intermediate+query"),
    "b_m2": ("bitfit", "intermediate"),
    "b_q": ("bitfit", "query"),
}


def prepare(
    model: nn.Module, method: str, terms: str = "all", layers: str | None = None, head: bool = True
) -> Any:
    """Make `model` train what `method` trains, in place; see `METHODS`.

    Raises
    ------
    BitFitError
        If the model cannot take the method, the terms or the layers.
    """
    return METHODS[method].select(model, terms, layers, head)


def symbols(terms: str) -> tuple[str, ...]:
    """Return a choice of terms in one order, `("all",)` for all of them."""
    chosen = parse_terms(terms)
    return ("all",) if chosen is None else tuple(sorted(chosen))
