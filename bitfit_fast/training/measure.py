"""Time and memory of a run."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "StepClock",
    "commit",
    "device_name",
    "multiplies_bf16",
    "peak_memory",
    "reset_peak_memory",
    "slow_in",
]


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM on Linux


def peak_memory(device: torch.device) -> int:
    """Return the peak in bytes: allocated on a GPU, else resident in the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource  # not on Windows, where nothing here is known to work

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """Return what a result should call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        model = "CPU"
    return f"{model}, {torch.get_num_threads()} threads"


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions that multiply bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    can = _instructions()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def slow_in(precision: str, device: torch.device) -> str | None:
    """Return what to tell someone who lets PyTorch compute in a precision that it is slow in.

    Of an x86 processor; of others it is not known.
    """
    if precision == "fp32" or device.type != "cpu":
        return None
    if not _instructions().get("sse2") or multiplies_bf16(device):
        return None
    return (
        "this processor has no instructions that multiply bf16: in PyTorch a step takes longer "
        "in it than in fp32 (precision fp32)"
    )


def _instructions() -> Mapping[str, Any]:
    """Return which sets of instructions the processor has, as far as PyTorch says."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def commit() -> str | None:
    """Return the commit of this code, marked where files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def mean_step_ms(rows: Iterable[Mapping[str, Any]]) -> float:
    """Return the time of a step over a whole run, from its metrics.

    The mean of the windows' medians, each as often as it has steps: methods with phases have
    steps of several kinds, and what disturbed a few steps counts in none.
    """
    total, before = 0.0, 0
    for step, milliseconds in {row["step"]: row["step_ms"] for row in rows}.items():
        total += (step - before) * milliseconds
        before = step
    return total / before


class StepClock:
    """Times of steps, measured where the loop reads the loss and so waits for the device.

    Attributes
    ----------
    seconds : float
        Time in steps since the last `restart`.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Leave out what happened since the last `lap`, and begin a new window."""
        self.window: list[float] = []
        self.seconds, self.examples = 0.0, 0
        self.start = time.perf_counter()

    def lap(self, steps: int, examples: int) -> None:
        """Note that `steps` steps over `examples` examples have ended now."""
        now = time.perf_counter()
        self.window.append((now - self.start) / steps)
        self.seconds += now - self.start
        self.examples += examples
        self.start = now

    @property
    def step_ms(self) -> float:
        """Median time of a step in this window, in milliseconds."""
        return 1e3 * statistics.median(self.window) if self.window else 0.0

    @property
    def examples_per_second(self) -> float:
        """Training throughput in this window."""
        return self.examples / self.seconds if self.seconds else 0.0
