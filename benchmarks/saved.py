"""What autograd keeps alive between forward and backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Saved"]


class Saved(TorchDispatchMode):
    """Sums up the memory of what is saved while it is entered, each storage once.

    Parameters and buffers are left out, and so are copies of them in another dtype, which are no
    larger for more tokens.

    Attributes
    ----------
    bytes, copies : int
        Of activations, and of copies of parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        owned = [*model.parameters(), *model.buffers()]
        self._owned = {t.untyped_storage()._cdata for t in owned}
        self._copied: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        self.bytes = self.copies = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place not in self._owned and place not in self._kept:
            # held, so that no other storage comes to lie there
            self._kept[place] = tensor.detach()
            if place in self._copied:
                self.copies += storage.nbytes()
            else:
                self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> Saved:
        super().__enter__()
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        super().__exit__(*error)
        self._kept.clear()
        self._copied.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        casts = func is torch.ops.aten._to_copy.default
        if casts and args[0].untyped_storage()._cdata in self._owned:
            self._copied[out.untyped_storage()._cdata] = out
        return out
