"""All layers of an encoder as one operation, whose backward pass computes bias gradients alone.

It ends at the lowest parameter that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops._autograd import once, shaped
from ..packing import Packing
from .backward import BackwardPass
from .forward import forward_pass
from .gradients import Gradients
from .run import Run
from .stack import Stack

__all__ = ["run_stack"]


def run_stack(
    stack: Stack,
    x: Tensor,
    biases: Sequence[Tensor | None],
    packing: Packing,
    score_bias: Tensor | None = None,
    embedding_beta: Tensor | None = None,
    sinks: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
    overwrites: bool = False,
    rates: Sequence[float] | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Run all layers.

    Parameters
    ----------
    stack : Stack
        The layers.
    x : Tensor
        `[T, d]`, the packed tokens' embeddings.
    biases : sequence of Tensor
        fp32, eight a layer, in the order of `ROLES`; None for one that the model lacks.
    packing : Packing
        Where the sequences lie.
    score_bias : Tensor, optional
        `[H, S, S]`, added to the scores of attention.
    embedding_beta : Tensor, optional
        The bias of a LayerNorm that `x` is the output of, which needs no gradient then.
        It is computed from those of q, k and v without the gradient of `x`, where nothing
        was dropped.
    sinks : sequence of Tensor, optional
        Where the gradient of each bias is added, instead of being handed to autograd;
        None for those that do not train. With one more, where that of `embedding_beta` is
        added, by a backward pass that then lets it be its `grad`.
    dtype : torch.dtype, optional
        Of the output; by default that of `x`.
    overwrites : bool
        Whether gradients take the place of what is in the sinks.
    rates : sequence of float, optional
        The probability of each dropout, by place; that of the input is the one with which a dropout
        behind that LayerNorm dropped elements. By default those of the stack now.
    seeds : Tensor, optional
        Theirs, as `new_seeds` draws them; by default they are drawn.

    Returns
    -------
    Tensor
        `[T, d]`, or `[B, d]` with `first_only`. It cannot be differentiated twice.
    """
    grad, dtype = torch.is_grad_enabled(), dtype or x.dtype
    given = stack, packing, score_bias, sinks, dtype, overwrites, grad, rates, seeds
    with torch.autocast(x.device.type, enabled=False):
        return _Layers.apply(given, x, embedding_beta, *biases)


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: tuple[Any, ...],
        x: Tensor,
        embedding_beta: Tensor | None,
        *biases: Tensor | None,
    ) -> Tensor:
        stack, packing, score_bias, sinks, dtype, overwrites, grad, rates, seeds = given
        keeps = grad and any(ctx.needs_input_grad)
        run = Run(stack, packing, score_bias, biases, dtype, keeps, rates, seeds)
        out = forward_pass(run, x)
        if keeps:
            ctx.run, ctx.dtype, ctx.embedding_beta = run, x.dtype, embedding_beta
            ctx.sinks, ctx.overwrites = sinks, overwrites
            ctx.save_for_backward(*run.take_kept(), *biases)
        return out.to(dtype) if out.dtype != dtype else shaped(out, out.shape)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        run, tensors = ctx.run, ctx.saved_tensors
        _, needs_input, needs_embedding_beta, *needs = ctx.needs_input_grad
        count = len(needs)
        run.restore(tensors[: len(tensors) - count], tensors[len(tensors) - count :])
        # what layers kept is to be freed behind them, unless there will be another backward pass
        del tensors
        if not torch.compiler.is_compiling():
            ctx.maybe_clear_saved_tensors()
        with torch.autocast(dy.device.type, enabled=False):
            gradients = Gradients(
                run.biases, needs, ctx.embedding_beta if needs_embedding_beta else None,
                ctx.sinks, ctx.overwrites, dy, run.stack.recomputes,
            )  # fmt: skip
            dx = BackwardPass(run, gradients, needs_input)(dy)
        # what was kept for layers that the backward pass did not reach
        run.release()
        of_biases = gradients.finish()
        dx = dx.to(ctx.dtype) if dx is not None and needs_input else None
        return (None, dx, *of_biases)
