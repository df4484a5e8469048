"""One run of an encoder's layers: what it is given, and what waits for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.tiles import Norm
from ..ops.dropout import new_seed
from ..packing import Packing
from . import sums
from .depth import END, MIDDLE, QKV, place
from .stack import KEY, QUERY, ROLES, VALUE, Stack

__all__ = ["SEEDS_APART", "Run", "dropouts", "new_seeds", "seed_at"]

#: Seeds of one forward pass are so far apart that no two masks share a row.
SEEDS_APART = 2**40


def dropouts(stack: Stack) -> list[float]:
    """Return the probability with which elements are dropped, by place.

    Those of attention's probabilities are at the place of its q, k and v.
    """
    rates = [0.0] * place(len(stack.layers), 0)
    for number, layer in enumerate(stack.layers):
        owners = ((QKV, layer.dropout), (MIDDLE, layer.middle.dropout), (END, layer.end.dropout))
        for part, rate in owners:
            rates[place(number, part)] = 0.0 if rate is None else rate()
    return rates


def new_seeds(stack: Stack, device: torch.device) -> Tensor:
    """Draw the seeds of a forward pass from the device's default generator.

    Returns
    -------
    Tensor
        int64, one for each place. Each is there twice, so that all begin at 16 bytes: kernels
        compile for what does, or does not.
    """
    if stack.seeds_apart is None or stack.seeds_apart.device != device:
        places = torch.arange(place(len(stack.layers), 0), device=device)
        stack.seeds_apart = SEEDS_APART * places.repeat_interleave(2)
    return new_seed(device) + stack.seeds_apart


def seed_at(seeds: Tensor, at: int) -> Tensor:
    """Return the seed of a place, `[1]`, of what `new_seeds` drew."""
    return seeds[2 * at : 2 * at + 1]


class Run:
    """One forward pass and its backward pass.

    Parameters
    ----------
    stack : Stack
        What runs.
    packing : Packing
        Where the sequences lie.
    score_bias : Tensor or None
        `[H, S, S]`, added to the scores of attention.
    biases : sequence of Tensor or None
        Eight a layer, in the order of `ROLES`.
    dtype : torch.dtype
        Of the output.
    keeps : bool
        Whether there may be a backward pass.
    rates : sequence of float, optional
        The probability of each dropout, by place; by default those of the stack now.
    seeds : Tensor, optional
        Theirs, as `new_seeds` draws them; by default they are drawn.
    """

    def __init__(
        self,
        stack: Stack,
        packing: Packing,
        score_bias: Tensor | None,
        biases: Sequence[Tensor | None],
        dtype: torch.dtype,
        keeps: bool,
        rates: Sequence[float] | None = None,
        seeds: Tensor | None = None,
    ) -> None:
        self.stack, self.packing, self.score_bias = stack, packing, score_bias
        self.biases, self.dtype, self.keeps = biases, dtype, keeps
        #: What the backward pass takes, from the end
        self.kept: list[Tensor | None] = []
        #: Whether the last LayerNorm casts to the output's dtype, and from it
        self.casts = False
        #: The probability of each dropout, by place
        self.dropouts = dropouts(stack) if rates is None else rates
        if seeds is None and any(self.dropouts):
            seeds = new_seeds(stack, packing.device)
        self._seeds = seeds
        #: The same one by one, once they are asked for
        self._each: Sequence[Tensor] | None = None
        self._numbers: list[int] | None = None
        #: The joined biases of q, k and v by layer, once they are asked for
        self._joined: Sequence[Tensor] | None = None

    def drop(self, at: int) -> tuple[float, Tensor | None]:
        """Return probability and seed of the dropout at a place."""
        p = self.dropouts[at]
        if not p or self._seeds is None:
            return p, None
        if self._each is None:
            self._each = self._seeds[::2].split(1)
        return p, self._each[at]

    def drop_on_cpu(self, at: int) -> tuple[float, int | None]:
        """Return the same, with the seed as the number that it is."""
        p = self.dropouts[at]
        if not p or self._seeds is None:
            return p, None
        if self._numbers is None:
            self._numbers = self._seeds.tolist()
        return p, self._numbers[2 * at]

    def norms(self, number: int) -> tuple[Norm, Norm]:
        """Return what kernels for CPUs are told of a layer's two junctions."""
        layer, found = self.stack.layers[number], []
        for junction, part in ((layer.middle, MIDDLE), (layer.end, END)):
            assert junction.gamma is not None
            beta, bias = self.bias(junction.beta), self.bias(junction.bias)
            drop = self.drop_on_cpu(place(number, part))
            found.append(Norm(junction.gamma, beta, bias, junction.eps, *drop))
        return found[0], found[1]

    def bias(self, index: int | None) -> Tensor | None:
        """Return a bias, if there is one."""
        return None if index is None else self.biases[index]

    def qkv_bias(self, number: int, first: int, last: int) -> Tensor | None:
        """Return some parts of the joined biases of q, k and v of a layer."""
        if self._joined is None:
            self._joined = self._joined_biases()
        if not self._joined:
            return None
        width = self.stack.width
        return self._joined[number][first * width : last * width]

    def _joined_biases(self) -> Sequence[Tensor]:
        """Return the biases of q, k and v of each layer, `[3 d]`; nothing where there are none."""
        count = len(self.stack.layers)
        parts = [
            self.biases[number * len(ROLES) + role]
            for number in range(count)
            for role in (QUERY, KEY, VALUE)
        ]
        there = [part for part in parts if part is not None]
        if not there:
            return ()
        if len(there) < len(parts):
            zero = torch.zeros_like(there[0])
            there = [zero if part is None else part for part in parts]
        # our own kernels for CPUs add numbers in fp32
        own = self.stack.layers[0].qkv.packed(self.stack.layers[0].qkv.weight, "forward")
        dtype = self.stack.dtype if own is None else torch.float32
        if sums.defers(there[0][None]):
            # one launch, not two
            joined = torch.empty(sum(map(len, there)), dtype=dtype, device=there[0].device)
            torch._foreach_copy_(list(joined.split([len(part) for part in there])), there)
            return joined.view(count, -1).unbind()
        return torch.cat(there).to(dtype).view(count, -1).unbind()

    # ------------------------------------------------------------ between the two passes

    def keep(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass, which takes them in the opposite order."""
        if self.keeps:
            self.kept.extend(tensors)

    def taken(self, count: int) -> list[Any]:
        """Take the last tensors that were kept."""
        taken = self.kept[-count:]
        del self.kept[-count:]
        return taken

    def take_kept(self) -> list[Tensor | None]:
        """Hand out what was kept, for autograd to look after."""
        kept = [*self.kept, self._seeds]
        self.release()
        return kept

    def restore(self, kept: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> None:
        """Take back what was kept."""
        self.kept, self.biases = list(kept), biases
        self._seeds = self.kept.pop()

    def release(self) -> None:
        """Let go of tensors."""
        self.kept, self.biases, self._joined, self._each = [], (), None, None
