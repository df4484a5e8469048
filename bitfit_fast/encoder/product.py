"""Products with a frozen weight, forward and backward, by the faster of the libraries at hand."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Product"]


class Product:
    """A frozen weight, which activations and gradients are multiplied by.

    Parameters
    ----------
    weight : Tensor
        `[N, K]`, with contiguous rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor, b: Tensor | None = None) -> Tensor:
        """Return `x W^T + b`, `[M, N]` of `[M, K]`."""
        return x @ self.weight.t() if b is None else torch.addmm(b, x, self.weight.t())

    def backward(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return `dy W`, `[M, K]` of `[M, N]`; added to `onto`, in place, where it is given."""
        return dy @ self.weight if onto is None else onto.addmm_(dy, self.weight)

    def part(self, first: int, last: int) -> Product:
        """Return the product with some rows of the weight."""
        return Product(self.weight[first:last])
