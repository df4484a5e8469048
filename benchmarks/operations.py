"""What is timed: each fused operation, the same in plain PyTorch, and its floors.

Frozen weights and LayerNorm scales have the activations' dtype; biases train and are fp32. In a
model PyTorch's `x + b` rides on the matrix product before it, which `bias_gelu` and its like
cannot show: `feed_forward` has the whole of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitfit_fast import ops

__all__ = ["OPERATIONS", "Operation", "Random"]

EPS = 1e-12

#: Draws a normal tensor of this size and dtype (the activations' by default), and scale.
Random = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """One operation in all its variants.

    Attributes
    ----------
    name : str
        As in the results.
    inputs : callable
        `(rows, width, random)` to its tensors by name; the widths follow a transformer layer,
        whose feed-forward block is four times as wide.
    ours, eager : callable
        The inputs by name to the output. The plain one also runs in fp64, as the reference.
    trains : tuple of str
        Inputs that get a gradient. Without any, the operation is itself a backward pass.
    needs, writes : tuple of str
        What a backward pass reads besides the output's gradient, named by inputs of the same
        size, and the gradients that it writes, where those of two inputs are not one tensor.
    flops : callable
        Inputs to the operations of the matrix products, forward and backward.
    p : float
        Probability of dropout; the reference then takes a `mask`.
    extra : dict of str to callable
        Further variants.
    """

    name: str
    inputs: Callable[[int, int, Random], dict[str, Tensor]]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    trains: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    flops: Callable[[dict[str, Tensor]], tuple[int, int]] = lambda inputs: (0, 0)
    p: float = 0.0
    extra: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def directions(self) -> tuple[str, ...]:
        """Return what there is to time."""
        return ("forward", "backward", "both") if self.trains else ("backward",)

    @property
    def variants(self) -> tuple[str, ...]:
        """Return the names of the variants, `eager` among them."""
        return ("ours", "eager", "compile", *self.extra)

    def floor(self, inputs: dict[str, Tensor], output: int) -> dict[str, tuple[int, int]]:
        """Return (bytes, operations) by direction: each tensor read or written once.

        Parameters
        ----------
        inputs : dict of str to Tensor
        output : int
            Bytes of the output.
        """
        forward = sum(t.nbytes for t in inputs.values()) + output
        ahead, back = self.flops(inputs)
        if not self.trains:
            return {"backward": (forward, back)}
        backward = output + sum(inputs[name].nbytes for name in (*self.needs, *self.writes))
        return {
            "forward": (forward, ahead),
            "backward": (backward, back),
            "both": (forward + backward, ahead + back),
        }


def _products(*pairs: str) -> Callable[[dict[str, Tensor]], tuple[int, int]]:
    # a backward pass multiplies by each frozen weight once, as the forward pass does
    def flops(inputs: dict[str, Tensor]) -> tuple[int, int]:
        rows = next(iter(inputs.values())).shape[0]
        count = sum(2 * rows * inputs[name].numel() for name in pairs)
        return count, count

    return flops


def _column_sum() -> Operation:
    return Operation(
        "column_sum",
        lambda m, n, random: {"dy": random(m, n)},
        ops.column_sum,
        lambda dy: dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)),
    )


def _bias_gelu() -> Operation:
    return Operation(
        "bias_gelu",
        lambda m, n, random: {"x": random(m, 4 * n), "b": random(4 * n, dtype=torch.float32)},
        ops.bias_activation,
        lambda x, b: F.gelu(x + b.to(x.dtype)),
        trains=("x", "b"),
        needs=("x", "b"),
        writes=("x", "b"),
    )


def _dropout_add_layer_norm(p: float) -> Operation:
    def inputs(m: int, n: int, random: Random) -> dict[str, Tensor]:
        out = {"x": random(m, n), "residual": random(m, n), "gamma": 1 + random(n, scale=0.1)}
        return {**out, **{name: random(n, dtype=torch.float32) for name in ("b", "beta")}}

    def ours(x: Tensor, residual: Tensor, gamma: Tensor, b: Tensor, beta: Tensor) -> Tensor:
        return ops.dropout_add_layer_norm(x, gamma, beta, b, residual, p, EPS)[0]

    def eager(
        x: Tensor, residual: Tensor, gamma: Tensor, b: Tensor, beta: Tensor, mask: Any = None
    ) -> Tensor:
        s = x + b.to(x.dtype)
        s = F.dropout(s, p) if mask is None else s * mask / (1 - p)
        return F.layer_norm(s + residual, s.shape[-1:], gamma, beta.to(s.dtype), EPS)

    return Operation(
        "bias_dropout_add_layer_norm" if p else "bias_add_layer_norm",
        inputs,
        ours,
        eager,
        trains=("x", "residual", "b", "beta"),
        needs=("x", "gamma"),
        writes=("x", "b", "beta", *(("residual",) if p else ())),
        p=p,
    )


def _layer_norm() -> Operation:
    def liger(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(x, gamma, beta, EPS)

    there = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")
    return Operation(
        "layer_norm",
        lambda m, n, random: {
            "x": random(m, n),
            "gamma": 1 + random(n, scale=0.1),
            "beta": random(n, dtype=torch.float32),
        },
        lambda x, gamma, beta: ops.layer_norm(x, gamma, beta, EPS),
        lambda x, gamma, beta: F.layer_norm(x, x.shape[-1:], gamma, beta.to(x.dtype), EPS),
        trains=("x", "beta"),
        needs=("x", "gamma"),
        writes=("x", "beta"),
        extra={"liger": liger} if there else {},
    )


def _linear() -> Operation:
    return Operation(
        "linear",
        lambda m, n, random: {
            "x": random(m, n),
            "w": random(n, n, scale=n**-0.5),
            "b": random(n, dtype=torch.float32),
        },
        ops.linear,
        lambda x, w, b: F.linear(x, w, b.to(x.dtype)),
        trains=("x", "b"),
        needs=("w",),
        writes=("x", "b"),
        flops=_products("w"),
    )


def _feed_forward() -> Operation:
    return Operation(
        "feed_forward",
        lambda m, n, random: {
            "x": random(m, n),
            "w1": random(4 * n, n, scale=n**-0.5),
            "b1": random(4 * n, dtype=torch.float32),
            "w2": random(n, 4 * n, scale=(4 * n) ** -0.5),
        },
        ops.feed_forward,
        lambda x, w1, b1, w2: F.linear(F.gelu(F.linear(x, w1, b1.to(x.dtype))), w2),
        trains=("x", "b1"),
        needs=("x", "w1", "b1", "w2"),
        writes=("x", "b1"),
        flops=_products("w1", "w2"),
    )


def _product_gelu_bwd() -> Operation:
    """Return the part of `feed_forward`'s backward pass that one kernel could do."""

    def eager(dy: Tensor, w: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        dz = torch.ops.aten.gelu_backward(dy @ w, x + b.to(x.dtype))
        return dz, dz.sum(0, dtype=b.dtype)

    def epilogue(dy: Tensor, w: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        from bitfit_fast.kernels.linear import linear_bwd

        return linear_bwd(dy, w, x, b, "gelu")

    return Operation(
        "product_gelu_bwd",
        lambda m, n, random: {
            "dy": random(m, n),
            "w": random(n, 4 * n, scale=n**-0.5),
            "x": random(m, 4 * n),
            "b": random(4 * n, dtype=torch.float32),
        },
        # the vendor's product, whatever was measured
        lambda dy, w, x, b: torch.ops.bitfit_fast.activation_bwd(dy @ w, x, b, "gelu"),
        eager,
        flops=_products("w"),
        extra={"epilogue": epilogue} if torch.cuda.is_available() else {},
    )


#: By name.
OPERATIONS = {
    operation.name: operation
    for operation in (
        _column_sum(),
        _bias_gelu(),
        _dropout_add_layer_norm(0.0),
        _dropout_add_layer_norm(0.1),
        _layer_norm(),
        _linear(),
        _feed_forward(),
        _product_gelu_bwd(),
    )
}
