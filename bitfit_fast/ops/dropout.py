"""Dropout without a stored mask: it is drawn from a seed in both passes.

The kernels have a counter-based generator, of which `kept` is the definition: one seed drops the
same elements on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels._constants import ROUNDS, threshold
from ._autograd import as_rows, once, operation, shaped
from ._backend import uses_native, uses_triton

__all__ = ["drawn", "dropout", "kept", "new_seed"]

_LOW = 0xFFFFFFFF


def new_seed(device: torch.device) -> Tensor:
    """Draw a seed from the device's default generator.

    Returns
    -------
    Tensor
        `[1]` int64 on the device, so that a captured graph draws a new one at each replay.
    """
    return torch.randint(0, 2**62, (1,), device=device)


def _times(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of a product of 32-bit numbers held in int64."""
    product = a * b  # wraps around, which leaves the bits right
    return (product >> 32) & _LOW, product & _LOW


def kept(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """Return which elements of an `[M, N]` tensor dropout keeps.

    Element (m, n) has the 16-bit number n mod 8 of the Philox4x32 call with key `seed + m` and
    counter n div 8, and is kept where that number is at least `65536 p`, rounded.

    Parameters
    ----------
    rows, columns : int
        M and N.
    p : float
        Probability of dropping an element.
    seed : Tensor
        `[1]` int64.

    Returns
    -------
    Tensor
        `[M, N]` bool on the seed's device.
    """
    key = seed + torch.arange(rows, device=seed.device)[:, None]
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    c0 = torch.arange(-(-columns // 8), device=seed.device)[None, :]
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        high_a, low_a = _times(0xD2511F53, c0)
        high_b, low_b = _times(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)
    numbers = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)
    return numbers[:, :columns] >= threshold(p)


def drawn(rows: int, columns: int, p: float, seed: Tensor) -> Tensor | None:
    """Return what `kept` does, as fast as it is to be had; None without dropout."""
    if not p:
        return None
    if seed.device.type == "cpu" and uses_native():
        from ..kernels import native

        return native.kept(rows, columns, p, seed)
    return kept(rows, columns, p, seed)


@operation(
    "dropout",
    "(Tensor x, float p, Tensor seed) -> Tensor",
)
def _dropout(x, p, seed):
    if uses_triton(x):
        from ..kernels import dropout as kernel

        return kernel.dropout(x, p, seed)
    if uses_native(x):
        from ..kernels import native

        return native.dropout(x, p, seed)
    return torch.where(drawn(x.shape[0], x.shape[1], p, seed), x, 0) * (1 / (1 - p))


@_dropout.register_fake
def _(x, p, seed):
    return x.new_empty(x.shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(seed)
        return shaped(_dropout(as_rows(x), p, seed), x.shape)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _dropout(as_rows(dy), ctx.p, *ctx.saved_tensors).view(dy.shape), None, None


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Drop the elements that a fused operation with this seed drops; no mask is kept.

    Parameters
    ----------
    x : Tensor
        `[..., N]`, floating point.
    p : float
        Probability of dropping an element, below 1.
    seed : Tensor
        `[1]` int64 on the device of `x`.

    Returns
    -------
    Tensor
        Like `x`, scaled by 1 / (1 - p).
    """
    return _Dropout.apply(x, p, seed)
