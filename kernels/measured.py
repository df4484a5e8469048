"""Which of two ways to the same result is the faster on this GPU: measured once, and remembered.

Whether a kernel of our own beats a vendor's product hangs on shape, dtype, device and versions. It
is timed with the tensors of the first call that asks, and the times are kept in
`$XDG_CACHE_HOME/bitfit_fast/products-*.json`, by device, versions and the kernels' source. So later
runs choose the same, and give the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from ._cache import cache_folder, put

__all__ = ["is_faster", "known"]

#: What the kernels that are timed are made of.
_SOURCES = ("_product.py", "activation.py", "linear.py")
#: Calls of each way that are not timed, as they compile; and that are.
_FIRST, _TIMED = 3, 20
#: Clock cycles that a GPU waits while the host asks for all calls that are timed: 5 ms or more.
#: Otherwise small ones would be timed at the host's pace, which no CUDA graph has.
_AHEAD = 10_000_000
#: What ours has to take at most of the other's time: less is noise.
_SHARE = 0.97

#: Milliseconds of ours and of the other way, by problem; and that by name of the file.
_known: dict[str, dict[str, list[float]]] = {}


@functools.cache
def _name(index: int) -> str:
    """Return the name of the file in which times of a device are kept."""
    here = Path(__file__).parent
    sources = [(here / name).read_text(encoding="utf-8") for name in _SOURCES]
    device = torch.cuda.get_device_name(index)
    parts = (device, torch.__version__, triton.__version__, *sources)
    return f"products-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.json"


def _read(name: str) -> dict[str, list[float]]:
    """Return what is known; what cannot be read is measured again."""
    try:
        found = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
        return {str(key): [float(ours), float(other)] for key, (ours, other) in found.items()}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
        return {}


def _write(name: str, times: dict[str, list[float]]) -> None:
    """Keep times beside those that other processes have measured meanwhile."""
    text = json.dumps({**_read(name), **times}, indent=1, sort_keys=True) + "\n"
    with contextlib.suppress(OSError, RuntimeError):  # without a home the next run measures again
        put(cache_folder() / name, lambda at: at.write_text(text, encoding="utf-8"))


def _times(ways: tuple[Callable[[], object], ...]) -> list[float]:
    """Return the median time of each way in milliseconds; they take turns."""
    stream = torch.cuda.current_stream()
    for way in ways * _FIRST:
        way()
    stream.synchronize()
    torch.cuda._sleep(_AHEAD)
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in ways]
    for _ in range(_TIMED):
        for way, timed in zip(ways, events):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            way()
            end.record(stream)
            timed.append((begin, end))
    stream.synchronize()
    return [statistics.median(begin.elapsed_time(end) for begin, end in timed) for timed in events]


def known() -> dict[str, list[float]]:
    """Return the milliseconds of both ways by problem, as far as this process has asked."""
    return {key: times for found in _known.values() for key, times in found.items()}


def is_faster(
    ours: Callable[[], object], other: Callable[[], object], device: torch.device, *problem: object
) -> bool:
    """Return whether the first of two ways takes clearly less time than the second.

    Parameters
    ----------
    ours, other : callable
        Compute the same, on the current stream; called only where it is not known yet.
    device : torch.device
        A CUDA device, on which both work.
    *problem : object
        What the times depend on, besides the device and the kernels: its words are the key.

    Returns
    -------
    bool
        False while a CUDA graph is captured, where it is not known yet.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    name, key = _name(index), " ".join(map(str, problem))
    if name not in _known:
        _known[name] = _read(name)
    times = _known[name]
    if key not in times:
        if torch.cuda.is_current_stream_capturing():
            return False
        with torch.cuda.device(index):
            try:
                times[key] = _times((ours, other))
            except torch.OutOfMemoryError:
                return False  # the step may have room for one of them, and is not known to for both
        _write(name, {key: times[key]})
    mine, its = times[key]
    return mine <= _SHARE * its
