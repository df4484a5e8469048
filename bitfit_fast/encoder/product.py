"""Products with a frozen weight, forward and backward, by the faster of the libraries at hand."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Product"]

#: How much faster oneDNN must be than PyTorch's choice for fp32; less may be luck, and which
#: one is taken decides the last bits.
_MARGIN = 1.3


def _onednn(x: Tensor, weight: Tensor, b: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, b, "none", [], "")


def _fastest(run: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


@functools.cache
def _prefers_onednn() -> bool:
    """Return whether oneDNN multiplies fp32 faster than MKL, as on CPUs not of MKL's maker."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    x, weight = torch.ones(512, 768), torch.ones(768, 768)
    with torch.no_grad():
        return _fastest(lambda: x @ weight.t()) > _MARGIN * _fastest(lambda: _onednn(x, weight))


class Product:
    """A frozen weight, which activations and gradients are multiplied by.

    Parameters
    ----------
    weight : Tensor
        `[N, K]`, with contiguous rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        fp32 = weight.device.type == "cpu" and weight.dtype == torch.float32
        self._onednn = fp32 and _prefers_onednn()

    def __call__(self, x: Tensor, b: Tensor | None = None) -> Tensor:
        """Return `x W^T + b`, `[M, N]` of `[M, K]`."""
        if self._onednn:
            return _onednn(x, self.weight, b)
        return x @ self.weight.t() if b is None else torch.addmm(b, x, self.weight.t())

    def backward(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return `dy W`, `[M, K]` of `[M, N]`; added to `onto`, in place, where it is given."""
        if self._onednn:
            dx = _onednn(dy, self.weight.t())
            return dx if onto is None else onto.add_(dx)
        return dy @ self.weight if onto is None else onto.addmm_(dy, self.weight)

    def part(self, first: int, last: int) -> Product:
        """Return the product with some rows of the weight."""
        return Product(self.weight[first:last])
