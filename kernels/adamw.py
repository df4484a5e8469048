"""Clipping and AdamW over one flat buffer: the sum of squares, then everything else.

    scale = max(1, (sqrt(sum g^2) + 1e-6) / max_norm),   g = g / scale
    m = m + (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g^2,   w = w (1 - lr weight_decay)
    w = w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

as in `torch.optim.AdamW` behind `clip_grad_norm_` (Loshchilov and Hutter 2019), all in fp32. The
first launch reads g and writes a partial sum for each program, and counts the step t; the second
adds those up in a fixed order and reads g, w, m, v and writes them: 9 N numbers in all. PyTorch
takes six launches for that, whose last gives a multiprocessor 65,536 numbers: two work, the
others wait.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._constants import MOST_PARTS, PART
from ._launch import cdiv, device_guard, next_power_of_2

__all__ = ["adamw", "squares"]


@triton.jit(do_not_specialize=["N", "S", "P"])
def _squares_kernel(
    gradients_ptr,  # [N]
    steps_ptr,  # [S]
    partial_ptr,  # [P]
    N,
    S,
    P,
    BLOCK: tl.constexpr,
):
    share = tl.program_id(0)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(share * BLOCK, N, P * BLOCK):
        at = first + tl.arange(0, BLOCK)
        g = tl.load(gradients_ptr + at, mask=at < N, other=0.0)
        acc += g * g
    tl.store(partial_ptr + share, tl.sum(acc, axis=0))
    if share == 0:
        for first in range(0, S, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(steps_ptr + at, tl.load(steps_ptr + at, mask=at < S) + 1, mask=at < S)


@triton.jit(do_not_specialize=["N", "P"])
def _adamw_kernel(
    values_ptr,  # [N]
    gradients_ptr,  # [N]
    first_ptr,  # [N], exp_avg
    second_ptr,  # [N], exp_avg_sq
    step_ptr,  # []
    lr_ptr,  # []
    partial_ptr,  # [P]
    N,
    P,
    max_norm,
    rate1,  # 1 - beta1
    rate2,
    beta2,
    log1,  # log2(beta1)
    log2,
    eps,
    weight_decay,
    sign,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    parts = tl.arange(0, BLOCK_P)
    norm = tl.sqrt(tl.sum(tl.load(partial_ptr + parts, mask=parts < P, other=0.0), axis=0))
    scale = (norm + 1e-6) / max_norm
    scale = tl.where(scale < 1, 1.0, scale)  # a norm that is no number stays none
    lr = tl.load(lr_ptr)
    # 1 - 0.999^t loses four digits in fp32
    step = tl.load(step_ptr).to(tl.float64)
    correction1 = (1 - tl.exp2(step * log1)).to(tl.float32)
    correction2 = (1 - tl.exp2(step * log2)).to(tl.float32)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    g = tl.load(gradients_ptr + at, mask=inside, other=0.0) / scale
    tl.store(gradients_ptr + at, g, mask=inside)
    g *= sign
    w = tl.load(values_ptr + at, mask=inside, other=0.0)
    first = tl.load(first_ptr + at, mask=inside, other=0.0)
    second = tl.load(second_ptr + at, mask=inside, other=0.0)
    w -= lr * weight_decay * w
    first += rate1 * (g - first)
    second = beta2 * second + rate2 * g * g
    w -= lr / correction1 * first / (tl.sqrt(second) / tl.sqrt(correction2) + eps)
    tl.store(values_ptr + at, w, mask=inside)
    tl.store(first_ptr + at, first, mask=inside)
    tl.store(second_ptr + at, second, mask=inside)


def squares(gradients: Tensor, steps: Tensor) -> Tensor:
    """Return partial sums of the squares of all gradients, and count a step.

    Parameters
    ----------
    gradients : Tensor
        `[N]` fp32, contiguous, N above 0.
    steps : Tensor
        `[S]` fp32, contiguous; to each 1 is added.

    Returns
    -------
    Tensor
        `[P]` fp32.
    """
    parts = min(MOST_PARTS, cdiv(len(gradients), PART))
    partial = torch.empty(parts, dtype=torch.float32, device=gradients.device)
    with device_guard(gradients):
        _squares_kernel[(parts,)](
            gradients, steps, partial, len(gradients), len(steps), parts, BLOCK=PART
        )
    return partial


def adamw(
    values: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    partial: Tensor,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Clip gradients, and update values and moments, in place.

    Parameters
    ----------
    values, gradients, exp_avg, exp_avg_sq : Tensor
        `[N]` fp32, contiguous.
    step, lr : Tensor
        fp32, one number on the device; `step` counts this one.
    partial : Tensor
        `[P]` fp32, what `squares` gave.
    max_norm, beta1, beta2, eps, weight_decay, maximize
        As in PyTorch; the betas above 0.
    """
    with device_guard(values):
        _adamw_kernel[(cdiv(len(values), PART),)](
            values,
            gradients,
            exp_avg,
            exp_avg_sq,
            step,
            lr,
            partial,
            len(values),
            len(partial),
            max_norm,
            1 - beta1,
            1 - beta2,
            beta2,
            math.log2(beta1),
            math.log2(beta2),
            eps,
            weight_decay,
            -1.0 if maximize else 1.0,
            BLOCK=PART,
            BLOCK_P=next_power_of_2(len(partial)),
        )
