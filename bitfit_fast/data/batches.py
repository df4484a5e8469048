"""From texts to batches: tokens, the order of examples, padding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import BitFitWarning
from ..transfer import sent
from .task import Split

__all__ = [
    "IGNORED",
    "Batch",
    "Collate",
    "EpochBatches",
    "Features",
    "evaluation_batches",
    "in_tensors",
    "move",
    "pad",
    "subset",
    "tokenize",
    "training_batches",
]

Features = list[dict[str, Any]]
Batch = dict[str, Any]
Collate = Callable[[Features], Batch]

#: Label of a token that no loss looks at.
IGNORED = -100


def tokenize(split: Split, tokenizer: Any, max_length: int) -> Features:
    """Turn a split into token ids.

    Parameters
    ----------
    split : Split
        Single sentences or pairs.
    tokenizer : PreTrainedTokenizerBase
        The model's own; special tokens and token types are what it makes of a pair.
    max_length : int
        Longer examples are cut, the longer sentence of a pair first. A warning says how many,
        where the tokenizer tells ("fast" ones do).

    Returns
    -------
    list of dict
        One an example: the tokenizer's keys, each an int64 tensor of as many numbers as there are
        tokens, and `labels` where the split has them.
    """
    encoded = tokenizer(*map(list, zip(*split.texts)), truncation=True, max_length=max_length)
    keys = list(encoded.keys())
    features = [{key: encoded[key][i] for key in keys} for i in range(len(split))]
    if split.labels is not None:
        for feature, label in zip(features, split.labels):
            feature["labels"] = label
    # of the tokenizers that say what they left out
    cut = sum(bool(one.overflowing) for one in getattr(encoded, "encodings", None) or ())
    if cut:
        warnings.warn(
            f"{cut} of {len(split)} examples of the {split.name} set are cut to max-length "
            f"{max_length}",
            BitFitWarning,
            4,
        )
    return in_tensors(features)


def in_tensors(features: Features) -> Features:
    """Turn what features hold for each token into tensors, in place, and return the features.

    Batches of lists are put together number by number, which takes longer than a GPU's step.
    """
    for key, value in features[0].items() if features else ():
        if isinstance(value, list):
            lists = [feature[key] for feature in features]
            flat = torch.tensor([n for each in lists for n in each], dtype=torch.int64)
            for feature, part in zip(features, flat.split([len(each) for each in lists])):
                feature[key] = part
    return features


def pad(tokenizer: Any) -> Collate:
    """Return the collation that pads to the longest example of a batch.

    Its batches are those of transformers' `DataCollatorWithPadding`, or where labels are tensors
    of `DataCollatorForTokenClassification`, in a tenth of the time.
    """
    fill = {
        "input_ids": tokenizer.pad_token_id,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
        "special_tokens_mask": 1,
        "labels": IGNORED,
    }
    side = tokenizer.padding_side

    def collate(features: Features) -> Batch:
        batch = {}
        for key, first in features[0].items():
            values = [feature[key] for feature in features]
            if isinstance(first, Tensor):
                batch[key] = pad_sequence(values, True, fill.get(key, 0), side)
            else:
                batch[key] = torch.tensor(values)
        return batch

    return collate


def subset(examples: int, count: int, seed: int) -> list[int]:
    """Return `count` of the indices by seed; a smaller count gives a subset of a larger one's."""
    if count >= examples:
        return list(range(examples))
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    return order[:count].tolist()


class EpochBatches:
    """Endless batches of example indices, a fresh permutation an epoch.

    The order depends on `seed` and the epoch's number alone, so a resumed run, and every
    backend, sees the same examples in the same batches.

    Parameters
    ----------
    examples, batch_size, seed : int
        The last batch of an epoch may be smaller.
    start : int
        Number of batches to leave out.
    """

    def __init__(self, examples: int, batch_size: int, seed: int, start: int = 0) -> None:
        self.examples, self.batch_size, self.seed, self.start = examples, batch_size, seed, start

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-self.examples // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = divmod(self.start, self.per_epoch)
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.examples, generator=generator).tolist()
            for batch in range(first, self.per_epoch):
                yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
            epoch, first = epoch + 1, 0


def training_batches(
    features: Features, collate: Collate, batch_size: int, seed: int, start: int = 0
) -> Iterator[tuple[int, Batch]]:
    """Yield training batches without end, from number `start` on, with their examples' count."""
    for indices in EpochBatches(len(features), batch_size, seed, start):
        yield len(indices), collate([features[i] for i in indices])


def move(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on `device`; what else it holds stays as it is."""
    return {
        key: sent(value, device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def evaluation_batches(
    features: Features, collate: Collate, batch_size: int
) -> Iterator[tuple[list[int], Batch]]:
    """Yield every example once, with its indices; sorted by length, so little is padded."""
    order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        yield indices, collate([features[i] for i in indices])
