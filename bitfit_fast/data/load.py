"""One call for a task by name or from files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import BitFitError, check_known, listed
from ..kinds import KINDS
from .files import load_files
from .glue import GLUE, load_glue
from .reviews import load_reviews
from .squad import is_span_file, load_span_files, load_squad
from .tags import load_pos, load_tag_files
from .task import TaskData

__all__ = ["SPLITS", "TASKS", "kind_of_files", "load_task", "task_name"]

_REVIEWS, _SQUAD, _POS, _GLUE = "reviews", "squad", "pos", "glue"

#: What options are of, and the sources that take them: files of a kind, or tasks.
_OPTIONS: dict[str, tuple[str, set[str]]] = {
    "data_dir": ("a data folder is of tasks but 'reviews'", {_GLUE, _SQUAD, _POS}),
    "text_columns": ("text columns are of files of labelled texts", {"sequence"}),
    "label_column": ("a label column is of files of labelled texts", {"sequence"}),
    "labels": (
        "labels are of files of texts or tags and of the task 'pos'",
        {"sequence", "token", _POS},
    ),
    "regression": ("regression is of files of labelled texts", {"sequence"}),
    "task_kind": ("a task kind is of files", {"sequence", "span", "token"}),
    "validation_share": (
        "a validation share is of the task 'squad' from one file",
        {_SQUAD},
    ),
    "split_seed": ("a seed of the split is of the task 'squad' from one file", {_SQUAD}),
}

#: Names of the built-in tasks.
TASKS = (*GLUE, _SQUAD, _POS, _REVIEWS)

#: Names of the sets that a task may have, one file each.
SPLITS = ("train", "validation", "test")

#: Endings that say of themselves that words are tagged.
_TAGGED = (".conllu", ".conll")

PathLike = str | os.PathLike[str]


def task_name(name: str) -> str:
    """Return the canonical name of a task, however it is spelled (`STS-B`, `sst_2`).

    Raises
    ------
    BitFitError
        For an unknown task.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in TASKS:  # which is told of as it was spelled
        check_known("task", name, TASKS)
    return plain


def kind_of_files(files: Sequence[Path], kind: str | None = None) -> str:
    """Return which of `KINDS` the examples of files are: `kind`, or what the files look like.

    Files that end in `.conllu` or `.conll` hold tagged words; JSON in SQuAD's format, and JSON
    lines with a context, a question and answers, hold spans.

    Raises
    ------
    BitFitError
        For an unknown kind, or files of several.
    """
    if kind is not None:
        check_known("task kind", kind, KINDS)
        return kind
    found = {}
    for path in files:
        if path.suffix.lower() in _TAGGED:
            found[path] = "token"
        else:
            found[path] = "span" if is_span_file(path) else "sequence"
    kinds = list(dict.fromkeys(found.values()))
    if len(kinds) > 1:
        each = listed(f"{path} ({kind})" for path, kind in found.items())
        raise BitFitError(f"the files are of several kinds: {each}; say which with --task-kind")
    return kinds[0]


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
    task_kind: str | None = None,
    validation_share: float | None = None,
    split_seed: int | None = None,
    labelled: bool = True,
) -> TaskData:
    """Load a task's splits.

    Parameters
    ----------
    task : str, optional
        A GLUE task (`cola sst2 mrpc stsb qqp mnli qnli rte wnli`), `squad`, `pos`, or
        `reviews`, which is generated.
    data_dir : str or PathLike, optional
        Folder with GLUE's own task folders, with SQuAD's JSON files, or with a treebank's
        CoNLL-U files; for `squad` also one JSON file. Without it the hub is asked.
    train_file, validation_file, test_file : str or PathLike, optional
        Instead of `task`: CSV, TSV, JSON-lines or Parquet files of labelled texts; JSON in
        SQuAD's format or JSON lines of questions on a text; CoNLL-U or two columns for tags.
    text_columns, label_column : sequence of str, str
        Columns of labelled texts, by default `text` and `label`; two text columns make a pair.
    labels : sequence of str, optional
        Of files of texts or tags and of `pos`: classes or tags in index order; by default those
        of the training set, sorted, which is read for them, or where no file of it is named of
        the first set.
    regression : bool, optional
        Of labelled texts: see `bitfit_fast.data.files.load_files`.
    kinds : sequence of str
        Which of `train`, `validation`, `test` to load.
    task_kind : str, optional
        What the examples of files are: `sequence`, `span` or `token`; see `kind_of_files`.
    validation_share, split_seed : float, int
        For `squad` from a single file: the share of its articles that is for validation, by
        default 0.2, and the seed by which they are chosen, by default 0.
    labelled : bool
        Whether to read the labels of files.

    Raises
    ------
    BitFitError
        If what is asked for does not exist or is broken.
    """
    for split in kinds:
        check_known("split", split, SPLITS)
    given = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {k: Path(f) for k, f in given.items() if f is not None and k in kinds}
    if task is not None and any(f is not None for f in given.values()):
        raise BitFitError(f"give a task ('{task}') or files, not both")
    if task is None and not files:
        if named := [kind for kind, file in given.items() if file is not None]:
            raise BitFitError(
                f"there is a {named[0]} file, and {' or '.join(kinds)} examples are wanted"
            )
        raise BitFitError(f"name a task ({listed(TASKS)}) or a file of examples")
    # columns are of labelled texts
    implied = "sequence" if text_columns or label_column else None
    name = "" if task is None else task_name(task)
    if name:
        source, here = _GLUE if name in GLUE else name, f"the task '{name}'"
    else:
        source = kind_of_files(list(files.values()), task_kind or implied)
        here = f"{source} files"
    _refuse_others(
        source,
        here,
        data_dir=data_dir,
        text_columns=text_columns or None,
        label_column=label_column or None,
        labels=labels,
        regression=regression,
        task_kind=task_kind,
        validation_share=validation_share,
        split_seed=split_seed,
    )
    # labels are those of the training set, whether it is asked for or not
    more = labels is None and labelled and "train" not in kinds and not regression
    more = more and source in _OPTIONS["labels"][1] and bool(name or train_file)
    if more and train_file is not None:
        files = {"train": Path(train_file), **files}
    folder = None if data_dir is None else Path(data_dir)
    if source == "sequence":
        columns = text_columns or ("text",)
        label = (label_column or "label") if labelled else None
        data = load_files(files, columns, label, labels, regression)
    elif source == "span":
        data = load_span_files(files, labelled)
    elif source == "token":
        data = load_tag_files(files, labels, labelled)
    elif source == _SQUAD:
        data = load_squad(folder, tuple(kinds), validation_share, split_seed)
    elif source == _POS:
        data = load_pos(folder, ("train",) * more + tuple(kinds), labels)
    elif source == _REVIEWS:
        data = load_reviews()
    else:
        data = load_glue(name, folder, tuple(kinds))
    if not more:
        return data
    return replace(data, splits={n: s for n, s in data.splits.items() if n != "train"})


def _refuse_others(source: str, here: str, **given: object) -> None:
    """Refuse an option that says nothing of a source, which is called `here`."""
    for option, value in given.items():
        what, sources = _OPTIONS[option]
        if value is not None and source not in sources:
            raise BitFitError(f"{what}, not of {here}")
