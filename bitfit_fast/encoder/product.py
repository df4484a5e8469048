"""Products with a frozen weight, forward and backward, by the faster of the libraries at hand."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Product"]


def _onednn(x: Tensor, weight: Tensor, b: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, b, "none", [], "")


@functools.cache
def _prefers_onednn() -> bool:
    """Return whether oneDNN multiplies fp32 faster than PyTorch's choice, MKL.

    MKL does not use all of what CPUs of other makers can do, and took twice as long on an AMD
    EPYC; on Intel's the two are alike. By the maker, not by measuring, as the choice decides
    the last bits of results.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    makers = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return bool(makers) and "GenuineIntel" not in makers


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
