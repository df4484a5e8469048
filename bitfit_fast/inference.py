"""What is done with a finished checkpoint: evaluation, predictions, bias changes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import Checkpoint
from .data.load import SPLITS, load_task, task_name
from .data.task import Split, TaskData
from .encoder import encoder_of, refusal
from .errors import BitFitError, check_known, listed
from .kinds import Kind
from .models.families import biases
from .patching import patch_encoder, unpatch
from .training.checks import check_length, choose_device
from .training.evaluate import evaluate, predict
from .training.settings import Settings

__all__ = ["bias_changes", "evaluate_checkpoint", "predict_checkpoint", "task_of"]

#: Options of `load_task` by which a checkpoint's own splits come about again.
_SOURCE = ("validation_share", "split_seed")


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
    header, kind = checkpoint.header, checkpoint.kind
    info = header.task
    if file is not None:
        if task is not None:
            raise BitFitError(f"give a task ('{task}') or a file, not both")
        check_known("split of a file", split, SPLITS)
        if kind.name == "sequence":
            text_columns = text_columns or info.get("text_columns", ("text",))
            label_column = label_column or info.get("label_column", "label")
        options: dict[str, Any] = {f"{split}_file": file}
        data = load_task(
            **options,
            data_dir=data_dir,
            text_columns=text_columns,
            label_column=label_column,
            labels=header.labels,
            regression=header.labels is None if kind.name == "sequence" else None,
            kinds=(split,),
            task_kind=kind.name,
            labelled=labelled,
        )
    else:
        if text_columns or label_column:
            raise BitFitError("text and label columns are of a file, and none is given")
        name = task or info.get("name")
        if name is None or (task is None and ("text_columns" in info or name == "files")):
            raise BitFitError(
                f"{checkpoint.path} was trained on files of its own; name one with --file"
            )
        options = {key: info[key] for key in _SOURCE if key in info and task_name(name) == "squad"}
        if task_name(name) == "pos":
            options["labels"] = header.labels
        data = load_task(name, data_dir=data_dir, kinds=(split,), **options)
    if data.kind != kind.name:
        raise BitFitError(
            f"the task {data.name} is a {data.kind} task, and {checkpoint.path} was trained for "
            f"{kind.name} tasks"
        )
    _check_labels(checkpoint, data)
    if not _splits(data, split):
        raise BitFitError(
            f"the task {data.name} has no split '{split}'; it has {listed(data.splits)}"
        )
    return data


def _check_labels(checkpoint: Checkpoint, data: TaskData) -> None:
    known = checkpoint.header.labels
    if (None if data.labels is None else list(data.labels)) != known:
        raise BitFitError(
            f"the task {data.name} has the labels {listed(data.labels or ['a score'])}, and "
            f"{checkpoint.path} was trained for {listed(known or ['a score'])}"
        )


def _splits(data: TaskData, kind: str) -> list[Split]:
    return [s for name, s in data.splits.items() if name.split("_")[0] == kind]


def _prepare(
    model: nn.Module,
    tokenizer: Any,
    checkpoint: Checkpoint,
    max_length: int | None,
    precision: str,
    device: str,
) -> dict[str, int]:
    """Check the settings, move the model to its device, and return what features depend on."""
    kind, info = checkpoint.kind, checkpoint.header.task
    given = {name: info.get(name) for name in kind.options}
    if max_length is not None:
        given["max_length"] = max_length
    settings = Settings(precision=precision, device=device, **given).for_kind(kind)  # type: ignore[arg-type]
    options = {name: getattr(settings, name) for name in kind.options}
    check_length(options["max_length"], model, tokenizer)
    model.to(choose_device(device))
    return options


@contextlib.contextmanager
def _in_precision(model: nn.Module, kind: Kind, precision: str) -> Iterator[None]:
    """Let the encoder compute in bf16, and not the head, as in training, where that can be."""
    trains = [p for p in model.parameters() if p.requires_grad]
    patches = precision == "bf16" and encoder_of(model) is None
    try:
        for parameter in trains if patches else ():
            parameter.requires_grad_(False)
        if patches := patches and refusal(model) is None:
            # what is read of answers leaves padding out
            patch_encoder(model, precision=precision, reads_padding=None if kind.classes else False)
        yield
    finally:
        if patches:
            unpatch(model)
        for parameter in trains:
            parameter.requires_grad_(True)


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
        If a split has no labels, or the data others than the checkpoint.
    """
    kind = checkpoint.kind
    _check_labels(checkpoint, data)
    options = _prepare(model, tokenizer, checkpoint, max_length, precision, device)
    metrics = checkpoint.header.task.get("metrics") or data.metrics
    scores, collate = {}, kind.collate(tokenizer)
    with _in_precision(model, kind, precision):
        for part in _splits(data, split):
            if part.labels is None:
                raise BitFitError(
                    f"the split {part.name} of {data.name} has no labels to compare with"
                )
            encoded = kind.encode(part, tokenizer, options)
            scores[part.name] = evaluate(model, encoded, collate, metrics, precision)
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
    """Write predictions for each split of the kind `split`.

    Labels of texts go in the form of GLUE's submissions, `index` and `prediction`; answers in
    that of SQuAD's script, JSON of id and answer, with the n best beside it; tags in CoNLL-U
    where the data is, else in two columns, `_` for a word that the model did not see.

    Parameters
    ----------
    model, tokenizer, checkpoint
        From `open_model`.
    data : TaskData
        From `task_of`.
    output : str or PathLike
        Folder; those of a GLUE task's test sets get the names that the server expects.
    split : str
        Kind of split.
    max_length, precision, device
        As in training.

    Returns
    -------
    list of Path
        The files: two for MNLI and for answers, else one.
    """
    kind = checkpoint.kind
    options = _prepare(model, tokenizer, checkpoint, max_length, precision, device)
    paths, collate = [], kind.collate(tokenizer)
    with _in_precision(model, kind, precision):
        for part in _splits(data, split):
            # labels play no part here, and some files only pretend to have them
            encoded = kind.encode(part.unlabelled(), tokenizer, options)
            predictions, _ = predict(model, encoded, collate, precision=precision)
            paths += kind.write(data, part, predictions, Path(output))
    return paths


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
