"""The gradient that a linear layer passes on, with the bias gradient of the layer below.

    dx = dy W,                          db[n] = sum_m dx[m, n]           without an activation
    dz = (dy W) * act'(x + b),          db[n] = sum_m dz[m, n]           with one

`dy` is `[M, K]`, `W` is `[K, N]` as `nn.Linear` stores it. The layer below ends in a bias, or in
bias and activation as in `activation.activation_fwd`; its bias gradient is a column sum of this
product, taken in the epilogue from the tile in registers. fp32, fp16 or bf16 in and out, fp32
accumulation and `db`.

Reads `dy`, `W` and, with an activation, `x`; writes the product once and a partial row of `db`
for each block of rows: `2 M N` elements less than a product followed by `activation_bwd`. The
operations, `2 M N K`, are those of the plain product.

`ops.feed_forward` is where it is used. Whether that beats the vendor's product followed by
`activation_bwd` is a question for each shape and device: `MEASURED` answers it, and what it does
not list is the vendor's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._constants import quantisation
from ._launch import INTERPRETED, cdiv, device_guard, processors
from ._reduce import add_partial_rows
from .activation import slope

__all__ = ["MEASURED", "beats_vendor", "linear_bwd", "linear_config"]

# the interpreter multiplies bf16 as the integers that it stores
_INTERPRETED = tl.constexpr(INTERPRETED)

#: By compute capability: (K, N) -> the fewest rows at which this kernel won on such a device.
#: Filled from `benchmarks/results`; empty until a GPU has measured it.
MEASURED: dict[tuple[int, int], dict[tuple[int, int], int]] = {}


@triton.jit
def _halves(tile):
    """Return the left and the right half of a tile."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))


@triton.jit(do_not_specialize=["M"])
def _linear_bwd_kernel(
    dy_ptr,  # [M, K]
    w_ptr,  # [K, N]
    x_ptr,  # [M, N]; with FEW_BITS the uint8 derivative
    b_ptr,  # [N]
    dx_ptr,  # [M, N], contiguous
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
    # programs that run together share rows of dy and columns of W in the cache
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    first = group * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_n)
    block_m, block_n = first + within % height, within // height

    # 64 bits for where the tile begins, 32 within it: the epilogue has few registers left
    above, left = block_m.to(tl.int64) * BLOCK_M, block_n.to(tl.int64) * BLOCK_N
    row, col = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    in_rows, in_cols = above + row < M, left + col < N
    inner = tl.arange(0, BLOCK_K)
    dy_at = dy_ptr + above * stride_ym + (row * stride_ym + inner[None, :] * stride_yk)
    w_at = w_ptr + left * stride_wn + (inner[:, None] * stride_wk + col * stride_wn)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            dy = tl.load(dy_at, mask=in_rows, other=0.0)
            w = tl.load(w_at, mask=in_cols, other=0.0)
        else:
            there = inner < K - k * BLOCK_K
            dy = tl.load(dy_at, mask=in_rows & there[None, :], other=0.0)
            w = tl.load(w_at, mask=there[:, None] & in_cols, other=0.0)
        if _INTERPRETED:
            dy, w = dy.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(dy, w, acc, input_precision="ieee")
        dy_at += BLOCK_K * stride_yk
        w_at += BLOCK_K * stride_wk
    # a quarter of a tile at a time: the product fills the registers
    lower, upper = _halves(acc)
    parts = _halves(lower) + _halves(upper)
    col = tl.arange(0, BLOCK_N // 4)[None, :]
    for i in tl.static_range(4):
        part = parts[i]
        at = left + i * (BLOCK_N // 4)
        in_cols = at + col < N
        inside = in_rows & in_cols
        if ACT is not None:
            x_at = x_ptr + above * stride_xm + at * stride_xn
            x = tl.load(x_at + (row * stride_xm + col * stride_xn), mask=inside, other=0)
            x = x.to(tl.float32)
            if HAS_BIAS:
                x += tl.load(b_ptr + at + col, mask=in_cols, other=0.0).to(tl.float32)
            part *= slope(x, LOW, STEP, ACT, FEW_BITS)
        dx_at = dx_ptr + above * N + at
        tl.store(dx_at + (row * N + col), part.to(dx_ptr.dtype.element_ty), mask=inside)
        # rows beyond M are products with zeros
        db_at = partial_ptr + block_m.to(tl.int64) * N + at
        tl.store(db_at + col, tl.sum(part, axis=0)[None, :], mask=in_cols)


def linear_config(
    rows: int, columns: int, inner: int, itemsize: int, processors: int
) -> dict[str, int]:
    """Return the launch configuration.

    Parameters
    ----------
    rows, columns, inner : int
        M, N and K.
    itemsize : int
        Bytes of an element of `dy`.
    processors : int
        Multiprocessors of the device.
    """
    # two heights and no more, since each is compiled
    few = cdiv(rows, 128) * cdiv(columns, 128) < 2 * processors
    # rows that begin anywhere are read element by element, each with a register of its own
    block_k = 128 // itemsize if inner % (128 // itemsize) == 0 else 32
    return {
        "BLOCK_M": 64 if few else 128,
        "BLOCK_N": 128,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        "num_warps": 8,
        "num_stages": 3,
    }


def beats_vendor(dy: Tensor, w: Tensor) -> bool:
    """Return whether `linear_bwd` was measured to win on this device at this shape."""
    if not (MEASURED and dy.is_cuda):
        return False
    wins = MEASURED.get(torch.cuda.get_device_capability(dy.device), {})
    return dy.shape[0] >= wins.get((w.shape[0], w.shape[1]), dy.shape[0] + 1)


def linear_bwd(
    dy: Tensor,
    w: Tensor,
    x: Tensor | None = None,
    b: Tensor | None = None,
    act: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a linear's input, or of the activation below it, and its sum.

    Parameters
    ----------
    dy : Tensor
        `[M, K]`, fp32, fp16 or bf16, gradient of the linear's output; only read, any strides.
    w : Tensor
        `[K, N]` of the same dtype, any strides.
    x : Tensor, optional
        `[M, N]`, what the forward pass of the activation below kept: its input, or the uint8
        derivative. Needed with `act`.
    b : Tensor, optional
        `[N]`, the bias that the activation's input lacks; unused with the derivative.
    act : str, optional
        A key of `ACTIVATIONS`; None where no activation lies below.

    Returns
    -------
    dx, db : Tensor, Tensor
        `[M, N]` in the dtype of `dy`; `[N]` fp32, the sum of the unrounded `dx`. The same
        inputs give the same bits.
    """
    (rows, inner), columns = dy.shape, w.shape[1]
    few_bits = x is not None and x.dtype == torch.uint8
    has_bias = b is not None and not few_bits
    config = linear_config(rows, columns, inner, dy.element_size(), processors(dy))
    blocks = cdiv(rows, config["BLOCK_M"])
    low, step = quantisation(act) if act else (0.0, 0.0)
    dx = torch.empty(rows, columns, dtype=dy.dtype, device=dy.device)
    partial = torch.empty(1, blocks, columns, dtype=torch.float32, device=dy.device)
    if dx.numel():
        with device_guard(dy):
            _linear_bwd_kernel[(blocks * cdiv(columns, config["BLOCK_N"]),)](
                dy,
                w,
                dy if x is None else x,
                b if has_bias else dy,
                dx,
                partial,
                rows,
                columns,
                inner,
                *dy.stride(),
                *w.stride(),
                *(dy if x is None else x).stride(),
                LOW=low,
                STEP=step,
                ACT=act,
                HAS_BIAS=has_bias,
                FEW_BITS=few_bits,
                EVEN_K=inner % config["BLOCK_K"] == 0,
                **config,
            )
    return dx, add_partial_rows(partial)[0]
