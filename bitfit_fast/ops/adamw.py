"""Clipping and AdamW over flat buffers, in two launches of a GPU.

On a CPU `ArenaAdamW` takes PyTorch's; what is here in PyTorch is the definition.
"""

from __future__ import annotations

import torch

from ..kernels._constants import MOST_PARTS, PART
from ._autograd import operation
from ._backend import uses_triton

__all__ = ["adamw_", "squares"]


def _parts(gradients):
    return min(MOST_PARTS, -(-gradients.shape[0] // PART))


@operation("squares", "(Tensor gradients, Tensor(a!) steps) -> Tensor", writes=("steps",))
def squares(gradients, steps):
    """Return partial sums of squares, and add 1 to all step counts; see the kernel's."""
    if uses_triton(gradients):
        from ..kernels import adamw as kernel

        return kernel.squares(gradients, steps)
    steps += 1
    parts = gradients.tensor_split(_parts(gradients))
    return torch.stack([part.square().sum() for part in parts])


@squares.register_fake
def _(gradients, steps):
    return gradients.new_empty(_parts(gradients))


@operation(
    "adamw_",
    "(Tensor(a!) values, Tensor(b!) gradients, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
    "Tensor step, Tensor lr, Tensor partial, float max_norm, float beta1, float beta2, float eps, "
    "float weight_decay, bool maximize) -> ()",
    writes=("values", "gradients", "exp_avg", "exp_avg_sq"),
)
def adamw_(values, gradients, exp_avg, exp_avg_sq, step, lr, partial, *options):
    """Clip, and update in place; see the kernel's."""
    if uses_triton(values):
        from ..kernels import adamw as kernel

        kernel.adamw(values, gradients, exp_avg, exp_avg_sq, step, lr, partial, *options)
        return
    max_norm, beta1, beta2, eps, weight_decay, maximize = options
    gradients /= ((partial.sum().sqrt() + 1e-6) / max_norm).clamp(min=1)
    g = -gradients if maximize else gradients
    corrections = [(1 - beta ** step.double()).to(values.dtype) for beta in (beta1, beta2)]
    values -= lr * weight_decay * values
    exp_avg += (1 - beta1) * (g - exp_avg)
    exp_avg_sq.mul_(beta2).add_((1 - beta2) * g * g)
    values -= lr / corrections[0] * exp_avg / (exp_avg_sq.sqrt() / corrections[1].sqrt() + eps)


@adamw_.register_fake
def _(values, gradients, exp_avg, exp_avg_sq, step, lr, partial, *options):
    return None
