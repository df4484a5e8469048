"""How much memory the tensors of a step take at a time, where it is not run on a GPU."""

from __future__ import annotations

from typing import Any

from torch import UntypedStorage
from work import tensors

__all__ = ["Live"]


class Live:
    """Follows the storages that operations make until they are freed.

    What was there before is not counted: weights, optimiser and the batch.

    Attributes
    ----------
    peak : int
        The most bytes that were there after an operation.
    """

    def __init__(self) -> None:
        self.peak = self._bytes = 0
        #: Bytes by weak reference: none of a storage that was there before. While there is such a
        #: reference, no other storage comes to lie there.
        self._known: dict[int, int] = {}

    def note(self, inputs: Any, outputs: Any) -> None:
        """Look at what an operation took and what it gave."""
        for weak in [w for w in self._known if UntypedStorage._expired(w)]:  # type: ignore[attr-defined]
            self._forget(weak)
        for tree, counts in ((inputs, False), (outputs, True)):
            for storage in (tensor.untyped_storage() for tensor in tensors(tree)):
                if storage._cdata not in self._known:
                    weak = storage._weak_ref()  # type: ignore[attr-defined]
                    self._known[weak] = counts * storage.nbytes()
                    self._bytes += self._known[weak]
        self.peak = max(self.peak, self._bytes)

    def close(self) -> None:
        """Let go of all references."""
        for weak in [*self._known]:
            self._forget(weak)

    def _forget(self, weak: int) -> None:
        self._bytes -= self._known.pop(weak)
        UntypedStorage._free_weak_ref(weak)  # type: ignore[attr-defined]
