"""The backward pass through an encoder's layers, to the gradients of biases alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import tiles
from ..ops.column_sum import bias_gradient, column_sum
from ..ops.dropout import dropout
from ..ops.layer_norm import layer_norm_bwd
from ..ops.linear import fuses_backward, product_rows
from ..ops.partial import (
    activation_bwd_partial_,
    column_sum_partial,
    layer_norm_bwd_partial,
    linear_activation_bwd_partial,
)
from . import together
from .attention import attention_bwd, attention_sums, joined
from .depth import END, ENTRY, INNER, INPUT, MIDDLE, QKV, lowest, place
from .forward import apart, chunks, project
from .gradients import Gradients
from .run import Run
from .stack import KEY, QUERY, ROLES, UP, VALUE, Junction, Layer
from .sums import column_rows, layer_norm_rows

__all__ = ["BackwardPass"]

#: Rows from which on, on a GPU, sum(dY W) = sum(dY) W takes less time than the product: it is ten
#: launches, of which a product of 4,096 rows of BERT-base takes as long as seven.
_MANY_ROWS = 4096


class BackwardPass:
    """The way back through the layers, to the lowest place at which something needs a gradient.

    Parameters
    ----------
    run : Run
        With what its forward pass kept.
    gradients : Gradients
        Which are to be found.
    needs_input : bool
        Whether the layers' input needs one.
    """

    def __init__(self, run: Run, gradients: Gradients, needs_input: bool) -> None:
        self.run, self.stack, self.gradients = run, run.stack, gradients
        self.needs_input = needs_input
        needs_below = needs_input or gradients.embedding_beta is not None
        self.lowest = lowest(run.stack, gradients.needs, needs_below)

    def __call__(self, dy: Tensor) -> Tensor | None:
        """Return the gradient of the input, or None where nothing below needs one."""
        stack, last = self.stack, len(self.stack.layers) - 1
        residual: Tensor | None = None  # the gradient of the residual that goes on
        number = last
        while number >= 0:
            whole = self._whole(number, dy)
            of_layers = together.weights(stack, self.run.packing, whole, "backward")
            if of_layers:
                dy = together.backward(self.run, self.gradients, number, of_layers, dy)
            else:
                dy = dy if self.run.casts else dy.to(stack.dtype)
                below = self._layer_bwd(number, dy, residual)
                if below is None:
                    return None
                dy, residual = below
            number -= len(of_layers) or 1
        if stack.entry is not None:
            return self._enter_bwd(stack.entry, dy, residual)
        if self.gradients.embedding_beta is not None:
            self._sum_input(dy)
        return dy

    def _whole(self, number: int, dy: Tensor) -> list[int]:
        """Return the layers from this one on downwards whose backward pass is all of it."""
        numbers = range(number, -1 + self._by_identity(dy), -1)
        return [number for number in numbers if place(number, QKV) > self.lowest]

    def _layer_bwd(
        self, number: int, dy: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return the gradients of what a layer took, and of the residual that goes on.

        None where nothing below needs them.
        """
        stack = self.stack
        layer, first = stack.layers[number], stack.computes_first(number)
        weights = None
        if place(number, MIDDLE) > self.lowest:
            weights = stack.end_weights(number, dy, "backward")
        if weights is not None:
            residual, do = self._end_bwd(number, dy, weights)
            return self._attention_bwd(number, do, residual, first)
        left = self._leave(layer.end, dy, residual, place(number, END))
        if left is None:
            return None
        residual, dz = left
        inner = self._feed_forward_bwd(layer, number, dz, residual)
        if inner is None:
            return None
        left = self._leave(layer.middle, inner, residual, place(number, MIDDLE))
        if left is None:
            return None
        residual, dz = left
        return self._attention_bwd(number, layer.out.backward(dz), residual, first)

    def _sum_input(self, dy: Tensor) -> None:
        """Sum up the gradient of the input, for the embeddings' bias."""
        gradients, (p, seed) = self.gradients, self.run.drop(INPUT)
        if gradients.defers:
            partial = gradients.partial([gradients.embedding_index], column_rows(dy), dy.shape[1])
            column_sum_partial(dy, p, seed, partial)
        else:
            gradients.note_embedding_beta(column_sum(dy, None, p, seed))

    def _end_bwd(self, number: int, dy: Tensor, weights: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Return the gradients of the layer's input and of what attention's heads gave."""
        layer = self.stack.layers[number]
        hat, _, rstd, slope, end_hat, _, end_rstd = self.run.taken(7)
        up = number * len(ROLES) + UP
        indices = layer.end.beta, layer.end.bias, up, layer.middle.beta, layer.middle.bias
        needs = [self.gradients.needed(index) for index in indices]
        do, dx, sums = tiles.layer_end_bwd(
            dy.contiguous(), weights, self.run.norms(number), self.run.biases[up], layer.act,
            (hat, rstd, slope, end_hat, end_rstd), needs,
        )  # fmt: skip
        for index, gradient in zip(indices, sums):
            if gradient is not None:
                self.gradients.note(index, gradient)
        return dx, do

    def _enter_bwd(self, entry: Junction, dy: Tensor, residual: Tensor | None) -> Tensor | None:
        assert entry.gamma is not None
        needs_beta = self.gradients.needed(entry.beta)
        x, mean, rstd = self.run.taken(3)
        if self.lowest >= ENTRY:
            self.gradients.note(entry.beta, bias_gradient(dy))
            return None
        dx, _, sums = layer_norm_bwd(
            dy, x, mean, rstd, entry.gamma, residual, 0.0, None, dy.dtype, dy.dtype,
            needs_beta, False, False,
        )  # fmt: skip
        if needs_beta:
            self.gradients.note(entry.beta, sums[0])
        return dx

    def _leave(
        self, junction: Junction, dy: Tensor, residual: Tensor | None, at: int
    ) -> tuple[Tensor, Tensor] | None:
        """Return the gradients of the residual and of the sublayer's output.

        None where nothing below the junction, which is at this place, needs them.
        """
        p, seed = self.run.drop(at)
        needs_bias = self.gradients.needed(junction.bias)
        if junction.gamma is None:
            ds = dy if residual is None else dy + residual
            if needs_bias:
                self.gradients.note(junction.bias, column_sum(ds, None, p, seed))
            if at <= self.lowest:
                return None
            return ds, ds if seed is None else dropout(ds, p, seed)
        kept, mean, rstd = self.run.taken(3)
        needs_beta = self.gradients.needed(junction.beta)
        if at <= self.lowest and not needs_bias:
            self.gradients.note(junction.beta, bias_gradient(dy))
            return None
        given = (
            dy, kept, mean, rstd, junction.gamma, residual if self.stack.pre_norm else None,
            p, seed, self.stack.dtype, self.stack.dtype, needs_beta, needs_bias,
        )  # fmt: skip
        summed = [junction.beta] * needs_beta + [junction.bias] * needs_bias
        if self.gradients.defers:
            partial = self.gradients.partial(summed, layer_norm_rows(dy), dy.shape[1])
            ds, dz = layer_norm_bwd_partial(*given, partial)
        else:
            ds, dz, sums = layer_norm_bwd(*given, False)
            for index, gradient in zip(summed, sums):
                self.gradients.note(index, gradient)
        return None if at <= self.lowest else (ds, dz if dz.numel() else ds)

    def _onto(self, residual: Tensor) -> Tensor | None:
        """Return the residual's gradient where the next junction wants it added already."""
        return None if self.stack.pre_norm else residual

    def _feed_forward_bwd(
        self, layer: Layer, number: int, dz: Tensor, residual: Tensor
    ) -> Tensor | None:
        index = number * len(ROLES) + UP
        b, ends = self.run.biases[index], place(number, INNER) <= self.lowest
        if not self.stack.recomputes:
            (kept,) = self.run.taken(1)
            deferred = self.gradients.defers and self.gradients.needed(index)
            if deferred:
                du = self._activation_bwd(layer, index, dz, kept)
            else:
                du, db = layer.down.activation_bwd(dz, kept, b, layer.act, True)
                self.gradients.note(index, db)
            return None if ends else layer.up.backward(du, self._onto(residual))
        y = self._normalised(layer.middle)
        dy = torch.zeros_like(y) if self.stack.pre_norm else residual
        total = y.new_zeros(layer.up.weight.shape[0], dtype=torch.float32)
        for rows in chunks(y):
            du, db = layer.down.activation_bwd(dz[rows], layer.up(y[rows]), b, layer.act, False)
            total += db
            if not ends:
                layer.up.backward(du, dy[rows])
        self.gradients.note(index, total)
        return None if ends else dy

    def _activation_bwd(self, layer: Layer, index: int, dz: Tensor, kept: Tensor) -> Tensor:
        """Return the gradient of the activation's input, and leave its sum in partial rows."""
        b, act, w = self.run.biases[index], layer.act, layer.down.weight
        if fuses_backward(dz, w, kept, b, act):
            partial = self.gradients.partial([index], product_rows(dz, w), w.shape[1])
            return linear_activation_bwd_partial(dz, w, kept, b, act, partial)
        du = layer.down.backward(dz)
        partial = self.gradients.partial([index], column_rows(du), du.shape[1])
        activation_bwd_partial_(du, kept, b, act, partial)
        return du

    def _normalised(self, junction: Junction) -> Tensor:
        """Compute a junction's output again from what lies on top of what was kept."""
        assert junction.gamma is not None
        kept, mean, rstd = self.run.kept[-3:]
        beta = self.run.bias(junction.beta)
        assert kept is not None and rstd is not None
        rows = kept.float()
        if mean is not None:
            rows = (rows - mean[:, None]) * rstd[:, None]
        rows = rows * junction.gamma
        return (rows if beta is None else rows + beta).to(kept.dtype)

    def _input_of(self, number: int) -> Tensor:
        """Compute what a layer took in again."""
        if number:
            return self._normalised(self.stack.layers[number - 1].end)
        if self.stack.entry is not None:
            return self._normalised(self.stack.entry)
        x = self.run.kept.pop()
        assert x is not None
        return x

    def _attention_bwd(
        self, number: int, do: Tensor, residual: Tensor, first: bool
    ) -> tuple[Tensor, Tensor] | None:
        layer, at = self.stack.layers[number], number * len(ROLES)
        if self.stack.memory == "lowest":
            x = self._input_of(number)
            rows = x.index_select(0, self.run.packing.first) if first else None
            projected = project(self.run, number, x, rows)
        else:
            projected = tuple(self.run.taken(2 if first else 1))
        by_identity = not number and self._by_identity(do)
        ends = by_identity or place(number, QKV) <= self.lowest
        # at the bottom the value bias's gradient can do without those of keys and values, as
        # the probabilities of a query add up to 1 where none is dropped
        dropout = self.run.drop(place(number, QKV))
        dropped = dropout[0] > 0
        needs_v = by_identity or self.gradients.needed(at + VALUE)
        needs_kv = not ends or (dropped and needs_v)
        q, k, v = apart(self.stack, projected)
        given = (
            do.view(q.shape), q, k, v, self.run.packing, *dropout, self.run.score_bias, needs_kv,
        )  # fmt: skip
        if self.gradients.defers and not by_identity and needs_kv:
            dq, dkv = attention_bwd(*given, *self._take_qv(number, q, k))
        else:
            dq, dkv = attention_bwd(*given)
            sums = self._sum_qkv(number, dq, dkv, do, by_identity)
            if by_identity:
                self._embedding_beta(sums, residual)
        if ends:
            return None
        assert dkv is not None
        if not first:
            return layer.qkv.backward(joined(dq), self._onto(residual)), residual
        of_q, of_kv = self.stack.first_products()
        dx = of_kv.backward(dkv.flatten(1))
        of_rows = of_q.backward(dq.flatten(1), self._onto(residual))
        dx.index_add_(0, self.run.packing.first, of_rows)
        if self.stack.pre_norm:
            scattered = torch.zeros_like(dx)
            residual = scattered.index_copy_(0, self.run.packing.first, residual)
        return dx, residual

    def _by_identity(self, do: Tensor) -> bool:
        """Return whether the embeddings' bias goes without the gradient of the layers' input."""
        if self.gradients.embedding_beta is None or self.needs_input or self.run.dropouts[INPUT]:
            return False
        return not self.gradients.defers or len(do) >= _MANY_ROWS

    def _take_qv(self, number: int, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Return where partial rows of the sums for the biases of q and v go."""
        at, columns = number * len(ROLES), q.shape[1] * q.shape[2]
        heights, gradients = attention_sums(q, k, self.run.packing), self.gradients
        gradients.reserve((sum(heights) + 1) * columns)  # and what aligns the second
        return tuple(
            gradients.partial([index if gradients.needed(index) else None], rows, columns)
            for index, rows in zip((at + QUERY, at + VALUE), heights)
        )

    def _sum_qkv(
        self, number: int, dq: Tensor, dkv: Tensor | None, do: Tensor, needs_all: bool
    ) -> dict[int, Tensor]:
        """Return the gradients of the biases of q, k and v, as far as they are needed."""
        at, sums = number * len(ROLES), {}
        query, key, value = (self.gradients.needed(at + role) for role in (QUERY, KEY, VALUE))
        query, value = query or needs_all, value or needs_all
        if dkv is not None and len(dq) == len(dkv) and query and value:
            # those of keys ride along: one pass instead of two
            parts = bias_gradient(joined(dq)).chunk(3)
            sums = dict(zip((QUERY, KEY, VALUE), parts))
        else:
            if query:
                sums[QUERY] = bias_gradient(dq.flatten(1))
            if key and dkv is not None:
                sums[KEY] = bias_gradient(dkv[:, 0].flatten(1))
            if value:
                sums[VALUE] = bias_gradient(do if dkv is None else dkv[:, 1].flatten(1))
        for role, gradient in sums.items():
            self.gradients.note(at + role, gradient)
        return sums

    def _embedding_beta(self, sums: dict[int, Tensor], residual: Tensor) -> None:
        """Compute the sum of the input's gradient without that: sum(dY W) = sum(dY) W."""
        width, weight = self.stack.width, self.stack.layers[0].qkv.weight
        total = bias_gradient(residual)
        for role, first in ((QUERY, 0), (VALUE, 2 * width)):
            rows = weight[first : first + width].to(total.dtype)
            total = torch.addmv(total, rows.t(), sums[role])
        self.gradients.note_embedding_beta(total)
