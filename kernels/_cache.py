"""The folder where what was built or measured on this machine is kept for later runs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["UnusableError", "cache_folder", "put"]


class UnusableError(OSError):
    """The folder cannot be used; the message says why, and how to name another."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; XDG_CACHE_HOME may name another folder")


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/bitfit_fast`; RuntimeError where there is no home either."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bitfit_fast"


def put(file: Path, make: Callable[[Path], object], replaces: bool = True) -> None:
    """Let `make` write a file beside its place, and move it there: others may be writing it too.

    What is there already stays unless the new one `replaces` it.

    Raises
    ------
    UnusableError
        Where nothing can be written there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=file.parent)
    except OSError as error:
        why = f"nothing can be written to {file.parent} ({error.strerror})"
        raise UnusableError(why) from error
    with beside as folder:
        made = Path(folder) / file.name
        make(made)
        if replaces:
            os.replace(made, file)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(made, file)
