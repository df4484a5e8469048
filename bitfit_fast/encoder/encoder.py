"""An encoder that a model runs as one operation, and how it runs on a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..arena import Arena
from ..errors import BitFitError
from ..models.families import StackRow
from ..modules import LayerNorm
from ..packing import Packing
from . import together
from .depth import INPUT
from .embeddings import Dropout, Onward, waiting_tables
from .operation import run_stack
from .parts import hooked
from .run import dropouts, new_seeds, seed_at
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
        Those of the layers, and the table of what is added to scores.
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
    packing, beta, rates, seeds
        Of the batch that is running.
    dtype : torch.dtype, optional
        Of the embeddings of that batch, which the model goes on with behind the layers, where
        the layers are given them in another.
    fixed : (Packing, dict), optional
        A packing, and the base model's inputs packed like that, in the place of those that
        it is given; see `given`.
    in_head : bool, optional
        Whether the model's head is running, where only it may be given first tokens alone.
    score_biases : dict of (int, torch.device) to Tensor
        What was added to scores so far, by how many positions and where.
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
    rates: list[float] | None = None
    seeds: Tensor | None = None
    dtype: torch.dtype | None = None
    fixed: tuple[Packing, dict[str, Tensor]] | None = None
    in_head: bool | None = None
    score_biases: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copied model runs, whose gradients are its own."""
        return {**vars(self), "sinks": None, "score_biases": {}}

    def write_to(self, arena: Arena | None) -> None:
        """Add gradients where an arena has them, from now on; None hands them to autograd.

        It hands on those of parameters that have hooks now, which would not be called otherwise.
        """
        if arena is None:
            self.sinks = None
            return
        straight = {n for n, p in arena.parameters.items() if not hooked(p)}
        self.sinks = [
            None if name is None or name not in straight else arena.view(name, arena.gradients)
            for name in (*self.names, self.embedding_name)
        ]

    @property
    def written(self) -> set[str]:
        """Names of the layers' biases whose gradients go where `write_to` said."""
        named = zip(self.names, self.sinks or ())
        return {name for name, sink in named if name is not None and sink is not None}

    @property
    def biases(self) -> list[Tensor | None]:
        """The biases, or what stands in for them in a functional call."""
        return [owner._parameters["bias"] for owner in self.owners]

    @contextlib.contextmanager
    def running(self, packing: Packing) -> Iterator[None]:
        """Let the layers run as the stack, on a batch packed like this."""
        self.weights.check()
        dropout, p, knows = self._dropout()
        self.rates = dropouts(self.stack)
        if p or any(self.rates):
            self.seeds = new_seeds(self.stack, packing.device)
        norm, tables = self._embedding_norm() if knows else None, waiting_tables(self.embeddings)
        onward = Onward(together.rows_dtype(self.stack, packing))
        told: list[tuple[Any, str, Any]] = [(table, "_onward", onward) for table in tables]
        if p and self.seeds is not None:
            onward.p, onward.seed = p, seed_at(self.seeds, INPUT)
            told.append((dropout, "_onward", onward))
        if tables:
            self.dtype = tables[0].weight.dtype
            if self.projects or not knows:
                # what is between the LayerNorm and the layers has the model's dtype
                onward.dtype = self.dtype
        if norm is not None:
            self.beta, self.rates[INPUT] = norm.bias, p
            told.append((norm, "_leaves_bias", True))
        self.packing = packing
        for module, name, value in told:
            setattr(module, name, value)
        try:
            yield
        finally:
            self.packing = self.beta = self.rates = self.seeds = self.dtype = None
            for module, name, _ in told:
                delattr(module, name)

    @contextlib.contextmanager
    def given(self, packing: Packing, inputs: dict[str, Tensor]) -> Iterator[None]:
        """Let the base model run on inputs that are packed already, whatever it is called with."""
        self.fixed = packing, inputs
        try:
            yield
        finally:
            self.fixed = None

    def positions(self, ids: Tensor, longest: int | None) -> Tensor:
        """Return the `[B, S]` positions that the model would give to padded tokens.

        Raises
        ------
        BitFitError
            Where the `longest` sequence, if that is known, has more tokens than the model has
            positions.
        """
        # a wrapped table says nothing of its size
        rows = getattr(self.embeddings.position_embeddings, "num_embeddings", None)
        padding = -1
        if self.row.positions == "padding":
            padding = int(self.embeddings.padding_idx)  # type: ignore[arg-type]
        elif longest is None:  # all count, whatever they are
            longest = ids.shape[1]
        if rows is not None and longest is not None and longest > (most := rows - padding - 1):
            raise BitFitError(
                f"a sequence of {longest} tokens is longer than the model's {most} positions; "
                "cut it when it is tokenized (max_length)"
            )
        if padding < 0:
            return torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
        real = ids.ne(padding)
        return real.cumsum(1) * real + padding

    def _embedding_norm(self) -> Any:
        """Return the LayerNorm that the stack's input comes from, if its bias trains.

        The stack computes that bias's gradient, through a dropout that it knows.
        """
        norm = getattr(self.embeddings, "LayerNorm", None)
        if type(norm) is not LayerNorm or hooked(norm) or self.projects or norm.bias is None:
            return None
        return norm if norm.bias.requires_grad and torch.is_grad_enabled() else None

    def _dropout(self) -> tuple[Any, float, bool]:
        """Return the dropout at the end of the embeddings, its probability, and what is known.

        That is whether it drops elements by a seed that it is told, or none; the probability is 0
        otherwise.
        """
        dropout = getattr(self.embeddings, "dropout", None)
        if type(dropout) is Dropout and not hooked(dropout):
            return dropout, Rate(dropout, "p")(), True
        if isinstance(dropout, nn.Dropout):
            return None, 0.0, not (dropout.training and dropout.p)
        return None, 0.0, dropout is None or type(dropout) is nn.Identity

    def _score_bias(self, module: Any, longest: int, device: torch.device) -> Tensor:
        """Return what the model adds to scores, `[H, S, S]` for no fewer positions than `longest`.

        It is kept: its weight is frozen, some versions of models wait for a GPU to compute it, and
        captured graphs read it where it was. Vectors may read its rows up to a multiple of 16.
        """
        size = max(64, 1 << (longest - 1).bit_length())
        if (size, device) not in self.score_biases:
            with torch.inference_mode(False), torch.no_grad():
                dummy = torch.empty(1, size, 1, device=device)
                bias = module.compute_position_bias(dummy)[0].float().contiguous()
            self.score_biases[size, device] = bias
        return self.score_biases[size, device]

    def run(self, module: Any, hidden: Tensor) -> Tensor:
        """Run the stack on `[1, T, d]` packed or `[B, S, d]` unpadded embeddings."""
        packing = self.packing
        assert packing is not None
        bias = None
        if self.row.score_bias is not None:
            bias = self._score_bias(module, packing.longest, hidden.device)
        rows, dtype = hidden.flatten(0, 1), self.dtype or hidden.dtype
        overwrites, self.overwrites = self.overwrites, False
        y = run_stack(
            self.stack, rows, self.biases, packing, bias, self.beta, self.sinks, dtype,
            overwrites, self.rates, self.seeds,
        )  # fmt: skip
        return y[:, None] if self.stack.first_only else packing.pad(y)
