"""Bias, dropout, residual and LayerNorm in one pass, and all their gradients from one read.

    s = residual + dropout(x + b)                                        forward
    y = xhat * gamma + beta,   xhat = (s - mean(s)) * rstd
    c = dy * gamma                                                       backward
    ds = dsum + rstd * (c - mean(c) - xhat * mean(c * xhat))
    dx = ds * keep / (1 - p)
    dbeta = sum_m dy,   db = sum_m dx,   dgamma = sum_m dy * xhat

`x` is `[M, N]`, the preceding linear's output before its bias; bias, dropout and residual may
each be absent. Means run over the N columns of a row (Ba et al. 2016). `ds` is the gradient of
the residual, `dx` that of the linear's output: the same tensor without dropout. A pre-norm
transformer goes on with `s` besides `y`: with `returns_sum` the forward pass writes it, rounded,
normalises what it wrote, and the backward pass takes its gradient `dsum`. fp32, fp16 or bf16 in
and out, fp32 inside and for `dbeta`, `db`, `dgamma`; N is at most 8192.

The forward pass reads `x` and the residual and writes `y` and `xhat`, `4 M N` elements, and
`rstd`, M numbers; `xhat` and `rstd` are all that is kept. Where `s` is in memory anyway, as the
input of a LayerNorm alone or as the sum returned, that is kept in the place of `xhat`, which
is not written, with M means. The backward pass reads `dy` and `xhat` or `s` and writes `ds`,
with dropout also `dx`, and reads `dsum` where there is one: `3 M N` elements and more. Under
autocast `x` is bf16 and the residual and the outputs are fp32; each keeps its own dtype.

Dropout keeps no mask: both passes draw it from `_dropout`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._constants import MAX_COLUMNS, keeps_sum, sum_dtype, threshold
from ._dropout import kept
from ._launch import cdiv, device_guard, next_power_of_2, processors
from ._reduce import add_partial_rows

__all__ = ["MAX_COLUMNS", "layer_norm_bwd", "layer_norm_config", "layer_norm_fwd"]

#: Above this, three sums of a row's width would not fit into registers.
_MAX_COLUMNS_THREE_SUMS = 4096
#: Elements of a tile: 8 a thread of each tensor, one 16-byte load in bf16.
_TILE = 2048
#: Programs for each multiprocessor of the backward pass: with 8 KB of loads each, enough to hide
#: the memory's latency. Each writes partial rows, which stay in the cache.
_PROGRAMS_PER_PROCESSOR = 4
#: Registers of a thread, of eight warps, with which three of them fit. Left to itself the
#: assembler takes so many that two fit, or spills a few, of what dropout needs with a gradient of
#: the sum or in fp32; told so, it does neither. A third sum does need more.
_REGISTERS_OF_THREE = 80
#: Rows that one of them should have at least.
_ROWS_PER_PROGRAM = 4


@triton.jit(do_not_specialize=["M", "threshold"])
def _layer_norm_fwd_kernel(
    x_ptr,  # [M, N]
    b_ptr,  # [N]
    residual_ptr,  # [M, N]
    gamma_ptr,  # [N]
    beta_ptr,  # [N]
    seed_ptr,  # [1], int64
    s_ptr,  # [M, N], contiguous
    y_ptr,  # [M, N], contiguous
    xhat_ptr,  # [M, N], contiguous
    mean_ptr,  # [M], fp32
    rstd_ptr,  # [M], fp32
    M,
    N,
    stride_xm,
    stride_xn,
    stride_rm,
    stride_rn,
    threshold,
    scale,
    eps,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_BETA: tl.constexpr,
    RETURNS_SUM: tl.constexpr,
    KEEPS_XHAT: tl.constexpr,
    KEEPS_MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < N
    inside = (rows < M)[:, None] & in_row[None, :]
    wide = cols.to(tl.int64)[None, :]
    s = tl.load(x_ptr + rows[:, None] * stride_xm + wide * stride_xn, mask=inside, other=0.0)
    s = s.to(tl.float32)
    if HAS_BIAS:
        s += tl.load(b_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_DROPOUT:
        s = tl.where(kept(seed_ptr, rows, 0, threshold, BLOCK_N), s * scale, 0.0)
    if HAS_RESIDUAL:
        at = residual_ptr + rows[:, None] * stride_rm + wide * stride_rn
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    s = tl.where(inside, s, 0.0)
    to = rows[:, None] * N + wide
    if RETURNS_SUM:
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + to, rounded, mask=inside)
        s = rounded.to(tl.float32)
    mean = tl.sum(s, axis=1) / N
    centred = tl.where(inside, s - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + eps)
    xhat = centred * rstd[:, None]
    y = xhat * tl.load(gamma_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if HAS_BETA:
        y += tl.load(beta_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=inside)
    if KEEPS_XHAT:
        tl.store(xhat_ptr + to, xhat.to(xhat_ptr.dtype.element_ty), mask=inside)
    if KEEPS_MEAN:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
    if KEEPS_XHAT or KEEPS_MEAN:
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit(do_not_specialize=["M", "P", "threshold"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # [M, N]
    kept_ptr,  # [M, N]; with HAS_MEAN what was normalised, else xhat
    mean_ptr,  # [M], fp32
    rstd_ptr,  # [M], fp32
    gamma_ptr,  # [N]
    seed_ptr,  # [1], int64
    dsum_ptr,  # [M, N]
    ds_ptr,  # [M, N], contiguous
    dx_ptr,  # [M, N], contiguous
    partial_ptr,  # [sums, P, N], fp32: those needed of dbeta, db, dgamma
    M,
    N,
    P,
    stride_ym,
    stride_yn,
    stride_km,
    stride_kn,
    stride_sm,
    stride_sn,
    threshold,
    scale,
    HAS_DROPOUT: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    WRITES_DX: tl.constexpr,
    NEEDS_DBETA: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    NEEDS_DGAMMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    share = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < N
    wide = cols.to(tl.int64)[None, :]
    gamma = tl.load(gamma_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if NEEDS_DBETA:
        dbeta = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if NEEDS_DB:
        db = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if NEEDS_DGAMMA:
        dgamma = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # row offsets are 64 bits wide: M * N may pass 2^31
    rows = share * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    for _ in range(0, tl.cdiv(M, P * BLOCK_M)):
        inside = (rows < M)[:, None] & in_row[None, :]
        at = rows[:, None] * N + wide
        dy = tl.load(dy_ptr + rows[:, None] * stride_ym + wide * stride_yn, mask=inside, other=0.0)
        dy = dy.to(tl.float32)
        kept_at = kept_ptr + rows[:, None] * stride_km + wide * stride_kn
        xhat = tl.load(kept_at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        if HAS_MEAN:
            mean_of_s = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
            xhat = tl.where(inside, (xhat - mean_of_s) * rstd, 0.0)
        c = dy * gamma
        along = (tl.sum(c * xhat, axis=1) / N)[:, None]
        mean = (tl.sum(c, axis=1) / N)[:, None]
        ds = tl.where(inside, (c - mean - xhat * along) * rstd, 0.0)
        if HAS_DSUM:
            dsum = dsum_ptr + rows[:, None] * stride_sm + wide * stride_sn
            ds += tl.load(dsum, mask=inside, other=0.0).to(tl.float32)
        tl.store(ds_ptr + at, ds.to(ds_ptr.dtype.element_ty), mask=inside)
        if NEEDS_DBETA:
            dbeta += dy
        if HAS_DROPOUT:
            ds = tl.where(kept(seed_ptr, rows, 0, threshold, BLOCK_N), ds * scale, 0.0)
        if WRITES_DX:
            tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=inside)
        if NEEDS_DB:
            db += ds
        if NEEDS_DGAMMA:
            dgamma += dy * xhat
        rows += P * BLOCK_M
    to = partial_ptr + share * N + cols
    if NEEDS_DBETA:
        tl.store(to, tl.sum(dbeta, axis=0), mask=in_row)
        to += P * N
    if NEEDS_DB:
        tl.store(to, tl.sum(db, axis=0), mask=in_row)
        to += P * N
    if NEEDS_DGAMMA:
        tl.store(to, tl.sum(dgamma, axis=0), mask=in_row)


def layer_norm_config(rows: int, columns: int, processors: int) -> dict[str, int]:
    """Return the launch configuration of both passes: tile sizes, warps, and partial rows P.

    Parameters
    ----------
    rows, columns : int
        Shape of the problem.
    processors : int
        Multiprocessors of the device.

    Raises
    ------
    ValueError
        If there are more columns than `MAX_COLUMNS`.
    """
    if columns > MAX_COLUMNS:
        raise ValueError(f"{columns} columns are more than the {MAX_COLUMNS} that a row may have")
    block_n = max(16, next_power_of_2(columns))
    block_m = max(1, min(16, _TILE // block_n))
    useful = rows // max(_ROWS_PER_PROGRAM, block_m)
    # of short rows the assembler would hold so many a thread that some registers spill
    least = 8 if block_n <= 64 else 4
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": max(least, min(16, block_m * block_n // 256)),
        "P": max(1, min(_PROGRAMS_PER_PROCESSOR * processors, useful)),
    }


def layer_norm_fwd(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    b: Tensor | None = None,
    residual: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-12,
    dtype: torch.dtype | None = None,
    keeps: bool = True,
    returns_sum: bool = False,
    kept_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Add bias and residual, drop out, and normalise.

    Parameters
    ----------
    x : Tensor
        `[M, N]`, fp32, fp16 or bf16, any strides.
    gamma, beta, b : Tensor
        `[N]`, contiguous, of any of these dtypes; `beta` and `b` may be None.
    residual : Tensor, optional
        `[M, N]`, any of these dtypes, any strides.
    p : float
        Probability of dropping an element of `x + b`, below 1.
    seed : Tensor, optional
        `[1]` int64 on the device; needed with `p > 0`.
    eps : float
        Added to the variance.
    dtype : torch.dtype, optional
        Of `y`; that of `x` by default. `s` has that of `x + residual`.
    keeps : bool
        Whether a backward pass will follow.
    returns_sum : bool
        Whether to return what was normalised, too.
    kept_dtype : torch.dtype, optional
        Of `xhat`; that of `y` by default.

    Returns
    -------
    y, s, xhat, mean, rstd : Tensor
        `y`, `s` and `xhat` are `[M, N]`, `mean` and `rstd` `[M]` in fp32. `s` is
        there only where asked for. For a backward pass there are `mean` and `rstd` where
        `keeps_sum`, so that it can take `s` or `x`, and else `xhat` and `rstd`.
    """
    rows, columns = x.shape

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=x.device)

    keeps_mean = keeps and keeps_sum(b, residual, p, returns_sum)
    keeps_xhat = keeps and not keeps_mean

    def numbers() -> Tensor:
        return torch.empty(rows, dtype=torch.float32, device=x.device)

    dtype = dtype or x.dtype
    y, xhat = empty(dtype), empty(kept_dtype or dtype) if keeps_xhat else None
    s = empty(sum_dtype(x, residual)) if returns_sum else None
    mean, rstd = numbers() if keeps_mean else None, numbers() if keeps else None
    config = layer_norm_config(rows, columns, processors(x))
    config.pop("P")
    if y.numel():
        with device_guard(x):
            _layer_norm_fwd_kernel[(cdiv(rows, config["BLOCK_M"]),)](
                x,
                x if b is None else b,
                x if residual is None else residual,
                gamma,
                gamma if beta is None else beta,
                gamma if seed is None else seed,
                y if s is None else s,
                y,
                y if xhat is None else xhat,
                gamma if mean is None else mean,
                gamma if rstd is None else rstd,
                rows,
                columns,
                *x.stride(),
                *(x if residual is None else residual).stride(),
                threshold(p),
                1 / (1 - p),
                eps,
                HAS_BIAS=b is not None,
                HAS_RESIDUAL=residual is not None,
                HAS_DROPOUT=p > 0,
                HAS_BETA=beta is not None,
                RETURNS_SUM=returns_sum,
                KEEPS_XHAT=keeps_xhat,
                KEEPS_MEAN=keeps_mean,
                **config,
            )
    return y, s, xhat, mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    kept: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor,
    dsum: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    ds_dtype: torch.dtype | None = None,
    dx_dtype: torch.dtype | None = None,
    needs_dbeta: bool = True,
    needs_db: bool = True,
    needs_dgamma: bool = False,
    partial: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return every gradient of `layer_norm_fwd`.

    Parameters
    ----------
    dy : Tensor
        `[M, N]`, gradient of `y`; only read, any strides.
    kept : Tensor
        `[M, N]`, `xhat` of the forward pass; or, with its `mean`, what was normalised.
    mean, rstd : Tensor
        What the forward pass returned.
    gamma, p, seed
        As in the forward pass.
    dsum : Tensor, optional
        `[M, N]`, gradient of the sum `s` from elsewhere; only read, any strides.
    ds_dtype, dx_dtype : torch.dtype, optional
        Of `ds` and `dx`; that of `dy` by default.
    needs_dbeta, needs_db, needs_dgamma : bool
        Which of these to sum up.
    partial : Tensor, optional
        `[k, P, N]` fp32, contiguous: where partial rows go that the caller will add.

    Returns
    -------
    ds, dx : Tensor
        `[M, N]`, the same tensor without dropout and of equal dtypes.
    sums : Tensor
        `[k, N]` fp32: those needed of `dbeta`, `db` and `dgamma`, in this order; or `partial`.

    The same inputs give the same bits.
    """
    rows, columns = dy.shape
    needs = (needs_dbeta, needs_db, needs_dgamma)
    if columns > _MAX_COLUMNS_THREE_SUMS and needs_dgamma and sum(needs) > 1:
        assert partial is None
        again = (dy, kept, mean, rstd, gamma, dsum, p, seed, ds_dtype, dx_dtype)
        ds, dx, sums = layer_norm_bwd(*again, needs_dbeta, needs_db, False)
        return ds, dx, torch.cat((sums, layer_norm_bwd(*again, False, False, True)[-1]))
    ds = torch.empty(rows, columns, dtype=ds_dtype or dy.dtype, device=dy.device)
    dx_dtype = dx_dtype or dy.dtype
    writes_dx = p > 0 or dx_dtype != ds.dtype
    dx = torch.empty(rows, columns, dtype=dx_dtype, device=dy.device) if writes_dx else ds
    config = layer_norm_config(rows, columns, processors(dy))
    many = p > 0 and (dsum is not None or dy.dtype == torch.float32)
    if many and not needs_dgamma and config["num_warps"] == 8:
        config["maxnreg"] = _REGISTERS_OF_THREE
    size, later = (sum(needs), config.pop("P"), columns), partial is not None
    if partial is None:
        partial = torch.empty(size, dtype=torch.float32, device=dy.device)
    partial_rows = partial.shape[1]
    if columns == 1:
        # a row of one number is its own mean: what rounding leaves of it, this would make large
        rstd = torch.zeros_like(rstd)
    # without rows there is no ds, and the partial rows are zero
    if columns:
        with device_guard(dy):
            _layer_norm_bwd_kernel[(partial_rows,)](
                dy,
                kept,
                rstd if mean is None else mean,
                rstd,
                gamma,
                rstd if seed is None else seed,
                dy if dsum is None else dsum,
                ds,
                dx,
                partial,
                rows,
                columns,
                partial_rows,
                *dy.stride(),
                *kept.stride(),
                *(dy if dsum is None else dsum).stride(),
                threshold(p),
                1 / (1 - p),
                HAS_DROPOUT=p > 0,
                HAS_DSUM=dsum is not None,
                HAS_MEAN=mean is not None,
                WRITES_DX=writes_dx,
                NEEDS_DBETA=needs_dbeta,
                NEEDS_DB=needs_db,
                NEEDS_DGAMMA=needs_dgamma,
                **config,
            )
    return ds, dx, partial if later else add_partial_rows(partial)
