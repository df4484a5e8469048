"""Linear layers whose backward pass computes the bias gradient, and no weight's unless it trains.

y = x W^T + b,   dx = dy W,   db = sum over tokens of dy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels._launch import cdiv, column_config, processors, product_config
from ._autograd import as_rows, check_shapes, contiguous, in_autocast, once, operation, shaped
from ._backend import fuses_product, uses_triton
from .activation import (
    activation_bwd,
    activation_fwd,
    activation_fwd_,
    bias_activation,
    keeps_few_bits,
)
from .column_sum import bias_gradient

__all__ = ["feed_forward", "linear"]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype as `F.linear` would, so that backward finds one dtype."""
    if not in_autocast(tensors[0]) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(t.device.type)) for t in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None
        )
        out = F.linear(x, w, None if b is None else b.to(x.dtype))
        return shaped(out, out.shape)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        # of a gradient that is not contiguous, PyTorch would make a product for each sequence
        rows = as_rows(dy)
        return (
            None if w is None else (rows @ w).view(*dy.shape[:-1], w.shape[1]),
            None if x is None else rows.t() @ as_rows(x),
            bias_gradient(rows) if ctx.needs_input_grad[2] else None,
        )


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Multiply by a weight and add a bias, as `torch.nn.functional.linear`.

    Its backward pass keeps the weight only where `x` needs a gradient and `x` only where the
    weight trains. It cannot be differentiated twice.

    Parameters
    ----------
    x : Tensor
        `[..., K]`, floating point.
    w : Tensor
        `[N, K]`.
    b : Tensor, optional
        `[N]`; may be fp32 where the rest is in 16 bits.

    Returns
    -------
    Tensor
        `[..., N]`, in autocast's dtype under autocast.
    """
    return _Linear.apply(*_autocast(x, w), b)


def product_rows(dy: Tensor, w: Tensor) -> int:
    """Return how many partial rows a product in one kernel makes of its column sum."""
    (rows, inner), columns = dy.shape, w.shape[1]
    config = product_config(rows, columns, inner, dy.element_size(), processors(dy))
    return cdiv(rows, config["BLOCK_M"])


def fuses_forward(
    x: Tensor, w: Tensor, b: Tensor | None, act: str, few_bits: bool, keeps: bool
) -> bool:
    """Return whether `linear_activation_fwd` of these is one kernel."""

    def fused() -> object:
        from ..kernels import linear as kernel

        return kernel.linear_fwd(x, w.t(), b, act, few_bits, keeps)

    def apart() -> object:
        return _activated(x @ w.t(), b, act, few_bits, keeps)

    kept = ("8 bits" if few_bits else "input") if keeps else "nothing"
    return fuses_product(x, w.t(), fused, apart, "linear_fwd", act, "keeps", kept)


def fuses_backward(dy: Tensor, w: Tensor, kept: Tensor, b: Tensor | None, act: str) -> bool:
    """Return whether `linear_activation_bwd` of these is one kernel."""
    # the second stage of the sum is the same for both, and an encoder's is elsewhere

    def fused() -> object:
        from ..kernels import linear as kernel

        partial = dy.new_empty(1, product_rows(dy, w), w.shape[1], dtype=torch.float32)
        return kernel.linear_bwd(dy, w, kept, b, act, partial)

    def apart() -> object:
        from ..kernels import activation as kernel

        parts = column_config(dy.shape[0], w.shape[1], processors(dy))["P"]
        partial = dy.new_empty(1, parts, w.shape[1], dtype=torch.float32)
        return kernel.activation_bwd(dy @ w, kept, b, act, partial, in_place=True)

    from_ = "8 bits" if kept.dtype == torch.uint8 else "input"
    return fuses_product(dy, w, fused, apart, "linear_bwd", act, "from", from_)


def _activated(
    u: Tensor, b: Tensor | None, act: str, few_bits: bool, keeps: bool
) -> tuple[Tensor, Tensor]:
    """Return act(u + b), which may take the place of u, and what is kept."""
    few_bits = few_bits and keeps
    if uses_triton(u) and (few_bits or not keeps):
        # nobody asks for u again
        return u, activation_fwd_(u, b, act, few_bits)
    h, levels = activation_fwd(u, b, act, few_bits)
    return h, levels if few_bits or not keeps else u


@operation(
    "linear_activation_fwd",
    "(Tensor x, Tensor w, Tensor? b, str act, bool few_bits, bool keeps) -> (Tensor, Tensor)",
)
def linear_activation_fwd(x, w, b, act, few_bits, keeps):
    """Return act(x W^T + b), and what the backward pass takes: act' in 8 bits, x W^T or nothing."""
    (b,) = contiguous(b)
    if fuses_forward(x, w, b, act, few_bits, keeps):
        from ..kernels import linear as kernel

        h, kept = kernel.linear_fwd(x, w.t(), b, act, few_bits, keeps)
        return h, x.new_empty(0, dtype=torch.uint8) if kept is None else kept
    return _activated(x @ w.t(), b, act, few_bits, keeps)


@linear_activation_fwd.register_fake
def _(x, w, b, act, few_bits, keeps):
    shape = x.shape[0], w.shape[0]
    none = few_bits or not keeps
    kept = x.new_empty(shape if keeps else (0,), dtype=torch.uint8 if none else x.dtype)
    return x.new_empty(shape), kept


@operation(
    "linear_activation_bwd",
    "(Tensor dy, Tensor w, Tensor kept, Tensor? b, str act) -> (Tensor, Tensor)",
)
def linear_activation_bwd(dy, w, kept, b, act):
    """Return the gradient of the activation before a product, and its bias's."""
    (b,) = contiguous(b)
    if fuses_backward(dy, w, kept, b, act):
        from ..kernels import linear as kernel

        return kernel.linear_bwd(dy, w, kept, b, act)
    return activation_bwd(dy @ w, kept, b, act)


@linear_activation_bwd.register_fake
def _(dy, w, kept, b, act):
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.new_empty(dy.shape[0], w.shape[1]), dy.new_empty(w.shape[1], dtype=wide)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, act: str, few_bits: bool
    ) -> Tensor:
        keeps = any(ctx.needs_input_grad)
        h, kept = linear_activation_fwd(as_rows(x), w1, b1, act, few_bits, keeps)
        if keeps:
            needs_dx = ctx.needs_input_grad[0]
            ctx.save_for_backward(w1 if needs_dx else None, w2, kept, None if few_bits else b1)
        ctx.act = act
        out = F.linear(h.view(*x.shape[:-1], h.shape[1]), w2)
        return shaped(out, out.shape)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        w1, w2, kept, b1 = ctx.saved_tensors
        rows = as_rows(dy)
        dz, db = linear_activation_bwd(rows, w2, kept, b1, ctx.act)
        dx = None if w1 is None else (dz @ w1).view(*dy.shape[:-1], w1.shape[1])
        return dx, None, db if ctx.needs_input_grad[2] else None, None, None, None


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    act: str = "gelu",
    few_bits: bool = False,
) -> Tensor:
    """Compute `act(x W1^T + b1) W2^T`, the feed-forward block without its last bias.

    The activation and its gradient, with that of `b1`, are taken inside the products where that
    was measured to be faster, and in one pass over each otherwise. Weights that train take the
    same steps one after the other.

    Parameters
    ----------
    x : Tensor
        `[..., K]`, floating point.
    w1, b1, w2 : Tensor
        `[F, K]`, `[F]` and `[N, F]`.
    act, few_bits
        As in `bias_activation`.

    Returns
    -------
    Tensor
        `[..., N]`.

    Raises
    ------
    BitFitError
        For a bias of another shape.
    """
    check_shapes(w1.t(), b1=b1)
    if w1.requires_grad or w2.requires_grad or x.numel() == 0:
        return linear(bias_activation(linear(x, w1), b1, act, few_bits), w2)
    x, w1, w2 = _autocast(x, w1, w2)
    return _FeedForward.apply(x, w1, b1, w2, act, few_bits and keeps_few_bits(x, b1))
