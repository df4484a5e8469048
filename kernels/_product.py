"""A tile of a matrix product, for kernels that have more to do with it than to write it."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import INTERPRETED

__all__ = ["block", "product_tile", "quarters"]

# the interpreter multiplies bf16 as the integers that it stores
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _halves(tile):
    """Return the left and the right half of a tile."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))


@triton.jit
def quarters(tile):
    """Return a tile's columns in four parts: the product fills the registers."""
    left, right = _halves(tile)
    return _halves(left) + _halves(right)


@triton.jit
def block(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return which block of rows and of columns is this program's."""
    # programs that run together share rows of one factor and columns of the other in the cache
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    first = group * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_n)
    return first + within % height, within // height


@triton.jit
def product_tile(
    a_ptr,  # [M, K]
    w_ptr,  # [K, N]
    above,
    left,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_wk,
    stride_wn,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return a tile of the product in fp32; rows and columns beyond it are zeros."""
    row, col = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    in_rows, in_cols = above + row < M, left + col < N
    inner = tl.arange(0, BLOCK_K)
    a_at = a_ptr + above * stride_am + (row * stride_am + inner[None, :] * stride_ak)
    w_at = w_ptr + left * stride_wn + (inner[:, None] * stride_wk + col * stride_wn)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            a = tl.load(a_at, mask=in_rows, other=0.0)
            w = tl.load(w_at, mask=in_cols, other=0.0)
        else:
            there = inner < K - k * BLOCK_K
            a = tl.load(a_at, mask=in_rows & there[None, :], other=0.0)
            w = tl.load(w_at, mask=there[:, None] & in_cols, other=0.0)
        if _INTERPRETED:
            a, w = a.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(a, w, acc, input_precision="ieee")
        a_at += BLOCK_K * stride_ak
        w_at += BLOCK_K * stride_wk
    return acc
