"""The step on inputs of a fixed size that stay where they are, so that it can be captured.

A batch is packed into the smallest of a few budgets of tokens that holds it. What is computed for
it is what the ordinary step computes, and rows that it leaves over add nothing to any gradient:
seeds of dropout are drawn in the same order, and rows of masks have the same numbers (but not in
the dropout of a head that labels tokens, which looks at the padded outputs). Capturing itself is
`graph`'s; without it the same step runs as it is, on any device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import IGNORED, Batch
from ..encoder import LENGTHS, Encoder, fixed_refusal
from ..errors import BitFitError, BitFitWarning, listed
from ..packing import Budget, FixedPacking, Packing
from ..transfer import pinned, sent

__all__ = ["LONGEST", "CannotCapture", "FixedSteps", "budgets", "check_budget", "token_lengths"]

#: Tokens of an example where nothing says how many there may be.
LONGEST = 512

#: How much larger a budget is than the one below: the most that a batch has computed in vain.
_RATIO = 1.25
#: What budgets are multiples of, and the smallest.
_ALIGNMENT = 64
#: Up to this many tokens sequences share a packing; attention makes no difference between them.
_SHORT = 64
#: Packings that are kept, each of which is a captured graph.
_MOST = 32
#: What a batch may hold besides images or tokens.
_KNOWN = {"attention_mask", "token_type_ids", "position_ids", "labels", LENGTHS}


class CannotCapture(Exception):
    """A step cannot be captured; the message says why."""


def budgets(tokens: int) -> tuple[int, ...]:
    """Return budgets for batches of up to `tokens` tokens, ascending."""
    made: list[int] = []
    while not made or made[0] > _ALIGNMENT:
        made.insert(0, -(-tokens // _ALIGNMENT) * _ALIGNMENT)
        tokens = min(int(tokens / _RATIO), made[0] - _ALIGNMENT)
    return tuple(made)


def token_lengths(batch: Batch) -> tuple[int, ...] | None:
    """Return how many tokens each example has, where the host knows it or can look."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None or ids.ndim != 2 or not ids.numel():
        return None
    if LENGTHS in batch:
        lengths = tuple(batch[LENGTHS])
        fit = len(lengths) == len(ids) and min(lengths) >= 1 and max(lengths) <= ids.shape[1]
        return lengths if fit else None
    if mask is None:
        return (ids.shape[1],) * len(ids)
    if mask.device.type != "cpu" or mask.shape != ids.shape:
        return None
    packing = Packing.of_mask(mask)
    return None if packing is None else packing.lengths


def check_budget(batch: Batch, given: Sequence[int]) -> None:
    """Check that a batch is within the largest of the budgets that were asked for.

    Raises
    ------
    BitFitError
        With both numbers.
    """
    lengths = token_lengths(batch)
    if lengths is not None and sum(lengths) > max(given):
        raise BitFitError(
            f"a batch of {len(lengths)} examples has {sum(lengths)} tokens, and the token budget "
            f"is {max(given)}; a larger token-budget, smaller batches or a smaller max-length fit"
        )


class _Inputs:
    """The tensors in which the step finds its batch.

    Parameters
    ----------
    encoder : Encoder
        Of the patched model.
    batch : dict
        One like those to come.
    budget : Budget or None
        None for images, whose size is fixed.
    device : torch.device
        Where the model is.
    by_token : bool
        Whether there is a label for each token.
    """

    def __init__(
        self,
        encoder: Encoder,
        batch: Batch,
        budget: Budget | None,
        device: torch.device,
        by_token: bool,
    ) -> None:
        self.encoder, self.budget, self.device = encoder, budget, device
        self._by_token = by_token
        self.packing: Packing
        self._parts: dict[str, slice] = {}
        #: The learning rate, where the optimiser reads it.
        self.lr = torch.zeros((), device=device)
        #: What the base model is given, and what its head is given.
        self.own: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}
        if budget is None:
            images = batch["pixel_values"]
            self.own["pixel_values"] = torch.empty_like(images, device=device)
            positions: Any = encoder.embeddings.position_embeddings
            self.packing = Packing.uniform(len(images), positions.shape[1], device)
            # now, as nothing may be sent to the device while it is captured
            _ = self.packing.starts, self.packing.first, self.packing.each, self.packing.rows
        else:
            self._lay_out(batch, budget)
        if "labels" in batch and "labels" not in self.others:
            labels = batch["labels"]
            shape = labels.shape
            if by_token and budget is not None:
                shape = torch.Size((budget.sequences, budget.longest))
            self.others["labels"] = torch.full(shape, IGNORED, dtype=labels.dtype, device=device)

    def _lay_out(self, batch: Batch, budget: Budget) -> None:
        """Make one tensor of all whole numbers, which one message fills."""
        names = ["input_ids", "position_ids"]
        if "token_type_ids" in batch:
            names.append("token_type_ids")
        cuts = budget.sequences + budget.spare + 1
        sizes = {"starts": -(-cuts // 2), "lr": 1, "first": budget.sequences}
        sizes["rows"] = budget.tokens
        sizes |= dict.fromkeys(names, budget.tokens)
        labels = batch.get("labels")
        if labels is not None and labels.dtype == torch.int64 and labels.ndim == 1:
            sizes["labels"] = len(labels)
        end = 0
        for name, size in sizes.items():
            self._parts[name] = slice(end, end + size)
            end += size + size % 2  # at 16 bytes, which kernels are compiled for
            if name == "rows":
                self._layout = slice(0, end)
        self._table = torch.zeros(end, dtype=torch.int64, device=self.device)
        self._cuts = cuts
        self.lr = self._part(self._table, "lr")
        tables = {name: self._part(self._table, name) for name in ("starts", "first", "rows")}
        self._tables = {**tables, "each": FixedPacking.queries(budget, self.device)}
        self.own = {name: self._part(self._table, name)[None] for name in names}
        if "labels" in sizes:
            self.others["labels"] = self._part(self._table, "labels")

    def _part(self, table: Tensor, name: str) -> Tensor:
        part = table[self._parts[name]]
        if name == "lr":
            return part.view(torch.float32)[0]
        return part.view(torch.int32)[: self._cuts] if name == "starts" else part

    def _rides(self, batch: Batch) -> bool:
        """Return whether labels go to the device with the tokens."""
        if "labels" not in self._parts:
            return False
        return {batch[key].device.type for key in ("input_ids", "labels")} == {"cpu"}

    def load(self, batch: Batch, lengths: Sequence[int] | None, lr: float) -> None:
        """Take a batch and a learning rate over, without waiting for the device."""
        if self.budget is None:
            self.lr.fill_(lr)
            images = pinned(batch["pixel_values"], self.device)
            self.own["pixel_values"].copy_(images, non_blocking=True)
        else:
            assert lengths is not None
            self._load_tokens(batch, lengths, self.budget, lr)
        if "labels" in self.others and not self._rides(batch):
            given, labels = batch["labels"], self.others["labels"]
            if self._by_token:
                labels.fill_(IGNORED)
                # either may be the wider one: padding has no labels, and a batch may have much
                width = min(labels.shape[1], given.shape[1])
                labels, given = labels[:, :width], given[:, :width]
            labels.copy_(pinned(given, self.device), non_blocking=True)

    def _load_tokens(self, batch: Batch, lengths: Sequence[int], budget: Budget, lr: float) -> None:
        ids = batch["input_ids"]
        tables = FixedPacking.tables(budget, lengths, ids.shape[1])
        source = sent(tables.pop("source"), ids.device)
        pins = self.device.type == "cuda"
        # a new one each time: that of the step before may not have been read yet
        host = torch.empty(len(self._table), dtype=torch.int64, device="cpu", pin_memory=pins)
        self._part(host, "lr").fill_(lr)
        for name, table in tables.items():
            self._part(host, name).copy_(table)
        on_host = ids.device.type == "cpu"
        table = host if on_host else self._table
        for name in self.own:
            padded = batch.get(name)
            if padded is None:
                padded = self.encoder.positions(ids, max(lengths))
            packed = padded.expand_as(ids).flatten().index_select(0, source)
            self._part(table, name).copy_(packed)
        if self._rides(batch):
            self._part(host, "labels").copy_(batch["labels"])
        part = slice(None) if on_host else self._layout
        self._table[part].copy_(host[part], non_blocking=True)
        self.packing = FixedPacking(
            budget.filled(lengths), budget.longest, self.device, budget, self._tables
        )


class FixedSteps:
    """Runs steps on packings of a fixed size, one for each kind of batch.

    Parameters
    ----------
    model : nn.Module
        After `patch_encoder`.
    encoder : Encoder
        Its own.
    step : callable
        Takes the model's inputs and a learning rate on the device, trains, and returns the loss;
        waits for nothing.
    given : sequence of int
        Budgets of tokens, ascending.
    device : torch.device
        Where the model is.
    record : callable, optional
        Takes a function that works on the same tensors at each call, and returns one that
        does the same faster; raises `CannotCapture` where it cannot. By default the function
        itself is called.
    after : int
        How many batches of a kind go another way before it gets a packing of its own.
    say : callable, optional
        Takes the sentence that says why steps go another way; by default a warning.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        step: Callable[[dict[str, Any], Tensor], Tensor],
        given: Sequence[int],
        device: torch.device,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
        after: int = 1,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.encoder, self.step, self.device = model, encoder, step, device
        self.budgets, self.record, self.after = tuple(sorted(given)), record, after
        #: Why no step can run so, or None
        self.refusal = fixed_refusal(model)
        self._seen: dict[Any, int] = {}
        self._made: dict[Any, tuple[_Inputs, Callable[[], None], list[Tensor]]] = {}
        self._said: set[str] = set()
        self._say = say

    def __call__(self, batch: Batch, lr: float = 0.0, also: Hashable = None) -> Tensor | None:
        """Train on a batch, and return its loss; None if it has to go another way.

        Why it has to is said once. `lr` is for steps that update; `also` is what a step depends
        on besides the batch: steps of a kind have it in common.
        """
        try:
            return self._trained(batch, lr, also)
        except CannotCapture as reason:
            text = f"steps run without a CUDA graph where {reason}"
            if text not in self._said:
                self._said.add(text)
                if self._say is None:
                    warnings.warn(text, BitFitWarning, stacklevel=3)
                else:
                    self._say(text)
            return None

    def _trained(self, batch: Batch, lr: float, also: Hashable) -> Tensor | None:
        """Train on a batch, unless it is one of the first of its kind."""
        if self.refusal is not None:
            raise CannotCapture(self.refusal)
        if unknown := batch.keys() - _KNOWN - {"input_ids", "pixel_values"}:
            raise CannotCapture(f"batches with {listed(sorted(unknown))} are not known")
        lengths = token_lengths(batch)
        if lengths is None and "pixel_values" not in batch:
            raise CannotCapture("batches do not tell how long their examples are")
        budget = None if lengths is None else self._budget(lengths)
        key = (also, *self._kind(batch, budget))
        if key in self._made:
            inputs, run, losses = self._made[key]
            self.encoder.weights.check()
            inputs.load(batch, lengths, lr)
        else:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= self.after:
                return None
            if len(self._made) >= _MOST:
                raise CannotCapture(f"there are more than {_MOST} kinds of batches")
            run, losses = self._make(key, batch, budget, lengths, lr)
        run()
        # the next replay, of whichever graph, may overwrite it
        return losses[-1].clone()

    def close(self) -> None:
        """Let go of what was captured, and of the memory that it holds."""
        self._made.clear()

    def _budget(self, lengths: Sequence[int]) -> Budget:
        """Return the smallest budget that holds a batch."""
        below = 0
        for tokens in self.budgets:
            if sum(lengths) <= tokens:
                longest = max(_SHORT, 1 << (max(lengths) - 1).bit_length())
                return Budget(len(lengths), longest, tokens, max(below + 1, len(lengths)))
            below = tokens
        raise CannotCapture(
            f"a batch has {sum(lengths)} tokens, and the largest budget is {self.budgets[-1]}"
        )

    def _is_by_token(self, batch: Batch) -> bool:
        """Return whether a batch has a label for each token."""
        return type(self.model).__name__.endswith("ForTokenClassification") and "labels" in batch

    def _kind(self, batch: Batch, budget: Budget | None) -> Any:
        """Return what batches have in common that can take the same tensors."""
        shapes = [] if budget is None else [budget]
        padded = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
        if self._is_by_token(batch):
            padded.add("labels")
        for key, value in sorted(batch.items()):
            if isinstance(value, Tensor):
                shapes.append((key, value.dtype, None if key in padded else value.shape))  # type: ignore[arg-type]
        return (self.model.training, *shapes)

    def _make(
        self,
        key: Any,
        batch: Batch,
        budget: Budget | None,
        lengths: Sequence[int] | None,
        lr: float,
    ) -> tuple[Callable[[], None], list[Tensor]]:
        """Return what trains on batches of a kind, this one first, and where the loss will be."""
        inputs = _Inputs(self.encoder, batch, budget, self.device, self._is_by_token(batch))
        inputs.load(batch, lengths, lr)
        losses: list[Tensor] = []

        def run() -> None:
            with self.encoder.given(inputs.packing, inputs.own):
                losses[:] = [self.step({**inputs.own, **inputs.others}, inputs.lr)]

        replay: Callable[[], None] = run
        if self.record is not None:
            try:
                replay = self.record(run)
            except CannotCapture as reason:
                # nor will others be, and what was captured is not replayed again
                self.refusal = str(reason)
                self.close()
                raise
        self._made[key] = inputs, replay, losses
        return replay, losses
