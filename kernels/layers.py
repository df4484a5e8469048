"""Launchers of whole layers on CPUs with AVX-512: all of a post-norm encoder's in one call.

What a layer computes is what `tiles` has launchers for, part by part; see `layers.h`. With short
batches the calls themselves are what takes long.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from ._constants import ROUNDS
from .tiles import Norm, Packed, _Junction, _room_for_slopes, _Slopes, _slopes

__all__ = ["Heads", "Kept", "Layer", "layers_bwd", "layers_fwd"]

_P, _L, _I, _F, _ = native.C_TYPES


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("qkv", "out", "up", "down", "qkv_b", "up_b", "qkv_rows")),
        *(("middle", _Junction), ("end", _Junction), ("slopes", _Slopes)),
        *(("threshold", _I), ("scale", _F), ("seed", _L)),
        *(("sums", _P * 5), ("qkv_sums", _P), ("first_column", _L), ("columns", _L)),
    )


class _Through(ctypes.Structure):
    _fields_ = (
        *((name, _L) for name in ("count", "tokens", "heads", "size")),
        *(("starts", _P), ("sequences", _L)),
        *(("bias", _P), ("bias_head", _L), ("bias_query", _L), ("factor", _F)),
        *((name, _P) for name in ("x", "o", "spare", "y")),
        *(("rounds", _I), ("threads", _I)),
    )


@dataclass
class Heads:
    """What attention is told, alike for all layers.

    Attributes
    ----------
    count : int
        Heads.
    starts : Tensor
        `[B + 1]` int32: where each sequence begins.
    bias : Tensor or None
        As `tiles.attention_fwd` takes it.
    """

    count: int
    starts: Tensor
    bias: Tensor | None


@dataclass
class Layer:
    """A layer in one pass over one batch.

    Attributes
    ----------
    weights : tuple of Packed
        Of q, k and v, of the projection behind attention, and of the feed-forward block; packed
        for this pass.
    qkv_b, up_b : Tensor or None
        `[3 d]` and `[f]` fp32.
    norms : tuple of Norm
        The junctions behind attention and behind the feed-forward block.
    p, seed
        Dropout of attention's probabilities.
    """

    weights: tuple[Packed, Packed, Packed, Packed]
    qkv_b: Tensor | None
    up_b: Tensor | None
    norms: tuple[Norm, Norm]
    p: float
    seed: int | None


#: What a layer keeps: q, k and v, xhat and rstd of the first junction, act', and those of the
#: second.
Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _struct(layer: Layer, qkv: Tensor, kept: Kept | None, act: str) -> _Layer:
    hat, rstd, slope, end_hat, end_rstd = kept[1:] if kept is not None else (None,) * 5
    threshold, scale, seed, _ = native._dropped(layer.p, layer.seed)
    return _Layer(
        *(weight.address for weight in layer.weights),
        *(native._pointer(b) for b in (layer.qkv_b, layer.up_b)),
        qkv.data_ptr(),
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
    x: Tensor,
    scratch: int,
) -> Tensor:
    """Run layers on contiguous `[T, d]`; return what the last gives."""
    tokens, width = x.shape
    y, room = x.new_empty(x.shape), x.new_empty(scratch + (len(structs) > 1), *x.shape)
    size, bias = width // heads.count, heads.bias
    strides = (0, 0) if bias is None else bias.stride()[:2]
    through = _Through(
        *(len(structs), tokens, heads.count, size),
        *(heads.starts.data_ptr(), len(heads.starts) - 1),
        *(native._pointer(bias), *strides, size**-0.5),
        *(x.data_ptr(), room.data_ptr(), room[-1].data_ptr(), y.data_ptr()),
        ROUNDS,
    )
    rest = () if scratch == 1 else (room[1].data_ptr(),)
    layers = (_Layer * len(structs))(*structs)
    addresses = ctypes.addressof(layers), ctypes.addressof(through)
    native._call(which, native.DTYPES[x.dtype], native.ACTS[act], *addresses, *rest)
    return y


def layers_fwd(
    x: Tensor, layers: Sequence[Layer], heads: Heads, act: str, few_bits: bool, keeps: bool
) -> tuple[Tensor, list[Kept]]:
    """Run layers from the bottom.

    Parameters
    ----------
    x : Tensor
        `[T, d]` contiguous, bf16 or fp32.
    layers : sequence of Layer
        With weights packed for the forward pass.
    heads : Heads
        Of attention.
    act : str
        The feed-forward blocks' activation.
    few_bits, keeps : bool
        Whether act' is kept in 8 bits, and whether anything is.

    Returns
    -------
    y : Tensor
        `[T, d]`.
    kept : list
        What each layer keeps, as `Kept` says; empty where nothing is.
    """
    rows, width = x.shape
    kept: list[Kept] = []
    if keeps:
        for layer in layers:
            hats, rstds = x.new_empty(2, rows, width), x.new_empty(2, rows, dtype=torch.float32)
            slope = _room_for_slopes(x, layer.weights[2].columns, few_bits)
            qkv = x.new_empty(rows, 3 * width)
            kept.append((qkv, hats[0], rstds[0], slope, hats[1], rstds[1]))
        structs = [_struct(layer, each[0], each, act) for layer, each in zip(layers, kept)]
    else:
        qkv = x.new_empty(rows, 3 * width)
        structs = [_struct(layer, qkv, None, act) for layer in layers]
    return _run("layers_fwd", structs, act, heads, x, 1), kept


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
        `[T, d]` contiguous, the gradient of what the first of these layers gave.
    layers : sequence of Layer
        With weights packed for the backward pass.
    heads, act
        As in the forward pass.
    kept : sequence
        What each layer kept.
    needs : sequence of sequence of bool
        Whether each sum of each layer is needed: of the second junction's beta and b, of `up_b`,
        of the first junction's beta and b, and of the gradients of q and of v.

    Returns
    -------
    dx : Tensor
        `[T, d]`.
    sums : list of list of Tensor or None
        fp32, those sums; that of k comes last where those of q and of v are both there.
    """
    structs, sums = [], []
    for layer, each, needed in zip(layers, kept, needs):
        struct, found = _struct(layer, each[0], each, act), _room_for_sums(dy, layer, needed)
        struct.sums = (_P * 5)(*map(native._pointer, found[:5]))
        of_qkv = [part for part in found[5:] if part is not None]
        if of_qkv:
            # side by side, with that of k between them where there are both
            columns = [part.data_ptr() for part in of_qkv]
            struct.qkv_sums, struct.columns = min(columns), sum(map(len, of_qkv))
            struct.first_column = 0 if needed[5] else 2 * dy.shape[1]
        structs.append(struct)
        sums.append(found)
    return _run("layers_bwd", structs, act, heads, dy, 4), sums


def _room_for_sums(dy: Tensor, layer: Layer, needed: Sequence[bool]) -> list[Tensor | None]:
    """Return memory for a layer's sums, in the order in which `layers_bwd` returns them."""
    width, inner = dy.shape[1], layer.weights[3].columns
    *ends, of_q, of_v = needed
    wanted = [*ends, of_q, of_q and of_v, of_v]
    sizes = [
        size if wants else 0 for size, wants in zip((width, width, inner, *[width] * 5), wanted)
    ]
    parts = dy.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    *found, q, k, v = (part if wants else None for part, wants in zip(parts, wanted))
    return [*found, q, v, k]
