"""One call for a task by name or from files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import BitFitError, listed
from .files import load_files
from .glue import GLUE, load_glue
from .reviews import load_reviews
from .task import TaskData

__all__ = ["TASKS", "load_task", "task_name"]

_REVIEWS = "reviews"

#: Names of the built-in tasks.
TASKS = (*GLUE, _REVIEWS)

_KINDS = ("train", "validation", "test")

PathLike = str | os.PathLike[str]


def task_name(name: str) -> str:
    """Return the canonical name of a task, however it is spelled (`STS-B`, `sst_2`).

    Raises
    ------
    BitFitError
        For an unknown task.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in TASKS:
        raise BitFitError(f"unknown task '{name}'; valid ones are {listed(TASKS)}")
    return plain


def load_task(
    task: str | None = None,
    *,
    data_dir: PathLike | None = None,
    train_file: PathLike | None = None,
    validation_file: PathLike | None = None,
    test_file: PathLike | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    regression: bool | None = None,
    kinds: Sequence[str] = ("train", "validation"),
) -> TaskData:
    """Load a task's splits.

    Parameters
    ----------
    task : str, optional
        A GLUE task (`cola sst2 mrpc stsb qqp mnli qnli rte wnli`), or `reviews`, which
        is generated.
    data_dir : str or PathLike, optional
        For a GLUE task: folder with GLUE's own task folders. Without it the hub is asked.
    train_file, validation_file, test_file : str or PathLike, optional
        Instead of `task`: CSV, TSV, JSON-lines or Parquet files.
    text_columns, label_column : sequence of str, str
        Columns of those files, by default `text` and `label`; two text columns make a pair.
    labels, regression
        Of those files: see `bitfit_fast.data.files.load_files`.
    kinds : sequence of str
        Which of `train`, `validation`, `test` to load.

    Raises
    ------
    BitFitError
        If what is asked for does not exist or is broken.
    """
    if unknown := [kind for kind in kinds if kind not in _KINDS]:
        raise BitFitError(f"unknown split '{unknown[0]}'; valid ones are {listed(_KINDS)}")
    given = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {k: Path(f) for k, f in given.items() if f is not None and k in kinds}
    if task is not None and any(f is not None for f in given.values()):
        raise BitFitError(f"give a task ('{task}') or files, not both")
    if task is None:
        if not files:
            raise BitFitError(f"name a task ({listed(TASKS)}) or a file of examples")
        if data_dir is not None:
            raise BitFitError(f"files take no data folder, got {data_dir}")
        return load_files(
            files, text_columns or ("text",), label_column or "label", labels, regression
        )
    if text_columns or label_column:
        raise BitFitError(f"text and label columns are of files; the task '{task}' has its own")
    name = task_name(task)
    if name == _REVIEWS:
        if data_dir is not None:
            raise BitFitError("the task 'reviews' is generated and takes no data folder")
        return load_reviews()
    return load_glue(name, None if data_dir is None else Path(data_dir), tuple(kinds))
