"""The metrics of the paper's tasks: counts and correlations by torchmetrics, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef
from torchmetrics.functional.classification import multiclass_confusion_matrix

__all__ = ["METRICS", "compute"]


def _confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the counts in fp64, a row for each true class."""
    return multiclass_confusion_matrix(logits.argmax(-1), labels, logits.shape[-1]).double()


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    counts = _confusion(logits, labels)
    return counts.trace() / counts.sum()


def _mcc(logits: Tensor, labels: Tensor) -> Tensor:
    # torchmetrics' own is far from 0 where the prediction is constant, and GLUE's is 0
    counts = _confusion(logits, labels)
    true, predicted, total = counts.sum(1), counts.sum(0), counts.sum()
    covariance = counts.trace() * total - true @ predicted
    variances = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return covariance / variances.sqrt()


def _f1(logits: Tensor, labels: Tensor) -> Tensor:
    counts = _confusion(logits, labels)
    return 2 * counts[1, 1] / (counts[1].sum() + counts[:, 1].sum())


def _pearson(logits: Tensor, labels: Tensor) -> Tensor:
    return _correlation(logits.squeeze(-1), labels)


def _spearman(logits: Tensor, labels: Tensor) -> Tensor:
    return _correlation(_ranks(logits.squeeze(-1)), _ranks(labels))


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    # the mean of equal numbers may be rounded, so that their variance is not quite zero
    if x.min() == x.max() or y.min() == y.max():
        return x.new_zeros(())
    return pearson_corrcoef(x, y)


def _ranks(values: Tensor) -> Tensor:
    """Return fp64 ranks; equal values share the mean of theirs, and NaN stays NaN."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    means = counts.cumsum(0) - (counts - 1).double() / 2
    return torch.where(values.isnan(), values, means[places])


#: Name -> function of fp64 logits `[N, classes]` (`[N, 1]` for regression) and labels `[N]`.
#: F1 is that of class 1.
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
    logits = logits.detach().cpu().double()
    regression = logits.shape[-1] == 1
    target = torch.tensor(labels, dtype=torch.float64 if regression else torch.int64)
    values = {name: float(METRICS[name](logits, target)) for name in names}
    return {name: value if math.isfinite(value) else 0.0 for name, value in values.items()}
