"""The metrics of the paper's tasks, from torchmetrics."""

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
from torchmetrics.functional.text import squad

__all__ = ["METRICS", "answer_scores", "compute", "tag_scores"]


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return multiclass_accuracy(logits.argmax(-1), labels, logits.shape[-1], average="micro")


def _f1(logits: Tensor, labels: Tensor) -> Tensor:
    return binary_f1_score(logits.argmax(-1), labels)


def _mcc(logits: Tensor, labels: Tensor) -> Tensor:
    predicted = logits.argmax(-1)
    # torchmetrics gives 0.58 for some constant predictions, where GLUE's server gives 0
    if _constant(predicted) or _constant(labels):
        return torch.zeros(())
    return multiclass_matthews_corrcoef(predicted, labels, logits.shape[-1])


def _pearson(logits: Tensor, labels: Tensor) -> Tensor:
    return _correlation(pearson_corrcoef, logits.squeeze(-1), labels)


def _spearman(logits: Tensor, labels: Tensor) -> Tensor:
    return _correlation(spearman_corrcoef, logits.squeeze(-1), labels)


def _correlation(function: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    # the variance of equal numbers is not quite zero where their mean is rounded
    if _constant(x) or _constant(y) or not bool(torch.isfinite(x).all()):
        return torch.zeros(())
    return function(x, y)


def _constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())


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
        formula would divide by zero: nothing has been learned. So is one with NaN.
    """
    # correlations of thousands of scores lose digits in fp32
    logits = logits.detach().cpu().double()
    regression = logits.shape[-1] == 1
    target = torch.tensor(labels, dtype=torch.float64 if regression else torch.int64)
    values = {name: float(METRICS[name](logits, target)) for name in names}
    # torchmetrics divides in fp32, whose eighth digit is noise
    return {name: round(v, 7) if math.isfinite(v) else 0.0 for name, v in values.items()}


def answer_scores(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Compute SQuAD's metrics, `f1` and `exact_match`, each from 0 to 1.

    They are torchmetrics', whose F1 of two answers that are nothing but articles or punctuation
    is 1, as in SQuAD 2.

    Parameters
    ----------
    names : sequence of str
        Of the metrics, in the order to be returned.
    predictions : sequence of str
        An answer a question.
    references : sequence of sequence of str
        The answers of each question that are right; the best match counts.
    """
    given = [{"id": str(i), "prediction_text": text} for i, text in enumerate(predictions)]
    true = [{"id": str(i), "answers": {"text": list(r)}} for i, r in enumerate(references)]
    found = squad(given, true)  # type: ignore[arg-type]
    # sums in fp32, whose eighth digit is noise
    return {name: round(float(found[name]) / 100, 6) for name in names}


def tag_scores(
    names: Sequence[str],
    predictions: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Compute `accuracy`, the share of words whose tag is right.

    Parameters
    ----------
    names : sequence of str
        Of the metrics.
    predictions, references : sequence of sequence of int
        A tag's index for each word of each sentence; a negative one is never right.
    """
    pairs = [pair for p, r in zip(predictions, references) for pair in zip(p, r)]
    right = sum(p == r and r >= 0 for p, r in pairs)
    values = {"accuracy": right / max(1, len(pairs))}
    return {name: round(values[name], 7) for name in names}
