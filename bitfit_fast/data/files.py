"""Tasks from the user's own CSV, TSV, JSON-lines and Parquet files."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import BitFitError, listed
from .labels import class_index, score
from .task import Split, TaskData

__all__ = ["check_file", "json_rows", "load_files", "text_lines", "tsv_cells"]

Row = tuple[str, dict[str, Any]]  # where it stands, and its columns
Cells = tuple[str, list[str]]

#: The `csv` module stops at 131072 characters, and an unclosed quote should get a better message.
_LONGEST_FIELD = 2**31 - 1


def check_file(path: Path, what: str = "file") -> None:
    """Raise BitFitError where there is no file."""
    if not path.is_file():
        raise BitFitError(f"the {what} {path} is {'a folder' if path.is_dir() else 'missing'}")


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line of a UTF-8 file, with its ending, after the words that name its place.

    Only line feeds end a line: texts may hold what Unicode also calls a line's end.

    Raises
    ------
    BitFitError
        If the file is missing; at the first line that is not UTF-8.
    """
    check_file(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                # a byte-order mark is no part of the first column's name
                yield where, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BitFitError(f"{where} is not UTF-8 text ({error.reason})") from None


def tsv_cells(path: Path) -> Iterator[Cells]:
    """Yield the place and the cells of each line that is not blank; quotes are plain text."""
    for where, line in text_lines(path):
        line = line.rstrip("\r\n")
        if line:
            yield where, line.split("\t")


def _csv_cells(path: Path) -> Iterator[Cells]:
    reader = csv.reader((line for _, line in text_lines(path)), strict=True)
    limit = csv.field_size_limit(_LONGEST_FIELD)
    # quoted fields may hold line ends; a row that goes wrong does so after its first line
    first = 1
    try:
        for cells in reader:
            if cells:
                yield f"{path}, line {first}", cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise BitFitError(f"{path}, line {first}: {error}; is the file cut short?") from None
    finally:
        csv.field_size_limit(limit)


def _table(rows: Iterator[Cells]) -> Iterator[Row]:
    where, header = next(rows, ("", []))
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise BitFitError(f"{where} names the column '{twice[0]}' twice")
    for where, cells in rows:
        if len(cells) != len(header):
            raise BitFitError(
                f"{where} has {len(cells)} columns where the header has {len(header)}; is the "
                "file cut short?"
            )
        yield where, dict(zip(header, cells))


def _csv_rows(path: Path) -> Iterator[Row]:
    return _table(_csv_cells(path))


def _tsv_rows(path: Path) -> Iterator[Row]:
    return _table(tsv_cells(path))


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the place and the object of each line that is not blank.

    Raises
    ------
    BitFitError
        At the first line that is no JSON object.
    """
    for where, line in text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        # numbers of thousands of digits and very deep brackets raise the other two
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise BitFitError(f"{where} is not JSON ({reason}); is the file cut short?") from None
        if not isinstance(row, dict):
            raise BitFitError(f"{where} is not a JSON object")
        yield where, row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        # without `partitioning` a folder called `label=1` would become a column
        rows = parquet.read_table(path, partitioning=None).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BitFitError(f"{path} is not a whole Parquet file ({reason})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".jsonl": json_rows,
    ".json": json_rows,
    ".parquet": _parquet_rows,
}


def load_files(
    files: dict[str, Path],
    text_columns: Sequence[str],
    label_column: str | None,
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
    label_column : str or None
        Column of the labels; a test file may lack it. None reads no labels.
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
    if isinstance(text_columns, str):
        text_columns = (text_columns,)
    if len(text_columns) not in (1, 2):
        raise BitFitError(
            f"one or two text columns are needed, got {len(text_columns)}: {listed(text_columns)}"
        )
    raw = {s: _read(path, text_columns, label_column, s) for s, path in files.items()}
    source = "train" if "train" in raw else next(iter(raw))
    given = raw[source][1] or []
    if regression is None:
        regression = labels is None and _is_regression([text for _, text in given])
    if not regression and labels is None:
        labels = sorted({text for _, text in given}, key=_numbers_first)
        if len(labels) < 2:
            raise BitFitError(
                f"{files[source]}: column '{label_column}' has only the label "
                f"{listed(labels) or '(none)'}, and two are needed"
            )
    read = score if regression else class_index
    splits = {}
    for split, (texts, found) in raw.items():
        values = None if found is None else tuple(read(text, labels, w) for w, text in found)
        splits[split] = Split(split, tuple(texts), values)
    metrics = ("pearson", "spearman") if regression else ("accuracy", "mcc")
    columns = (tuple(text_columns), label_column or "")
    return TaskData(name, None if regression else tuple(labels or ()), metrics, splits, columns)


def _read(
    path: Path, text_columns: Sequence[str], label_column: str | None, split: str
) -> tuple[list[tuple[str, ...]], list[tuple[str, str]] | None]:
    check_file(path, f"{split} file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BitFitError(
            f"{path} has the ending '{path.suffix}'; known endings are {listed(_READERS)}"
        )
    texts: list[tuple[str, ...]] = []
    labels: list[tuple[str, str]] = []
    for where, row in reader(path):
        texts.append(tuple(_cell(row, column, where) for column in text_columns))
        if label_column is None:
            continue
        # a CSV file has no other way to leave a label out
        unlabelled = row.get(label_column) in (None, "")
        if unlabelled and (labels or not split.startswith("test")):
            raise BitFitError(
                f"{where}: no label in column '{label_column}'; its columns are {listed(row)}"
            )
        if not unlabelled:
            if len(labels) < len(texts) - 1:
                raise BitFitError(
                    f"{where}: a label in column '{label_column}', and none in the rows above"
                )
            labels.append((where, _cell(row, label_column, where)))
    if not texts:
        raise BitFitError(f"the {split} file {path} has no examples")
    for column, of_column in zip(text_columns, zip(*texts) if split == "train" else ()):
        if not any(map(str.strip, of_column)):
            raise BitFitError(f"the {split} file {path} has no text in column '{column}'")
    return texts, labels or None


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise BitFitError(f"{where}: there is no column '{column}'; its columns are {listed(row)}")
    value = row[column]
    if not isinstance(value, (str, int, float)):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise BitFitError(f"{where}: column '{column}' holds {kind}, and no text")
    return str(value)


def _is_regression(labels: Sequence[str]) -> bool:
    try:
        numbers = [float(text) for text in labels]
    except ValueError:
        return False
    return any(not number.is_integer() for number in numbers)


def _numbers_first(label: str) -> tuple[bool, float, str]:
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    # NaN has no place in an order
    return (False, number, label) if math.isfinite(number) else (True, 0.0, label)
