"""Column sums of a backward pass whose second stages run together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels._constants import MAX_COLUMNS
from ..kernels._launch import column_config, processors
from ..ops._backend import uses_triton
from ..ops.partial import add_segments
from ..transfer import sent

__all__ = ["Sums", "defers"]

#: Numbers of partial rows that are kept until they are added: 48 MB, which a GPU's cache holds, and
#: BERT-base needs 39 for 1,024 tokens; and where memory is to be saved.
_ROOM, _FEW = 3 * 2**22, 2**20
#: Tables of sums that are remembered, of a hundred bytes each: a backward pass of BERT-large that
#: saves memory has 72, and all have to be there when it is captured.
_REMEMBERED = 1024


def defers(tensor: Tensor) -> bool:
    """Return whether second stages are launches, which are worth doing together."""
    return uses_triton(tensor) and tensor.shape[1] <= MAX_COLUMNS


def layer_norm_rows(x: Tensor) -> int:
    """Return how many partial rows the backward pass of LayerNorm makes."""
    from ..kernels.layer_norm import layer_norm_config

    return layer_norm_config(x.shape[0], x.shape[1], processors(x))["P"]


def column_rows(x: Tensor) -> int:
    """Return how many partial rows a pass over a matrix makes that sums columns on its way."""
    return column_config(x.shape[0], x.shape[1], processors(x))["P"]


class Sums:
    """Partial rows of sums, and where each sum is to be added.

    Parameters
    ----------
    places : dict of int to Tensor
        Gradients by the number of their bias: contiguous, fp32, all in one piece of memory.
    few : bool
        Whether memory is to be saved.
    overwrites : bool
        Whether sums take the place of what is there, rather than being added to it.
    """

    #: By device and contents.
    _tables: ClassVar[OrderedDict[tuple[object, ...], Tensor]] = OrderedDict()
    #: Those that captured graphs read, which have to stay.
    _captured: ClassVar[dict[tuple[object, ...], Tensor]] = {}

    def __init__(
        self, places: dict[int, Tensor], few: bool = False, overwrites: bool = False
    ) -> None:
        self.places, self._room, self._adds = places, _FEW if few else _ROOM, not overwrites
        self._begin = min(places.values(), key=Tensor.data_ptr)
        self._partial: Tensor | None = None
        self._used = 0
        self._segments: list[tuple[int, ...]] = []

    def reserve(self, size: int) -> None:
        """Make sure that the next so many numbers are taken without adding any before."""
        if self._partial is None or self._used + size > len(self._partial):
            self.add()
            device = self._begin.device
            self._partial = torch.empty(max(self._room, size), dtype=torch.float32, device=device)

    def take(self, numbers: Sequence[int | None], rows: int, columns: int) -> Tensor:
        """Return memory for the partial rows of some sums.

        Parameters
        ----------
        numbers : sequence of int or None
            Of the biases whose gradients the sums are; None for one that nobody needs.
        rows, columns : int
            Partial rows of each, and their width.

        Returns
        -------
        Tensor
            `[k, rows, columns]` fp32, to be written before anything else is asked for.
        """
        size = len(numbers) * rows * columns
        self.reserve(size)
        assert self._partial is not None
        first, self._used = self._used, self._used + -(-size // 16) * 16
        for i, number in enumerate(numbers):
            if number is not None:
                to = (self.places[number].data_ptr() - self._begin.data_ptr()) // 4
                segment = (first + i * rows * columns, rows, columns, columns, to)
                self._segments.append(segment)
        return self._partial[first : first + size].view(len(numbers), rows, columns)

    def add(self) -> None:
        """Add all partial rows that were taken to the gradients, in one launch."""
        if self._segments:
            assert self._partial is not None
            widest = max(segment[3] for segment in self._segments)
            add_segments(self._partial, self._table(), widest, self._begin, self._adds)
        self._segments, self._used = [], 0

    def _table(self) -> Tensor:
        """Return the segments on the device, where they mostly are from the step before."""
        device = self._begin.device
        key = (device, tuple(self._segments))
        table = self._captured.get(key)
        if table is not None:
            return table
        table = self._tables.pop(key, None)
        captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if table is None and captures:
            # a replay would copy it from where it no longer is
            raise RuntimeError("a table of sums is not on the device yet")
        if table is None:
            host = torch.tensor(self._segments, dtype=torch.int32, device="cpu")
            table = sent(host, device)
        if captures:
            self._captured[key] = table
        else:
            self._tables[key] = table
            if len(self._tables) > _REMEMBERED:
                self._tables.popitem(last=False)
        return table
