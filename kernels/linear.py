"""Products with a frozen weight that take the activation along which lies before or behind them.

    u = x W^T,   h = act(u + b)                                          forward
    dz = (dy W) * act'(u + b),   db[n] = sum_m dz[m, n]                  backward

Forward, the weight is the block's first, `[N, K]`; backward the second, `[K, N]`, both as
`nn.Linear` stores them. The kernels take either as `[K, N]` of any strides, and the matrix before
it as `[M, K]`. In the epilogue the tile is in registers: there the bias is added and the activation
or its derivative taken, and, backward, the column sum that is the bias's gradient. fp32, fp16 or
bf16 in and out, fp32 accumulation and `db`.

Forward reads both factors and writes `h`, and `u` or act' in 8 bits where a backward pass will ask
for it: `M N` elements less than a product followed by `activation_fwd`. Backward reads both factors
and what was kept, and writes `dz` and a partial row of `db` for each block of rows: `2 M N`
elements less than a product followed by `activation_bwd`. The operations, `2 M N K`, are those of
the plain product.

`ops.linear` is where they are used. Whether one beats the vendor's product and the activation's own
pass is a question for each shape and device, which `measured` answers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._constants import quantisation
from ._launch import cdiv, device_guard, processors, product_config
from ._product import block, product_tile, quarters
from ._reduce import add_partial_rows
from .activation import level, slope, value

__all__ = ["linear_bwd", "linear_fwd"]


@triton.jit(do_not_specialize=["M"])
def _linear_fwd_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [K, N]
    b_ptr,  # [N]
    h_ptr,  # [M, N], contiguous
    kept_ptr,  # [M, N], contiguous: u, or with FEW_BITS act' in uint8
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEPS: tl.constexpr,
    FEW_BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    block_m, block_n = block(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # 64 bits for where the tile begins, 32 within it: the epilogue has few registers left
    above, left = block_m.to(tl.int64) * BLOCK_M, block_n.to(tl.int64) * BLOCK_N
    acc = product_tile(
        x_ptr, w_ptr, above, left, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn,
        EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    parts = quarters(acc)
    fine: tl.constexpr = h_ptr.dtype.element_ty == tl.float32
    row, col = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N // 4)[None, :]
    for i in tl.static_range(4):
        z = parts[i]
        at = left + i * (BLOCK_N // 4)
        in_cols = at + col < N
        inside = (above + row < M) & in_cols
        base, to = above * N + at, row * N + col
        if KEEPS and not FEW_BITS:
            tl.store(kept_ptr + base + to, z.to(kept_ptr.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            z += tl.load(b_ptr + at + col, mask=in_cols, other=0.0).to(tl.float32)
        tl.store(h_ptr + base + to, value(z, ACT, fine).to(h_ptr.dtype.element_ty), mask=inside)
        if KEEPS and FEW_BITS:
            tl.store(kept_ptr + base + to, level(z, LOW, STEP, ACT), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _linear_bwd_kernel(
    dy_ptr,  # [M, K]
    w_ptr,  # [K, N]
    x_ptr,  # [M, N]; with FEW_BITS the uint8 derivative
    b_ptr,  # [N]
    dz_ptr,  # [M, N], contiguous
    partial_ptr,  # [blocks of rows, N], fp32
    M,
    N,
    K,
    stride_ym,
    stride_yk,
    stride_wk,
    stride_wn,
    stride_xm,
    stride_xn,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FEW_BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    block_m, block_n = block(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    above, left = block_m.to(tl.int64) * BLOCK_M, block_n.to(tl.int64) * BLOCK_N
    acc = product_tile(
        dy_ptr, w_ptr, above, left, M, N, K, stride_ym, stride_yk, stride_wk, stride_wn,
        EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    parts = quarters(acc)
    fine: tl.constexpr = dz_ptr.dtype.element_ty == tl.float32
    row, col = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N // 4)[None, :]
    for i in tl.static_range(4):
        part = parts[i]
        at = left + i * (BLOCK_N // 4)
        in_cols = at + col < N
        inside = (above + row < M) & in_cols
        x_at = x_ptr + above * stride_xm + at * stride_xn
        x = tl.load(x_at + (row * stride_xm + col * stride_xn), mask=inside, other=0)
        x = x.to(tl.float32)
        if HAS_BIAS:
            x += tl.load(b_ptr + at + col, mask=in_cols, other=0.0).to(tl.float32)
        part *= slope(x, LOW, STEP, ACT, fine, FEW_BITS)
        dz_at = dz_ptr + above * N + at
        tl.store(dz_at + (row * N + col), part.to(dz_ptr.dtype.element_ty), mask=inside)
        # rows beyond M are products with zeros
        db_at = partial_ptr + block_m.to(tl.int64) * N + at
        tl.store(db_at + col, tl.sum(part, axis=0)[None, :], mask=in_cols)


def _launch(a: Tensor, w: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Return how many blocks of rows and columns a product has, and the configuration."""
    (rows, inner), columns = a.shape, w.shape[1]
    if w.shape[0] != inner:
        raise RuntimeError(f"{tuple(a.shape)} and {tuple(w.shape)} cannot be multiplied")
    config = product_config(rows, columns, inner, a.element_size(), processors(a))
    blocks = cdiv(rows, config["BLOCK_M"]), cdiv(columns, config["BLOCK_N"])
    return blocks, {**config, "EVEN_K": inner % config["BLOCK_K"] == 0}


def linear_fwd(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    act: str = "gelu",
    few_bits: bool = False,
    keeps: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Multiply by a weight, add the bias and apply the activation.

    Parameters
    ----------
    x : Tensor
        `[M, K]`, fp32, fp16 or bf16, any strides.
    w : Tensor
        `[K, N]` of the same dtype, any strides: the transpose of what `nn.Linear` stores.
    b : Tensor, optional
        `[N]`, any of these dtypes, contiguous.
    act : str
        A key of `ACTIVATIONS`.
    few_bits, keeps : bool
        Whether act' is kept in 8 bits rather than the activation's input, and whether either is.

    Returns
    -------
    h, kept : Tensor, Tensor or None
        `[M, N]` in the dtype of `x`; `[M, N]`, the product without its bias in that dtype, or
        uint8.
    """
    (rows, inner), columns = x.shape, w.shape[1]
    h = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    kept: Tensor | None = None
    if keeps:
        kept = torch.empty_like(h, dtype=torch.uint8 if few_bits else x.dtype)
    low, step = quantisation(act)
    if h.numel():
        blocks, config = _launch(x, w)
        with device_guard(x):
            _linear_fwd_kernel[(blocks[0] * blocks[1],)](
                x,
                w,
                x if b is None else b,
                h,
                h if kept is None else kept,
                rows,
                columns,
                inner,
                *x.stride(),
                *w.stride(),
                LOW=low,
                STEP=step,
                ACT=act,
                HAS_BIAS=b is not None,
                KEEPS=keeps,
                FEW_BITS=few_bits and keeps,
                **config,
            )
    return h, kept


def linear_bwd(
    dy: Tensor,
    w: Tensor,
    x: Tensor,
    b: Tensor | None = None,
    act: str = "gelu",
    partial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the input of the activation before a product, and its column sum.

    Parameters
    ----------
    dy : Tensor
        `[M, K]`, fp32, fp16 or bf16, gradient of the product; only read, any strides.
    w : Tensor
        `[K, N]` of the same dtype, any strides.
    x : Tensor
        `[M, N]`, what the activation's forward pass kept: its input, or the uint8 derivative.
    b : Tensor, optional
        `[N]`, the bias that the activation's input lacks; unused with the derivative.
    act : str
        A key of `ACTIVATIONS`.
    partial : Tensor, optional
        `[1, P, N]` fp32, contiguous, with a P of `M / BLOCK_M`, rounded up: where partial rows go
        that the caller will add.

    Returns
    -------
    dz, db : Tensor, Tensor
        `[M, N]` in the dtype of `dy`; `[N]` fp32, the sum of the unrounded `dz`, or `partial`.
        The same inputs give the same bits.

    Raises
    ------
    ValueError
        If `partial` has another shape.
    """
    (rows, inner), columns = dy.shape, w.shape[1]
    few_bits = x.dtype == torch.uint8
    has_bias = b is not None and not few_bits
    low, step = quantisation(act)
    dz = torch.empty(rows, columns, dtype=dy.dtype, device=dy.device)
    blocks, config = _launch(dy, w)
    later = partial is not None
    if partial is None:
        partial = torch.empty(1, blocks[0], columns, dtype=torch.float32, device=dy.device)
    elif partial.shape != (1, blocks[0], columns):
        shape = (1, blocks[0], columns)
        raise ValueError(f"partial is {tuple(partial.shape)}, and the sums take {shape}")
    if dz.numel():
        with device_guard(dy):
            _linear_bwd_kernel[(blocks[0] * blocks[1],)](
                dy,
                w,
                x,
                b if has_bias else dy,
                dz,
                partial,
                rows,
                columns,
                inner,
                *dy.stride(),
                *w.stride(),
                *x.stride(),
                LOW=low,
                STEP=step,
                ACT=act,
                HAS_BIAS=has_bias,
                FEW_BITS=few_bits,
                # the assembler spills rather than take more on its own, where four warps multiply
                maxnreg=224 if config["num_warps"] == 4 else None,
                **config,
            )
    return dz, partial if later else add_partial_rows(partial)[0]
