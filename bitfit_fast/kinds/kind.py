"""What a kind of task is: a head, and the way from examples to features and from outputs back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.batches import Batch, Collate, Features
from ..data.task import Split, TaskData
from ..errors import BitFitError

__all__ = ["Encoded", "Kind", "check_offsets", "count_rows"]


@dataclass(frozen=True)
class Encoded:
    """A split as the model takes it, and what leads back from its outputs.

    Attributes
    ----------
    kind : str
        Name of the kind of task.
    split : Split
        The examples.
    features : list of dict
        What batches are made of: one an example, or more where long texts are cut into windows.
    places : list
        What the kind's `decode` must know of each feature; empty where it needs nothing.
    options : dict of str to int
        With which the features were made.
    """

    kind: str
    split: Split
    features: Features
    places: list[Any] = field(default_factory=list)
    options: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Kind:
    """A row of the table of kinds.

    Attributes
    ----------
    name : str
        As `TaskData.kind` has it.
    head : str
        How the names of model classes end, and that of the `AutoModel` class.
    classes : bool
        Whether its outputs stand for classes with names.
    options : dict of str to int
        Fields of `Settings` that `encode` and `decode` depend on, and their defaults.
    configure : callable
        `configure(labels)`: what the model's configuration must say.
    encode : callable
        `encode(split, tokenizer, options)`: an `Encoded`.
    collate : callable
        `collate(tokenizer)`: how padded batches are formed.
    weigh : callable
        `weigh(batch)`: of how many things the loss of a batch is the mean.
    keep : callable
        `keep(output)`: what evaluation keeps of a batch's outputs, a tensor a feature.
    decode : callable
        `decode(encoded, kept)`: predictions, one an example.
    score : callable
        `score(metrics, predictions, split)`: values by metric.
    write : callable
        `write(data, split, predictions, folder)`: the paths of the files of predictions.
    """

    name: str
    head: str
    classes: bool
    options: dict[str, int]
    configure: Callable[[Sequence[str] | None], dict[str, Any]]
    encode: Callable[[Split, Any, Mapping[str, int]], Encoded]
    collate: Callable[[Any], Collate]
    weigh: Callable[[Batch], int]
    keep: Callable[[Any], Iterable[Tensor]]
    decode: Callable[[Encoded, list[Tensor]], Any]
    score: Callable[[Sequence[str], Any, Split], dict[str, float]]
    write: Callable[[TaskData, Split, Any, Path], list[Path]]


def check_offsets(tokenizer: Any, what: str) -> None:
    """Refuse a tokenizer that does not say where in the text a token stands."""
    if not getattr(tokenizer, "is_fast", False):
        raise BitFitError(
            f"{what} needs to know where each token stands in the text, and the tokenizer "
            f"{type(tokenizer).__name__} does not say; use the fast tokenizer of this model"
        )


def count_rows(batch: Batch) -> int:
    """Return the rows of a batch: what its loss is the mean of where each has one label."""
    return len(batch["input_ids"])
