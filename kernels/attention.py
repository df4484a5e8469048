"""Softmax attention over packed sequences, with dropout, that keeps only its inputs.

    S = q k^T / sqrt(D) + bias,   P = softmax(S),   Pd = P * keep / (1 - p),   o = Pd v

for each sequence and head. `q` is `[Tq, H, D]`, `k` and `v` are `[Tk, H, D]`; sequence b is the
rows from `starts[b]` up to `starts[b + 1]`, of the queries and of the keys, and either may be
empty. `bias` is `[H, S, S']`, the same for every sequence. fp32, fp16 or bf16 in and out; scores,
softmax and sums in fp32, and what is multiplied in the dtype of `q`.

Reads `q`, `k`, `v` and writes `o`, softmax on the way (Milakov and Gimelshein 2018, Dao et al.
2022): `4 T H D` elements, and nothing besides is kept. `attention_bwd` has the backward pass.

Dropout keeps no mask: both passes draw element (i, j) of head h from `_dropout` as that of row
`i H + h`, i counted through all sequences, and column j, counted within its own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import (
    LOG2_E,
    LOWEST,
    VARYING,
    attention_config,
    kept_tile,
    load_rows,
    scores,
    sequence,
    store_rows,
)
from ._constants import threshold
from ._launch import cdiv, device_guard

__all__ = ["attention_fwd"]


@triton.jit(do_not_specialize=VARYING)
def _attention_fwd_kernel(
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    v_ptr,  # [Tk, H, D]
    bias_ptr,  # [H, S, S']
    starts_q_ptr,  # [B + 1], int32
    starts_k_ptr,  # [B + 1], int32
    seed_ptr,  # [1], int64
    o_ptr,  # [Tq, H, D], contiguous
    H, stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh,
    stride_bh, stride_bi, stride_bj, threshold, scale, unscale,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start_q, len_q = sequence(starts_q_ptr)
    start_k, len_k = sequence(starts_k_ptr)
    head, above = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_M
    if above >= len_q:
        return
    left_q = len_q - above
    q_at, k_at, v_at = q_ptr + head * stride_qh, k_ptr + head * stride_kh, v_ptr + head * stride_vh
    bias_at = bias_ptr + head * stride_bh
    q = load_rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
    highest = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for first in range(0, len_k, BLOCK_N):
        left_k = len_k - first
        k = load_rows(k_at, stride_km, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
        v = load_rows(v_at, stride_vm, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
        s = scores(
            q, k, bias_at, stride_bi, stride_bj, above, first, left_q, left_k, scale, HAS_BIAS
        )  # fmt: skip
        keep = kept_tile(
            seed_ptr, starts_q_ptr, H, above, first, threshold, HAS_DROPOUT, BLOCK_M, BLOCK_N
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(s, axis=1))
        shrunk, p = tl.exp2(highest - higher), tl.exp2(s - higher[:, None])
        highest, total = higher, total * shrunk + tl.sum(p, axis=1)
        p = tl.where(keep, p, 0.0).to(v.dtype)
        o = tl.dot(p, v, o * shrunk[:, None], input_precision="ieee")
    # without keys there is no total, and o is zero
    o *= (unscale / tl.where(total == 0, 1.0, total))[:, None]
    store_rows(o_ptr + head * D, H * D, start_q + above, left_q, o, D)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    max_q: int,
    max_k: int,
    p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend, each query to the keys of its own sequence.

    Parameters
    ----------
    q : Tensor
        `[Tq, H, D]`, fp32, fp16 or bf16; D is at most `MAX_HEAD_SIZE`. Strided views as of one
        `[T, 3, H, D]` buffer; only the last dimension is without gaps.
    k, v : Tensor
        `[Tk, H, D]`, of the same dtype, likewise.
    starts_q, starts_k : Tensor
        `[B + 1]` int32 on the device, ascending, from 0 to Tq and to Tk.
    max_q, max_k : int
        At least the queries and keys of the longest sequence.
    p : float
        Probability of dropping a probability, below 1.
    seed : Tensor, optional
        `[1]` int64 on the device; needed with `p > 0`.
    bias : Tensor, optional
        `[H, S, S']`, added to the scores of every sequence: element (i, j) to those of its i-th
        query and j-th key. Any of these dtypes, any strides; it gets no gradient.

    Returns
    -------
    Tensor
        `[Tq, H, D]` in the dtype of `q`, contiguous; zero where a sequence has no keys.
    """
    (rows, heads, d), sequences = q.shape, starts_q.numel() - 1
    config = attention_config(max_q, max_k, d, q.element_size(), "fwd")
    o = torch.empty(rows, heads, d, dtype=q.dtype, device=q.device)
    if o.numel():
        with device_guard(q):
            _attention_fwd_kernel[(sequences, heads, cdiv(max_q, config["BLOCK_M"]))](
                q,
                k,
                v,
                q if bias is None else bias,
                starts_q,
                starts_k,
                starts_q if seed is None else seed,
                o,
                heads,
                *q.stride()[:2],
                *k.stride()[:2],
                *v.stride()[:2],
                *((0, 0, 0) if bias is None else bias.stride()),
                threshold(p),
                LOG2_E.value / math.sqrt(d),
                1 / (1 - p),
                D=d,
                HAS_BIAS=bias is not None,
                HAS_DROPOUT=p > 0,
                **config,
            )
    return o
