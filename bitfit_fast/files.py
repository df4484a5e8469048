"""Files that are never half-written."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["append_json_line", "replace_file", "to_json", "write_json", "write_text"]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path` and rename it, so that `path` is old or new, never between.

    Parameters
    ----------
    path : Path
        The file to make or replace; its folder is created.
    write : callable
        Called with the path of the temporary file, which has the same ending. If it raises,
        `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.stem}-"
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
    except OSError as error:
        error.filename = str(path)  # the other name says nothing to anybody
        raise
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(value: Any) -> Any:
    """Return `value` with what JSON has no number for as null, and paths as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def to_json(value: Any, **options: Any) -> str:
    """Return JSON that every reader takes: NaN and infinity become null."""
    return json.dumps(_plain(value), allow_nan=False, **options)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as an indented JSON file, whole or not at all."""
    write_text(path, to_json(value, indent=2) + "\n")


def append_json_line(path: Path, value: Any) -> None:
    """Append `value` as one line of JSON in a single write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(value) + "\n")
