"""Tasks from the user's own CSV, TSV, JSON-lines and Parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import BitFitError, listed
from .labels import class_index, score
from .task import Split, TaskData

__all__ = ["load_files"]

Row = tuple[str, dict[str, Any]]  # where it stands, and its columns


def _csv_rows(path: Path, **dialect: Any) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, **dialect)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise BitFitError(
                        f"{where} does not have the {len(reader.fieldnames or ())} columns of "
                        "the header; is the file cut short?"
                    )
                yield where, row
        except csv.Error as error:
            raise BitFitError(
                f"{path}, line {reader.line_num}: {error}; is the file cut short?"
            ) from None


def _tsv_rows(path: Path) -> Iterator[Row]:
    return _csv_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BitFitError(
                    f"{where} is not JSON ({error.msg}); is the file cut short?"
                ) from None
            if not isinstance(row, dict):
                raise BitFitError(f"{where} is not a JSON object")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        reason = str(error).strip().split("\n")[0]
        raise BitFitError(f"{path} is not a whole Parquet file ({reason})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}


def load_files(
    files: dict[str, Path],
    text_columns: Sequence[str],
    label_column: str,
    labels: Sequence[str] | None = None,
    regression: bool | None = None,
    name: str = "files",
) -> TaskData:
    """Load a task from files, one a split.

    Parameters
    ----------
    files : dict of str to Path
        Split name -> CSV, TSV, JSON-lines or Parquet file.
    text_columns : sequence of str
        One column, or two for sentence pairs.
    label_column : str
        Column of the labels; a test file may lack it.
    labels : sequence of str, optional
        The classes in index order; by default those of the training file, sorted.
    regression : bool, optional
        Whether labels are scores. By default they are if all labels of the training file
        are numbers and some are not whole.
    name : str
        The task's name.

    Returns
    -------
    TaskData
        Metrics: accuracy and MCC, or Pearson and Spearman for regression.

    Raises
    ------
    BitFitError
        For a missing or broken file, a missing column, an empty split, or a label that
        the training file does not have; names the file and the line.
    """
    if len(text_columns) not in (1, 2):
        raise BitFitError(
            f"one or two text columns are needed, got {len(text_columns)}: {listed(text_columns)}"
        )
    raw = {s: _read(path, text_columns, label_column, s) for s, path in files.items()}
    if regression is None:
        first = next(iter(raw.values()))[1]
        regression = labels is None and first is not None and _is_regression(first)
    if not regression and labels is None:
        source = raw.get("train", next(iter(raw.values())))[1] or []
        labels = sorted({text for _, text in source}, key=_numbers_first)
        if len(labels) < 2:
            raise BitFitError(
                f"{files.get('train', next(iter(files.values())))}: column '{label_column}' has "
                f"only the label {listed(labels) or '(none)'}, and two are needed"
            )
    read = score if regression else class_index
    splits = {}
    for split, (texts, found) in raw.items():
        values = None if found is None else tuple(read(text, labels, w) for w, text in found)
        splits[split] = Split(split, tuple(texts), values)
    metrics = ("pearson", "spearman") if regression else ("accuracy", "mcc")
    columns = (tuple(text_columns), label_column)
    return TaskData(name, None if regression else tuple(labels or ()), metrics, splits, columns)


def _read(
    path: Path, text_columns: Sequence[str], label_column: str, split: str
) -> tuple[list[tuple[str, ...]], list[tuple[str, str]] | None]:
    if not path.is_file():
        raise BitFitError(f"the {split} file {path} is missing")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BitFitError(
            f"{path} has the ending '{path.suffix}'; known endings are {listed(_READERS)}"
        )
    texts: list[tuple[str, ...]] = []
    labels: list[tuple[str, str]] = []
    try:
        for where, row in reader(path):
            for column in text_columns:
                if row.get(column) is None:
                    raise BitFitError(
                        f"{where}: no text in column '{column}'; its columns are {listed(row)}"
                    )
            texts.append(tuple(str(row[column]) for column in text_columns))
            if row.get(label_column) is not None:
                labels.append((where, str(row[label_column])))
            elif labels or not split.startswith("test"):
                raise BitFitError(
                    f"{where}: no label in column '{label_column}'; its columns are {listed(row)}"
                )
    except UnicodeDecodeError as error:
        raise BitFitError(f"{path} is not UTF-8 text ({error.reason})") from None
    if not texts:
        raise BitFitError(f"the {split} file {path} has no examples")
    return texts, labels if len(labels) == len(texts) else None


def _is_regression(labels: list[tuple[str, str]]) -> bool:
    try:
        return any(not float(text).is_integer() for _, text in labels)
    except (ValueError, OverflowError):
        return False


def _numbers_first(label: str) -> tuple[bool, float, str]:
    try:
        return (False, float(label), label)
    except ValueError:
        return (True, 0.0, label)
