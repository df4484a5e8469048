"""Bias and activation in one pass; backward, the bias gradient comes with the input's.

h = act(x + b),   dz = dh * act'(x + b),   db = sum over tokens of dz
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import check_known
from ..kernels._constants import ACTIVATIONS, quantisation
from ._autograd import as_rows, check_shapes, contiguous, once, operation, shaped
from ._backend import uses_native, uses_triton

__all__ = ["ACTIVATIONS", "bias_activation"]

_aten = torch.ops.aten

#: By name: the activation of z, and dh * act'(z).
_DEFINITIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda dh, z: _aten.gelu_backward(dh, z, approximate="tanh"),
    ),
    "relu": (F.relu, lambda dh, z: _aten.threshold_backward(dh, z, 0)),
    "silu": (F.silu, _aten.silu_backward),
    "tanh": (torch.tanh, lambda dh, z: _aten.tanh_backward(dh, torch.tanh(z))),
}


def composed(x: Tensor, b: Tensor | None, act: str) -> Tensor:
    """Compute h in two steps, with PyTorch's autograd."""
    return _DEFINITIONS[act][0](x if b is None else x + b.to(x.dtype))


def forward_definition(
    x: Tensor, b: Tensor | None, act: str, few_bits: bool
) -> tuple[Tensor, Tensor]:
    """Compute h, and act' in 8 bits where asked for, with PyTorch operations."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) if b is None else x.to(wide) + b.to(wide)
    value, backward = _DEFINITIONS[act]
    h = value(z).to(x.dtype)
    if not few_bits:
        return h, x.new_empty(0, dtype=torch.uint8)
    low, step = quantisation(act)
    levels = (backward(torch.ones_like(z), z) - low) / step + 0.5
    return h, levels.to(torch.uint8)


def backward_definition(
    dh: Tensor, kept: Tensor, b: Tensor | None, act: str
) -> tuple[Tensor, Tensor]:
    """Compute dz and db with PyTorch operations; `kept` is x, or act' in 8 bits."""
    wide = torch.promote_types(dh.dtype, torch.float32)
    if kept.dtype == torch.uint8:
        low, step = quantisation(act)
        dz = dh.to(wide) * (kept * step + low)
    else:
        z = kept.to(wide) if b is None else kept.to(wide) + b.to(wide)
        dz = _DEFINITIONS[act][1](dh.to(wide), z)
    return dz.to(dh.dtype), dz.sum(0)


@operation(
    "activation_fwd",
    "(Tensor x, Tensor? b, str act, bool few_bits) -> (Tensor, Tensor)",
)
def activation_fwd(x, b, act, few_bits):
    (b,) = contiguous(b)
    if uses_triton(x):
        from ..kernels import activation as kernel

        h, d = kernel.activation_fwd(x, b, act, few_bits)
        return h, x.new_empty(0, dtype=torch.uint8) if d is None else d
    if uses_native(x):
        from ..kernels import native

        h, d = native.activation_fwd(x, b, act, few_bits)
        return h, x.new_empty(0, dtype=torch.uint8) if d is None else d
    return contiguous(*forward_definition(x, b, act, few_bits))


@activation_fwd.register_fake
def _(x, b, act, few_bits):
    h = x.new_empty(x.shape)
    return h, x.new_empty(x.shape if few_bits else (0,), dtype=torch.uint8)


@operation(
    "activation_fwd_",
    "(Tensor(a!) x, Tensor? b, str act, bool few_bits) -> Tensor",
    writes=("x",),
)
def activation_fwd_(x, b, act, few_bits):
    """Apply the activation to `x` itself; return act' in 8 bits where asked for."""
    (b,) = contiguous(b)
    if uses_triton(x):
        from ..kernels import activation as kernel

        d = kernel.activation_fwd(x, b, act, few_bits, in_place=True)[1]
        return x.new_empty(0, dtype=torch.uint8) if d is None else d
    h, d = activation_fwd(x, b, act, few_bits)
    x.copy_(h)
    return d


@activation_fwd_.register_fake
def _(x, b, act, few_bits):
    return x.new_empty(x.shape if few_bits else (0,), dtype=torch.uint8)


@operation(
    "activation_bwd",
    "(Tensor dh, Tensor kept, Tensor? b, str act) -> (Tensor, Tensor)",
)
def activation_bwd(dh, kept, b, act):
    (b,) = contiguous(b)
    if uses_triton(dh):
        from ..kernels import activation as kernel

        return kernel.activation_bwd(dh, kept, b, act)
    if uses_native(dh) and kept.dtype in (dh.dtype, torch.uint8):
        from ..kernels import native

        return native.activation_bwd(dh, kept, b, act)
    return contiguous(*backward_definition(dh, kept, b, act))


@activation_bwd.register_fake
def _(dh, kept, b, act):
    wide = torch.promote_types(dh.dtype, torch.float32)
    return dh.new_empty(dh.shape), dh.new_empty(dh.shape[1:], dtype=wide)


def keeps_few_bits(x: Tensor, b: Tensor | None) -> bool:
    """Return whether a backward pass may follow, which the derivative would be kept for."""
    return torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad))


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, act: str, few_bits: bool) -> Tensor:
        rows = as_rows(x)
        h, d = activation_fwd(rows, b, act, few_bits)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*((d, None) if few_bits else (x, b)))
        ctx.act = act
        return shaped(h, x.shape)

    @staticmethod
    @once
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        kept, b = ctx.saved_tensors
        dz, db = activation_bwd(as_rows(dh), as_rows(kept), b, ctx.act)
        return (
            dz.view(dh.shape) if ctx.needs_input_grad[0] else None,
            db if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def bias_activation(
    x: Tensor, b: Tensor | None = None, act: str = "gelu", few_bits: bool = False
) -> Tensor:
    """Add the bias and apply the activation.

    Only `x` and `b` are kept for the backward pass, which computes the gradients of both in
    one pass. It cannot be differentiated twice.

    Parameters
    ----------
    x : Tensor
        `[..., N]`, floating point, as from a linear layer without its bias.
    b : Tensor, optional
        `[N]`, of any floating-point dtype.
    act : str
        `gelu` (exact), `gelu_tanh`, `relu`, `silu` or `tanh`.
    few_bits : bool
        Keep the activation's derivative in 8 bits instead of `x`: a quarter of the memory of
        fp32, half that of bf16, and an error of at most 1/510 of the derivative's range in
        it (2.5e-3 for GELU).

    Returns
    -------
    Tensor
        Like `x`.

    Raises
    ------
    BitFitError
        For an unknown activation, or a bias of another shape.
    """
    check_known("activation", act, ACTIVATIONS)
    check_shapes(x, b=b)
    if x.numel() == 0:
        return composed(x, b, act)
    return _BiasActivation.apply(x, b, act, few_bits and keeps_few_bits(x, b))
