"""Averages over GLUE that papers report, to stand beside a study's own numbers."""

from __future__ import annotations

from dataclasses import dataclass

from .terms import symbols

__all__ = ["PUBLISHED", "Published", "published"]


@dataclass(frozen=True)
class Published:
    """One reported average.

    Attributes
    ----------
    method, terms : str
        What trains, by this package's names.
    name : str
        The method as a reader knows it.
    model, split : str
        Model, and GLUE's development (`dev`) or test set.
    average : float
        In percent.
    source : str
        Where it is reported.
    """

    method: str
    terms: str
    name: str
    model: str
    split: str
    average: float
    source: str


_PAPER = "Ben Zaken et al. 2022"
_DIFF = "Guo et al. 2021, in Ben Zaken et al. 2022"
_ADAPTERS = "Houlsby et al. 2019, in Ben Zaken et al. 2022"
_BASE, _LARGE, _ROBERTA = "BERT-base", "BERT-large", "RoBERTa-base"

#: In the paper's order. Full fine-tuning has two numbers for BERT-large's test set because the
#: rows that it is compared with leave out different tasks.
PUBLISHED: tuple[Published, ...] = (
    Published("full", "all", "full", _BASE, "dev", 82.3, _PAPER),
    Published("bitfit", "all", "BitFit", _BASE, "dev", 82.4, _PAPER),
    Published("bitfit", "intermediate+query", "BitFit b_m2+b_q", _BASE, "dev", 81.1, _PAPER),
    Published("bitfit", "intermediate", "BitFit b_m2", _BASE, "dev", 80.0, _PAPER),
    Published("bitfit", "query", "BitFit b_q", _BASE, "dev", 76.6, _PAPER),
    Published("frozen", "all", "frozen", _BASE, "dev", 62.1, _PAPER),
    Published("random-uniform", "all", "random uniform", _BASE, "dev", 78.5, _PAPER),
    Published("random-row-col", "all", "random row/column", _BASE, "dev", 79.5, _PAPER),
    Published("full", "all", "full", _LARGE, "dev", 84.1, _PAPER),
    Published("bitfit", "all", "BitFit", _LARGE, "dev", 84.2, _PAPER),
    Published("diff-pruning", "all", "Diff-Pruning", _LARGE, "dev", 84.6, _DIFF),
    Published("full", "all", "full", _LARGE, "test", 81.2, _PAPER),
    Published("full", "all", "full", _LARGE, "test", 81.8, _PAPER),
    Published("adapters", "all", "adapters", _LARGE, "test", 81.1, _ADAPTERS),
    Published("diff-pruning", "all", "Diff-Pruning", _LARGE, "test", 81.5, _DIFF),
    Published("bitfit", "all", "BitFit", _LARGE, "test", 80.9, _PAPER),
    Published("full", "all", "full", _ROBERTA, "dev", 85.3, _PAPER),
    Published("bitfit", "all", "BitFit", _ROBERTA, "dev", 84.6, _PAPER),
)


def published(method: str, terms: str) -> dict[tuple[str, str], tuple[float, ...]]:
    """Return what is reported for a method: `(model, split)` -> its averages, in percent."""
    found: dict[tuple[str, str], tuple[float, ...]] = {}
    for row in PUBLISHED:
        if row.method == method and symbols(row.terms) == symbols(terms):
            key = (row.model, row.split)
            found[key] = (*found.get(key, ()), row.average)
    return found
