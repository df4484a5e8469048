"""Column sums: the bias gradient of a linear layer, `db[n] = sum_m dy[m, n]`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import operation
from ._backend import uses_native, uses_triton
from .dropout import drawn

__all__ = ["bias_gradient", "column_sum", "definition"]


def definition(
    dy: Tensor, offsets: Tensor | None = None, p: float = 0.0, keep: Tensor | None = None
) -> Tensor:
    """Compute `column_sum` with PyTorch operations, in fp32 or, of float64, in float64."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    if keep is not None:
        dy = torch.where(keep, dy.to(wide) / (1 - p), 0)
    if offsets is None:
        return dy.sum(0, dtype=wide)
    parts = [part.sum(0, dtype=wide) for part in dy.tensor_split(offsets[1:-1].cpu())]
    return torch.stack(parts)


@operation(
    "column_sum",
    "(Tensor dy, Tensor? offsets, float p, Tensor? seed) -> Tensor",
)
def _column_sum(dy, offsets, p, seed):
    if uses_triton(dy):
        from ..kernels import column_sum as kernel

        return kernel.column_sum(dy, offsets, p, seed)
    if offsets is None and uses_native(dy):
        from ..kernels import native

        return native.column_sum(dy, p, seed)
    return definition(dy, offsets, p, drawn(dy.shape[0], dy.shape[1], p, seed))


@_column_sum.register_fake
def _(dy, offsets, p, seed):
    columns = dy.shape[1:]
    size = columns if offsets is None else (offsets.shape[0] - 1, *columns)
    return dy.new_empty(size, dtype=torch.promote_types(dy.dtype, torch.float32))


def column_sum(
    dy: Tensor, offsets: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """Add the rows of a matrix; the order of the additions is fixed by the shapes.

    It has no gradient of its own: it is what backward passes are made of.

    Parameters
    ----------
    dy : Tensor
        `[M, N]`, floating point, any strides.
    offsets : Tensor, optional
        `[S + 1]` int64, ascending, from 0 to M: segment s is the rows from `offsets[s]` up to
        `offsets[s + 1]`.
    p : float
        Probability with which dropout dropped an element, below 1.
    seed : Tensor, optional
        `[1]` int64, the seed of that dropout; needed with `p > 0`.

    Returns
    -------
    Tensor
        `[N]`, or `[S, N]` with offsets, in fp32 (float64 of float64).
    """
    return _column_sum(dy, offsets, p, seed)


def bias_gradient(dy: Tensor) -> Tensor:
    """Return the column sum, as backward passes call it.

    The numbers are written out: the compiler takes those of default arguments for inputs,
    and cannot have such in a backward pass.
    """
    return _column_sum(dy, None, 0.0, None)
