"""All layers of an encoder as one operation, whose backward pass computes bias gradients alone.

An encoder is a chain of sublayers, attention and feed-forward block in turn, with a junction
behind each:

    s = residual + dropout(z + b),   y = LayerNorm(s)

where z is what the sublayer's last product gives. The next sublayer takes y; the residual goes on
from y (post-norm) or from s (pre-norm). Pre-norm encoders begin with a junction that has no
sublayer, and end with one that has no LayerNorm.

The backward pass ends at the lowest parameter that trains. What it keeps of each token and layer,
in bytes for a width of d, a feed-forward block of 4 d and 16 bits a number:

    fast     18 d + 8   q k v, both junctions, the activation's input or derivative
    low      14 d + 8   the derivative in 8 bits, the only approximation
    lower    10 d + 8   the feed-forward block runs again up to its activation
    lowest    4 d + 8   q k v are computed again, too
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BitFitError
from ..kernels import tiles
from ..kernels.tiles import Norm
from ..ops._autograd import once, shaped
from ..ops._backend import uses_triton
from ..ops.column_sum import bias_gradient, column_sum
from ..ops.dropout import dropout, new_seed
from ..ops.layer_norm import layer_norm_bwd, layer_norm_fwd
from ..ops.partial import activation_bwd_partial, column_sum_partial, layer_norm_bwd_partial
from ..packing import Packing
from .attention import attention_bwd, attention_fwd, attention_sums, joined
from .product import Product
from .sums import Sums, column_rows, defers, layer_norm_rows

__all__ = ["MEMORY", "ROLES", "Junction", "Layer", "Rate", "Stack"]

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
_QUERY, _KEY, _VALUE, _, _, _UP, _, _ = range(len(ROLES))

#: How much is kept for the backward pass, the most first.
MEMORY = ("fast", "low", "lower", "lowest")

#: Rows of the feed-forward block that run at once where memory is to be saved.
_CHUNK = 2048
#: Rows from which on, on a GPU, sum(dY W) = sum(dY) W takes less time than the product: it is ten
#: launches, of which a product of 4,096 rows of BERT-base takes as long as seven.
_MANY_ROWS = 4096
#: Seeds of one forward pass are so far apart that no two masks share a row.
_SEEDS_APART = 2**40

#: Places at which a parameter can be, from the bottom: the input, the first junction of a
#: pre-norm encoder, and in each layer its q, k and v, a junction, the first projection of the
#: feed-forward block, and another junction.
_INPUT, _ENTRY = 0, 1
_QKV, _MIDDLE, _INNER, _END = range(4)


def _place(layer: int, part: int) -> int:
    return 2 + 4 * layer + part


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
    """

    layers: list[Layer]
    heads: int
    dtype: torch.dtype
    pre_norm: bool = False
    entry: Junction | None = None
    memory: str = "fast"
    first_only: bool = False
    stops: bool = True

    def __call__(
        self,
        x: Tensor,
        biases: Sequence[Tensor | None],
        packing: Packing,
        bias: Tensor | None = None,
        embedding_beta: Tensor | None = None,
        sinks: Sequence[Tensor | None] | None = None,
        dtype: torch.dtype | None = None,
        overwrites: bool = False,
    ) -> Tensor:
        """Run all layers.

        Parameters
        ----------
        x : Tensor
            `[T, d]`, the packed tokens' embeddings.
        biases : sequence of Tensor
            fp32, eight a layer, in the order of `ROLES`; None for one that the model lacks.
        packing : Packing
            Where the sequences lie.
        bias : Tensor, optional
            `[H, S, S]`, added to the scores of attention.
        embedding_beta : Tensor, optional
            The bias of a LayerNorm that `x` is the output of, which needs no gradient then.
            It is computed from those of q, k and v without the gradient of `x`.
        sinks : sequence of Tensor, optional
            Where the gradient of each bias is added, instead of being handed to autograd;
            None for those that do not train. With one more, where that of `embedding_beta` is
            added, by a backward pass that then lets it be its `grad`.
        dtype : torch.dtype, optional
            Of the output; by default that of `x`.
        overwrites : bool
            Whether gradients take the place of what is in the sinks.

        Returns
        -------
        Tensor
            `[T, d]`, or `[B, d]` with `first_only`. It cannot be differentiated twice.
        """
        run = _Run(self, packing, bias, sinks, dtype or x.dtype, embedding_beta, overwrites)
        with torch.autocast(x.device.type, enabled=False):
            return _Encoder.apply(run, torch.is_grad_enabled(), x, embedding_beta, *biases)

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


class _Encoder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: _Run,
        grad: bool,
        x: Tensor,
        embedding_beta: Tensor | None,
        *biases: Tensor | None,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        keeps = grad and any(needs)
        run.begin(biases, keeps, needs[2], needs[3], needs[4:])
        out = run.forward(x.to(run.stack.dtype))
        if keeps:
            ctx.run, ctx.dtype = run, x.dtype
            ctx.save_for_backward(*run.take_kept(), *biases)
        return out.to(run.dtype) if out.dtype != run.dtype else shaped(out, out.shape)

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        run, tensors = ctx.run, ctx.saved_tensors
        count = len(run.needs)
        run.restore(tensors[: len(tensors) - count], tensors[len(tensors) - count :])
        with torch.autocast(dy.device.type, enabled=False):
            dx = run.backward(dy if run.casts else dy.to(run.stack.dtype))
        gradients = run.finish()
        dx = dx.to(ctx.dtype) if dx is not None and ctx.needs_input_grad[2] else None
        return (None, None, dx, *gradients)


@dataclass
class _Run:
    """One forward pass and its backward pass."""

    stack: Stack
    packing: Packing
    bias: Tensor | None
    sinks: Sequence[Tensor | None] | None
    dtype: torch.dtype
    embedding_beta: Tensor | None
    overwrites: bool
    needs: tuple[bool, ...] = ()
    gradients: list[Tensor | None] = field(default_factory=list)

    # ------------------------------------------------------------------ bookkeeping

    def begin(
        self,
        biases: Sequence[Tensor | None],
        keeps: bool,
        needs_input: bool,
        needs_embedding_beta: bool,
        needs: Sequence[bool],
    ) -> None:
        self.biases, self.keeps = biases, keeps
        self.needs_input, self.needs_embedding_beta = needs_input, needs_embedding_beta
        self.needs = tuple(needs)
        self.lowest = self._lowest()
        self.kept: list[Tensor | None] = []
        self.joined: Tensor | None = None
        #: Whether the last LayerNorm casts to the output's dtype, and from it
        self.casts = False
        self.dropouts = self._dropouts()
        self.seeds = None
        if any(self.dropouts):
            count = len(self.dropouts)
            device = self.packing.device
            # each twice, so that all begin at 16 bytes: kernels compile for what is so, or not
            number = torch.arange(2 * count, device=device) // 2
            self.seeds = new_seed(device) + _SEEDS_APART * number

    def _dropouts(self) -> list[float]:
        """Return the probability of each dropout: attention's and both junctions' a layer."""
        return [
            0.0 if rate is None else rate()
            for layer in self.stack.layers
            for rate in (layer.dropout, layer.middle.dropout, layer.end.dropout)
        ]

    def _lowest(self) -> int:
        """Return the lowest place at which something needs a gradient."""
        if self.needs_input or self.needs_embedding_beta or not self.stack.stops:
            return _INPUT
        places = [self._place_of(i) for i, needed in enumerate(self.needs) if needed]
        return min(places, default=_place(len(self.stack.layers), 0))

    def _place_of(self, index: int) -> int:
        layer, role = divmod(index, len(ROLES))
        if role in (_QUERY, _KEY, _VALUE):
            return _place(layer, _QKV)
        if role == _UP:
            return _place(layer, _INNER)
        for number, one in enumerate(self.stack.layers):
            if index in (one.middle.bias, one.middle.beta):
                return _place(number, _MIDDLE)
            if index in (one.end.bias, one.end.beta):
                return _place(number, _END)
        return _ENTRY

    def _drop(self, number: int) -> tuple[float, Tensor | None]:
        """Return probability and seed of a dropout: three a layer, as in `_dropouts`."""
        p = self.dropouts[number]
        return p, None if not p or self.seeds is None else self.seeds[2 * number : 2 * number + 1]

    def keep(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass, which takes them in the opposite order."""
        if self.keeps:
            self.kept.extend(tensors)

    def take_kept(self) -> list[Tensor | None]:
        """Hand out what was kept, for autograd to look after."""
        kept, self.kept = [*self.kept, self.seeds], []
        self.biases, self.joined = (), None
        return kept

    def restore(self, kept: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> None:
        """Take back what was kept."""
        self.kept, self.biases = list(kept), biases
        self.seeds = self.kept.pop()
        self.gradients = [None] * len(biases)
        self.embedding_gradient: Tensor | None = None
        self.sums: Sums | None = None
        self.deferred: set[int] = set()

    def _defer(self, dy: Tensor) -> None:
        """Let second stages of sums run together, where they are launches."""
        if not defers(dy) or not any(self.needs):
            return
        needs = (*self.needs, self.needs_embedding_beta)
        places = {i: s for i, s in enumerate(self.sinks or ()) if s is not None and needs[i]}
        owners = {sink.untyped_storage().data_ptr() for sink in places.values()}
        of_sinks = len(owners) == 1 and len(places) == sum(needs)
        if not of_sinks:
            places = self._own_places(dy.device)
        self.sums = Sums(places, self._recomputes, self.overwrites and of_sinks)

    def _own_places(self, device: torch.device) -> dict[int, Tensor]:
        """Return gradients of zero, in one piece of memory."""
        needed = {i: b for i, b in enumerate(self.biases) if b is not None and self.needs[i]}
        if self.needs_embedding_beta:
            assert self.embedding_beta is not None
            needed[len(self.needs)] = self.embedding_beta
        # at 64 bytes, as in tensors that PyTorch makes
        sizes = [-(-bias.numel() // 16) * 16 for bias in needed.values()]
        parts = torch.zeros(sum(sizes), dtype=torch.float32, device=device).split(sizes)
        return {i: part[: len(bias)] for (i, bias), part in zip(needed.items(), parts)}

    def _take(self, indices: Sequence[int | None], rows: int, columns: int) -> Tensor:
        """Return where partial rows of these biases' sums go."""
        assert self.sums is not None
        self.deferred.update(i for i in indices if i is not None)
        return self.sums.take(indices, rows, columns)

    def _taken(self, count: int) -> list[Any]:
        taken = self.kept[-count:]
        del self.kept[-count:]
        return taken

    def _note(self, index: int | None, gradient: Tensor) -> None:
        if index is not None and self.needs[index]:
            self.gradients[index] = gradient

    def finish(self) -> list[Tensor | None]:
        """Return the gradients of the embeddings' bias and of each bias, and let go of all else."""
        if self.sums is not None:
            self.sums.add()
            self._finish_embedding_beta(self.sums)
        for index, (bias, needed) in enumerate(zip(self.biases, self.needs)):
            if not needed or self.gradients[index] is not None:
                continue
            if self.sums is not None and index in self.deferred:
                place = self.sums.places[index]
                there = self.sinks is not None and place is self.sinks[index]
                self.gradients[index] = None if there else place
                continue
            if bias is None or index % len(ROLES) != _KEY:  # that of keys is zero
                raise RuntimeError(f"the backward pass came by no gradient of bias {index}")
            self.gradients[index] = torch.zeros_like(bias)
        gradients, self.gradients = self.gradients, []
        # what was kept for layers that the backward pass did not reach
        self.kept, self.biases, self.joined, self.sums = [], (), None, None
        into, added = [], []
        for index, sink in enumerate((self.sinks or ())[: len(gradients)]):
            gradient = gradients[index]
            if sink is not None and gradient is not None:
                into.append(sink)
                added.append(gradient)
                gradients[index] = None
        if into and self.overwrites:
            torch._foreach_copy_(into, added)
        elif into:
            torch._foreach_add_(into, added)
        embedding_gradient, self.embedding_gradient = self.embedding_gradient, None
        return [embedding_gradient, *gradients]

    def _finish_embedding_beta(self, sums: Sums) -> None:
        """Hand the deferred gradient of the embeddings' bias on, unless it is in its sink."""
        index, beta = len(self.needs), self.embedding_beta
        if beta is None or index not in self.deferred:
            return
        place = sums.places[index]
        if not self.sinks or len(self.sinks) <= index or place is not self.sinks[index]:
            self.embedding_gradient = place
        elif beta.grad is None:
            beta.grad = place

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        stack, last = self.stack, len(self.stack.layers) - 1
        residual, y = x, x
        if stack.entry is not None:
            y = self._enter(x)
        elif stack.memory == "lowest":
            self.keep(x)
        for number, layer in enumerate(stack.layers):
            first = stack.first_only and number == last
            rows = None
            if first:
                rows = y.index_select(0, self.packing.first)
                same = residual is y
                residual = rows if same else residual.index_select(0, self.packing.first)
            o = self._attention(number, y, rows)
            if (weights := self._end_weights(layer, o, "forward")) is not None:
                y = residual = self._end(number, o, residual, weights)
                continue
            z = layer.out(o)
            y, residual = self._join(layer.middle, z, residual, 3 * number + 1, z.dtype)
            z = self._feed_forward(layer, y, number)
            self.casts = number == last and layer.end.gamma is not None and defers(z)
            dtype = self.dtype if self.casts else z.dtype
            y, residual = self._join(layer.end, z, residual, 3 * number + 2, dtype)
        return y

    def _end_weights(self, layer: Layer, rows: Tensor, which: str) -> Any:
        """Return the weights behind attention where one call does all of that; None elsewhere.

        It keeps, and takes, what the steps one by one do.
        """
        if self.stack.pre_norm or self._recomputes:
            return None
        products = layer.out, layer.up, layer.down
        weights = tuple(product.packed(rows, which) for product in products)
        return None if any(weight is None for weight in weights) else weights

    def _norms(self, number: int) -> tuple[Norm, Norm]:
        def norm(at: Junction, number: int) -> Norm:
            assert at.gamma is not None
            vectors = at.gamma, self._bias(at.beta), self._bias(at.bias)
            return Norm(*vectors, at.eps, *self._drop(number))

        layer = self.stack.layers[number]
        return norm(layer.middle, 3 * number + 1), norm(layer.end, 3 * number + 2)

    def _end(self, number: int, o: Tensor, x: Tensor, weights: Any) -> Tensor:
        """Run all of a layer behind attention."""
        b, act = self.biases[number * len(ROLES) + _UP], self.stack.layers[number].act
        few_bits = self.stack.memory == "low"
        y, *kept = tiles.layer_end(o, x, weights, self._norms(number), b, act, few_bits, self.keeps)
        if self.keeps:
            hat, rstd, slope, end_hat, end_rstd = kept
            self.keep(hat, None, rstd, slope, end_hat, None, end_rstd)
        return y

    def _enter(self, x: Tensor) -> Tensor:
        entry = self.stack.entry
        assert entry is not None and entry.gamma is not None
        beta = self._bias(entry.beta)
        out = layer_norm_fwd(
            x, entry.gamma, beta, None, None, 0.0, None, entry.eps, x.dtype, self.keeps, False,
            x.dtype,
        )  # fmt: skip
        self.keep(x, *out[1:])
        return out[0]

    def _bias(self, index: int | None) -> Tensor | None:
        return None if index is None else self.biases[index]

    def _join(
        self, junction: Junction, z: Tensor, residual: Tensor, number: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return what the next sublayer takes, in some dtype, and the residual that goes on."""
        p, seed = self._drop(number)
        pre_norm = self.stack.pre_norm
        b = self._bias(junction.bias)
        if junction.gamma is None:
            z = z if b is None else z + b.to(z.dtype)
            s = residual + (dropout(z, p, seed) if seed is not None else z)
            return s, s
        y, *kept = layer_norm_fwd(
            z,
            junction.gamma,
            self._bias(junction.beta),
            b,
            residual,
            p,
            seed,
            junction.eps,
            dtype,
            self.keeps,
            pre_norm,
            z.dtype,
        )
        if not pre_norm:
            if self.keeps:
                self.keep(kept[0], None, kept[1])
            return y, y
        self.keep(*kept)
        return y, kept[0]

    def _qkv_bias(self, number: int, first: int, last: int) -> Tensor | None:
        """Return some parts of the joined biases of q, k and v of a layer."""
        if self.joined is None:
            self.joined = self._joined_biases()
        width = self.stack.layers[number].out.weight.shape[1]
        return (
            None if not self.joined.numel() else self.joined[number, first * width : last * width]
        )

    def _joined_biases(self) -> Tensor:
        """Return the biases of q, k and v of all layers, `[L, 3 d]`; empty where there are none."""
        parts = [
            self.biases[number * len(ROLES) + role]
            for number in range(len(self.stack.layers))
            for role in (_QUERY, _KEY, _VALUE)
        ]
        there = [part for part in parts if part is not None]
        if not there:
            return torch.empty(0)
        if len(there) < len(parts):
            zero = torch.zeros_like(there[0])
            there = [zero if part is None else part for part in parts]
        if defers(there[0][None]):
            # one launch, not two
            joined = torch.empty(
                sum(map(len, there)), dtype=self.stack.dtype, device=there[0].device
            )
            torch._foreach_copy_(list(joined.split([len(part) for part in there])), there)
            return joined.view(len(self.stack.layers), -1)
        return torch.cat(there).to(self.stack.dtype).view(len(self.stack.layers), -1)

    def _heads(self, rows: Tensor) -> Tensor:
        """Return `[*, parts, H, D]` of `[*, parts d]`."""
        width = self.stack.layers[0].out.weight.shape[1]
        return rows.view(rows.shape[0], -1, self.stack.heads, width // self.stack.heads)

    def _project(self, number: int, x: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        """Return q, k and v in one tensor; or q of some rows, first tokens, and k and v."""
        layer = self.stack.layers[number]
        if rows is None:
            return (layer.qkv(x, self._qkv_bias(number, 0, 3)),)
        width = layer.out.weight.shape[1]
        kv = layer.qkv.part(width, 3 * width)(x, self._qkv_bias(number, 1, 3))
        return layer.qkv.part(0, width)(rows, self._qkv_bias(number, 0, 1)), kv

    def _apart(self, projected: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v by head, `[*, H, D]`."""
        q, k, v = (part for rows in projected for part in self._heads(rows).unbind(1))
        return q, k, v

    def _attention(self, number: int, x: Tensor, rows: Tensor | None) -> Tensor:
        projected = self._project(number, x, rows)
        if self.stack.memory != "lowest":
            self.keep(*projected)
        o = attention_fwd(*self._apart(projected), self.packing, *self._drop(3 * number), self.bias)
        return o.flatten(1)

    def _feed_forward(self, layer: Layer, y: Tensor, number: int) -> Tensor:
        b = self.biases[number * len(ROLES) + _UP]
        if self._recomputes:
            z = y.new_empty(y.shape[0], layer.down.weight.shape[0])
            for rows in _chunks(y):
                z[rows] = layer.down(layer.up.activated(y[rows], b, layer.act, False, False)[0])
            return z
        h, kept = layer.up.activated(y, b, layer.act, self.stack.memory == "low", self.keeps)
        self.keep(kept)
        return layer.down(h)

    @property
    def _recomputes(self) -> bool:
        return self.stack.memory in ("lower", "lowest")

    # ------------------------------------------------------------------ backward

    def backward(self, dy: Tensor) -> Tensor | None:
        """Return the gradient of the input, or None where nothing below needs one."""
        stack, last = self.stack, len(self.stack.layers) - 1
        self._defer(dy)
        residual: Tensor | None = None  # the gradient of the residual that goes on
        for number in range(last, -1, -1):
            layer, first = stack.layers[number], stack.first_only and number == last
            weights = None
            if _place(number, _MIDDLE) > self.lowest:
                weights = self._end_weights(layer, dy, "backward")
            if weights is not None:
                residual, do = self._end_bwd(number, dy, weights)
                below = self._attention_bwd(number, do, residual, first)
                if below is None:
                    return None
                dy, residual = below
                continue
            left = self._leave(layer.end, dy, residual, 3 * number + 2, _place(number, _END))
            if left is None:
                return None
            residual, dz = left
            inner = self._feed_forward_bwd(layer, number, dz, residual)
            if inner is None:
                return None
            left = self._leave(
                layer.middle, inner, residual, 3 * number + 1, _place(number, _MIDDLE)
            )
            if left is None:
                return None
            residual, dz = left
            below = self._attention_bwd(number, layer.out.backward(dz), residual, first)
            if below is None:
                return None
            dy, residual = below
        if stack.entry is not None:
            return self._enter_bwd(dy, residual)
        if self.needs_embedding_beta and self.sums is not None:
            partial = self._take([len(self.needs)], column_rows(dy), dy.shape[1])
            column_sum_partial(dy, partial)
        elif self.needs_embedding_beta:
            self.embedding_gradient = bias_gradient(dy)
        return dy

    def _end_bwd(self, number: int, dy: Tensor, weights: Any) -> tuple[Tensor, Tensor]:
        """Return the gradients of the layer's input and of what attention's heads gave."""
        layer = self.stack.layers[number]
        hat, _, rstd, slope, end_hat, _, end_rstd = self._taken(7)
        up = number * len(ROLES) + _UP
        places = layer.end.beta, layer.end.bias, up, layer.middle.beta, layer.middle.bias
        needs = [place is not None and self.needs[place] for place in places]
        do, dx, sums = tiles.layer_end_bwd(
            dy, weights, self._norms(number), self.biases[up], layer.act,
            (hat, rstd, slope, end_hat, end_rstd), needs,
        )  # fmt: skip
        for place, gradient in zip(places, sums):
            if gradient is not None:
                self._note(place, gradient)
        return dx, do

    def _enter_bwd(self, dy: Tensor, residual: Tensor | None) -> Tensor | None:
        entry = self.stack.entry
        assert entry is not None and entry.gamma is not None and entry.beta is not None
        x, mean, rstd = self._taken(3)
        if self.lowest >= _ENTRY:
            self._note(entry.beta, bias_gradient(dy))
            return None
        dx, _, sums = layer_norm_bwd(
            dy, x, mean, rstd, entry.gamma, residual, 0.0, None, dy.dtype, dy.dtype,
            self.needs[entry.beta], False, False,
        )  # fmt: skip
        if self.needs[entry.beta]:
            self._note(entry.beta, sums[0])
        return dx

    def _leave(
        self, junction: Junction, dy: Tensor, residual: Tensor | None, number: int, place: int
    ) -> tuple[Tensor, Tensor] | None:
        """Return the gradients of the residual and of the sublayer's output.

        None where nothing below needs them.
        """
        p, seed = self._drop(number)
        needs_bias = junction.bias is not None and self.needs[junction.bias]
        if junction.gamma is None:
            ds = dy if residual is None else dy + residual
            if needs_bias:
                self._note(junction.bias, column_sum(ds, None, p, seed))
            if place <= self.lowest:
                return None
            return ds, ds if seed is None else dropout(ds, p, seed)
        kept, mean, rstd = self._taken(3)
        assert junction.beta is not None
        needs_beta = self.needs[junction.beta]
        if place <= self.lowest and not needs_bias:
            self._note(junction.beta, bias_gradient(dy))
            return None
        given = (
            dy, kept, mean, rstd, junction.gamma, residual if self.stack.pre_norm else None,
            p, seed, self.stack.dtype, self.stack.dtype, needs_beta, needs_bias,
        )  # fmt: skip
        summed = [junction.beta] * needs_beta + [junction.bias] * needs_bias
        if self.sums is not None:
            partial = self._take(summed, layer_norm_rows(dy), dy.shape[1])
            ds, dz = layer_norm_bwd_partial(*given, partial)
        else:
            ds, dz, sums = layer_norm_bwd(*given, False)
            for index, gradient in zip(summed, sums):
                self._note(index, gradient)
        return None if place <= self.lowest else (ds, dz if dz.numel() else ds)

    def _onto(self, residual: Tensor) -> Tensor | None:
        """Return the residual's gradient where the next junction wants it added already."""
        return None if self.stack.pre_norm else residual

    def _feed_forward_bwd(
        self, layer: Layer, number: int, dz: Tensor, residual: Tensor
    ) -> Tensor | None:
        index = number * len(ROLES) + _UP
        b, ends = self.biases[index], _place(number, _INNER) <= self.lowest
        if not self._recomputes:
            (kept,) = self._taken(1)
            if self.sums is not None and self.needs[index] and not _is_one_kernel(layer.down, dz):
                dh = layer.down.backward(dz)
                partial = self._take([index], column_rows(dh), dh.shape[1])
                du = activation_bwd_partial(dh, kept, b, layer.act, partial)
            else:
                du, db = layer.down.activation_bwd(dz, kept, b, layer.act, True)
                self._note(index, db)
            return None if ends else layer.up.backward(du, self._onto(residual))
        y = self._normalised(layer.middle)
        dy = torch.zeros_like(y) if self.stack.pre_norm else residual
        total = y.new_zeros(layer.up.weight.shape[0], dtype=torch.float32)
        for rows in _chunks(y):
            du, db = layer.down.activation_bwd(dz[rows], layer.up(y[rows]), b, layer.act, False)
            total += db
            if not ends:
                layer.up.backward(du, dy[rows])
        self._note(index, total)
        return None if ends else dy

    def _normalised(self, junction: Junction) -> Tensor:
        """Compute a junction's output again from what lies on top of what was kept."""
        assert junction.gamma is not None
        kept, mean, rstd = self.kept[-3:]
        beta = self._bias(junction.beta)
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
        x = self.kept.pop()
        assert x is not None
        return x

    def _attention_bwd(
        self, number: int, do: Tensor, residual: Tensor, first: bool
    ) -> tuple[Tensor, Tensor] | None:
        layer, at = self.stack.layers[number], number * len(ROLES)
        if self.stack.memory == "lowest":
            x = self._input_of(number)
            rows = x.index_select(0, self.packing.first) if first else None
            projected = self._project(number, x, rows)
        else:
            projected = tuple(self._taken(2 if first else 1))
        by_identity = not number and self._by_identity(do)
        ends = by_identity or _place(number, _QKV) <= self.lowest
        # at the bottom the value bias's gradient can do without those of keys and values, as
        # the probabilities of a query add up to 1 where none is dropped
        dropped = self.dropouts[3 * number] > 0
        needs_kv = not ends or (dropped and (by_identity or self.needs[at + _VALUE]))
        q, k, v = self._apart(projected)
        given = (
            do.view(q.shape), q, k, v, self.packing, *self._drop(3 * number), self.bias, needs_kv
        )  # fmt: skip
        if self.sums is not None and not by_identity and needs_kv:
            dq, dkv = attention_bwd(*given, *self._take_qv(number, q, k))
        else:
            dq, dkv = attention_bwd(*given)
            sums = self._sum_qkv(number, dq, dkv, do, by_identity)
            if by_identity:
                self._embedding_beta(layer, sums, residual)
        if ends:
            return None
        assert dkv is not None
        width = layer.out.weight.shape[1]
        if not first:
            return layer.qkv.backward(joined(dq), self._onto(residual)), residual
        dx = layer.qkv.part(width, 3 * width).backward(dkv.reshape(-1, 2 * width))
        of_rows = layer.qkv.part(0, width).backward(dq.reshape(-1, width), self._onto(residual))
        dx.index_add_(0, self.packing.first, of_rows)
        if self.stack.pre_norm:
            scattered = torch.zeros_like(dx)
            residual = scattered.index_copy_(0, self.packing.first, residual)
        return dx, residual

    def _by_identity(self, do: Tensor) -> bool:
        """Return whether the embeddings' bias goes without the gradient of the layers' input."""
        if not self.needs_embedding_beta or self.needs_input:
            return False
        return self.sums is None or len(do) >= _MANY_ROWS

    def _take_qv(self, number: int, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Return where partial rows of the sums for the biases of q and v go."""
        at, columns = number * len(ROLES), q.shape[1] * q.shape[2]
        heights = attention_sums(q, k, self.packing)
        assert self.sums is not None
        self.sums.reserve((sum(heights) + 1) * columns)  # and what aligns the second
        return tuple(
            self._take([at + role if self.needs[at + role] else None], rows, columns)
            for role, rows in zip((_QUERY, _VALUE), heights)
        )

    def _sum_qkv(
        self, number: int, dq: Tensor, dkv: Tensor | None, do: Tensor, needs_all: bool
    ) -> dict[int, Tensor]:
        """Return the gradients of the biases of q, k and v, as far as they are needed."""
        at, sums = number * len(ROLES), {}
        query, key, value = (self.needs[at + role] for role in (_QUERY, _KEY, _VALUE))
        query, value = query or needs_all, value or needs_all
        if dkv is not None and len(dq) == len(dkv) and query and value:
            # those of keys ride along: one pass instead of two
            parts = bias_gradient(joined(dq)).chunk(3)
            sums = dict(zip((_QUERY, _KEY, _VALUE), parts))
        else:
            if query:
                sums[_QUERY] = bias_gradient(dq.flatten(1))
            if key and dkv is not None:
                sums[_KEY] = bias_gradient(dkv[:, 0].flatten(1))
            if value:
                sums[_VALUE] = bias_gradient(do if dkv is None else dkv[:, 1].flatten(1))
        for role, gradient in sums.items():
            self._note(at + role, gradient)
        return sums

    def _embedding_beta(self, layer: Layer, sums: dict[int, Tensor], residual: Tensor) -> None:
        """Compute the sum of the input's gradient without that: sum(dY W) = sum(dY) W."""
        width = layer.out.weight.shape[1]
        weight = layer.qkv.weight
        total = bias_gradient(residual)
        for role, first in ((_QUERY, 0), (_VALUE, 2 * width)):
            rows = weight[first : first + width].to(total.dtype)
            total = torch.addmv(total, rows.t(), sums[role])
        self.embedding_gradient = total


def _chunks(rows: Tensor) -> Iterator[slice]:
    for first in range(0, rows.shape[0], _CHUNK):
        yield slice(first, first + _CHUNK)


def _is_one_kernel(down: Product, dz: Tensor) -> bool:
    """Return whether the product below an activation and its backward pass are one kernel."""
    if not uses_triton(dz):
        return False
    from ..kernels.linear import beats_vendor

    return beats_vendor(dz, down.weight)
