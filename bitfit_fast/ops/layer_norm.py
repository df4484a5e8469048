"""Bias, dropout, residual and LayerNorm in one pass, and the bias gradients from one read.

    s = residual + dropout(x + b),   y = (s - mean(s)) * rstd * gamma + beta

Backward: the gradients of residual, `x`, `b` and `beta`; that of `gamma` only where it trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BitFitError
from ..kernels._constants import MAX_COLUMNS, keeps_sum, sum_dtype
from ._autograd import as_rows, check_shapes, contiguous, in_autocast, once, operation, shaped
from ._backend import uses_native, uses_triton
from .column_sum import bias_gradient
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
    s = s if residual is None else residual + s
    beta = None if beta is None else beta.to(dtype)
    return F.layer_norm(s.to(dtype), s.shape[-1:], gamma.to(dtype), beta, eps), s


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
    kept_dtype: torch.dtype,
) -> list[Tensor]:
    """Compute y, s, xhat, mean and rstd with PyTorch operations; of these, what is needed."""
    wide = torch.promote_types(dtype, torch.float32)
    s = x.to(wide)
    if b is not None:
        s = s + b.to(wide)
    if keep is not None:
        s = torch.where(keep, s, 0).mul_(1 / (1 - p))
    if residual is not None:
        s = s + residual.to(wide)
    total = []
    if returns_sum:
        total = [s.to(sum_dtype(x, residual), copy=True)]
        s = total[0].to(wide)
    gamma, beta, shape = gamma.to(wide), None if beta is None else beta.to(wide), s.shape[-1:]
    if keeps and not keeps_sum(b, residual, p, returns_sum):
        xhat, _, rstd = torch.native_layer_norm(s, shape, None, None, eps)
        y = xhat * gamma if beta is None else torch.addcmul(beta, xhat, gamma)
        return [y.to(dtype), xhat.to(kept_dtype), rstd.reshape(-1)]
    y, mean, rstd = torch.native_layer_norm(s, shape, gamma, beta, eps)
    return [y.to(dtype), *total, *([mean.reshape(-1), rstd.reshape(-1)] if keeps else [])]


def backward_definition(
    dy: Tensor,
    kept: Tensor,
    mean: Tensor | None,
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
    dy, kept = dy.to(wide), kept.to(wide)
    shift = torch.zeros_like(rstd) if mean is None else mean
    scale = torch.ones_like(rstd) if mean is None else rstd
    ds, dgamma, _ = torch.ops.aten.native_layer_norm_backward(
        dy,
        kept,
        dy.shape[-1:],
        shift[:, None],
        scale[:, None],
        gamma.to(wide),
        None,
        [True, needs_dgamma, False],
    )
    if mean is None:  # rows of xhat have mean 0 and deviation 1
        ds *= rstd[:, None]
    if dsum is not None:
        ds += dsum.to(wide)
    dx = ds
    if keep is not None:
        dx = torch.where(keep, ds, 0).mul_(1 / (1 - p))
    sums = [part.sum(0) for needed, part in ((needs_dbeta, dy), (needs_db, dx)) if needed]
    if needs_dgamma:
        sums.append(dgamma)
    return (
        ds.to(ds_dtype),
        dx.to(dx_dtype, copy=True)
        if p or dx_dtype != ds_dtype
        else dy.new_empty(0, dtype=dx_dtype),
        torch.stack(sums) if sums else dy.new_empty(0, dy.shape[1]),
    )


@operation(
    "layer_norm_fwd",
    "(Tensor x, Tensor gamma, Tensor? beta, Tensor? b, Tensor? residual, float p, "
    "Tensor? seed, float eps, ScalarType dtype, bool keeps, bool returns_sum, "
    "ScalarType kept_dtype) -> Tensor[]",
)
def layer_norm_fwd(x, gamma, beta, b, residual, p, seed, eps, dtype, *tail):
    tail = (eps, dtype, *tail)
    gamma, beta, b = contiguous(gamma, beta, b)
    if uses_triton(x, dtype, most=MAX_COLUMNS):
        from ..kernels import layer_norm as kernel

        return [
            out
            for out in kernel.layer_norm_fwd(x, gamma, beta, b, residual, p, seed, *tail)
            if out is not None
        ]
    if dtype == tail[-1] == sum_dtype(x, residual) and uses_native(x, residual):
        from ..kernels import native

        return native.layer_norm_fwd(x, gamma, beta, b, residual, p, seed, eps, *tail[2:-1])
    keep = drawn(x.shape[0], x.shape[1], p, seed)
    outputs = forward_definition(x, gamma, beta, b, residual, p, keep, *tail)
    return list(contiguous(*outputs))


@layer_norm_fwd.register_fake
def _(x, gamma, beta, b, residual, p, seed, eps, dtype, keeps, returns_sum, kept_dtype):
    numbers = (x.shape[:1], torch.promote_types(dtype, torch.float32))
    total = [(x.shape, sum_dtype(x, residual))] if returns_sum else []
    rows = numbers if keeps_sum(b, residual, p, returns_sum) else (x.shape, kept_dtype)
    outputs = [(x.shape, dtype), *total, *([rows, numbers] if keeps else [])]
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in outputs]


@operation(
    "layer_norm_bwd",
    "(Tensor dy, Tensor kept, Tensor? mean, Tensor rstd, Tensor gamma, Tensor? dsum, "
    "float p, Tensor? seed, ScalarType ds_dtype, ScalarType dx_dtype, bool needs_dbeta, "
    "bool needs_db, bool needs_dgamma) -> (Tensor, Tensor, Tensor)",
)
def layer_norm_bwd(dy, kept, mean, rstd, gamma, dsum, p, seed, *tail):
    (gamma,) = contiguous(gamma)
    if uses_triton(dy, most=MAX_COLUMNS):
        from ..kernels import layer_norm as kernel

        ds, dx, sums = kernel.layer_norm_bwd(dy, kept, mean, rstd, gamma, dsum, p, seed, *tail)
        # an operation may not return a tensor twice
        return ds, ds.new_empty(0) if dx is ds else dx, sums
    dtypes = {t.dtype for t in (dy, kept, dsum) if t is not None}
    promoted = dtypes == {torch.promote_types(*tail[:2])} and torch.float16 not in tail[:2]
    if promoted and uses_native(dy):
        from ..kernels import native

        ds, dx, sums = native.layer_norm_bwd(dy, kept, mean, rstd, gamma, dsum, p, seed, *tail)
        return ds, ds.new_empty(0) if dx is ds else dx, sums
    keep = drawn(dy.shape[0], dy.shape[1], p, seed)
    return contiguous(*backward_definition(dy, kept, mean, rstd, gamma, dsum, p, keep, *tail))


@layer_norm_bwd.register_fake
def _(dy, kept, mean, rstd, gamma, dsum, p, seed, ds_dtype, dx_dtype, *needs):
    wide = torch.promote_types(dy.dtype, torch.float32)
    return (
        dy.new_empty(dy.shape, dtype=ds_dtype),
        dy.new_empty(dy.shape if p or dx_dtype != ds_dtype else (0,), dtype=dx_dtype),
        dy.new_empty(sum(needs), dy.shape[1], dtype=wide),
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
        needs_dx, needs_dgamma, _, needs_db, needs_ds = ctx.needs_input_grad[:5]
        # beta's gradient is a sum of dy, and needs nothing that is computed here
        ctx.keeps = grad and (needs_dx or needs_dgamma or needs_db or needs_ds)
        y, *others = layer_norm_fwd(
            as_rows(x),
            gamma,
            beta,
            b,
            None if residual is None else as_rows(residual),
            p,
            seed,
            eps,
            dtype,
            ctx.keeps,
            returns_sum,
            dtype,
        )
        total = shaped(others[0], x.shape) if returns_sum else None
        if ctx.keeps and keeps_sum(b, residual, p, returns_sum):
            ctx.save_for_backward(x if total is None else total, *others[-2:], gamma, seed)
        elif ctx.keeps:
            ctx.save_for_backward(others[0], None, others[1], gamma, seed)
        ctx.p = p
        ctx.dtypes = (x.dtype if residual is None else residual.dtype, x.dtype)
        ctx.set_materialize_grads(False)
        return shaped(y, x.shape), total

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_dx, needs_dgamma, needs_dbeta, needs_db, needs_ds = ctx.needs_input_grad[:5]
        rest = (None,) * 6
        if dy is None:
            if dsum is None:
                return (None,) * 11
            dy = torch.zeros_like(dsum)  # only the sum went on
        shape = dy.shape
        dy = as_rows(dy)
        if not ctx.keeps:
            return (None, None, bias_gradient(dy), None, None, *rest)
        kept, mean, rstd, gamma, seed = ctx.saved_tensors
        ds, dx, sums = layer_norm_bwd(
            dy,
            as_rows(kept),
            mean,
            rstd,
            gamma,
            None if dsum is None else as_rows(dsum),
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
        Like `x`; fp32 under CUDA's autocast. It cannot be differentiated twice.
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

    For the backward pass it keeps the normalised rows and one number a row, or what is in
    memory anyway, `x` alone or the sum returned, and two; nothing where only `beta` trains. It
    cannot be differentiated twice.

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
        Like `x`, in the wider of the dtypes of `x` and `residual`; under CUDA's autocast y is
        in fp32, as PyTorch's. s is None unless asked for.

    Raises
    ------
    BitFitError
        If `p` is no probability below 1, or a shape is another.
    """
    if not 0 <= p < 1:
        raise BitFitError(f"the probability of dropout is {p}; it must be from 0 to below 1")
    check_shapes(x, residual, gamma=gamma, beta=beta, b=b)
    dtype = sum_dtype(x, residual)
    # on a CPU, autocast leaves LayerNorm alone
    if x.is_cuda and in_autocast(x):
        dtype = torch.promote_types(dtype, torch.float32)
    if x.numel() == 0:
        y, total = composed(x, gamma, beta, b, residual, p, eps, dtype)
        return y, total if returns_sum else None
    if p and seed is None:
        seed = new_seed(x.device)
    grad = torch.is_grad_enabled()
    return _LayerNorm.apply(x, gamma, beta, b, residual, p, seed, eps, dtype, returns_sum, grad)
