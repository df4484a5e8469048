"""Launchers of products with frozen weights, attention and layers' ends on CPUs.

The kernels are in `tiles.h` and `heads.h`; `units.h` says what multiplies, from the vectors of AVX2
to matrix units (AMX), and how an operand is laid out for it. Weights are packed once. In bf16 sums
are in fp32; fp32 gives what products in fp32 do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import library
from ._constants import ROUNDS, quantisation

__all__ = [
    "SIDE",
    "Norm",
    "Packed",
    "attention_bwd",
    "attention_fwd",
    "beat_libraries",
    "layer_end",
    "layer_end_bwd",
    "linear",
    "linear_activation",
    "linear_activation_bwd",
    "pack",
    "packed_bytes",
]

_P, _L, _I, _F, _D = library.C_TYPES

#: Of weights and heads' sizes, multiples are what these kernels take.
SIDE = 32
#: The width of layers from which on fp32 weights are not packed where products are as fast without.
_WIDE = 512


class _Weight(ctypes.Structure):
    _fields_ = (
        ("data", _P),
        ("panel", _L),
        ("depth", _L),
        ("columns", _L),
        ("plane", _L),
    )


class _Slopes(ctypes.Structure):
    _fields_ = (("data", _P), ("kind", _I), ("low", _F), ("step", _F))


class _Junction(ctypes.Structure):
    _fields_ = (
        *(
            ("b", _P),
            ("gamma", _P),
            ("beta", _P),
            ("eps", _D),
            ("xhat", _P),
            ("rstd", _P),
        ),
        *(("threshold", _I), ("scale", _F), ("seed", _L)),
    )


class Packed:
    """A frozen right operand `[K, N]` in the order in which the CPU takes it.

    Parameters
    ----------
    data : Tensor
        N / 32 panels of 32 columns, in each K / 32 steps. A step is `[32, 32]` in fp32, and in
        bf16 `[2, 16, 16, 2]`: left and right half, pair of rows, column, row of the pair; or,
        without instructions that multiply bf16, `[32, 32 / (2 L), L, 2]` for vectors of L numbers:
        row, pair of vectors, lane, vector of the pair. With matrix units fp32 numbers are three
        of bf16, in as many planes.
    panel : int
        Numbers from one panel to the next.
    depth, columns : int
        K and N, multiples of 32.
    plane : int
        Numbers from one plane to the next.
    """

    def __init__(self, data: Tensor, panel: int, depth: int, columns: int, plane: int) -> None:
        self.data, self.panel, self.depth, self.columns = data, panel, depth, columns
        self.plane = plane
        self._struct = _Weight(data.data_ptr(), panel, depth, columns, plane)
        self.address = ctypes.addressof(self._struct)

    def __getitem__(self, index: tuple[slice, slice]) -> Packed:
        """Return some rows and columns, from multiples of 32 to multiples of 32."""
        (k, k_end, _), (n, n_end, _) = index[0].indices(self.depth), index[1].indices(self.columns)
        assert not any(at % SIDE for at in (k, k_end, n, n_end))
        data = self.data[n // SIDE * self.panel + k * SIDE :]
        return Packed(data, self.panel, k_end - k, n_end - n, self.plane)


def beat_libraries(weight: Tensor) -> bool:
    """Return whether products with a weight take less time than those of MKL or oneDNN.

    With matrix units all do. With vectors those of bf16, which the libraries pack at each call,
    and without instructions for bf16 compute at a fifth of the speed of fp32, without AVX-512 at
    a fraction of that. In fp32 the two are alike, and packed weights would take memory for
    nothing; but narrow layers gain as they run in one call, and with AVX2 nothing is lost with long
    batches.
    """
    if not library.has_tiles() or any(size % SIDE for size in weight.shape):
        return False
    if weight.dtype == torch.bfloat16 or library.has_matrix_units():
        return True
    return library.lanes() == 8 and min(weight.shape) < _WIDE


def packed_bytes(operand: Tensor) -> int:
    """Return how much memory an operand takes once it is packed."""
    layout = library.layout(operand.dtype)
    return layout.planes * layout.dtype.itemsize * operand.numel()


def pack(operand: Tensor) -> Packed:
    """Pack a right operand `[K, N]`, bf16 or fp32, any strides; K and N are multiples of 32."""
    depth, columns = operand.shape
    layout = library.layout(operand.dtype)
    data = operand.new_empty(layout.planes * operand.numel(), dtype=layout.dtype)
    library.call("pack", _type(operand), operand.data_ptr(), *operand.stride(), depth, columns,
                 data.data_ptr())  # fmt: skip
    return Packed(data, depth * SIDE, depth, columns, depth * columns)


def _type(tensor: Tensor) -> int:
    return library.DTYPES[tensor.dtype]


def _slopes(kept: Tensor | None, act: str, is_slope: bool = True) -> _Slopes:
    if kept is None:
        return _Slopes(None, library.SLOPE, 0.0, 1.0)
    assert kept.is_contiguous()
    return _Slopes(kept.data_ptr(), library.kind(kept, is_slope), *quantisation(act))


def _room_for_slopes(x: Tensor, columns: int, few_bits: bool) -> Tensor:
    """Return memory for act'."""
    return x.new_empty((x.shape[0], columns), dtype=torch.uint8 if few_bits else x.dtype)


def linear(
    x: Tensor, weight: Packed, b: Tensor | None = None, onto: Tensor | None = None
) -> Tensor:
    """Return `x W + b`, or `x W` added to `onto`, in place; all of one dtype but b."""
    assert x.shape[1] == weight.depth
    x, b = library.contiguous_rows(x), library.vector(b)
    y = x.new_empty(x.shape[0], weight.columns) if onto is None else onto
    assert y.is_contiguous() and y.shape == (len(x), weight.columns) and y.dtype == x.dtype
    library.call(
        "linear",
        _type(x),
        x.data_ptr(),
        x.stride(0),
        weight.address,
        library.pointer(b),
        y.data_ptr(),
        onto is not None,
        x.shape[0],
    )
    return y


def linear_activation(
    x: Tensor, weight: Packed, b: Tensor | None, act: str, few_bits: bool, keeps: bool
) -> tuple[Tensor, Tensor | None]:
    """Return act(x W + b), and act' if it is to be kept, in the dtype of x or in 8 bits."""
    assert x.shape[1] == weight.depth
    x, b = library.contiguous_rows(x), library.vector(b)
    h = x.new_empty(x.shape[0], weight.columns)
    kept = _room_for_slopes(x, weight.columns, few_bits) if keeps else None
    slopes = _slopes(kept, act)
    library.call(
        "linear_activation",
        _type(x),
        library.ACTS[act],
        x.data_ptr(),
        x.stride(0),
        weight.address,
        library.pointer(b),
        h.data_ptr(),
        ctypes.addressof(slopes),
        x.shape[0],
    )
    return h, kept


def linear_activation_bwd(
    dy: Tensor, weight: Packed, kept: Tensor, b: Tensor | None, act: str, is_slope: bool
) -> tuple[Tensor, Tensor]:
    """Return `dz = (dy W) act'`, and its sum over tokens; `kept` as in `activation_bwd`."""
    assert dy.shape[1] == weight.depth and kept.shape == (len(dy), weight.columns)
    dy, b = library.contiguous_rows(dy), library.vector(b)
    dz = dy.new_empty(kept.shape)
    db = dy.new_empty(weight.columns, dtype=torch.float32)
    slopes = _slopes(kept, act, is_slope)
    library.call(
        "linear_activation_bwd",
        _type(dy),
        library.ACTS[act],
        dy.data_ptr(),
        dy.stride(0),
        weight.address,
        ctypes.addressof(slopes),
        library.pointer(b),
        dz.data_ptr(),
        db.data_ptr(),
        dy.shape[0],
    )
    return dz, db


@dataclass
class Norm:
    """Bias, dropout, residual and LayerNorm behind a product.

    Attributes
    ----------
    gamma : Tensor
        `[d]` fp32.
    beta, b : Tensor or None
        `[d]` fp32, of the LayerNorm and of the product.
    eps, p : float
        Added to the variance; probability of dropout.
    seed : Tensor, int or None
        Of dropout.
    """

    gamma: Tensor
    beta: Tensor | None
    b: Tensor | None
    eps: float
    p: float
    seed: Tensor | int | None

    def struct(self, xhat: Tensor | None, rstd: Tensor | None) -> _Junction:
        """Return it for the library, with where normalised rows and their scale lie."""
        drop = library.dropped(self.p, self.seed)[:3]
        vectors = (library.pointer(t) for t in (self.b, self.gamma, self.beta))
        return _Junction(*vectors, self.eps, library.pointer(xhat), library.pointer(rstd), *drop)


def layer_end(
    o: Tensor,
    x: Tensor,
    weights: tuple[Packed, Packed, Packed],
    norms: tuple[Norm, Norm],
    b: Tensor | None,
    act: str,
    few_bits: bool,
    keeps: bool,
) -> list[Tensor]:
    """Compute what a post-norm layer does behind attention, all of it token by token.

    Parameters
    ----------
    o, x : Tensor
        `[M, d]` contiguous, bf16 or fp32: what the heads of attention gave, and the layer's input.
    weights : tuple of Packed
        Of the projection behind attention, and of the feed-forward block.
    norms : tuple of Norm
        The junctions behind the two.
    b : Tensor, optional
        fp32, of the feed-forward block's first projection.
    act : str
        Its activation.
    few_bits, keeps : bool
        Whether act' is kept in 8 bits, and whether anything is.

    Returns
    -------
    list of Tensor
        The layer's output, and what `layer_end_bwd` is given: xhat and rstd of the first
        junction, act', xhat and rstd of the second.
    """
    rows, width = x.shape
    y = x.new_empty(x.shape)
    kept: list[Tensor] = []
    if keeps:
        hats, rstds = x.new_empty(2, rows, width), norms[0].gamma.new_empty(2, rows)
        slope = _room_for_slopes(x, weights[1].columns, few_bits)
        kept = [hats[0], rstds[0], slope, hats[1], rstds[1]]
    _layer_end("", (o, x), weights, norms, b, act, kept, (y,))
    return [y, *kept]


def layer_end_bwd(
    dy: Tensor,
    weights: tuple[Packed, Packed, Packed],
    norms: tuple[Norm, Norm],
    b: Tensor | None,
    act: str,
    kept: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Compute the way back through `layer_end`, by weights packed for it.

    Returns
    -------
    do, dx : Tensor
        Gradients of the two inputs.
    sums : list of Tensor or None
        Gradients of the second junction's beta and b, of `b`, and of the first's beta and b,
        where `needs` says so.
    """
    rows, width = dy.shape
    do, dx = dy.new_empty(2, rows, width).unbind()
    widths = (width, width, weights[2].columns, width, width)
    sums = [
        dy.new_empty(size, dtype=torch.float32) if needed else None
        for size, needed in zip(widths, needs)
    ]
    _layer_end("_bwd", (dy,), weights, norms, b, act, kept, (do, dx, *sums))
    return do, dx, sums


def _layer_end(
    which: str,
    inputs: tuple[Tensor, ...],
    weights: tuple[Packed, Packed, Packed],
    norms: tuple[Norm, Norm],
    b: Tensor | None,
    act: str,
    kept: Sequence[Tensor],
    outputs: tuple[Tensor | None, ...],
) -> None:
    width = inputs[0].shape[1]
    first, second = (weights[2], weights[1]) if which else weights[1:]
    assert all(t.is_contiguous() and t.shape == inputs[0].shape for t in inputs)
    assert weights[0].depth == weights[0].columns == first.depth == second.columns == width
    assert first.columns == second.depth
    out, up, down = (weight.address for weight in weights)
    hat, rstd, slope, end_hat, end_rstd = kept or (None,) * 5
    structs = norms[0].struct(hat, rstd), _slopes(slope, act), norms[1].struct(end_hat, end_rstd)
    middle, slopes, end = map(ctypes.addressof, structs)
    library.call(
        f"layer_end{which}",
        _type(inputs[0]),
        library.ACTS[act],
        *map(library.pointer, inputs),
        *(out, middle, up, library.pointer(b), slopes, down, end),
        *map(library.pointer, outputs),
        inputs[0].shape[0],
        ROUNDS,
    )


def _heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    bias: Tensor | None,
) -> tuple[Any, ...]:
    size = q.shape[2]
    assert all(t.stride()[1:] == (size, 1) for t in (q, k, v)) and not size % SIDE
    tensors = (value for t in (q, k, v) for value in (t.data_ptr(), t.stride(0)))
    strides = (0, 0) if bias is None else bias.stride()[:2]
    return (
        *tensors,
        starts_q.data_ptr(),
        starts_k.data_ptr(),
        len(starts_q) - 1,
        *q.shape[1:],
        library.pointer(bias),
        *strides,
        size**-0.5,
    )


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    p: float,
    seed: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + bias) v of each sequence and head, `[*, H, D]` contiguous.

    Parameters
    ----------
    q, k, v : Tensor
        `[*, H, D]` bf16 or fp32, heads side by side, D a multiple of 32.
    starts_q, starts_k : Tensor
        `[B + 1]` int32: where each sequence's queries and keys begin.
    p, seed
        Dropout; the row of head h of packed query t is `t H + h`.
    bias : Tensor, optional
        `[H, S, >= S]` fp32 with contiguous rows of a multiple of 16, added to the scaled scores.
    """
    o = q.new_empty(q.shape)
    heads = _heads(q, k, v, starts_q, starts_k, bias)
    library.call("attention_fwd", _type(q), *heads, o.data_ptr(), *library.dropped(p, seed))
    return o


def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    dq: Tensor,
    dkv: Tensor | None,
) -> None:
    """Write the gradients of q, and of k and v if `dkv` `[*, 2, H, D]` is there."""
    assert do.is_contiguous() and do.dtype == dq.dtype == q.dtype
    dk, dv = (None, None) if dkv is None else dkv.unbind(1)
    library.call(
        "attention_bwd",
        _type(q),
        *_heads(q, k, v, starts_q, starts_k, bias),
        do.data_ptr(),
        dq.data_ptr(),
        dq.stride(0),
        library.pointer(dk),
        library.pointer(dv),
        0 if dkv is None else dkv.stride(0),
        *library.dropped(p, seed),
    )
