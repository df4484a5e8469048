"""Reading labels, with messages that name the place."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import BitFitError, listed

__all__ = ["class_index", "score"]


def class_index(text: str, labels: Sequence[str] | None, where: str) -> int:
    """Return the index of a class label; `where` names its file and line for the error."""
    labels = list(labels or ())
    if text not in labels:
        raise BitFitError(f"{where}: label '{text}' is not one of {listed(labels)}")
    return labels.index(text)


def score(text: str, labels: Sequence[str] | None, where: str) -> float:
    """Return a regression label; takes the same arguments as `class_index`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BitFitError(f"{where}: label '{text}' is not a number")
    return value
