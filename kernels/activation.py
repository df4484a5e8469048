"""Bias and activation in one pass, and the activation's backward with the bias gradient.

    z = x + b,   h = act(z)                                    forward
    dz[m, n] = dh[m, n] act'(z[m, n]),   db[n] = sum_m dz[m, n]  backward

`x` is `[M, N]`, the linear layer's output before its bias; `b` is `[N]`. act is one of
`ACTIVATIONS`: GELU with erf (Hendrycks and Gimpel 2016), its tanh form, ReLU, SiLU, tanh.
fp32, fp16 or bf16 in and out, fp32 inside, fp32 `db` from the unrounded `dz`.

The forward pass reads and writes `M N` elements; nothing but `x` and `b` is kept. The backward
pass reads `x` and `dh` and writes `dz`, `3 M N` elements, with the column sum on the way.

With `few_bits` the forward pass writes act' in 8 bits a number besides, and the backward pass
reads that in place of `x`: the derivative of each activation here lies in a known range, which
255 steps divide evenly. That leaves an error of at most 1/510 of the range in act' (2.5e-3 for
GELU), which is why it has to be asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._constants import ACTIVATIONS, quantisation
from ._launch import cdiv, column_config, device_guard, processors
from ._reduce import add_partial_rows

__all__ = ["ACTIVATIONS", "activation_bwd", "activation_fwd", "level", "slope", "value"]


@triton.jit
def _inverse(x, FINE: tl.constexpr):
    """Return 1/x for a positive x; a division takes ten instructions, an inverse root two."""
    if FINE:
        return 1 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def _tanh(x, FINE: tl.constexpr):
    """Return tanh and its derivative, without the cancellation of 1 - tanh^2."""
    e = tl.exp(-2 * tl.abs(x))
    r = _inverse(1 + e, FINE)
    t = (1 - e) * r
    return tl.where(x < 0, -t, t), 4 * e * r * r


@triton.jit
def _normal(z, FINE: tl.constexpr):
    """Return the normal distribution's Phi(z) and its density.

    What is stored in 16 bits takes Phi from its density (Abramowitz and Stegun 26.2.17, at most
    7.5e-8 off): half the instructions, of which erf has more than a pass of so few bytes.
    """
    density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)  # exp(-z^2 / 2)
    if FINE:
        return 0.5 * (1 + tl.math.erf(z * 0.7071067811865476)), density
    else:
        t = _inverse(1 + 0.2316419 * tl.abs(z), FINE)
        series = -1.821255978 + t * 1.330274429
        series = -0.356563782 + t * (1.781477937 + t * series)
        tail = density * t * (0.319381530 + t * series)
        return tl.where(z < 0, tail, 1 - tail), density


@triton.jit
def value(z, ACT: tl.constexpr, FINE: tl.constexpr):
    """Return act(z), `FINE` for what is stored in fp32."""
    if ACT == "gelu":
        return z * _normal(z, FINE)[0]
    elif ACT == "gelu_tanh":
        t, _ = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z), FINE)
        return 0.5 * z * (1 + t)
    elif ACT == "relu":
        return tl.where(z <= 0, 0.0, z)  # NaN stays NaN
    elif ACT == "silu":
        return z * tl.sigmoid(z)
    else:
        t, _ = _tanh(z, FINE)
        return t


@triton.jit
def _derivative(z, ACT: tl.constexpr, FINE: tl.constexpr):
    if ACT == "gelu":
        phi, density = _normal(z, FINE)
        return phi + z * density
    elif ACT == "gelu_tanh":
        t, dt = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z), FINE)
        slope = 0.7978845608028654 * (1 + 0.134145 * z * z)
        return 0.5 * (1 + t) + 0.5 * z * dt * slope
    elif ACT == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
    else:
        _, dt = _tanh(z, FINE)
        return dt


@triton.jit
def level(z, LOW: tl.constexpr, STEP: tl.constexpr, ACT: tl.constexpr):
    """Return act'(z) in 8 bits."""
    return ((_derivative(z, ACT, False) - LOW) / STEP + 0.5).to(tl.uint8)


@triton.jit
def slope(
    kept,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    ACT: tl.constexpr,
    FINE: tl.constexpr,
    FEW_BITS: tl.constexpr,
):
    """Return act' of what the forward pass kept: its input, or act' itself in 8 bits."""
    if FEW_BITS:
        return kept * STEP + LOW
    else:
        return _derivative(kept, ACT, FINE)


@triton.jit(do_not_specialize=["M"])
def _activation_fwd_kernel(
    x_ptr,  # [M, N]
    b_ptr,  # [N]
    h_ptr,  # [M, N], contiguous
    d_ptr,  # [M, N], uint8, contiguous
    M,
    N,
    stride_xm,
    stride_xn,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FEW_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows[:, None] * stride_xm + cols.to(tl.int64)[None, :] * stride_xn
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    to = rows[:, None] * N + cols[None, :]
    fine: tl.constexpr = h_ptr.dtype.element_ty == tl.float32
    tl.store(h_ptr + to, value(z, ACT, fine).to(h_ptr.dtype.element_ty), mask=inside)
    if FEW_BITS:
        tl.store(d_ptr + to, level(z, LOW, STEP, ACT), mask=inside)


@triton.jit(do_not_specialize=["M", "P"])
def _activation_bwd_kernel(
    x_ptr,  # [M, N]; with FEW_BITS the uint8 derivative
    b_ptr,  # [N]
    dh_ptr,  # [M, N]
    dz_ptr,  # [M, N], contiguous
    partial_ptr,  # [P, N], fp32
    M,
    N,
    P,
    stride_xm,
    stride_xn,
    stride_hm,
    stride_hn,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FEW_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    in_row = cols < N
    wide = cols.to(tl.int64)[None, :]
    if HAS_BIAS:
        b = tl.load(b_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    # row offsets are 64 bits wide: M * N may pass 2^31
    rows = share * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    fine: tl.constexpr = dz_ptr.dtype.element_ty == tl.float32
    for _ in range(0, tl.cdiv(M, P * BLOCK_M)):
        inside = (rows < M)[:, None] & in_row[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + wide * stride_xn, mask=inside, other=0)
        dh = tl.load(dh_ptr + rows[:, None] * stride_hm + wide * stride_hn, mask=inside, other=0.0)
        z = x.to(tl.float32)
        if HAS_BIAS:
            z += b
        dz = dh.to(tl.float32) * slope(z, LOW, STEP, ACT, fine, FEW_BITS)
        acc += dz
        tl.store(dz_ptr + rows[:, None] * N + wide, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        rows += P * BLOCK_M
    tl.store(partial_ptr + share * N + cols, tl.sum(acc, axis=0), mask=in_row)


def activation_fwd(
    x: Tensor,
    b: Tensor | None = None,
    act: str = "gelu",
    few_bits: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Add the bias and apply the activation.

    Parameters
    ----------
    x : Tensor
        `[M, N]`, fp32, fp16 or bf16, any strides.
    b : Tensor, optional
        `[N]`, any of these dtypes, contiguous.
    act : str
        A key of `ACTIVATIONS`.
    few_bits : bool
        Whether to return the derivative in 8 bits too.
    in_place : bool
        Whether `h` takes the place of `x`, which is contiguous then.

    Returns
    -------
    h, d : Tensor, Tensor or None
        `[M, N]` in the dtype of `x`; `[M, N]` uint8.
    """
    rows, columns = x.shape
    h = x if in_place else torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    d = torch.empty(rows, columns, dtype=torch.uint8, device=x.device) if few_bits else None
    if h.numel() == 0:
        return h, d
    config = column_config(rows, columns, processors(x))
    config.pop("P")
    low, step = quantisation(act)
    grid = (cdiv(rows, config["BLOCK_M"]), cdiv(columns, config["BLOCK_N"]))
    with device_guard(x):
        _activation_fwd_kernel[grid](
            x,
            x if b is None else b,
            h,
            h if d is None else d,
            rows,
            columns,
            *x.stride(),
            LOW=low,
            STEP=step,
            ACT=act,
            HAS_BIAS=b is not None,
            FEW_BITS=few_bits,
            **config,
        )
    return h, d


def activation_bwd(
    dh: Tensor,
    x: Tensor,
    b: Tensor | None = None,
    act: str = "gelu",
    partial: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the activation's input and its column sum.

    Parameters
    ----------
    dh : Tensor
        `[M, N]`, gradient of the output; any strides, and only read unless asked otherwise.
    x : Tensor
        `[M, N]`, the input of the forward pass, or the uint8 derivative that it returned.
    b : Tensor, optional
        `[N]`, the bias of the forward pass; unused with the derivative.
    act : str
        A key of `ACTIVATIONS`.
    partial : Tensor, optional
        `[1, P, N]` fp32, contiguous: where partial rows go that the caller will add.
    in_place : bool
        Whether `dz` takes the place of `dh`, which is contiguous then.

    Returns
    -------
    dz, db : Tensor, Tensor
        `[M, N]` in the dtype of `dh`; `[N]` fp32, the sum of the unrounded `dz`, or `partial`.
        The same inputs give the same bits.
    """
    rows, columns = dh.shape
    few_bits = x.dtype == torch.uint8
    has_bias = b is not None and not few_bits
    config = column_config(rows, columns, processors(dh))
    size, later = (1, config.pop("P"), columns), partial is not None
    if partial is None:
        partial = torch.empty(size, dtype=torch.float32, device=dh.device)
    partial_rows = partial.shape[1]
    low, step = quantisation(act)
    dz = dh if in_place else torch.empty(rows, columns, dtype=dh.dtype, device=dh.device)
    if partial.numel():
        grid = (cdiv(columns, config["BLOCK_N"]), partial_rows)
        with device_guard(dh):
            _activation_bwd_kernel[grid](
                x,
                b if has_bias else dh,
                dh,
                dz,
                partial,
                rows,
                columns,
                partial_rows,
                *x.stride(),
                *dh.stride(),
                LOW=low,
                STEP=step,
                ACT=act,
                HAS_BIAS=has_bias,
                FEW_BITS=few_bits,
                **config,
            )
    return dz, partial if later else add_partial_rows(partial)[0]
