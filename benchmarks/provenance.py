"""What every file of results says about where its numbers come from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bitfit_fast.files import to_json, write_text
from bitfit_fast.training.measure import commit, device_name

__all__ = ["QUICK", "command_line", "provenance", "short", "slug", "write_results"]

#: Set to 1, it makes a run that only shows that everything works.
QUICK = os.environ.get("BITFIT_FAST_QUICK") == "1"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_line() -> str:
    """Return the command that runs this script, as from the checkout's root.

    The folder of the data sets goes by the name of its variable.
    """
    script, data = Path(sys.argv[0]), os.environ.get("BITFIT_FAST_DATA")
    arguments = [a.replace(data, "$BITFIT_FAST_DATA") if data else a for a in sys.argv[1:]]
    return " ".join(["python", f"{script.parent.name}/{script.name}", *arguments])


def provenance(
    command: str,
    device: torch.device,
    packages: tuple[str, ...] = ("torch", "triton", "transformers"),
) -> dict[str, Any]:
    """Return the head of a file of results: command, commit, date, device and versions."""
    # a copy of the sources has no history to ask
    at = os.environ.get("BITFIT_FAST_COMMIT") or commit() or ""
    return {
        "command": command,
        "commit": at.removesuffix("-dirty") or None,
        "dirty": at.endswith("-dirty") if at else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{package: _version(package) for package in packages},
        },
    }


def slug(device: torch.device) -> str:
    """Return the device's part of a file's name."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def short(value: float) -> float:
    """Return a number without the digits that no measurement has."""
    return float(f"{value:.5g}")


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results whose `rows` have a line each."""
    head = to_json({k: v for k, v in results.items() if k != "rows"}, indent=2)
    rows = ",\n".join(f"    {to_json(row)}" for row in results["rows"])
    write_text(path, f'{head[:-2]},\n  "rows": [\n{rows}\n  ]\n}}\n')
