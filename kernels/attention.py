"""Softmax attention over packed sequences, with dropout, that keeps only its inputs.

    S = q k^T / sqrt(D) + bias,   P = softmax(S),   Pd = P * keep / (1 - p)       forward
    o = Pd v
    dPd = do v^T,   delta[i] = sum_j Pd[i, j] dPd[i, j]                           backward
    dS = P * (dPd * keep / (1 - p) - delta)
    dq = dS k / sqrt(D),   dk = dS^T q / sqrt(D),   dv = Pd^T do

for each sequence and head. `q` is `[Tq, H, D]`, `k` and `v` are `[Tk, H, D]`; sequence b is the
rows from `starts[b]` up to `starts[b + 1]`, of the queries and of the keys, and either may be
empty. `bias` is `[H, S, S']`, the same for every sequence. fp32, fp16 or bf16 in and out; scores,
softmax and sums in fp32, and what is multiplied in the dtype of `q`.

The forward pass reads `q`, `k`, `v` and writes `o`, softmax on the way (Milakov and Gimelshein
2018, Dao et al. 2022): `4 T H D` elements, and nothing besides is kept. The backward pass
computes the softmax again. A program holds a block of queries with their `do`, goes through the
keys once for the statistics of its rows, the log-sum-exp and delta, and once for `dq`; where one
block has all keys, once for both. Where one block has all queries of a sequence, the program also
has everything that a `dk` and `dv` add up, and the backward pass is one launch, of `7 T H D`
elements. Else it leaves the statistics, 8 bytes a row and head, to a second launch over blocks of
keys. Nothing is added across programs: no atomics, and the same inputs give the same bits.

Dropout keeps no mask: all passes draw element (i, j) of head h from `_dropout` as that of row
`i H + h`, i counted through all sequences, and column j, counted within its own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._constants import threshold
from ._dropout import kept
from ._launch import INTERPRETED, cdiv, device_guard, next_power_of_2

__all__ = [
    "MAX_HEAD_SIZE",
    "attention_bwd",
    "attention_config",
    "attention_fwd",
    "attention_sums",
]

#: The widest head: several blocks of its rows have to fit into a program's registers.
MAX_HEAD_SIZE = 128

# the interpreter multiplies bf16 as the integers that it stores
_INTERPRETED = tl.constexpr(INTERPRETED)
# powers are of 2, for which the GPU has an instruction
_LOG2_E = tl.constexpr(1 / math.log(2))
# below every score and finite: a bias of -inf so far makes no NaN
_LOWEST = tl.constexpr(-1e30)
# what changes with the longest sequence of a batch and with the rate
_VARYING = ["threshold", "stride_bh", "stride_bi", "stride_bj"]


@triton.jit
def _sequence(starts_ptr):
    """Return where this program's sequence begins and its length; T * H * D may pass 2^31."""
    start = tl.load(starts_ptr + tl.program_id(0))
    return start.to(tl.int64), tl.load(starts_ptr + tl.program_id(0) + 1) - start


@triton.jit
def _rows(
    at, stride, first, left, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Return a block of rows, of which `left` are there; the others are zero."""
    row, col = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at += first * stride + (row * stride + col)
    rows = tl.load(at, mask=(row < left) & (col < D), other=0.0, volatile=AGAIN)
    return rows.to(tl.float32) if _INTERPRETED else rows


@triton.jit
def _store_rows(at, stride, first, left, rows, D: tl.constexpr):
    row, col = tl.arange(0, rows.shape[0])[:, None], tl.arange(0, rows.shape[1])[None, :]
    at += first * stride + (row * stride + col)
    tl.store(at, rows.to(at.dtype.element_ty), mask=(row < left) & (col < D))


@triton.jit
def _store_vector(sums_ptr, H, head, vector, D: tl.constexpr):
    """Store what a program adds to a bias gradient, a partial row of its own for each block."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    col = tl.arange(0, vector.shape[0])
    tl.store(sums_ptr + (row * H + head) * D + col, vector, mask=col < D)


@triton.jit
def _store_sum(sums_ptr, H, head, rows, D: tl.constexpr):
    _store_vector(sums_ptr, H, head, tl.sum(rows, axis=0), D)


@triton.jit
def _scores(
    q, k, bias_at, stride_bi, stride_bj, above, first, left_q, left_k, scale,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Return a tile of scores times log2 e: -inf beyond the keys, finite beyond the queries."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    row, col = tl.arange(0, q.shape[0])[:, None], tl.arange(0, k.shape[0])[None, :]
    if HAS_BIAS:
        at = bias_at + above * stride_bi.to(tl.int64) + first * stride_bj.to(tl.int64)
        inside = (row < left_q) & (col < left_k)
        bias = tl.load(at + (row * stride_bi + col * stride_bj), mask=inside, other=0.0)
        s += bias.to(tl.float32) * _LOG2_E
    return tl.where(col < left_k, s, float("-inf"))


@triton.jit
def _keep(
    seed_ptr, starts_q_ptr, H, above, first, threshold,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return which probabilities of a tile are kept."""
    if HAS_DROPOUT:
        # read again, or the compiler holds every row's keys of all rounds in registers
        start = tl.load(starts_q_ptr + tl.program_id(0), volatile=True).to(tl.int64)
        rows = (start + above + tl.arange(0, BLOCK_M)) * H + tl.program_id(1)
        return kept(seed_ptr, rows, first, threshold, BLOCK_N)
    else:
        return tl.full((BLOCK_M, BLOCK_N), True, tl.int1)


@triton.jit
def _tile(
    q, k, v, do, bias_at, seed_ptr, starts_q_ptr, H, stride_bi, stride_bj, above, first, left_q,
    left_k, threshold, scale, unscale, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Return scores, the gradient of the probabilities, and what dropout keeps of both."""
    s = _scores(
        q, k, bias_at, stride_bi, stride_bj, above, first, left_q, left_k, scale, HAS_BIAS
    )  # fmt: skip
    keep = _keep(
        seed_ptr, starts_q_ptr, H, above, first, threshold, HAS_DROPOUT, q.shape[0], k.shape[0]
    )  # fmt: skip
    dp = tl.dot(do, tl.trans(v), input_precision="ieee") * unscale
    return s, tl.where(keep, dp, 0.0), keep


@triton.jit
def _add_statistics(highest, total, delta, s, dp):
    """Go on to a tile's keys with the highest score, the sum of powers, and that times dp."""
    higher = tl.maximum(highest, tl.max(s, axis=1))
    shrunk, p = tl.exp2(highest - higher), tl.exp2(s - higher[:, None])
    return higher, total * shrunk + tl.sum(p, axis=1), delta * shrunk + tl.sum(p * dp, axis=1)


@triton.jit(do_not_specialize=_VARYING)
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
    start_q, len_q = _sequence(starts_q_ptr)
    start_k, len_k = _sequence(starts_k_ptr)
    head, above = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_M
    if above >= len_q:
        return
    left_q = len_q - above
    q_at, k_at, v_at = q_ptr + head * stride_qh, k_ptr + head * stride_kh, v_ptr + head * stride_vh
    bias_at = bias_ptr + head * stride_bh
    q = _rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
    highest = tl.full((BLOCK_M,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for first in range(0, len_k, BLOCK_N):
        left_k = len_k - first
        k = _rows(k_at, stride_km, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
        v = _rows(v_at, stride_vm, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
        s = _scores(
            q, k, bias_at, stride_bi, stride_bj, above, first, left_q, left_k, scale, HAS_BIAS
        )  # fmt: skip
        keep = _keep(
            seed_ptr, starts_q_ptr, H, above, first, threshold, HAS_DROPOUT, BLOCK_M, BLOCK_N
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(s, axis=1))
        shrunk, p = tl.exp2(highest - higher), tl.exp2(s - higher[:, None])
        highest, total = higher, total * shrunk + tl.sum(p, axis=1)
        p = tl.where(keep, p, 0.0).to(v.dtype)
        o = tl.dot(p, v, o * shrunk[:, None], input_precision="ieee")
    # without keys there is no total, and o is zero
    o *= (unscale / tl.where(total == 0, 1.0, total))[:, None]
    _store_rows(o_ptr + head * D, H * D, start_q + above, left_q, o, D)


@triton.jit(do_not_specialize=_VARYING)
def _attention_bwd_kernel(
    do_ptr,  # [Tq, H, D]
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    v_ptr,  # [Tk, H, D]
    bias_ptr,  # [H, S, S']
    starts_q_ptr,  # [B + 1], int32
    starts_k_ptr,  # [B + 1], int32
    seed_ptr,  # [1], int64
    dk_ptr,  # [Tk, H, D]
    dv_ptr,  # [Tk, H, D]
    lse_ptr,  # [Tq, H], fp32, of base 2
    delta_ptr,  # [Tq, H], fp32
    dq_ptr,  # [Tq, H, D]
    q_sums_ptr,  # [B * blocks of queries, H, D], fp32
    v_sums_ptr,  # [B, H, D], fp32; with WRITES_DKV
    H, stride_om, stride_oh, stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh,
    stride_bh, stride_bi, stride_bj, stride_dkm, threshold, scale, unscale, sqrt, stride_dqm,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    WRITES_DKV: tl.constexpr, ONE_BLOCK: tl.constexpr, HAS_SUMS: tl.constexpr,
    AGAIN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start_q, len_q = _sequence(starts_q_ptr)
    start_k, len_k = _sequence(starts_k_ptr)
    head, above = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_M
    # keys without queries have gradients too, of zero
    if above >= len_q and not WRITES_DKV:
        if HAS_SUMS:
            _store_sum(q_sums_ptr, H, head, tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32), D)
        return
    left_q = len_q - above
    q_at, do_at = q_ptr + head * stride_qh, do_ptr + head * stride_oh
    k_at, v_at = k_ptr + head * stride_kh, v_ptr + head * stride_vh
    bias_at = bias_ptr + head * stride_bh
    q = _rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
    do = _rows(do_at, stride_om, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
    highest = tl.full((BLOCK_M,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    delta = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if ONE_BLOCK:
        k = _rows(k_at, stride_km, start_k, len_k, D, BLOCK_N, BLOCK_D)
        v = _rows(v_at, stride_vm, start_k, len_k, D, BLOCK_N, BLOCK_D)
        s, dp, keep = _tile(
            q, k, v, do, bias_at, seed_ptr, starts_q_ptr, H, stride_bi, stride_bj, above, 0,
            left_q, len_k, threshold, scale, unscale, HAS_BIAS, HAS_DROPOUT,
        )  # fmt: skip
        highest, total, delta = _add_statistics(highest, total, delta, s, dp)
    else:
        for first in range(0, len_k, BLOCK_N):
            left_k = len_k - first
            if AGAIN:
                q = _rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D, True)
                do = _rows(do_at, stride_om, start_q + above, left_q, D, BLOCK_M, BLOCK_D, True)
            k = _rows(k_at, stride_km, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
            v = _rows(v_at, stride_vm, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
            s, dp, _ = _tile(
                q, k, v, do, bias_at, seed_ptr, starts_q_ptr, H, stride_bi, stride_bj, above,
                first, left_q, left_k, threshold, scale, unscale, HAS_BIAS, HAS_DROPOUT,
            )  # fmt: skip
            highest, total, delta = _add_statistics(highest, total, delta, s, dp)
    total = tl.where(total == 0, 1.0, total)
    lse = highest + tl.log2(total)
    delta /= total
    if not WRITES_DKV:
        row = tl.arange(0, BLOCK_M)
        numbers = (start_q + above + row) * H + head
        tl.store(lse_ptr + numbers, lse, mask=row < left_q)
        tl.store(delta_ptr + numbers, delta, mask=row < left_q)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    if HAS_SUMS and WRITES_DKV:
        v_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, BLOCK_N if ONE_BLOCK else len_k, BLOCK_N):
        left_k = len_k - first
        if not ONE_BLOCK:
            if AGAIN:
                q = _rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D, True)
                do = _rows(do_at, stride_om, start_q + above, left_q, D, BLOCK_M, BLOCK_D, True)
            k = _rows(k_at, stride_km, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
            v = _rows(v_at, stride_vm, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
            s, dp, keep = _tile(
                q, k, v, do, bias_at, seed_ptr, starts_q_ptr, H, stride_bi, stride_bj, above,
                first, left_q, left_k, threshold, scale, unscale, HAS_BIAS, HAS_DROPOUT,
            )  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        if WRITES_DKV:
            p = tl.where(keep, p, 0.0).to(do.dtype)
            dv = tl.dot(tl.trans(p), do, input_precision="ieee") * unscale
            _store_rows(dv_ptr + head * D, stride_dkm, start_k + first, left_k, dv, D)
            if HAS_SUMS:
                v_sum += tl.sum(dv, axis=0)
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * sqrt
            _store_rows(dk_ptr + head * D, stride_dkm, start_k + first, left_k, dk, D)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    dq *= sqrt
    _store_rows(dq_ptr + head * D, stride_dqm, start_q + above, left_q, dq, D)
    if HAS_SUMS:
        # rows beyond the queries have neither q nor do, and a gradient of zero
        _store_sum(q_sums_ptr, H, head, dq, D)
        if WRITES_DKV:
            _store_vector(v_sums_ptr, H, head, v_sum, D)


@triton.jit(do_not_specialize=_VARYING)
def _attention_bwd_kv_kernel(
    do_ptr,  # [Tq, H, D]
    q_ptr,  # [Tq, H, D]
    k_ptr,  # [Tk, H, D]
    v_ptr,  # [Tk, H, D]
    bias_ptr,  # [H, S, S']
    starts_q_ptr,  # [B + 1], int32
    starts_k_ptr,  # [B + 1], int32
    seed_ptr,  # [1], int64
    dk_ptr,  # [Tk, H, D]
    dv_ptr,  # [Tk, H, D]
    lse_ptr,  # [Tq, H], fp32, of base 2
    delta_ptr,  # [Tq, H], fp32
    v_sums_ptr,  # [B * blocks of keys, H, D], fp32
    H, stride_om, stride_oh, stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh,
    stride_bh, stride_bi, stride_bj, stride_dkm, threshold, scale, unscale, sqrt,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start_q, len_q = _sequence(starts_q_ptr)
    start_k, len_k = _sequence(starts_k_ptr)
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_N
    if first >= len_k:
        if HAS_SUMS:
            _store_sum(v_sums_ptr, H, head, tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32), D)
        return
    left_k = len_k - first
    q_at, do_at = q_ptr + head * stride_qh, do_ptr + head * stride_oh
    k_at, v_at = k_ptr + head * stride_kh, v_ptr + head * stride_vh
    bias_at = bias_ptr + head * stride_bh
    k = _rows(k_at, stride_km, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
    v = _rows(v_at, stride_vm, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
    row = tl.arange(0, BLOCK_M)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for above in range(0, len_q, BLOCK_M):
        left_q = len_q - above
        numbers = (start_q + above + row) * H + head
        lse = tl.load(lse_ptr + numbers, mask=row < left_q, other=0.0)
        delta = tl.load(delta_ptr + numbers, mask=row < left_q, other=0.0)
        q = _rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
        do = _rows(do_at, stride_om, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
        s, dp, keep = _tile(
            q, k, v, do, bias_at, seed_ptr, starts_q_ptr, H, stride_bi, stride_bj, above, first,
            left_q, left_k, threshold, scale, unscale, HAS_BIAS, HAS_DROPOUT,
        )  # fmt: skip
        # rows beyond the queries have neither q nor do, and add nothing
        p = tl.exp2(s - lse[:, None])
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        p = tl.where(keep, p, 0.0).to(do.dtype)
        dv = tl.dot(tl.trans(p), do, dv, input_precision="ieee")
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
    dv *= unscale
    _store_rows(dv_ptr + head * D, stride_dkm, start_k + first, left_k, dv, D)
    if HAS_SUMS:
        # scores beyond the keys are -inf, and these rows zero
        _store_sum(v_sums_ptr, H, head, dv, D)
    _store_rows(dk_ptr + head * D, stride_dkm, start_k + first, left_k, dk * sqrt, D)


def attention_config(max_q: int, max_k: int, d: int, itemsize: int, pass_: str) -> dict[str, int]:
    """Return the launch configuration of a pass: a block of queries, one of keys, and warps.

    Parameters
    ----------
    max_q, max_k : int
        Queries and keys of the longest sequence.
    d : int
        Size of a head.
    itemsize : int
        Bytes of an element of `q`.
    pass_ : str
        `fwd`, `bwd`, or `bwd_kv`, the second launch of the backward pass.

    Raises
    ------
    ValueError
        If a head is wider than `MAX_HEAD_SIZE`.
    """
    if d > MAX_HEAD_SIZE:
        raise ValueError(f"a head of {d} is wider than the {MAX_HEAD_SIZE} that it may have")
    block_d = max(16, next_power_of_2(d))
    few, backward = max_q <= 16, pass_ != "fwd"
    if itemsize == 4:
        # without tensor cores, whole rows of both factors are in registers
        sizes = (16, 16, 4, 1)
    elif pass_ == "bwd_kv":
        sizes = (64, 32, 8, 2) if block_d <= 64 else (32, 64, 8, 2)
    else:
        block_n = 64 if backward and (few or max_k <= 64) else 32
        sizes = (16 if few else 64, block_n, 8 if backward else 4, 2)
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    config = {**dict(zip(names, sizes)), "BLOCK_D": block_d}
    # to fit one more program the assembler would spill a few registers, unless given a limit
    limited = block_d <= 64 if itemsize == 4 else block_d > 64
    return {**config, "maxnreg": 255} if limited else config


def attention_sums(
    sequences: int, max_q: int, max_k: int, d: int, itemsize: int, needs_kv: bool
) -> tuple[int, int]:
    """Return how many partial rows the sums of dq and of dv have, one for each block.

    Parameters
    ----------
    sequences : int
        How many there are; the others as in `attention_config`.
    needs_kv : bool
        Whether `k` and `v` need gradients.
    """
    block_m = attention_config(max_q, max_k, d, itemsize, "bwd")["BLOCK_M"]
    if needs_kv and max_q <= block_m:
        return sequences, sequences
    block_n = attention_config(max_q, max_k, d, itemsize, "bwd_kv")["BLOCK_N"]
    return sequences * cdiv(max_q, block_m), sequences * cdiv(max_k, block_n) * needs_kv


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
                _LOG2_E.value / math.sqrt(d),
                1 / (1 - p),
                D=d,
                HAS_BIAS=bias is not None,
                HAS_DROPOUT=p > 0,
                **config,
            )
    return o


def attention_bwd(
    do: Tensor,
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
    needs_kv: bool = True,
    q_sums: Tensor | None = None,
    v_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `attention_fwd`.

    Parameters
    ----------
    do : Tensor
        `[Tq, H, D]`, gradient of `o` in its dtype; only read, any strides.
    q, k, v, starts_q, starts_k, max_q, max_k, p, seed, bias
        As in the forward pass.
    needs_kv : bool
        Whether `k` and `v` need gradients.
    q_sums, v_sums : Tensor, optional
        `[P, H D]` fp32, contiguous, with P as `attention_sums` says: where partial rows of the
        sums of the unrounded `dq` and `dv` go, which the caller will add. Both or neither;
        without `needs_kv` nothing is written to `v_sums`.

    Returns
    -------
    dq : Tensor
        `[Tq, H, D]` in the dtype of `q`.
    dkv : Tensor or None
        `[Tk, 2, H, D]`, the gradients of `k` and `v`; None where they are not needed.

    Where Tq = Tk both are views of one contiguous `[T, 3, H, D]` buffer, the gradient of a fused
    projection; else each is contiguous. The same inputs give the same bits.
    """
    (rows, heads, d), keys, sequences = q.shape, k.shape[0], starts_q.numel() - 1
    config = attention_config(max_q, max_k, d, q.element_size(), "bwd")

    def empty(*size: int, dtype: torch.dtype = q.dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=q.device)

    dkv = None
    if needs_kv and rows == keys:
        dqkv = empty(rows, 3, heads, d)
        dq, dkv = dqkv[:, 0], dqkv[:, 1:]
    else:
        dq = empty(rows, heads, d)
        dkv = empty(keys, 2, heads, d) if needs_kv else None
    dk, dv = (dq, dq) if dkv is None else dkv.unbind(1)
    # one block has all queries of a sequence, or a second launch goes through the blocks
    one_launch = needs_kv and max_q <= config["BLOCK_M"]
    lse, delta = empty(2, 0 if one_launch else rows, heads, dtype=torch.float32)
    do = do if do.stride(2) == 1 else do.contiguous()
    arguments = (
        do,
        q,
        k,
        v,
        q if bias is None else bias,
        starts_q,
        starts_k,
        starts_q if seed is None else seed,
        dk,
        dv,
        lse,
        delta,
    )
    numbers = (
        heads,
        *do.stride()[:2],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *((0, 0, 0) if bias is None else bias.stride()),
        dk.stride(0),
        threshold(p),
        _LOG2_E.value / math.sqrt(d),
        1 / (1 - p),
        1 / math.sqrt(d),
    )
    flags = {
        "D": d,
        "HAS_BIAS": bias is not None,
        "HAS_DROPOUT": p > 0,
        "HAS_SUMS": q_sums is not None,
    }
    of_q = delta if q_sums is None else q_sums
    of_v = delta if v_sums is None else v_sums
    blocks = 1 if one_launch else cdiv(max_q, config["BLOCK_M"])
    if sequences * heads * d * blocks:
        with device_guard(q):
            _attention_bwd_kernel[(sequences, heads, blocks)](
                *arguments,
                dq,
                of_q,
                of_v,
                *numbers,
                dq.stride(0),
                WRITES_DKV=one_launch,
                ONE_BLOCK=max_k <= config["BLOCK_N"],
                # in fp32 the rows of a wide head would be held in registers
                AGAIN=q.element_size() == 4,
                **flags,
                **config,
            )
            config = attention_config(max_q, max_k, d, q.element_size(), "bwd_kv")
            blocks = cdiv(max_k, config["BLOCK_N"])
            if needs_kv and not one_launch and blocks:
                _attention_bwd_kv_kernel[(sequences, heads, blocks)](
                    *arguments, of_v, *numbers, **flags, **config
                )
    return dq, dkv
