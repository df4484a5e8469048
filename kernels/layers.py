"""Launchers of whole layers on CPUs with tiles: all of a post-norm encoder's in one call.

What a layer computes is what `tiles` has launchers for, part by part; see `layers.h`. With short
batches the calls themselves are what takes long.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import library
from ._constants import ROUNDS
from .tiles import Norm, Packed, _Junction, _room_for_slopes, _Slopes, _slopes

__all__ = ["Heads", "Kept", "Layer", "layers_bwd", "layers_fwd"]

_P, _L, _I, _F, _ = library.C_TYPES


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("q", "qkv", "out", "up", "down", "q_b", "qkv_b", "up_b")),
        *((name, _P) for name in ("q_rows", "qkv_rows")),
        *(("middle", _Junction), ("end", _Junction), ("slopes", _Slopes)),
        *(("threshold", _I), ("scale", _F), ("seed", _L)),
        *(("ends", _P * 5), ("sums", _P * 3)),
    )


class _Through(ctypes.Structure):
    _fields_ = (
        *((name, _L) for name in ("count", "tokens", "heads", "size")),
        *(("starts", _P), ("each", _P), ("sequences", _L), ("first_tokens", _L)),
        *(("bias", _P), ("bias_head", _L), ("bias_query", _L), ("factor", _F)),
        *((name, _P) for name in ("x", "o", "spare", "firsts", "y")),
        *(("rounds", _I), ("threads", _I)),
    )


@dataclass
class Heads:
    """What attention is told, alike for all layers.

    Attributes
    ----------
    count : int
        Heads.
    starts, each : Tensor
        `[S + 1]` int32: where each sequence's tokens begin, and where those rows of it do of which
        there is one for each first token.
    first_tokens : int
        B: sequences, without those that are there to fill a budget.
    bias : Tensor or None
        As `tiles.attention_fwd` takes it.
    """

    count: int
    starts: Tensor
    each: Tensor
    first_tokens: int
    bias: Tensor | None


@dataclass
class Layer:
    """A layer in one pass over one batch.

    Attributes
    ----------
    q : Packed or None
        The queries' weight, where only first tokens have some: in the last layer.
    weights : tuple of Packed
        Of q, k and v, or then of k and v; of the projection behind attention, and of the
        feed-forward block. All are packed for this pass.
    q_b, qkv_b, up_b : Tensor or None
        fp32, contiguous, as wide as what their weights give; the backward pass takes the last.
    norms : tuple of Norm
        The junctions behind attention and behind the feed-forward block.
    p, seed
        Dropout of attention's probabilities.
    """

    q: Packed | None
    weights: tuple[Packed, Packed, Packed, Packed]
    q_b: Tensor | None
    qkv_b: Tensor | None
    up_b: Tensor | None
    norms: tuple[Norm, Norm]
    p: float
    seed: int | None


#: What a layer keeps: the queries of first tokens, if there are only these; q, k and v, or k and v;
#: xhat and rstd of the first junction, act', and those of the second.
Kept = tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _struct(layer: Layer, q: Tensor | None, qkv: Tensor, kept: Any, act: str) -> _Layer:
    hat, rstd, slope, end_hat, end_rstd = kept or (None,) * 5
    threshold, scale, seed, _ = library.dropped(layer.p, layer.seed)
    return _Layer(
        None if layer.q is None else layer.q.address,
        *(weight.address for weight in layer.weights),
        *map(library.pointer, (layer.q_b, layer.qkv_b, layer.up_b, q, qkv)),
        layer.norms[0].struct(hat, rstd),
        layer.norms[1].struct(end_hat, end_rstd),
        _slopes(slope, act),
        *(threshold, scale, seed),
    )


def _run(
    which: str,
    structs: Sequence[_Layer],
    act: str,
    heads: Heads,
    tokens: int,
    dtype: torch.dtype,
    x: Tensor,
    y: Tensor,
) -> None:
    """Run layers of some dtype, which take contiguous x and give y, both in fp32."""
    width, first_tokens = x.shape[1], heads.first_tokens
    size, bias, backward = width // heads.count, heads.bias, which == "layers_bwd"
    # o and dqkv, and what goes from layer to layer, with rows of first tokens behind it
    o = x.new_empty((1 + 3 * backward) * tokens, width, dtype=dtype)
    spare = x.new_empty(2 * tokens + first_tokens, width)
    strides = (0, 0) if bias is None else bias.stride()[:2]
    through = _Through(
        *(len(structs), tokens, heads.count, size),
        *(heads.starts.data_ptr(), heads.each.data_ptr(), len(heads.starts) - 1, first_tokens),
        *(library.pointer(bias), *strides, size**-0.5),
        *(t.data_ptr() for t in (x, o, spare, spare[2 * tokens :], y)),
        ROUNDS,
    )
    layers = (_Layer * len(structs))(*structs)
    addresses = [ctypes.addressof(layers), ctypes.addressof(through)]
    addresses += [o[tokens:].data_ptr()] * backward
    library.call(which, library.DTYPES[dtype], library.ACTS[act], *addresses)


def layers_fwd(
    x: Tensor,
    layers: Sequence[Layer],
    heads: Heads,
    act: str,
    dtype: torch.dtype,
    few_bits: bool,
    keeps: bool,
) -> tuple[Tensor, list[Kept]]:
    """Run layers from the bottom.

    Parameters
    ----------
    x : Tensor
        `[T, d]` fp32, contiguous.
    layers : sequence of Layer
        With weights packed for the forward pass.
    heads : Heads
        Of attention.
    act : str
        The feed-forward blocks' activation.
    dtype : torch.dtype
        Of the weights, and of what is multiplied and kept: bf16 or fp32. What goes from layer to
        layer is in fp32.
    few_bits, keeps : bool
        Whether act' is kept in 8 bits, and whether anything is.

    Returns
    -------
    y : Tensor
        `[T, d]` fp32, or `[B, d]` where the last layer computes first tokens only.
    kept : list
        What each layer keeps, as `Kept` says; empty where nothing is.
    """
    tokens, width = x.shape
    kept: list[Kept] = []
    structs, rows = [], tokens
    # what is not kept, layers use one after the other
    shared = None if keeps else x.new_empty(tokens, 3 * width, dtype=dtype)
    for layer in layers:
        q = None
        if layer.q is not None:
            rows = heads.first_tokens
            q = x.new_empty(rows, width, dtype=dtype)
        columns = layer.weights[0].columns
        qkv = x.new_empty(tokens, columns, dtype=dtype) if shared is None else shared
        if keeps:
            hats, rstds = qkv.new_empty(2, rows, width), x.new_empty(2, rows)
            slope = _room_for_slopes(hats[0], layer.weights[2].columns, few_bits)
            kept.append((q, qkv, hats[0], rstds[0], slope, hats[1], rstds[1]))
        structs.append(_struct(layer, q, qkv, kept[-1][2:] if keeps else None, act))
    y = x.new_empty(rows, width)
    _run("layers_fwd", structs, act, heads, tokens, dtype, x, y)
    return y, kept


def layers_bwd(
    dy: Tensor,
    layers: Sequence[Layer],
    heads: Heads,
    act: str,
    kept: Sequence[Kept],
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor, list[list[Tensor | None]]]:
    """Run the backward pass of layers, from the top.

    Parameters
    ----------
    dy : Tensor
        fp32, contiguous: the gradient of what the first of these layers gave.
    layers : sequence of Layer
        With weights packed for the backward pass.
    heads, act
        As in the forward pass.
    kept : sequence
        What each layer kept.
    needs : sequence of sequence of bool
        Whether each sum of each layer is needed: of the second junction's beta and b, of `up_b`,
        of the first junction's beta and b, and of the gradients of q, k and v.

    Returns
    -------
    dx : Tensor
        `[T, d]` fp32.
    sums : list of list of Tensor or None
        fp32, those sums.
    """
    width, structs, sums = dy.shape[1], [], []
    sizes: list[int] = []
    for layer, needed in zip(layers, needs):
        widths = (width, width, layer.weights[3].columns, *[width] * 5)
        sizes += [size * wanted for size, wanted in zip(widths, needed)]
    room = iter(dy.new_empty(sum(sizes)).split(sizes))
    for layer, each, needed in zip(layers, kept, needs):
        parts = itertools.islice(room, len(needed))
        found = [part if wanted else None for part, wanted in zip(parts, needed)]
        struct = _struct(layer, each[0], each[1], each[2:], act)
        struct.ends[:] = [*map(library.pointer, found[:5])]
        struct.sums[:] = [*map(library.pointer, found[5:])]
        structs.append(struct)
        sums.append(found)
    qkv = kept[0][1]
    dx = dy.new_empty(len(qkv), width)
    _run("layers_bwd", structs, act, heads, len(qkv), qkv.dtype, dy, dx)
    return dx, sums
