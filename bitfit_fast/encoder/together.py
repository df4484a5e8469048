"""Layers that run in one call, where a CPU has a kernel for every part of them.

What they keep, and the sums that they give, are those of the parts one by one, but that what goes
from layer to layer, and its gradient, is never rounded to bf16.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import layers as kernel
from ..packing import Packing
from .attention import takes_tiles
from .depth import QKV, place
from .gradients import Gradients
from .run import Run
from .stack import KEY, QUERY, ROLES, UP, VALUE, Stack

__all__ = ["backward", "forward", "rows_dtype", "weights"]


def rows_dtype(stack: Stack, packing: Packing) -> torch.dtype:
    """Return in which dtype the first layer takes the rows of a batch packed like this."""
    return torch.float32 if weights(stack, packing, [0], "forward") else stack.dtype


def weights(
    stack: Stack, packing: Packing, numbers: Iterable[int], which: str
) -> list[tuple[Any, ...]]:
    """Return the weights of as many of these layers, from the first on, as one call can run.

    Parameters
    ----------
    stack : Stack
        What they belong to.
    packing : Packing
        Where the sequences lie.
    numbers : iterable of int
        Of the layers.
    which : str
        The `forward` or the `backward` pass.
    """
    found, act = [], ""
    if not takes_tiles(stack.layers[0].qkv.weight, stack.width // stack.heads, packing):
        return []
    for number in numbers:
        of_layer = stack.whole_weights(number, which)
        act = act or stack.layers[number].act
        if of_layer is None or stack.layers[number].act != act:
            break
        found.append(of_layer)
    return found


def _heads(run: Run) -> kernel.Heads:
    packing = run.packing
    starts, each, first_tokens = packing.starts, packing.each, len(packing.first)
    return kernel.Heads(run.stack.heads, starts, each, first_tokens, run.score_bias)


def _layers(
    run: Run, numbers: Sequence[int], of_layers: list[Any], backward: bool
) -> list[kernel.Layer]:
    """Return what the kernel is told of layers in this batch."""
    made = []
    for number, (q, *others) in zip(numbers, of_layers):
        q_b = qkv_b = None
        if not backward:
            qkv_b = run.qkv_bias(number, int(q is not None), 3)
            q_b = None if q is None else run.qkv_bias(number, 0, 1)
        biases = q_b, qkv_b, run.biases[number * len(ROLES) + UP]
        dropout = run.drop_on_cpu(place(number, QKV))
        made.append(kernel.Layer(q, tuple(others), *biases, run.norms(number), *dropout))
    return made


def forward(run: Run, first: int, of_layers: list[tuple[Any, ...]], x: Tensor) -> Tensor:
    """Run layers from `first` on, and keep what the backward pass takes."""
    stack = run.stack
    layers = _layers(run, range(first, first + len(of_layers)), of_layers, backward=False)
    act, few_bits = stack.layers[first].act, stack.memory == "low"
    y, kept = kernel.layers_fwd(
        x.float().contiguous(), layers, _heads(run), act, stack.dtype, few_bits, run.keeps
    )
    for q, qkv, hat, rstd, slope, end_hat, end_rstd in kept:
        projected = (qkv,) if q is None else (q, qkv)
        run.keep(*projected, hat, None, rstd, slope, end_hat, None, end_rstd)
    return y


def backward(
    run: Run, gradients: Gradients, first: int, of_layers: list[tuple[Any, ...]], dy: Tensor
) -> Tensor:
    """Run the backward pass of layers from `first` on downwards; return the gradient below."""
    numbers = range(first, first - len(of_layers), -1)
    layers, kept, indices = _layers(run, numbers, of_layers, backward=True), [], []
    for number in numbers:
        qkv, hat, _, rstd, slope, end_hat, _, end_rstd = run.taken(8)
        q = run.taken(1)[0] if run.stack.computes_first(number) else None
        kept.append((q, qkv, hat, rstd, slope, end_hat, end_rstd))
        layer, at = run.stack.layers[number], number * len(ROLES)
        ends = layer.end.beta, layer.end.bias, at + UP, layer.middle.beta, layer.middle.bias
        indices.append((*ends, at + QUERY, at + KEY, at + VALUE))
    needs = [[gradients.needed(index) for index in of_layer] for of_layer in indices]
    act = run.stack.layers[first].act
    dy = dy.float().contiguous()
    dx, found = kernel.layers_bwd(dy, layers, _heads(run), act, kept, needs)
    for of_layer, gradients_of_layer in zip(indices, found):
        for index, gradient in zip(of_layer, gradients_of_layer):
            if gradient is not None:
                gradients.note(index, gradient)
    return dx
