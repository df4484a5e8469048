"""What operations do on a GPU, and how long they would take: the units of `cost_model`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["DEVICE", "Counted", "Device", "Work", "flash_backward", "plus", "size", "tensors"]


@dataclass(frozen=True)
class Device:
    """What predicts times.

    Attributes
    ----------
    name : str
    processors : int
        Multiprocessors.
    bandwidth, flops : float
        Bytes and operations a second.
    launch, node : float
        Seconds of a launch, and of a launch in a CUDA graph, which nobody has to ask for. The
        second is an assumption: no GPU has measured it here.
    """

    name: str
    processors: int
    bandwidth: float
    flops: float
    launch: float
    node: float


#: Rates that copies and bf16 products reach, not those of the data sheet.
DEVICE = Device("H200", 132, 4.3e12, 788e12, 3e-6, 1e-6)


@dataclass
class Work:
    """What one operation, or all of a step, does."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0


def plus(work: Work, more: Work) -> Work:
    """Return the sum of both."""
    return Work(work.launches + more.launches, work.bytes + more.bytes, work.flops + more.flops)


def tensors(tree: Any) -> list[Tensor]:
    """Return all tensors in lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size(some: list[Tensor]) -> int:
    """Return the bytes of different tensors; an expanded one is as large as its memory."""
    sizes = {}
    for t in some:
        there = math.prod(n for n, stride in zip(t.shape, t.stride()) if stride)
        key = (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape))
        sizes[key] = (there if t.numel() else 0) * t.element_size()
    return sum(sizes.values())


def flash_backward(number: int, rows: int, width: int, product: int) -> Iterable[Work]:
    """Yield the launches of the backward pass of PyTorch's flash attention.

    Parameters
    ----------
    number, rows : int
        Bytes of a tensor like q, and of one fp32 number for each of its rows.
    width : int
        Bytes of an element of q.
    product : int
        Operations of q k^T.
    """
    # sum(do o) for each row; the gradients, that of q in fp32; its conversion
    wide = number * 4 // width
    yield Work(1, 2 * number + rows + wide)
    yield Work(1, 4 * number + 2 * rows + 2 * wide + 2 * number, 5 * product)
    yield Work(1, wide + number)


@dataclass
class Counted:
    """The work of a step by operation.

    Attributes
    ----------
    works : list of (str, Work)
        In their order.
    outside : list of (str, Work)
        What a CUDA graph leaves to launches of its own.
    graphs : int
        CUDA graphs that a step starts, where it runs in some.
    tail : list of (str, Work)
        Of an eager step, what clipping and optimiser do.
    """

    works: list[tuple[str, Work]] = field(default_factory=list)
    outside: list[tuple[str, Work]] = field(default_factory=list)
    graphs: int = 1
    tail: list[tuple[str, Work]] = field(default_factory=list)

    def note(self, name: str, work: Work, outside: bool = False) -> None:
        """Count an operation."""
        (self.outside if outside else self.works).append((name, work))

    @property
    def total(self) -> Work:
        """The sum of all."""
        total = Work()
        for _, work in (*self.works, *self.outside):
            total = plus(total, work)
        return total

    @property
    def seconds(self) -> float:
        """The time that the device needs, one operation after the other, each launched."""
        return _seconds((*self.works, *self.outside), DEVICE.launch)

    @property
    def seconds_in_graphs(self) -> float:
        """The time with all in CUDA graphs that can be there."""
        starts = self.graphs * DEVICE.launch
        return _seconds(self.works, DEVICE.node) + _seconds(self.outside, DEVICE.launch) + starts

    def by_name(self) -> dict[str, Work]:
        """Return the work of each kind of operation, the most bytes first."""
        found: dict[str, Work] = {}
        for name, work in (*self.works, *self.outside):
            found[name] = plus(found.get(name, Work()), work)
        return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def _seconds(works: Iterable[tuple[str, Work]], launch: float) -> float:
    return sum(
        max(w.bytes / DEVICE.bandwidth, w.flops / DEVICE.flops, w.launches * launch)
        for _, w in works
    )
