"""An encoder that a model runs as one operation, and how it runs on a batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arena import Arena
from ..errors import BitFitError
from ..models.families import StackRow
from ..modules import LayerNorm
from ..packing import Packing
from .embeddings import waiting_tables
from .operation import run_stack
from .stack import Rate, Stack
from .weights import Weights

__all__ = ["Encoder"]


@dataclass
class Encoder:
    """A model's encoder as one operation, and what its forward pass needs to know.

    Attributes
    ----------
    stack : Stack
        The layers.
    names : list of str or None
        Of the biases, in the order of the stack's inputs.
    owners : list of nn.Module
        The modules that hold these biases.
    weights : Weights
        Those of the layers.
    row : StackRow
        The family's.
    embeddings : nn.Module
        What the stack's input comes from.
    embedding_name : str or None
        Of the bias of their LayerNorm.
    sinks : list of Tensor or None, optional
        Where gradients are added; see `run_stack`.
    overwrites : bool
        Whether those of the next batch take the place of what is there.
    projects : bool
        Whether there is a projection between embeddings and layers.
    reads_padding : bool
        Whether the head looks at tokens of padding, which then are computed, too.
    packing, beta
        Of the batch that is running.
    dtype : torch.dtype, optional
        Of the embeddings of that batch, which the model goes on with behind the layers, where
        the layers are given them in another.
    fixed : (Packing, dict), optional
        A packing, and the base model's inputs packed like that, in the place of those that
        it is given; see `given`.
    """

    stack: Stack
    names: list[str | None]
    owners: list[nn.Module]
    weights: Weights
    row: StackRow
    embeddings: nn.Module
    embedding_name: str | None = None
    sinks: Sequence[Tensor | None] | None = None
    overwrites: bool = False
    projects: bool = False
    reads_padding: bool = False
    packing: Packing | None = None
    beta: nn.Parameter | None = None
    dtype: torch.dtype | None = None
    fixed: tuple[Packing, dict[str, Tensor]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoder:
        """Return what a copied model runs, whose gradients are its own."""
        made = memo[id(self)] = copy.copy(self)
        for each in fields(self):
            setattr(made, each.name, copy.deepcopy(getattr(self, each.name), memo))
        made.sinks = None
        return made

    def write_to(self, arena: Arena | None) -> None:
        """Add gradients where an arena has them, from now on; None hands them to autograd."""
        if arena is None:
            self.sinks = None
            return
        self.sinks = [
            None if name not in arena.slices else arena.view(name, arena.gradients)
            for name in (*self.names, self.embedding_name)
        ]

    @property
    def biases(self) -> list[Tensor | None]:
        """The biases, or what stands in for them in a functional call."""
        return [owner._parameters["bias"] for owner in self.owners]

    @contextlib.contextmanager
    def running(self, packing: Packing) -> Iterator[None]:
        """Let the layers run as the stack, on a batch packed like this."""
        self.weights.check()
        norm, tables = self._embedding_norm(), waiting_tables(self.embeddings)
        self.packing, self.beta = packing, None if norm is None else norm.bias
        if norm is not None:
            norm._leaves_bias = True
        for table in tables:
            self.dtype = table.weight.dtype
            # what is between the LayerNorm and the layers has the model's dtype
            between = self.projects or self._drops()
            table._goes_on_in = self.dtype if between else self.stack.dtype
        try:
            yield
        finally:
            self.packing = self.beta = self.dtype = None
            if norm is not None:
                del norm._leaves_bias
            for table in tables:
                del table._goes_on_in

    @contextlib.contextmanager
    def given(self, packing: Packing, inputs: dict[str, Tensor]) -> Iterator[None]:
        """Let the base model run on inputs that are packed already, whatever it is called with."""
        self.fixed = packing, inputs
        try:
            yield
        finally:
            self.fixed = None

    def positions(self, ids: Tensor) -> Tensor:
        """Return the `[B, S]` positions that the model would give to padded tokens."""
        if self.row.positions == "index":
            return torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
        padding = int(self.embeddings.padding_idx)  # type: ignore[arg-type]
        real = ids.ne(padding)
        return real.cumsum(1) * real + padding

    def _embedding_norm(self) -> Any:
        """Return the LayerNorm that the stack's input is the output of, if its bias trains.

        The stack computes that bias's gradient without the gradient of its input.
        """
        norm = getattr(self.embeddings, "LayerNorm", None)
        if type(norm) is not LayerNorm or self.projects or norm.bias is None:
            return None
        if not norm.bias.requires_grad or self._drops() or not torch.is_grad_enabled():
            return None
        return norm

    def _drops(self) -> bool:
        """Return whether elements of the embeddings are dropped."""
        dropout = getattr(self.embeddings, "dropout", None)
        return dropout is not None and Rate(dropout, "p")() > 0

    def run(self, module: Any, hidden: Tensor) -> Tensor:
        """Run the stack on `[1, T, d]` packed or `[B, S, d]` unpadded embeddings."""
        packing = self.packing
        assert packing is not None
        bias = None
        if self.row.score_bias is not None:
            dummy = hidden.new_empty(1, packing.longest, 1)
            bias = module.compute_position_bias(dummy)[0].float()
            # rows that vectors may read to their end
            bias = F.pad(bias, (0, -packing.longest % 16))
            if bias.requires_grad:
                raise BitFitError(
                    f"the weight of {self.row.score_bias} trains now, and the patched encoder "
                    "computes no gradient of weights; unpatch the model first"
                )
        rows, dtype = hidden.flatten(0, 1), self.dtype or hidden.dtype
        overwrites, self.overwrites = self.overwrites, False
        given = (rows, self.biases, packing, bias, self.beta, self.sinks, dtype, overwrites)
        y = run_stack(self.stack, *given)
        return y[:, None] if self.stack.first_only else packing.pad(y)
