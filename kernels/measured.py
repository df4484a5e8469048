"""Which of two ways to the same result is the faster on this GPU: measured once, and remembered.

Whether a kernel of our own beats a vendor's product hangs on shape, dtype, device and versions. It
is timed with the tensors of the first call that asks, and the times are kept in a file for each
problem under `$XDG_CACHE_HOME/bitfit_fast/products-*`, by device, versions and the kernels' source.
The first process that measures a problem decides it. So later runs choose the same, and give the
same bits; to measure again, delete the folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from ._cache import cache_folder, put

__all__ = ["is_faster", "known"]

_KERNELS = Path(__file__).parent
#: Calls of each way that are not timed, as they compile; and that are.
_FIRST, _TIMED = 3, 20
#: Clock cycles that a GPU waits while the host asks for all calls that are timed, 10 ms or so, and
#: how often it is asked to wait twice as long where that is not enough. Small calls would be timed
#: at the host's pace otherwise, which no CUDA graph has.
_AHEAD, _TRIES = 20_000_000, 4
#: What ours has to take at most of the other's time: less is noise.
_SHARE = 0.97

#: Milliseconds of ours and of the other way, by folder and problem.
_known: dict[tuple[str, str], tuple[float, float]] = {}


@functools.cache
def _folder(index: int) -> str:
    """Return the name of the folder in which times of a device are kept."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(_KERNELS.glob("*.py"))]
    device = torch.cuda.get_device_name(index)
    parts = (device, torch.__version__, triton.__version__, *sources)
    return f"products-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def _read(file: Path) -> tuple[float, float] | None:
    """Return the times in a file; None where there are none, which are measured again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return float(found["ours_ms"]), float(found["other_ms"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _agreed(file: Path, ours: float, other: float) -> tuple[float, float]:
    """Write times down, unless another process has done so meanwhile; return what stands there."""
    text = json.dumps({"ours_ms": ours, "other_ms": other}) + "\n"
    put(
        file,
        lambda at: at.write_text(text, encoding="utf-8"),
        replaces=file.exists() and _read(file) is None,
    )
    return _read(file) or (ours, other)


def _times(ours: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """Return the median time of each way in milliseconds; they take turns."""
    stream, ahead = torch.cuda.current_stream(), _AHEAD
    for way in (ours, other) * _FIRST:
        way()
    for _ in range(_TRIES):
        stream.synchronize()
        torch.cuda._sleep(ahead)
        timed = [(_timed(ours, stream), _timed(other, stream)) for _ in range(_TIMED)]
        host_was_ahead = not timed[0][0][0].query()
        stream.synchronize()
        if host_was_ahead:
            break
        ahead *= 2
    mine, its = (
        statistics.median(begin.elapsed_time(end) for begin, end in way) for way in zip(*timed)
    )
    return mine, its


def _timed(
    way: Callable[[], object], stream: torch.cuda.Stream
) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Ask for a call, and return the events around it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    way()
    end.record(stream)
    return begin, end


def known() -> dict[str, tuple[float, float]]:
    """Return the milliseconds of both ways by problem, for those that this process has met."""
    return {problem: times for (_, problem), times in _known.items() if math.isfinite(times[0])}


def is_faster(
    ours: Callable[[], object], other: Callable[[], object], device: torch.device, problem: str
) -> bool:
    """Return whether the first of two ways takes clearly less time than the second.

    Parameters
    ----------
    ours, other : callable
        Compute the same, on the current stream; called only where it is not known yet.
    device : torch.device
        A CUDA device, on which both work.
    problem : str
        What the times depend on, besides the device and the kernels, in words.

    Returns
    -------
    bool
        False where it is not known yet and now cannot be measured, as a CUDA graph is captured or
        waiting for the device is an error; and where ours does not compile, or there is no memory
        to measure it, for as long as the process runs.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    key = _folder(index), problem
    if key not in _known:
        with torch.cuda.device(index):
            if torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode():
                return False
            _known[key] = _found(ours, other, *key)
    mine, its = _known[key]
    return mine <= _SHARE * its


def _found(
    ours: Callable[[], object], other: Callable[[], object], folder: str, problem: str
) -> tuple[float, float]:
    """Return what is known on disk, or measure."""
    file: Path | None = None
    with contextlib.suppress(RuntimeError):  # without a home
        file = cache_folder() / folder / (re.sub(r"\W+", "-", problem) + ".json")
    if file is not None and (times := _read(file)) is not None:
        return times
    try:
        times = _times(ours, other)
    except (TritonError, RuntimeError) as error:
        # of a pass of its compiler that fails, Triton says this and no more
        unfit = isinstance(error, (TritonError, torch.OutOfMemoryError))
        if not unfit and "PassManager" not in str(error):
            raise
        return math.inf, 0.0
    if file is not None:
        with contextlib.suppress(OSError):  # the next run measures again
            times = _agreed(file, *times)
    return times
