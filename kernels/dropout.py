"""Dropout alone, `y = x keep / (1 - p)`, for where no fused operation takes it along.

Forward and backward are the same function of the seed. In 16 bits an element costs 2 bytes read
and 2 written, and no mask is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._constants import threshold
from ._dropout import kept
from ._launch import cdiv, device_guard, next_power_of_2

__all__ = ["dropout"]


@triton.jit(do_not_specialize=["M", "threshold"])
def _dropout_kernel(
    x_ptr,
    y_ptr,
    seed_ptr,
    stride_xm,
    M,
    N,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # row offsets are 64 bits wide: M * N may pass 2^31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :], mask=inside, other=0.0)
    keep = kept(seed_ptr, rows, first, threshold, BLOCK_N)
    y = tl.where(keep, x.to(tl.float32) * scale, 0.0)
    y_ptrs = y_ptr + rows[:, None] * N + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Drop elements, and scale the others.

    Parameters
    ----------
    x : Tensor
        `[M, N]`, fp32, fp16 or bf16.
    p : float
        Probability of dropping an element, below 1.
    seed : Tensor
        `[1]` int64 on the device of `x`.

    Returns
    -------
    Tensor
        Like `x`, contiguous.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = min(256, max(16, next_power_of_2(columns)))
    block_m = 1024 // block_n * 4
    if y.numel():
        with device_guard(x):
            _dropout_kernel[(cdiv(rows, block_m), cdiv(columns, block_n))](
                x,
                y,
                seed,
                x.stride(0),
                rows,
                columns,
                threshold(p),
                1 / (1 - p),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=8,
            )
    return y
