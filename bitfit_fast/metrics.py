"""The metrics of the paper's tasks, all from torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import (
    binary_f1_score,
    multiclass_accuracy,
    multiclass_matthews_corrcoef,
)

__all__ = ["METRICS", "compute"]


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return multiclass_accuracy(logits.argmax(-1), labels, logits.shape[-1], average="micro")


def _mcc(logits: Tensor, labels: Tensor) -> Tensor:
    return multiclass_matthews_corrcoef(logits.argmax(-1), labels, logits.shape[-1])


def _f1(logits: Tensor, labels: Tensor) -> Tensor:
    return binary_f1_score(logits.argmax(-1), labels)


def _pearson(logits: Tensor, labels: Tensor) -> Tensor:
    return pearson_corrcoef(logits.squeeze(-1), labels)


def _spearman(logits: Tensor, labels: Tensor) -> Tensor:
    return spearman_corrcoef(logits.squeeze(-1), labels)


#: Name -> function of logits `[N, classes]` (`[N, 1]` for regression) and labels `[N]`.
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": _accuracy,
    "mcc": _mcc,
    "f1": _f1,
    "pearson": _pearson,
    "spearman": _spearman,
}


def compute(names: Sequence[str], logits: Tensor, labels: Sequence[float]) -> dict[str, float]:
    """Compute metrics over a whole split.

    Parameters
    ----------
    names : sequence of str
        Keys of `METRICS`.
    logits : Tensor
        `[N, classes]`, or `[N, 1]` for regression; any float dtype.
    labels : sequence of int or float
        `N` class indices or scores.

    Returns
    -------
    dict of str to float
        In the order of `names`. A correlation with a constant prediction is 0, where the
        formula would divide by zero: nothing has been learned.
    """
    # correlations of thousands of scores lose digits in fp32
    logits = logits.double()
    target = torch.tensor(labels)
    target = target.double() if target.is_floating_point() else target
    values = {name: float(METRICS[name](logits, target)) for name in names}
    return {name: value if math.isfinite(value) else 0.0 for name, value in values.items()}
