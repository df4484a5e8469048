"""What is done with a finished checkpoint: evaluation, predictions, bias changes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .checkpoint import Checkpoint
from .data.batches import pad, tokenize
from .data.files import load_files
from .data.glue import GLUE
from .data.load import load_task
from .data.task import Split, TaskData
from .errors import BitFitError, listed
from .files import write_text
from .models.families import biases
from .training.evaluate import evaluate, predict
from .training.loop import check_length, choose_device
from .training.settings import Settings

__all__ = ["bias_changes", "evaluate_checkpoint", "predict_checkpoint", "task_of"]

#: Range of STS-B's scores, which the GLUE server checks.
_STSB_RANGE = (0.0, 5.0)


def task_of(
    checkpoint: Checkpoint,
    split: str = "validation",
    task: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    file: str | os.PathLike[str] | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    labelled: bool = True,
) -> TaskData:
    """Load a split for a checkpoint: by default of the task that it was trained on.

    Parameters
    ----------
    checkpoint : Checkpoint
        From `read`.
    split : str
        `train`, `validation` or `test`.
    task, data_dir
        Another task, and the folder of a GLUE task: see `load_task`.
    file : str or PathLike, optional
        Examples of this split in a file, instead of a task.
    text_columns, label_column
        Columns of that file; by default those of the training run.
    labelled : bool
        Whether to read the labels of that file.

    Raises
    ------
    BitFitError
        If the task has other labels than the checkpoint, or no such split.
    """
    header = checkpoint.header
    info = header.task
    if file is not None:
        if task is not None:
            raise BitFitError(f"give a task ('{task}') or a file, not both")
        column = label_column or info.get("label_column", "label")
        data = load_files(
            {split: Path(file)},
            text_columns or info.get("text_columns", ("text",)),
            column if labelled else None,
            labels=header.labels,
            regression=header.labels is None,
        )
    else:
        if text_columns or label_column:
            raise BitFitError("text and label columns are of a file, and none is given")
        name = task or info.get("name")
        if name is None or (task is None and "text_columns" in info):
            raise BitFitError(
                f"{checkpoint.path} was trained on files of its own; name one with --file"
            )
        data = load_task(name, data_dir=data_dir, kinds=(split,))
    if (None if data.labels is None else list(data.labels)) != header.labels:
        raise BitFitError(
            f"the task {data.name} has the labels {listed(data.labels or ['a score'])}, and "
            f"{checkpoint.path} was trained for {listed(header.labels or ['a score'])}"
        )
    if not _splits(data, split):
        raise BitFitError(
            f"the task {data.name} has no split '{split}'; it has {listed(data.splits)}"
        )
    return data


def _splits(data: TaskData, kind: str) -> list[Split]:
    return [s for name, s in data.splits.items() if name.split("_")[0] == kind]


def _prepare(
    model: nn.Module,
    tokenizer: Any,
    checkpoint: Checkpoint,
    max_length: int | None,
    precision: str,
    device: str,
) -> Settings:
    """Check the settings and move the model to its device."""
    if max_length is None:
        max_length = checkpoint.header.task.get("max_length", Settings.max_length)
    settings = Settings(max_length=max_length, precision=precision, device=device)
    check_length(settings.max_length, model, tokenizer)
    model.to(choose_device(device))
    return settings


def evaluate_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    checkpoint: Checkpoint,
    data: TaskData,
    split: str = "validation",
    *,
    max_length: int | None = None,
    precision: str = "fp32",
    device: str = "auto",
) -> dict[str, dict[str, float]]:
    """Return loss and metrics of each split of the kind `split`, by split name.

    Raises
    ------
    BitFitError
        If a split has no labels.
    """
    settings = _prepare(model, tokenizer, checkpoint, max_length, precision, device)
    metrics = checkpoint.header.task.get("metrics") or data.metrics
    scores = {}
    for part in _splits(data, split):
        if part.labels is None:
            raise BitFitError(f"the split {part.name} of {data.name} has no labels to compare with")
        features = tokenize(part, tokenizer, settings.max_length)
        scores[part.name] = evaluate(model, features, pad(tokenizer), metrics, precision)
    return scores


def predict_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    checkpoint: Checkpoint,
    data: TaskData,
    output: str | os.PathLike[str],
    split: str = "test",
    *,
    max_length: int | None = None,
    precision: str = "fp32",
    device: str = "auto",
) -> list[Path]:
    """Write predictions in the form of GLUE's submissions: `index` and `prediction`.

    Parameters
    ----------
    model, tokenizer, checkpoint
        From `open_model`.
    data : TaskData
        From `task_of`.
    output : str or PathLike
        Folder; a GLUE task's files get the names that the server expects.
    split : str
        Kind of split.
    max_length, precision, device
        As in training.

    Returns
    -------
    list of Path
        The files: two for MNLI, else one.
    """
    settings = _prepare(model, tokenizer, checkpoint, max_length, precision, device)
    paths = []
    for part in _splits(data, split):
        # labels play no part here, and some files only pretend to have them
        unlabelled = Split(part.name, part.texts, None)
        features = tokenize(unlabelled, tokenizer, settings.max_length)
        logits, _ = predict(model, features, pad(tokenizer), precision=precision)
        lines = [f"{i}\t{text}" for i, text in enumerate(_written(data, logits))]
        path = Path(output) / f"{_submission_name(data.name, part.name)}.tsv"
        write_text(path, "\n".join(["index\tprediction", *lines]) + "\n")
        paths.append(path)
    return paths


def _submission_name(task: str, split: str) -> str:
    if task not in GLUE:
        return f"{task}-{split}"
    suffix = {"matched": "-m", "mismatched": "-mm"}.get(split.partition("_")[2], "")
    return GLUE[task].folder + suffix


def _written(data: TaskData, logits: Tensor) -> list[str]:
    if data.labels is None:
        values = logits.squeeze(-1)
        if data.name == "stsb":
            values = values.clamp(*_STSB_RANGE)
        return [f"{value:.3f}" for value in values.tolist()]
    names = (GLUE[data.name].written_labels if data.name in GLUE else None) or data.labels
    return [names[i] for i in logits.argmax(-1).tolist()]


def bias_changes(base: nn.Module, checkpoint: Checkpoint) -> dict[tuple[str, int | None], float]:
    """Return how far each kind of bias moved in training.

    Parameters
    ----------
    base : nn.Module
        The model as it was before training.
    checkpoint : Checkpoint
        What came out.

    Returns
    -------
    dict of (term, layer) to float
        Mean absolute difference over the entries (Ben Zaken et al. 2022: ||b0 - bF||_1 / dim);
        layer None stands for biases outside of the layers.
    """
    parameters = dict(base.named_parameters())
    sums: dict[tuple[str, int | None], tuple[float, int]] = {}
    for bias in biases(base):
        if bias.name not in checkpoint.tensors:
            continue
        before = parameters[bias.name].detach().cpu().double()
        moved = (checkpoint.tensors[bias.name].double() - before).abs()
        total, count = sums.get((bias.term, bias.layer), (0.0, 0))
        sums[bias.term, bias.layer] = (total + moved.sum().item(), count + moved.numel())
    return {key: total / count for key, (total, count) in sums.items()}
