"""Whole texts, or pairs of them, with a class or a score each."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.batches import pad, tokenize
from ..data.glue import GLUE
from ..data.task import Split, TaskData
from ..files import write_text
from .kind import Encoded, Kind, count_rows

__all__ = ["SEQUENCE"]

#: Range of STS-B's scores, which the GLUE server checks.
_STSB_RANGE = (0.0, 5.0)


def _configure(labels: Sequence[str] | None) -> dict[str, Any]:
    names = ["LABEL_0"] if labels is None else labels
    return {
        # the number of labels follows; to pass it as well sets off a warning
        "id2label": dict(enumerate(names)),
        "label2id": {label: i for i, label in enumerate(names)},
        "problem_type": "regression" if labels is None else "single_label_classification",
    }


def _encode(split: Split, tokenizer: Any, options: Mapping[str, int]) -> Encoded:
    features = tokenize(split, tokenizer, options["max_length"])
    return Encoded("sequence", split, features, options=options)


def _keep(output: Any) -> Tensor:
    return output.logits.float().cpu()


def _decode(encoded: Encoded, kept: list[Tensor]) -> Tensor:
    """Return logits `[N, classes]`, or `[N, 1]` of scores."""
    return torch.stack(kept)


def _score(metrics: Sequence[str], logits: Tensor, split: Split) -> dict[str, float]:
    from ..metrics import compute  # torchmetrics takes a second that --help need not wait for

    return compute(metrics, logits, split.labels or ())


def _write(data: TaskData, split: Split, logits: Tensor, folder: Path) -> list[Path]:
    """Write `index` and `prediction` as GLUE's server takes them."""
    path, text = folder / f"{_submission_name(data.name, split.name)}.tsv", io.StringIO()
    # which quotes a label that holds a tab or the end of a line
    rows = csv.writer(text, delimiter="\t", lineterminator="\n")
    rows.writerows([("index", "prediction"), *enumerate(_written(data, logits))])
    write_text(path, text.getvalue())
    return [path]


def _submission_name(task: str, split: str) -> str:
    if task not in GLUE:
        return f"{task}-{split}"
    kind, _, part = split.partition("_")
    name = GLUE[task].folder + {"matched": "-m", "mismatched": "-mm"}.get(part, "")
    # the server's name is for what it has no labels of
    return name if kind == "test" else f"{name}-{kind}"


def _written(data: TaskData, logits: Tensor) -> list[str]:
    if data.labels is None:
        values = logits.squeeze(-1)
        if data.name == "stsb":
            values = values.clamp(*_STSB_RANGE)
        return [f"{value:.3f}" for value in values.tolist()]
    names = (GLUE[data.name].written_labels if data.name in GLUE else None) or data.labels
    return [names[i] for i in logits.argmax(-1).tolist()]


SEQUENCE = Kind(
    name="sequence",
    head="ForSequenceClassification",
    classes=True,
    options={"max_length": 128},
    configure=_configure,
    encode=_encode,
    collate=pad,
    weigh=count_rows,
    keep=_keep,
    decode=_decode,
    score=_score,
    write=_write,
)
