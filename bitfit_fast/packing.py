"""Sequences without their padding: all tokens of a batch one after the other.

Everything in an encoder but attention treats each token alone, so only attention needs to know
where a sequence begins. The tokens keep the batch's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .transfer import sent

__all__ = ["Budget", "FixedPacking", "Group", "Packing"]

#: How much larger a group of sequences may become by padding them to their longest, and the
#: number of elements that never matter.
_SLACK, _FREE = 1.25, 32
#: Attention pads to a multiple of this, the width of the widest vectors.
_MULTIPLE = 16


@dataclass(frozen=True)
class Group:
    """Sequences of similar length, which attention on a CPU pads to one.

    Attributes
    ----------
    starts, lengths : Tensor
        `[n]` int32: each sequence's first row among the packed ones, and its rows.
    order : Tensor
        `[n]` int32: which sequences of the batch these are.
    ones : Tensor
        `[n]` int32: the lengths where each sequence has one query, 1; 0 for one that has none.
    longest : int
        What they are padded to.
    """

    starts: Tensor
    lengths: Tensor
    order: Tensor
    ones: Tensor
    longest: int


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed batch lie.

    Attributes
    ----------
    lengths : tuple of int
        Tokens of each sequence, at least 1.
    padded : int
        Tokens of a row of the padded batch.
    device : torch.device
        Where the tokens are.
    """

    lengths: tuple[int, ...]
    padded: int
    device: torch.device

    @classmethod
    def of_mask(cls, mask: Tensor) -> Packing | None:
        """Read a `[B, S]` attention mask; None where it is not ones, then zeros, in each row."""
        real = mask != 0
        lengths = real.sum(1)
        prefix = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        if not mask.numel() or not bool((real == prefix).all() & (lengths > 0).all()):
            return None
        return cls(tuple(lengths.tolist()), mask.shape[1], mask.device)

    @classmethod
    def uniform(cls, sequences: int, length: int, device: torch.device) -> Packing:
        """Return the packing of a batch without padding."""
        return cls((length,) * sequences, length, device)

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @cached_property
    def _lengths(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int64, device="cpu")

    @cached_property
    def _starts(self) -> Tensor:
        return torch.cat((self._lengths.new_zeros(1), self._lengths.cumsum(0)))

    @cached_property
    def starts(self) -> Tensor:
        """`[B + 1]` int32: where each sequence begins, and where the last one ends."""
        return sent(self._starts.int(), self.device)

    @cached_property
    def first(self) -> Tensor:
        """`[B]` int64: each sequence's first row."""
        return sent(self._starts[:-1], self.device)

    @cached_property
    def each(self) -> Tensor:
        """`[B + 1]` int32: what `starts` is where each sequence has one row."""
        count = len(self.lengths) + 1
        return torch.arange(count, dtype=torch.int32, device=self.device)

    @cached_property
    def rows(self) -> Tensor:
        """`[T]` int64: the row of each token in the padded batch, `[B S]`."""
        real = torch.arange(self.padded, device="cpu") < self._lengths[:, None]
        rows = real.flatten().nonzero().flatten()
        return sent(rows, self.device)

    def pack(self, padded: Tensor) -> Tensor:
        """Return the tokens `[T, ...]` of `[B, S, ...]`."""
        return padded.flatten(0, 1).index_select(0, self.rows)

    def pad(self, packed: Tensor) -> Tensor:
        """Return `[B, S, ...]` of the tokens `[T, ...]`, zero where there is none."""
        shape = (len(self.lengths) * self.padded, *packed.shape[1:])
        padded = packed.new_zeros(shape).index_copy(0, self.rows, packed)
        return padded.unflatten(0, (len(self.lengths), self.padded))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The batch in groups of similar length, the longest first."""
        there = [i for i, length in enumerate(self.lengths) if length]
        order = sorted(there, key=lambda i: -self.lengths[i])
        groups, members, tokens = [], [order[0]], self.lengths[order[0]]
        for i in order[1:]:
            longest, total = self.lengths[members[0]], tokens + self.lengths[i]
            if (len(members) + 1) * longest <= _SLACK * total + _FREE:
                members.append(i)
                tokens = total
            else:
                groups.append(self._group(members))
                members, tokens = [i], self.lengths[i]
        return (*groups, self._group(members))

    def _group(self, members: Sequence[int]) -> Group:
        order = torch.tensor(members, dtype=torch.int32, device=self.device)
        lengths = torch.tensor([self.lengths[i] for i in members], dtype=torch.int32, device="cpu")
        longest = -(-int(lengths[0]) // _MULTIPLE) * _MULTIPLE
        starts = self.starts[:-1][order.long()].contiguous()
        return Group(starts, lengths.to(self.device), order, self._queried(order), longest)

    def _queried(self, order: Tensor) -> Tensor:
        """Return for each of these sequences 1 where its first token may be a query, else 0."""
        return torch.ones_like(order)


@dataclass(frozen=True)
class Budget:
    """What a packing of a fixed size has room for.

    Attributes
    ----------
    sequences : int
        How many a batch has.
    longest : int
        Tokens that each of them may have.
    tokens : int
        Rows of the packing.
    least : int
        Tokens of the smallest batch that it is for.
    """

    sequences: int
    longest: int
    tokens: int
    least: int

    @property
    def spare(self) -> int:
        """Sequences that the rows which a batch leaves over are cut into."""
        return -(-(self.tokens - self.least) // self.longest)

    def filled(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Return the lengths of a batch's sequences, and of those that fill the rows left over."""
        left, lengths = self.tokens - sum(lengths), list(lengths)
        for _ in range(self.spare):
            lengths.append(min(left, self.longest))
            left -= lengths[-1]
        assert not left and len(lengths) == self.sequences + self.spare
        return tuple(lengths)


@dataclass(frozen=True)
class FixedPacking(Packing):
    """A packing of a fixed size, whose layout lies in tensors that stay where they are.

    What runs on it can be captured once and replayed with other batches. Rows that a batch
    leaves over lie behind it, in sequences of their own, since a row that no kernel writes
    could hold anything. Nothing reads what becomes of them, so all their gradients are zero.

    Attributes
    ----------
    lengths : tuple of int
        Of this batch, with the sequences of rows left over, some of which are empty. What runs
        on a GPU looks at the tensors alone.
    budget : Budget
        What there is room for.
    layout : dict of str to Tensor
        On the device, what `tables` makes: `starts`, `first`, `rows` and `each`.
    """

    budget: Budget
    layout: dict[str, Tensor]

    @staticmethod
    def tables(budget: Budget, lengths: Sequence[int], width: int) -> dict[str, Tensor]:
        """Compute the layout of a batch, on the host.

        Parameters
        ----------
        budget : Budget
        lengths : sequence of int
            Of the batch's sequences.
        width : int
            Tokens of a row of the padded batch.

        Returns
        -------
        dict of str to Tensor
            `starts`, int32, and `first`, as in `Packing`; `rows` `[T]`, where `pad` writes
            each token, those left over to where nobody looks; and `source` `[T]`, where each
            token is in the padded batch: for those left over its first one.
        """
        count = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        filled = torch.tensor(budget.filled(lengths), dtype=torch.int64, device="cpu")
        starts = torch.cat((filled.new_zeros(1), filled.cumsum(0)))
        tokens = int(count.sum())
        number = torch.arange(budget.sequences, device="cpu").repeat_interleave(count)
        within = torch.arange(tokens, device="cpu") - starts[:-1].index_select(0, number)
        rows = starts.new_full((budget.tokens,), budget.sequences * budget.longest)
        rows[:tokens] = budget.longest * number + within
        source = starts.new_zeros(budget.tokens)
        source[:tokens] = width * number + within
        return {
            "starts": starts.int(),
            "first": starts[: budget.sequences],
            "rows": rows,
            "source": source,
        }

    @staticmethod
    def queries(budget: Budget, device: torch.device) -> Tensor:
        """Return `each`: a query for each sequence of a batch, and none for rows left over."""
        count = torch.arange(budget.sequences + budget.spare + 1, device=device)
        return count.clamp(max=budget.sequences).int()

    @property
    def tokens(self) -> int:
        """Rows, whether of the batch or left over."""
        return self.budget.tokens

    @property
    def longest(self) -> int:
        """The most tokens that a sequence may have."""
        return self.budget.longest

    @cached_property
    def starts(self) -> Tensor:
        """`[B + spare + 1]` int32: where each sequence begins, and where the last one ends."""
        return self.layout["starts"]

    @cached_property
    def first(self) -> Tensor:
        """`[B]` int64: the first row of each of the batch's sequences."""
        return self.layout["first"]

    @cached_property
    def each(self) -> Tensor:
        """`[B + spare + 1]` int32: what `starts` is where each of the batch's has one row."""
        return self.layout["each"]

    @cached_property
    def rows(self) -> Tensor:
        """`[T]` int64: where `pad` writes each token."""
        return self.layout["rows"]

    def pad(self, packed: Tensor) -> Tensor:
        """Return `[B, S, ...]` of the tokens `[T, ...]`, zero where there is none."""
        budget = self.budget
        # a row more, for those left over
        shape = (budget.sequences * budget.longest + 1, *packed.shape[1:])
        padded = packed.new_zeros(shape).index_copy(0, self.rows, packed)
        return padded[:-1].unflatten(0, (budget.sequences, budget.longest))

    def _queried(self, order: Tensor) -> Tensor:
        return (order < self.budget.sequences).to(order.dtype)
