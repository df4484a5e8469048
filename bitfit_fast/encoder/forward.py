"""The forward pass through an encoder's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels import tiles
from ..ops.dropout import dropout
from ..ops.layer_norm import layer_norm_fwd
from . import sums, together
from .attention import attention_fwd
from .depth import END, MIDDLE, QKV, place
from .run import Run
from .stack import ROLES, UP, Junction, Stack

__all__ = ["apart", "chunks", "forward_pass", "project"]

#: Rows of the feed-forward block that run at once where memory is to be saved.
_CHUNK = 2048


def forward_pass(run: Run, x: Tensor) -> Tensor:
    """Return what comes out of the layers, and keep in the run what the backward pass takes.

    Parameters
    ----------
    run : Run
        New.
    x : Tensor
        `[T, d]`, at best in `together.rows_dtype`.

    Returns
    -------
    Tensor
        `[T, d]`, or `[B, d]` where the last layer computes first tokens only.
    """
    stack, last = run.stack, len(run.stack.layers) - 1
    residual = y = x.to(together.rows_dtype(stack, run.packing))
    if stack.entry is not None:
        y = _enter(run, stack.entry, y)
    elif stack.memory == "lowest":
        run.keep(y)
    number = 0
    while number <= last:
        left = range(number, last + 1)
        if of_layers := together.weights(stack, run.packing, left, "forward"):
            y = residual = together.forward(run, number, of_layers, y)
        else:
            if y.dtype != stack.dtype:  # behind some together
                y = residual = y.to(stack.dtype)
            y, residual = _layer(run, number, y, residual)
        number += len(of_layers) or 1
    return y


def _layer(run: Run, number: int, y: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the next layer takes, and the residual that goes on."""
    stack, last = run.stack, len(run.stack.layers) - 1
    layer, rows = stack.layers[number], None
    if stack.computes_first(number):
        rows = y.index_select(0, run.packing.first)
        same = residual is y
        residual = rows if same else residual.index_select(0, run.packing.first)
    o = _attention(run, number, y, rows)
    if (weights := stack.end_weights(number, o, "forward")) is not None:
        y = _end(run, number, o, residual, weights)
        return y, y
    z = layer.out(o)
    del o  # which would lie there as long as the feed-forward block runs
    y, residual = _join(run, layer.middle, z, residual, place(number, MIDDLE), z.dtype)
    z = _feed_forward(run, number, y)
    run.casts = number == last and layer.end.gamma is not None and sums.defers(z)
    dtype = run.dtype if run.casts else z.dtype
    return _join(run, layer.end, z, residual, place(number, END), dtype)


def _enter(run: Run, entry: Junction, x: Tensor) -> Tensor:
    assert entry.gamma is not None
    out = layer_norm_fwd(
        x, entry.gamma, run.bias(entry.beta), None, None, 0.0, None, entry.eps, x.dtype,
        run.keeps, False, x.dtype,
    )  # fmt: skip
    run.keep(x, *out[1:])
    return out[0]


def _attention(run: Run, number: int, x: Tensor, rows: Tensor | None) -> Tensor:
    projected = project(run, number, x, rows)
    if run.stack.memory != "lowest":
        run.keep(*projected)
    q, k, v = apart(run.stack, projected)
    dropout = run.drop(place(number, QKV))
    o = attention_fwd(q, k, v, run.packing, *dropout, run.score_bias)
    return o.flatten(1)


def _end(run: Run, number: int, o: Tensor, x: Tensor, weights: tuple[Any, ...]) -> Tensor:
    """Run all of a layer behind attention."""
    b, act = run.biases[number * len(ROLES) + UP], run.stack.layers[number].act
    few_bits = run.stack.memory == "low"
    y, *kept = tiles.layer_end(o, x, weights, run.norms(number), b, act, few_bits, run.keeps)
    if run.keeps:
        hat, rstd, slope, end_hat, end_rstd = kept
        run.keep(hat, None, rstd, slope, end_hat, None, end_rstd)
    return y


def _join(
    run: Run, junction: Junction, z: Tensor, residual: Tensor, at: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what the next sublayer takes, in some dtype, and the residual that goes on.

    The junction is at this place.
    """
    p, seed = run.drop(at)
    pre_norm = run.stack.pre_norm
    b = run.bias(junction.bias)
    if junction.gamma is None:
        z = z if b is None else z + b.to(z.dtype)
        s = residual + (dropout(z, p, seed) if seed is not None else z)
        return s, s
    y, *kept = layer_norm_fwd(
        z, junction.gamma, run.bias(junction.beta), b, residual, p, seed, junction.eps, dtype,
        run.keeps, pre_norm, z.dtype,
    )  # fmt: skip
    if not pre_norm:
        if run.keeps:
            run.keep(kept[0], None, kept[1])
        return y, y
    run.keep(*kept)
    return y, kept[0]


def _feed_forward(run: Run, number: int, y: Tensor) -> Tensor:
    stack, layer = run.stack, run.stack.layers[number]
    b = run.biases[number * len(ROLES) + UP]
    if stack.recomputes:
        z = y.new_empty(y.shape[0], layer.down.weight.shape[0])
        for rows in chunks(y):
            z[rows] = layer.down(layer.up.activated(y[rows], b, layer.act, False, False)[0])
        return z
    h, kept = layer.up.activated(y, b, layer.act, stack.memory == "low", run.keeps)
    run.keep(kept)
    return layer.down(h)


# ------------------------------------------------------------ what the backward pass does, too


def project(run: Run, number: int, x: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
    """Return q, k and v in one tensor; or q of some rows, first tokens, and k and v."""
    if rows is None:
        return (run.stack.layers[number].qkv(x, run.qkv_bias(number, 0, 3)),)
    of_q, of_kv = run.stack.first_products()
    kv = of_kv(x, run.qkv_bias(number, 1, 3))
    return of_q(rows, run.qkv_bias(number, 0, 1)), kv


def apart(stack: Stack, projected: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v by head, `[*, H, D]`."""
    size = stack.width // stack.heads
    q, k, v = (
        part
        for rows in projected
        for part in rows.view(rows.shape[0], -1, stack.heads, size).unbind(1)
    )
    return q, k, v


def chunks(rows: Tensor) -> Iterator[slice]:
    """Return slices of as many rows as run at once."""
    for first in range(0, rows.shape[0], _CHUNK):
        yield slice(first, first + _CHUNK)
