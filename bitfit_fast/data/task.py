"""What every data source delivers: named splits of texts and labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Split", "TaskData"]


@dataclass(frozen=True)
class Split:
    """Examples of one split, in file order.

    Attributes
    ----------
    name : str
        `train`, `validation` or `test`; tasks with several sets of a kind add a
        suffix, as in `validation_matched`.
    texts : tuple of tuple of str
        One entry an example: `(sentence,)` or `(first, second)`; `(question, context)` of a
        span task; the words of a sentence of a token task.
    labels : tuple, or None
        One entry an example: an index into the task's labels, or a score for a regression
        task; the answers of a question, each `(text, offset in the context)`; the tag of
        each word, -1 for one that the task does not know. None where the split has none.
    ids : tuple of str, optional
        What the data calls its examples, where predictions are told apart by that.
    """

    name: str
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[Any, ...] | None
    ids: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: list[int]) -> Split:
        """Return the split reduced to `indices`, in that order."""

        def chosen(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
            return None if values is None else tuple(values[i] for i in indices)

        texts = tuple(self.texts[i] for i in indices)
        return Split(self.name, texts, chosen(self.labels), chosen(self.ids))

    def unlabelled(self) -> Split:
        """Return the split without its labels."""
        return replace(self, labels=None)


@dataclass(frozen=True)
class TaskData:
    """A task with its splits.

    Attributes
    ----------
    name : str
        The task's name, as it appears in run folders and checkpoints.
    labels : tuple of str, or None
        Names of classes or tags in index order; None for regression and spans.
    metrics : tuple of str
        What `bitfit_fast.metrics` has for the kind; the first one chooses the best checkpoint.
    splits : dict of str to Split
        By split name.
    columns : tuple, optional
        For the user's own files: the text columns, and the label column.
    kind : str
        A key of `bitfit_fast.kinds.KINDS`: `sequence`, `span` or `token`.
    source : dict
        What else it takes to load the same splits again, as options of `load_task`.
    note : str
        What a person should know of how the splits came about.
    ending : str
        Of files of tags, `.conllu` or `.tsv`.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    splits: dict[str, Split] = field(default_factory=dict)
    columns: tuple[tuple[str, ...], str] | None = None
    kind: str = "sequence"
    source: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    ending: str = ".tsv"

    @property
    def regression(self) -> bool:
        """Whether labels are real numbers rather than classes."""
        return self.kind == "sequence" and self.labels is None

    def digest(self) -> str:
        """Return the SHA-256 of every split's texts and labels."""
        sha = hashlib.sha256()
        for name, split in self.splits.items():
            sha.update(repr((name, split.texts, split.labels)).encode())
            if split.ids is not None:
                sha.update(repr(split.ids).encode())
        return sha.hexdigest()

    @property
    def train(self) -> Split | None:
        """The training split, or None."""
        return self.splits.get("train")
