"""The nine GLUE tasks (Wang et al. 2019), from the hub or from GLUE's own TSV folders."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from ..errors import BitFitError, BitFitWarning, listed
from .files import tsv_cells
from .labels import class_index, score
from .task import Split, TaskData

__all__ = ["GLUE", "HUB_REPOSITORY", "GlueTask", "load_glue"]

HUB_REPOSITORY = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One row of the table of tasks.

    Attributes
    ----------
    folder : str
        Name of the task's folder and of its submission file.
    text, label : tuple of str, str
        Columns of the TSV files.
    hub_text : tuple of str
        The text columns' names on the hub, where the label is always `label`.
    labels : tuple of str, or None
        Class names in the hub's order; None for regression.
    written : tuple of str, or None
        Classes as the TSV files and the submission server write them; None: as `labels`.
    metrics : tuple of str
        The first is the one that the BitFit paper reports.
    rows : dict of str to int
        Official number of examples by split.
    headless : tuple of str
        Column names of train and dev files that come without a header.
    broken_rows : bool
        Whether the official files hold rows with missing columns, which everyone skips.
    """

    folder: str
    text: tuple[str, ...]
    label: str
    hub_text: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    rows: dict[str, int]
    written: tuple[str, ...] | None = None
    headless: tuple[str, ...] = ()
    broken_rows: bool = False

    @property
    def written_labels(self) -> tuple[str, ...] | None:
        """Class names as the files and the submission server write them."""
        return self.written or self.labels


def _rows(train: int, validation: int, test: int) -> dict[str, int]:
    return {"train": train, "validation": validation, "test": test}


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_BINARY = ("0", "1")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA", ("sentence",), "label", ("sentence",), ("unacceptable", "acceptable"),
        ("mcc", "accuracy"), _rows(8551, 1043, 1063), _BINARY,
        headless=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask(
        "SST-2", ("sentence",), "label", ("sentence",), ("negative", "positive"),
        ("accuracy",), _rows(67349, 872, 1821), _BINARY,
    ),
    "mrpc": GlueTask(
        "MRPC", ("#1 String", "#2 String"), "Quality", _PAIR, ("not_equivalent", "equivalent"),
        ("f1", "accuracy"), _rows(3668, 408, 1725), _BINARY,
    ),
    "stsb": GlueTask(
        "STS-B", _PAIR, "score", _PAIR, None,
        ("spearman", "pearson"), _rows(5749, 1500, 1379),
    ),
    "qqp": GlueTask(
        "QQP", ("question1", "question2"), "is_duplicate", ("question1", "question2"),
        ("not_duplicate", "duplicate"), ("f1", "accuracy"), _rows(363846, 40430, 390965), _BINARY,
        broken_rows=True,
    ),
    "mnli": GlueTask(
        "MNLI", _PAIR, "gold_label", ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"), ("accuracy",),
        {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832,
         "test_matched": 9796, "test_mismatched": 9847},
    ),
    "qnli": GlueTask(
        "QNLI", ("question", "sentence"), "label", ("question", "sentence"), _ENTAILMENT,
        ("accuracy",), _rows(104743, 5463, 5463),
    ),
    "rte": GlueTask(
        "RTE", _PAIR, "label", _PAIR, _ENTAILMENT, ("accuracy",), _rows(2490, 277, 3000),
    ),
    "wnli": GlueTask(
        "WNLI", _PAIR, "label", _PAIR, ("not_entailment", "entailment"),
        ("accuracy",), _rows(635, 71, 146), _BINARY,
    ),
}  # fmt: skip


def load_glue(
    name: str,
    data_dir: Path | None = None,
    kinds: tuple[str, ...] = ("train", "validation"),
    repository: str = HUB_REPOSITORY,
) -> TaskData:
    """Load splits of a GLUE task.

    Parameters
    ----------
    name : str
        A key of `GLUE`.
    data_dir : Path, optional
        Folder with GLUE's own task folders (`RTE/train.tsv`, ...), or the folder above a
        `glue` folder of them. Without it the task comes from the hub, or its cache.
    kinds : tuple of str
        Which of `train`, `validation`, `test` to load.
    repository : str
        Dataset repository, or a local folder of its layout.

    Raises
    ------
    BitFitError
        If a file is missing, cut short, or holds a label outside the set; if the hub
        cannot be reached and nothing is cached.
    """
    task = GLUE[name]
    splits = [split for split in task.rows if split.split("_")[0] in kinds]
    if data_dir is not None:
        folder = _folder(task, data_dir)
        loaded = {split: _read_tsv(task, folder, split) for split in splits}
    else:
        loaded = {split: _read_hub(task, name, split, repository) for split in splits}
    return TaskData(name, task.labels, task.metrics, loaded)


def _folder(task: GlueTask, data_dir: Path) -> Path:
    for folder in (data_dir / task.folder, data_dir / "glue" / task.folder):
        if folder.is_dir():
            return folder
    if not data_dir.is_dir():
        raise BitFitError(f"the data folder {data_dir} does not exist")
    root = data_dir / "glue" if (data_dir / "glue").is_dir() else data_dir
    there = [t.folder for t in GLUE.values() if (root / t.folder).is_dir()]
    raise BitFitError(
        f"{data_dir} has no folder {task.folder}; GLUE tasks in it: {listed(there) or 'none'}"
    )


def _read_tsv(task: GlueTask, folder: Path, split: str) -> Split:
    path = folder / (split.replace("validation", "dev") + ".tsv")
    rows = tsv_cells(path)
    header: tuple[str, ...] = () if split.startswith("test") else task.headless
    header = header or tuple(next(rows, ("", []))[1])
    if not header:
        raise BitFitError(f"the file {path} is empty")
    labelled = task.label in header or not split.startswith("test")
    wanted = (*task.text, task.label) if labelled else task.text
    for column in wanted:
        if column not in header:
            raise BitFitError(
                f"{path}, line 1: there is no column '{column}'; its columns are {listed(header)}"
            )
    places = [header.index(column) for column in wanted]
    texts: list[tuple[str, ...]] = []
    labels: list[int | float] = []
    skipped = 0
    for where, row in rows:
        if len(row) <= max(places):
            # never of a test set, whose predictions are told apart by their row
            if task.broken_rows and not split.startswith("test"):
                skipped += 1
                continue
            raise BitFitError(
                f"{where} has {len(row)} of {len(header)} columns; is the file cut short?"
            )
        cells = [row[i] for i in places]
        if labelled:
            read = score if task.labels is None else class_index
            labels.append(read(cells.pop(), task.written_labels, where))
        texts.append(tuple(cells))
    if skipped:
        warnings.warn(f"{path}: skipped {skipped} rows with missing columns", BitFitWarning, 2)
    return _finish(task, split, texts, labels if labelled else None, str(path))


def _read_hub(task: GlueTask, name: str, split: str, repository: str) -> Split:
    from .hub import load_hub_split

    source = f"{repository} ({name})"
    data = load_hub_split(repository, name, split)
    for column in (*task.hub_text, "label"):
        if column not in data.column_names:
            raise BitFitError(
                f"{source} has no column '{column}'; its columns are {listed(data.column_names)}"
            )
    texts = list(zip(*(data[column][:] for column in task.hub_text)))
    for row, example in enumerate(texts, 1):
        if None in example:
            raise BitFitError(
                f"{source}, {split} row {row}: a column of {listed(task.hub_text)} holds no text"
            )
    found = data["label"][:]
    labels: list[int | float] | None = None
    # the hub marks missing labels by -1
    if not split.startswith("test") or set(found) != {-1}:
        read = score if task.labels is None else class_index
        valid = None if task.labels is None else [str(i) for i in range(len(task.labels))]
        labels = [
            read(str(label), valid, f"{source}, {split} row {row}")
            for row, label in enumerate(found, 1)
        ]
    return _finish(task, split, texts, labels, source)


def _finish(
    task: GlueTask,
    split: str,
    texts: list[tuple[str, ...]],
    labels: list[int | float] | None,
    source: str,
) -> Split:
    if not texts:
        raise BitFitError(f"{source} has no examples for the split {split}")
    if len(texts) != task.rows[split]:
        warnings.warn(
            f"{source}: {len(texts)} examples where the official {task.folder} {split} set "
            f"has {task.rows[split]}",
            BitFitWarning,
            3,
        )
    return Split(split, tuple(texts), None if labels is None else tuple(labels))
