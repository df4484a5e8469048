"""Bias, dropout, residual and LayerNorm in one pass, and the bias gradients from one read.

    s = residual + dropout(x + b),   y = (s - mean(s)) * rstd * gamma + beta

Backward: the gradients of residual, `x`, `b` and `beta`; that of `gamma` only where it trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..kernels._constants import MAX_COLUMNS
from ._backend import uses_triton
from .column_sum import column_sum
from .dropout import drawn, new_seed

__all__ = ["dropout_add_layer_norm", "layer_norm"]


def composed(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    b: Tensor | None,
    residual: Tensor | None,
    p: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute y and s one step after the other, with PyTorch's autograd and its dropout."""
    s = F.dropout(x if b is None else x + b.to(x.dtype), p)
    s = (s if residual is None else residual + s).to(dtype)
    beta = None if beta is None else beta.to(dtype)
    return F.layer_norm(s, s.shape[-1:], gamma.to(dtype), beta, eps), s


def forward_definition(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    b: Tensor | None,
    residual: Tensor | None,
    p: float,
    keep: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keeps: bool,
    returns_sum: bool,
) -> list[Tensor]:
    """Compute y, then xhat and rstd, then s with PyTorch operations, as asked for."""
    wide = torch.promote_types(dtype, torch.float32)
    s = x.to(wide)
    if b is not None:
        s = s + b.to(wide)
    if keep is not None:
        s = torch.where(keep, s / (1 - p), 0)
    if residual is not None:
        s = s + residual.to(wide)
    total = []
    if returns_sum:
        total = [s.to(dtype, copy=True)]
        s = total[0].to(wide)
    xhat, _, rstd = torch.native_layer_norm(s, s.shape[-1:], None, None, eps)
    y = xhat * gamma.to(wide)
    if beta is not None:
        y += beta.to(wide)
    return [y.to(dtype), *([xhat.to(dtype), rstd.reshape(-1)] if keeps else []), *total]


def backward_definition(
    dy: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    dsum: Tensor | None,
    p: float,
    keep: Tensor | None,
    ds_dtype: torch.dtype,
    dx_dtype: torch.dtype,
    needs_dbeta: bool,
    needs_db: bool,
    needs_dgamma: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ds, dx and the sums needed of dbeta, db and dgamma with PyTorch operations.

    `dx` is empty where it is `ds` itself.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    dy, xhat = dy.to(wide), xhat.to(wide)
    c = dy * gamma.to(wide)
    ds = c - c.mean(1, keepdim=True) - xhat * (c * xhat).mean(1, keepdim=True)
    ds *= rstd[:, None]
    if dsum is not None:
        ds += dsum.to(wide)
    dx = ds
    if keep is not None:
        dx = torch.where(keep, ds / (1 - p), 0)
    parts = ((needs_dbeta, dy), (needs_db, dx), (needs_dgamma, dy * xhat if needs_dgamma else dy))
    sums = [part.sum(0) for needed, part in parts if needed]
    return (
        ds.to(ds_dtype, copy=True),
        dx.to(dx_dtype, copy=True)
        if p or dx_dtype != ds_dtype
        else dy.new_empty(0, dtype=dx_dtype),
        torch.stack(sums) if sums else dy.new_empty(0, dy.shape[1]),
    )


@torch.library.custom_op(
    "bitfit_fast::layer_norm_fwd",
    mutates_args=(),
    schema="(Tensor x, Tensor gamma, Tensor? beta, Tensor? b, Tensor? residual, float p, "
    "Tensor? seed, float eps, ScalarType dtype, bool keeps, bool returns_sum) "
    "-> Tensor[]",
)
def _layer_norm_fwd(x, gamma, beta, b, residual, p, seed, eps, dtype, keeps, returns_sum):
    tail = (eps, dtype, keeps, returns_sum)
    if uses_triton(x, x.shape[1], MAX_COLUMNS):
        from ..kernels import layer_norm as kernel

        return [
            out
            for out in kernel.layer_norm_fwd(x, gamma, beta, b, residual, p, seed, *tail)
            if out is not None
        ]
    keep = drawn(x.shape[0], x.shape[1], p, seed)
    return forward_definition(x, gamma, beta, b, residual, p, keep, *tail)


@_layer_norm_fwd.register_fake
def _(x, gamma, beta, b, residual, p, seed, eps, dtype, keeps, returns_sum):
    wide = torch.promote_types(dtype, torch.float32)
    kept = [x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:1], dtype=wide)]
    total = [x.new_empty(x.shape, dtype=dtype)]
    return [
        x.new_empty(x.shape, dtype=dtype),
        *(kept if keeps else []),
        *(total if returns_sum else []),
    ]


@torch.library.custom_op(
    "bitfit_fast::layer_norm_bwd",
    mutates_args=(),
    schema="(Tensor dy, Tensor xhat, Tensor rstd, Tensor gamma, Tensor? dsum, float p, "
    "Tensor? seed, ScalarType ds_dtype, ScalarType dx_dtype, bool needs_dbeta, bool needs_db, "
    "bool needs_dgamma) -> (Tensor, Tensor, Tensor)",
)
def _layer_norm_bwd(
    dy, xhat, rstd, gamma, dsum, p, seed, ds_dtype, dx_dtype, needs_dbeta, needs_db, needs_dgamma
):
    tail = (ds_dtype, dx_dtype, needs_dbeta, needs_db, needs_dgamma)
    if uses_triton(dy, dy.shape[1], MAX_COLUMNS):
        from ..kernels import layer_norm as kernel

        ds, dx, sums = kernel.layer_norm_bwd(dy, xhat, rstd, gamma, dsum, p, seed, *tail)
        # an operation may not return a tensor twice
        return ds, dy.new_empty(0, dtype=dx_dtype) if dx is ds else dx, sums
    keep = drawn(dy.shape[0], dy.shape[1], p, seed)
    return backward_definition(dy, xhat, rstd, gamma, dsum, p, keep, *tail)


@_layer_norm_bwd.register_fake
def _(
    dy, xhat, rstd, gamma, dsum, p, seed, ds_dtype, dx_dtype, needs_dbeta, needs_db, needs_dgamma
):
    wide = torch.promote_types(dy.dtype, torch.float32)
    return (
        dy.new_empty(dy.shape, dtype=ds_dtype),
        dy.new_empty(dy.shape if p or dx_dtype != ds_dtype else (0,), dtype=dx_dtype),
        dy.new_empty(needs_dbeta + needs_db + needs_dgamma, dy.shape[1], dtype=wide),
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        b: Tensor | None,
        residual: Tensor | None,
        p: float,
        seed: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        returns_sum: bool,
        grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        columns = x.shape[-1]
        needs_dx, needs_dgamma, _, needs_db, needs_ds = ctx.needs_input_grad[:5]
        # beta's gradient is a sum of dy, and needs nothing that is computed here
        ctx.keeps = grad and (needs_dx or needs_dgamma or needs_db or needs_ds)
        y, *others = _layer_norm_fwd(
            x.reshape(-1, columns),
            gamma,
            beta,
            b,
            None if residual is None else residual.reshape(-1, columns),
            p,
            seed,
            eps,
            dtype,
            ctx.keeps,
            returns_sum,
        )
        if ctx.keeps:
            ctx.save_for_backward(*others[:2], gamma, seed)
        ctx.p = p
        ctx.dtypes = (dtype if residual is None else residual.dtype, x.dtype)
        ctx.set_materialize_grads(False)
        return y.view(x.shape), others[-1].view(x.shape) if returns_sum else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_dx, needs_dgamma, needs_dbeta, needs_db, needs_ds = ctx.needs_input_grad[:5]
        rest = (None,) * 6
        if dy is None:
            if dsum is None:
                return (None,) * 11
            dy = torch.zeros_like(dsum)  # only the sum went on
        shape, columns = dy.shape, dy.shape[-1]
        dy = dy.reshape(-1, columns)
        if not ctx.keeps:
            return (None, None, column_sum(dy), None, None, *rest)
        xhat, rstd, gamma, seed = ctx.saved_tensors
        ds, dx, sums = _layer_norm_bwd(
            dy,
            xhat,
            rstd,
            gamma,
            None if dsum is None else dsum.reshape(-1, columns),
            ctx.p,
            seed,
            *ctx.dtypes,
            needs_dbeta,
            needs_db,
            needs_dgamma,
        )
        if not dx.numel():
            dx = ds
        dbeta = sums[0] if needs_dbeta else None
        db = sums[int(needs_dbeta)] if needs_db else None
        dgamma = sums[-1] if needs_dgamma else None
        dx = dx.view(shape) if needs_dx else None
        return (dx, dgamma, dbeta, db, ds.view(shape) if needs_ds else None, *rest)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise rows, as `torch.nn.functional.layer_norm` over the last dimension.

    Parameters
    ----------
    x : Tensor
        `[..., N]`, floating point.
    gamma, beta : Tensor
        `[N]`; beta may be None.
    eps : float
        Added to the variance.

    Returns
    -------
    Tensor
        Like `x`; fp32 under autocast. It cannot be differentiated twice.
    """
    return dropout_add_layer_norm(x, gamma, beta, eps=eps)[0]


def dropout_add_layer_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    b: Tensor | None = None,
    residual: Tensor | None = None,
    p: float = 0.0,
    eps: float = 1e-5,
    seed: Tensor | None = None,
    returns_sum: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `layer_norm(residual + dropout(x + b))` in one pass.

    For the backward pass it keeps the normalised rows and one number a row; nothing at all
    where only `beta` trains. It cannot be differentiated twice.

    Parameters
    ----------
    x : Tensor
        `[..., N]`, floating point, as from a linear layer without its bias.
    gamma, beta : Tensor
        `[N]`, scale and shift; beta may be None.
    b : Tensor, optional
        `[N]`, the linear layer's bias.
    residual : Tensor, optional
        Of the shape of `x`.
    p : float
        Probability of dropping an element of `x + b`, below 1.
    eps : float
        Added to the variance.
    seed : Tensor, optional
        `[1]` int64 on the device of `x`; by default a new one from its generator.
    returns_sum : bool
        Whether to return `residual + dropout(x + b)` too, as pre-norm layers need.

    Returns
    -------
    y, s : Tensor
        Like `x`, in the wider of the dtypes of `x` and `residual`, and fp32 under autocast;
        s is None unless asked for.
    """
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    if x.numel() == 0:
        return composed(x, gamma, beta, b, residual, p, eps, dtype)
    if p and seed is None:
        seed = new_seed(x.device)
    grad = torch.is_grad_enabled()
    return _LayerNorm.apply(x, gamma, beta, b, residual, p, seed, eps, dtype, returns_sum, grad)
