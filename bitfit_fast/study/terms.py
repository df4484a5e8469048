"""The paper's names for choices of terms."""

from __future__ import annotations

from ..selection import parse_terms

__all__ = ["PRESETS", "symbols"]

#: Names of the paper for a choice of terms: name -> (method, terms).
PRESETS: dict[str, tuple[str, str]] = {
    "b_m2+b_q": ("bitfit", "intermediate+query"),
    "b_m2": ("bitfit", "intermediate"),
    "b_q": ("bitfit", "query"),
}


def symbols(terms: str) -> tuple[str, ...]:
    """Return a choice of terms in one order, `("all",)` for all of them."""
    chosen = parse_terms(terms)
    return ("all",) if chosen is None else tuple(sorted(chosen))
