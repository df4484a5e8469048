"""Which process does which run: a file each, made by whoever comes first."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..files import to_json, write_text

__all__ = ["SIGN", "Claims"]

#: Seconds between signs of life, and after how many without one the process of another machine,
#: of which nothing else is known, has ended.
SIGN, _SILENCE = 30, 600


def _start_of(pid: int) -> str | None:
    """Return when a process of this machine began, or None where it is not there any more.

    Numbers of processes are used again; with the time of their start they are unique.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        state, *rest = stat.rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc: only whether there is such a process can be known
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


class Claims:
    """The claims of a study folder.

    A claim is made by linking a finished file to its name, which fails where there is one, so
    a claim is whole from the moment that others can see it. It names process, machine and start;
    one of a process of this machine that has ended is taken over, and so is one of another
    machine whose file nobody has touched for ten minutes.

    Parameters
    ----------
    folder : Path
        Created on first use.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pid = os.getpid()
        self.own = {"pid": pid, "host": socket.gethostname(), "started": _start_of(pid)}
        self._signed = 0.0

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def take(self, name: str) -> bool:
        """Claim `name`, and return whether it is this process's now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._link(name):
            return True
        if not self._stale(name):
            return False
        with self._alone():
            # another process may have taken it over since
            if self._stale(name):
                write_text(self._path(name), to_json(self.own) + "\n")
                return True
        return self._link(name)

    def release(self, name: str) -> None:
        """Give up a claim of this process."""
        if self.holder(name) == self.own:
            self._path(name).unlink(missing_ok=True)

    def keep_up(self, names: Iterable[str]) -> None:
        """Show other machines that the processes of these claims are still there."""
        if time.monotonic() - self._signed < SIGN:
            return
        self._signed = time.monotonic()
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path(name))

    def holder(self, name: str) -> dict[str, Any] | None:
        """Return who holds `name`, dead or alive; None for nobody."""
        try:
            return json.loads(self._path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _link(self, name: str) -> bool:
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{os.getpid()}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(to_json(self.own) + "\n")
            os.link(temporary, self._path(name))
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        return True

    def _stale(self, name: str) -> bool:
        holder = self.holder(name)
        if not holder:
            return False
        if holder.get("host") != self.own["host"]:
            try:
                return time.time() - self._path(name).stat().st_mtime > _SILENCE
            except FileNotFoundError:
                return False
        return _start_of(holder["pid"]) != holder["started"]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes of this machine from taking over at the same time."""
        import fcntl  # not on Windows, where nothing here is known to work

        with (self.folder / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process, however it ends
            yield
