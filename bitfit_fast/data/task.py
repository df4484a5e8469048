"""What every data source delivers: named splits of texts and labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

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
        One entry an example: `(sentence,)` or `(first, second)`.
    labels : tuple of int or float, or None
        Indices into the task's labels, scores for a regression task, or None
        where the split has no labels.
    """

    name: str
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...] | tuple[float, ...] | None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: list[int]) -> Split:
        """Return the split reduced to `indices`, in that order."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in indices)
        return Split(self.name, tuple(self.texts[i] for i in indices), labels)


@dataclass(frozen=True)
class TaskData:
    """A task with its splits.

    Attributes
    ----------
    name : str
        The task's name, as it appears in run folders and checkpoints.
    labels : tuple of str, or None
        Class names in index order; None for regression.
    metrics : tuple of str
        Keys of `bitfit_fast.metrics.METRICS`; the first one chooses the best checkpoint.
    splits : dict of str to Split
        By split name.
    columns : tuple, optional
        For the user's own files: the text columns, and the label column.
    """

    name: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    splits: dict[str, Split] = field(default_factory=dict)
    columns: tuple[tuple[str, ...], str] | None = None

    @property
    def regression(self) -> bool:
        """Whether labels are real numbers rather than classes."""
        return self.labels is None

    def digest(self) -> str:
        """Return the SHA-256 of every split's texts and labels."""
        sha = hashlib.sha256()
        for name, split in self.splits.items():
            sha.update(repr((name, split.texts, split.labels)).encode())
        return sha.hexdigest()

    @property
    def train(self) -> Split | None:
        """The training split, or None."""
        return self.splits.get("train")
