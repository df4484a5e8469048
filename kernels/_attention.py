"""What both passes of attention share: tiles of scores, and how a launch divides its work."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ._dropout import kept
from ._launch import INTERPRETED, next_power_of_2

__all__ = [
    "LOG2_E",
    "LOWEST",
    "MAX_HEAD_SIZE",
    "VARYING",
    "attention_config",
    "kept_tile",
    "load_rows",
    "scores",
    "sequence",
    "store_rows",
]

#: The widest head: several blocks of its rows have to fit into a program's registers.
MAX_HEAD_SIZE = 128

# the interpreter multiplies bf16 as the integers that it stores
_INTERPRETED = tl.constexpr(INTERPRETED)
# powers are of 2, for which the GPU has an instruction
LOG2_E = tl.constexpr(1 / math.log(2))
# below every score and finite: a bias of -inf so far makes no NaN
LOWEST = tl.constexpr(-1e30)
# what changes with the longest sequence of a batch and with the rate
VARYING = ["threshold", "stride_bh", "stride_bi", "stride_bj"]


@triton.jit
def sequence(starts_ptr):
    """Return where this program's sequence begins and its length; T * H * D may pass 2^31."""
    start = tl.load(starts_ptr + tl.program_id(0))
    return start.to(tl.int64), tl.load(starts_ptr + tl.program_id(0) + 1) - start


@triton.jit
def load_rows(
    at, stride, first, left, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Return a block of rows, of which `left` are there; the others are zero."""
    row, col = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at += first * stride + (row * stride + col)
    rows = tl.load(at, mask=(row < left) & (col < D), other=0.0, volatile=AGAIN)
    return rows.to(tl.float32) if _INTERPRETED else rows


@triton.jit
def store_rows(at, stride, first, left, rows, D: tl.constexpr):
    row, col = tl.arange(0, rows.shape[0])[:, None], tl.arange(0, rows.shape[1])[None, :]
    at += first * stride + (row * stride + col)
    tl.store(at, rows.to(at.dtype.element_ty), mask=(row < left) & (col < D))


@triton.jit
def scores(
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
        s += bias.to(tl.float32) * LOG2_E
    return tl.where(col < left_k, s, float("-inf"))


@triton.jit
def kept_tile(
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


def attention_config(
    max_q: int, max_k: int, d: int, itemsize: int, pass_: str, has_bias: bool = False
) -> dict[str, int]:
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
        `fwd`, or a launch of the backward pass: `bwd`, `bwd_kv`, the second one, or `bwd_all`,
        of a program that has all keys of a sequence.
    has_bias : bool
        Whether a bias is added to the scores.

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
    elif pass_ == "bwd_all":
        # where the elements of a bias lie takes the registers of half the queries
        sizes = (16, 128, 8, 1) if has_bias else (32, 128, 8, 2)
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
