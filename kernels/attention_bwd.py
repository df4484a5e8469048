"""The backward pass of attention over packed sequences, from its inputs alone.

    dPd = do v^T,   delta[i] = sum_j Pd[i, j] dPd[i, j]
    dS = P * (dPd * keep / (1 - p) - delta)
    dq = dS k / sqrt(D),   dk = dS^T q / sqrt(D),   dv = Pd^T do

with what `attention` defines. The softmax is computed again. There are three ways to go where `k`
and `v` need gradients:

one block has all queries of a sequence
    A program holds them with their `do`, goes through the keys once for the statistics of its
    rows, the log-sum-exp and delta, and once for `dq`, and has everything that a `dk` and `dv` add
    up. Where one block has all keys too, it goes through them once for both.
one block has all keys
    A program holds them, `dk` and `dv`, and goes through the queries, whose rows are whole.
neither
    A program for each block of queries leaves the statistics, 8 bytes a row and head, to a second
    launch over blocks of keys.

The first two are one launch, of `7 T H D` elements, the third takes two, of `11 T H D`. For `dq`
alone a launch over blocks of queries moves `5 T H D`. Nothing is added across programs: no atomics,
and the same inputs give the same bits.
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

__all__ = ["attention_bwd", "attention_bwd_passes", "attention_sums"]


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
def _tile(
    q, k, v, do, bias_at, seed_ptr, starts_q_ptr, H, stride_bi, stride_bj, above, first, left_q,
    left_k, threshold, scale, unscale, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Return scores, the gradient of the probabilities, and what dropout keeps of both."""
    s = scores(
        q, k, bias_at, stride_bi, stride_bj, above, first, left_q, left_k, scale, HAS_BIAS
    )  # fmt: skip
    keep = kept_tile(
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


@triton.jit(do_not_specialize=VARYING)
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
    start_q, len_q = sequence(starts_q_ptr)
    start_k, len_k = sequence(starts_k_ptr)
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
    q = load_rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
    do = load_rows(do_at, stride_om, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
    highest = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    delta = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if ONE_BLOCK:
        k = load_rows(k_at, stride_km, start_k, len_k, D, BLOCK_N, BLOCK_D)
        v = load_rows(v_at, stride_vm, start_k, len_k, D, BLOCK_N, BLOCK_D)
        s, dp, keep = _tile(
            q, k, v, do, bias_at, seed_ptr, starts_q_ptr, H, stride_bi, stride_bj, above, 0,
            left_q, len_k, threshold, scale, unscale, HAS_BIAS, HAS_DROPOUT,
        )  # fmt: skip
        highest, total, delta = _add_statistics(highest, total, delta, s, dp)
    else:
        for first in range(0, len_k, BLOCK_N):
            left_k = len_k - first
            if AGAIN:
                q = load_rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D, True)
                do = load_rows(do_at, stride_om, start_q + above, left_q, D, BLOCK_M, BLOCK_D, True)
            k = load_rows(k_at, stride_km, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
            v = load_rows(v_at, stride_vm, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
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
                q = load_rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D, True)
                do = load_rows(do_at, stride_om, start_q + above, left_q, D, BLOCK_M, BLOCK_D, True)
            k = load_rows(k_at, stride_km, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
            v = load_rows(v_at, stride_vm, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
            s, dp, keep = _tile(
                q, k, v, do, bias_at, seed_ptr, starts_q_ptr, H, stride_bi, stride_bj, above,
                first, left_q, left_k, threshold, scale, unscale, HAS_BIAS, HAS_DROPOUT,
            )  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        if WRITES_DKV:
            p = tl.where(keep, p, 0.0).to(do.dtype)
            dv = tl.dot(tl.trans(p), do, input_precision="ieee") * unscale
            store_rows(dv_ptr + head * D, stride_dkm, start_k + first, left_k, dv, D)
            if HAS_SUMS:
                v_sum += tl.sum(dv, axis=0)
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * sqrt
            store_rows(dk_ptr + head * D, stride_dkm, start_k + first, left_k, dk, D)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    dq *= sqrt
    store_rows(dq_ptr + head * D, stride_dqm, start_q + above, left_q, dq, D)
    if HAS_SUMS:
        # rows beyond the queries have neither q nor do, and a gradient of zero
        _store_sum(q_sums_ptr, H, head, dq, D)
        if WRITES_DKV:
            _store_vector(v_sums_ptr, H, head, v_sum, D)


@triton.jit(do_not_specialize=VARYING)
def _attention_bwd_all_kernel(
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
    dq_ptr,  # [Tq, H, D]
    q_sums_ptr,  # [B, H, D], fp32
    v_sums_ptr,  # [B, H, D], fp32
    H, stride_om, stride_oh, stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh,
    stride_bh, stride_bi, stride_bj, stride_dkm, threshold, scale, unscale, sqrt, stride_dqm,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    start_q, len_q = sequence(starts_q_ptr)
    start_k, len_k = sequence(starts_k_ptr)
    head = tl.program_id(1).to(tl.int64)
    q_at, do_at = q_ptr + head * stride_qh, do_ptr + head * stride_oh
    k_at, v_at = k_ptr + head * stride_kh, v_ptr + head * stride_vh
    bias_at = bias_ptr + head * stride_bh
    k = load_rows(k_at, stride_km, start_k, len_k, D, BLOCK_N, BLOCK_D)
    v = load_rows(v_at, stride_vm, start_k, len_k, D, BLOCK_N, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    q_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    # tiles are keys by queries: a warp has keys of its own, and all that belongs to these
    key, query = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[None, :]
    for above in range(0, len_q, BLOCK_M):
        left_q = len_q - above
        q = load_rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
        do = load_rows(do_at, stride_om, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        if HAS_BIAS:
            at = bias_at + above * stride_bi.to(tl.int64)
            inside = (key < len_k) & (query < left_q)
            bias = tl.load(at + (key * stride_bj + query * stride_bi), mask=inside, other=0.0)
            s += bias.to(tl.float32) * LOG2_E
        s = tl.where(key < len_k, s, float("-inf"))
        keep = kept_tile(
            seed_ptr, starts_q_ptr, H, above, 0, threshold, HAS_DROPOUT, BLOCK_M, BLOCK_N
        )  # fmt: skip
        keep = tl.trans(keep)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee") * unscale
        dp = tl.where(keep, dp, 0.0)
        p = tl.exp2(s - tl.maximum(tl.max(s, axis=0), LOWEST)[None, :])
        total = tl.sum(p, axis=0)
        # without keys there is no total, and every gradient is zero
        p *= (1 / tl.where(total == 0, 1.0, total))[None, :]
        ds = (p * (dp - tl.sum(p * dp, axis=0)[None, :])).to(k.dtype)
        # queries beyond the last have neither q nor do, and add nothing
        p = tl.where(keep, p, 0.0).to(do.dtype)
        dv = tl.dot(p, do, dv, input_precision="ieee")
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * sqrt
        store_rows(dq_ptr + head * D, stride_dqm, start_q + above, left_q, dq, D)
        if HAS_SUMS:
            q_sum += tl.sum(dq, axis=0)
    dv *= unscale
    store_rows(dv_ptr + head * D, stride_dkm, start_k, len_k, dv, D)
    store_rows(dk_ptr + head * D, stride_dkm, start_k, len_k, dk * sqrt, D)
    if HAS_SUMS:
        _store_vector(q_sums_ptr, H, head, q_sum, D)
        _store_sum(v_sums_ptr, H, head, dv, D)


@triton.jit(do_not_specialize=VARYING)
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
    start_q, len_q = sequence(starts_q_ptr)
    start_k, len_k = sequence(starts_k_ptr)
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_N
    if first >= len_k:
        if HAS_SUMS:
            _store_sum(v_sums_ptr, H, head, tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32), D)
        return
    left_k = len_k - first
    q_at, do_at = q_ptr + head * stride_qh, do_ptr + head * stride_oh
    k_at, v_at = k_ptr + head * stride_kh, v_ptr + head * stride_vh
    bias_at = bias_ptr + head * stride_bh
    k = load_rows(k_at, stride_km, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
    v = load_rows(v_at, stride_vm, start_k + first, left_k, D, BLOCK_N, BLOCK_D)
    row = tl.arange(0, BLOCK_M)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for above in range(0, len_q, BLOCK_M):
        left_q = len_q - above
        numbers = (start_q + above + row) * H + head
        lse = tl.load(lse_ptr + numbers, mask=row < left_q, other=0.0)
        delta = tl.load(delta_ptr + numbers, mask=row < left_q, other=0.0)
        q = load_rows(q_at, stride_qm, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
        do = load_rows(do_at, stride_om, start_q + above, left_q, D, BLOCK_M, BLOCK_D)
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
    store_rows(dv_ptr + head * D, stride_dkm, start_k + first, left_k, dv, D)
    if HAS_SUMS:
        # scores beyond the keys are -inf, and these rows zero
        _store_sum(v_sums_ptr, H, head, dv, D)
    store_rows(dk_ptr + head * D, stride_dkm, start_k + first, left_k, dk * sqrt, D)


def attention_bwd_passes(
    max_q: int, max_k: int, d: int, itemsize: int, needs_kv: bool = True
) -> tuple[str, ...]:
    """Return the launches of a backward pass, by their names in `attention_config`.

    Parameters
    ----------
    max_q, max_k, d, itemsize
        As in `attention_config`.
    needs_kv : bool
        Whether `k` and `v` need gradients.
    """
    if not needs_kv or max_q <= attention_config(max_q, max_k, d, itemsize, "bwd")["BLOCK_M"]:
        return ("bwd",)
    # in fp32, or of wide heads, so many keys and their gradients do not fit into registers
    fits = itemsize == 2 and d <= 64
    if fits and max_k <= attention_config(max_q, max_k, d, itemsize, "bwd_all")["BLOCK_N"]:
        return ("bwd_all",)
    return ("bwd", "bwd_kv")


def attention_sums(
    sequences: int, max_q: int, max_k: int, d: int, itemsize: int, needs_kv: bool
) -> tuple[int, int]:
    """Return how many partial rows the sums of dq and of dv have, one for each program of a head.

    Parameters
    ----------
    sequences : int
        How many there are; the others as in `attention_bwd_passes`.
    """
    sizes = max_q, max_k, d, itemsize
    passes = attention_bwd_passes(*sizes, needs_kv)
    if needs_kv and len(passes) == 1:
        return sequences, sequences
    block_m = attention_config(*sizes, "bwd")["BLOCK_M"]
    block_n = attention_config(*sizes, "bwd_kv")["BLOCK_N"]
    return sequences * cdiv(max_q, block_m), sequences * cdiv(max_k, block_n) * needs_kv


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
    sizes = max_q, max_k, d, q.element_size()
    passes = attention_bwd_passes(*sizes, needs_kv)

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
    one_launch = needs_kv and len(passes) == 1
    # what a second launch, or none, takes; each of its own, which begins at 16 bytes: kernels
    # compile for what does, or does not
    lse, delta = (empty(0 if one_launch else rows, heads, dtype=torch.float32) for _ in range(2))
    do = do if do.stride(2) == 1 else do.contiguous()
    of_q = delta if q_sums is None else q_sums
    of_v = delta if v_sums is None else v_sums
    inputs = (
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
        LOG2_E.value / math.sqrt(d),
        1 / (1 - p),
        1 / math.sqrt(d),
    )
    flags = {
        "D": d,
        "HAS_BIAS": bias is not None,
        "HAS_DROPOUT": p > 0,
        "HAS_SUMS": q_sums is not None,
    }
    with device_guard(q):
        for pass_ in passes:
            config = attention_config(*sizes, pass_, bias is not None)
            blocks_q, blocks_k = cdiv(max_q, config["BLOCK_M"]), cdiv(max_k, config["BLOCK_N"])
            blocks = 1 if one_launch else blocks_k if pass_ == "bwd_kv" else blocks_q
            grid = sequences, heads, blocks
            if not sequences * heads * d * blocks:
                continue
            if pass_ == "bwd_all":
                _attention_bwd_all_kernel[grid](
                    *inputs, dq, of_q, of_v, *numbers, dq.stride(0), **flags, **config
                )
            elif pass_ == "bwd_kv":
                _attention_bwd_kv_kernel[grid](
                    *inputs, lse, delta, of_v, *numbers, **flags, **config
                )
            else:
                _attention_bwd_kernel[grid](
                    *inputs,
                    lse,
                    delta,
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
    return dq, dkv
