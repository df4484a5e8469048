"""What an encoder is: layers of frozen weights, with junctions between them.

An encoder is a chain of sublayers, attention and feed-forward block in turn, with a junction
behind each:

    s = residual + dropout(z + b),   y = LayerNorm(s)

where z is what the sublayer's last product gives. The next sublayer takes y; the residual goes on
from y (post-norm) or from s (pre-norm). Pre-norm encoders begin with a junction that has no
sublayer, and end with one that has no LayerNorm.

What is kept of each token and layer for the backward pass, in bytes for a width of d, a
feed-forward block of 4 d and 16 bits a number:

    fast     18 d + 8   q k v, both junctions, the activation's input or derivative
    low      14 d + 8   the derivative in 8 bits, the only approximation
    lower    10 d + 8   the feed-forward block runs again up to its activation
    lowest    4 d + 8   q k v are computed again, too
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BitFitError
from .product import Product

__all__ = [
    "KEY",
    "MEMORY",
    "QUERY",
    "ROLES",
    "UP",
    "VALUE",
    "Junction",
    "Layer",
    "Rate",
    "Stack",
]

#: Biases of a layer, by the terms of the family table, in the order of the operation's inputs.
ROLES = (
    "query",
    "key",
    "value",
    "attention-output",
    "attention-layernorm",
    "intermediate",
    "output",
    "output-layernorm",
)
QUERY, KEY, VALUE, _, _, UP, _, _ = range(len(ROLES))

#: How much is kept for the backward pass, the most first.
MEMORY = ("fast", "low", "lower", "lowest")


@dataclass
class Rate:
    """The probability with which a module of the model drops elements, asked at each step."""

    module: nn.Module
    attribute: str

    def __call__(self) -> float:
        """Return it, 0 in evaluation mode."""
        p = float(getattr(self.module, self.attribute)) if self.module.training else 0.0
        if not 0 <= p < 1:
            raise BitFitError(f"the probability of dropout is {p}; it must be from 0 to below 1")
        return p


@dataclass
class Junction:
    """The bias, dropout, residual and LayerNorm behind a sublayer.

    Attributes
    ----------
    bias, beta : int or None
        Which of the operation's inputs they are; None for a junction without sublayer, or
        without LayerNorm.
    gamma : Tensor or None
        `[d]` fp32.
    eps : float
        Added to the variance.
    dropout : Rate or None
        Of what the bias is added to.
    """

    bias: int | None
    beta: int | None
    gamma: Tensor | None
    eps: float
    dropout: Rate | None


@dataclass
class Layer:
    """The frozen weights of one layer.

    Attributes
    ----------
    qkv, out, up, down : Product
        `[3 d, d]`, `[d, d]`, `[f, d]`, `[d, f]`.
    act : str
        One of `ops.ACTIVATIONS`.
    dropout : Rate or None
        Of attention's probabilities.
    middle, end : Junction
        Behind attention, and behind the feed-forward block.
    """

    qkv: Product
    out: Product
    up: Product
    down: Product
    act: str
    dropout: Rate | None
    middle: Junction
    end: Junction


@dataclass
class Stack:
    """The layers of an encoder, and how they run.

    Attributes
    ----------
    layers : list of Layer
        From the bottom.
    heads : int
        Of attention.
    dtype : torch.dtype
        Of weights and activations.
    pre_norm : bool
        Whether the residual goes on from before the LayerNorm.
    entry : Junction or None
        The LayerNorm before the first layer of a pre-norm encoder.
    memory : str
        One of `MEMORY`.
    first_only : bool
        Whether the last layer computes only the rows of first tokens, all that the head reads.
    stops : bool
        Whether the backward pass ends at the lowest parameter that trains.
    seeds_apart : Tensor, optional
        How far the seeds of a forward pass lie from the first, once one was drawn; see
        `run.new_seeds`.
    """

    layers: list[Layer]
    heads: int
    dtype: torch.dtype
    pre_norm: bool = False
    entry: Junction | None = None
    memory: str = "fast"
    first_only: bool = False
    stops: bool = True
    seeds_apart: Tensor | None = field(default=None, repr=False, compare=False)
    _first: tuple[Product, Product] | None = field(default=None, repr=False, compare=False)
    #: What `whole_weights` found, by layer and pass.
    _packed: dict[tuple[int, str], tuple[Any, ...] | None] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copied model runs, which packs its own weights."""
        return {**vars(self), "_packed": {}}

    @property
    def width(self) -> int:
        """Numbers of a token between layers."""
        return self.layers[0].out.weight.shape[1]

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass runs feed-forward blocks again."""
        return self.memory in ("lower", "lowest")

    def end_weights(self, number: int, rows: Tensor, which: str) -> tuple[Any, ...] | None:
        """Return a layer's weights behind attention where one call does all of that; else None.

        It keeps, and takes, what the steps one by one do.

        Parameters
        ----------
        number : int
            Of the layer.
        rows : Tensor
            What would be multiplied.
        which : str
            The `forward` or the `backward` pass.
        """
        if self.pre_norm or self.recomputes:
            return None
        layer = self.layers[number]
        products = layer.out, layer.up, layer.down
        weights = tuple(product.packed(rows, which) for product in products)
        return None if any(weight is None for weight in weights) else weights

    def whole_weights(self, number: int, which: str) -> tuple[Any, ...] | None:
        """Return all of a layer's weights where a CPU runs all of it in one call; else None.

        The first of the five is that of the queries, where only first tokens have some, and None
        elsewhere. That the CPU's kernels are used is known.

        Parameters
        ----------
        number : int
            Of the layer.
        which : str
            The `forward` or the `backward` pass.
        """
        if (number, which) not in self._packed:
            self._packed[number, which] = self._whole_weights(number, which)
        return self._packed[number, which]

    def _whole_weights(self, number: int, which: str) -> tuple[Any, ...] | None:
        if self.pre_norm or self.recomputes:
            return None
        layer = self.layers[number]
        first = self.first_products() if self.computes_first(number) else (layer.qkv,)
        products = (*first, layer.out, layer.up, layer.down)
        weights = tuple(product.packed_for_cpu(which) for product in products)
        if any(weight is None for weight in weights):
            return None
        return weights if len(first) == 2 else (None, *weights)

    def first_products(self) -> tuple[Product, Product]:
        """Return the last layer's products for q, and for k and v."""
        if self._first is None:
            qkv, width = self.layers[-1].qkv, self.width
            self._first = qkv.part(0, width), qkv.part(width, 3 * width)
        return self._first

    def computes_first(self, number: int) -> bool:
        """Return whether a layer computes first tokens only."""
        return self.first_only and number == len(self.layers) - 1

    def bytes_kept(self, tokens: int, memory: str | None = None) -> int:
        """Return how much the layers keep of a batch for the backward pass, in bytes."""
        memory = memory or self.memory
        layer, number = self.layers[0], self.dtype.itemsize
        width, inner = layer.down.weight.shape
        # both junctions, with one number a row in fp32 each, or two of pre-norm ones
        kept = 2 * width * number + (16 if self.pre_norm else 8)
        if memory != "lowest":
            kept += layer.qkv.weight.shape[0] * number
        if memory in ("fast", "low"):
            kept += inner * (number if memory == "fast" else 1)
        return tokens * kept * len(self.layers)

    def bytes_packed(self) -> int:
        """Return how much the weights take that the first step packs, in bytes."""
        products = (
            p for layer in self.layers for p in (layer.qkv, layer.out, layer.up, layer.down)
        )
        return sum(product.bytes_packed for product in products)
