"""What a study is: grids of models, tasks, methods and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Budget", "Grid", "MethodEntry", "Search", "Study", "TaskEntry"]


@dataclass(frozen=True)
class TaskEntry:
    """A task of a study: one of the built-in ones, or files.

    Attributes
    ----------
    label : str
        What the report calls it.
    name : str, or None
        Built-in task; None for files.
    files : tuple of (str, value)
        Arguments of `load_task` for a task of files.
    data_dir : str, or None
        Folder of a built-in task.
    values : dict
        What this task alone asks for.
    """

    label: str
    name: str | None
    files: tuple[tuple[str, Any], ...] = ()
    data_dir: str | None = None
    values: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class MethodEntry:
    """A method of a study: what trains, and under which name and values.

    `options` are the method's own; `by_task` holds values for single tasks, by the task's label.
    """

    label: str
    method: str
    terms: str = "all"
    layers: str | None = None
    head: bool = True
    options: tuple[tuple[str, float], ...] = ()
    values: dict[str, Any] = field(default_factory=dict, compare=False)
    by_task: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Budget:
    """A wall time to train for: seconds, or a share of full fine-tuning's time.

    That is the time which full fine-tuning takes for the steps that the method would have had, on
    batches of the method's size.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} s" if self.kind == "seconds" else f"{self.value:g} of full"


@dataclass(frozen=True)
class Search:
    """How a learning rate is chosen where several are given.

    Attributes
    ----------
    max_steps : int
        Of each trial run.
    held_back : float
        Share of the training set that judges, and does not train, in a trial run.
    by : str
        `loss` for the lowest loss, `metric` for the best main metric.
    """

    max_steps: int = 200
    held_back: float = 0.1
    by: str = "loss"


@dataclass(frozen=True)
class Grid:
    """Models x tasks x methods x seeds, at one or several sizes or time budgets."""

    title: str
    models: tuple[str, ...]
    tasks: tuple[TaskEntry, ...]
    methods: tuple[MethodEntry, ...]
    sizes: tuple[float | int, ...] = (1.0,)
    equal: str = "steps"
    budgets: tuple[Budget, ...] = ()
    search: Search = Search()
    values: dict[str, Any] = field(default_factory=dict)

    def values_of(self, task: TaskEntry, method: MethodEntry) -> dict[str, Any]:
        """Return the values for a task and method, the closest ones first."""
        return {
            **self.values, **task.values, **method.values, **method.by_task.get(task.label, {})
        }  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A named set of grids.

    Attributes
    ----------
    name : str
        What a study folder belongs to; by default the file's stem.
    title, description : str
        Heading of the report, and what stands below it.
    grids : tuple of Grid
        Runs that several of them share are done once.
    keep : str
        Trained files to keep of finished runs: `all`, `small` (below 10 MB) or `none`.
    """

    name: str
    title: str
    description: str
    grids: tuple[Grid, ...]
    keep: str
