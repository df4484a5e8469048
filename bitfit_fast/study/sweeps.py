"""From grids to runs: training-set sizes, time budgets and searched learning rates.

A run whose learning rate is searched, or whose steps follow from a time budget, needs other
runs first: trials on a part of the training set that is held back, and short ones that only
measure the time of a step. None of these sees a validation set.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..data.batches import subset
from ..data.load import load_task
from ..data.task import TaskData
from ..errors import BitFitError, listed
from ..kinds import KINDS
from ..methods import METHODS, prepare
from ..models.loading import describe_model
from ..training.settings import DEFAULT_EPOCHS, Settings, step_count
from .grid import Budget, Grid, MethodEntry, Search, Study, TaskEntry
from .terms import symbols

__all__ = [
    "CLOCK",
    "FINAL",
    "TRIAL",
    "Cell",
    "Measure",
    "Plan",
    "Run",
    "TaskSource",
    "expand",
    "hold_back",
    "load_source",
    "measure",
    "settle",
]

#: What a run is for: a number of the report, a learning rate, or the time of a step.
FINAL, TRIAL, CLOCK = "final", "trial", "clock"
#: Steps of a run that only measures their time.
CLOCK_STEPS = 20
#: Built-in tasks without files.
_GENERATED = ("reviews",)


@dataclass(frozen=True)
class TaskSource:
    """Where a task's examples come from: arguments of `load_task`."""

    name: str | None
    files: tuple[tuple[str, Any], ...] = ()
    data_dir: str | None = None

    @property
    def key(self) -> str:
        """What tells sources of a study apart, wherever its data lies."""
        return self.name or str(dict(self.files)["train_file"])


@dataclass(frozen=True)
class Run:
    """One training run; equal runs are one, whichever grids ask for them.

    Attributes
    ----------
    model, task, method
        As in the study.
    settings : Settings
        With `lr` None for the method's own or a searched one, and `max_steps` that of full
        fine-tuning where a time budget decides.
    rates : tuple of float
        Learning rates to choose from; empty where none is searched.
    search : Search, or None
        How.
    budget : Budget, or None
        Time to train for.
    purpose : str
        `final`, `trial` or `clock`.
    """

    model: str
    task: TaskSource
    method: MethodEntry
    settings: Settings
    rates: tuple[float, ...] = ()
    search: Search | None = None
    budget: Budget | None = None
    purpose: str = FINAL

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that makes the run the one that it is, without names and places."""
        default = Settings()
        given = {
            f.name: value
            for f in fields(Settings)
            if (value := getattr(self.settings, f.name)) != getattr(default, f.name)
        }
        return {
            "model": self.model,
            "task": self.task.name,
            "files": dict(self.task.files),
            "method": self.method.method,
            "terms": symbols(self.method.terms),
            "layers": self.method.layers,
            "head": self.method.head,
            "options": dict(self.method.options),
            "settings": given,
            "rates": self.rates,
            "search": asdict(self.search) if self.search else None,
            "budget": asdict(self.budget) if self.budget else None,
            "purpose": self.purpose,
        }

    @property
    def name(self) -> str:
        """Name of its folder: readable, and another for any other settings."""
        method, settings = self.method, self.settings
        parts = [Path(self.task.key).stem, method.method]
        if method.terms != "all":
            parts.append("+".join(symbols(method.terms)))
        if settings.train_examples:
            parts.append(f"n{settings.train_examples}")
        if self.budget:
            parts.append(str(self.budget).replace(" ", ""))
        if self.purpose == TRIAL:
            parts.append(f"lr{settings.lr:g}")
        parts.append(self.purpose if self.purpose != FINAL else f"seed{settings.seed}")
        parts.append(self.model.rstrip("/").split("/")[-1])
        sha = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(parts))
        return f"{slug[:100]}-{sha[:8]}"

    @property
    def trials(self) -> tuple[Run, ...]:
        """The runs that choose the learning rate, in the order of the rates; for all seeds."""
        if self.search is None or not self.rates:
            return ()
        settings = replace(
            self.settings, seed=0, max_steps=self.search.max_steps, epochs=None,
            eval_every=self.search.max_steps,
        )  # fmt: skip
        return tuple(
            replace(self, settings=replace(settings, lr=rate), rates=(), budget=None, purpose=TRIAL)
            for rate in self.rates
        )

    @property
    def clocks(self) -> tuple[Run, ...]:
        """The runs that say how many steps the time budget holds: its own, and full's."""
        if self.budget is None:
            return ()
        settings = replace(
            self.settings, lr=None, seed=0, max_steps=CLOCK_STEPS, epochs=None,
            eval_every=CLOCK_STEPS,
        )  # fmt: skip
        own = replace(
            self, settings=settings, rates=(), search=Search(), budget=None, purpose=CLOCK
        )
        if self.budget.kind == "seconds":
            return (own,)
        return (own, replace(own, method=MethodEntry("full", "full")))

    @property
    def needs(self) -> tuple[Run, ...]:
        """Runs that have to be done before this one."""
        return (*self.trials, *self.clocks)


@dataclass(frozen=True)
class Cell:
    """One entry of a grid: a run for each seed.

    `size` is a share or count as the study gives it; `examples` the number it comes to.
    """

    grid: int
    model: str
    task: TaskEntry
    method: MethodEntry
    size: float | int
    examples: int
    budget: Budget | None
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Plan:
    """All runs of a study.

    Attributes
    ----------
    study : Study
        What asks for them.
    cells : tuple of Cell
        In the order of the grids.
    """

    study: Study
    cells: tuple[Cell, ...]

    @property
    def runs(self) -> dict[str, Run]:
        """Every run by name, needed ones before those that need them."""
        found: dict[str, Run] = {}
        for cell in self.cells:
            for run in cell.runs:
                for one in (*run.needs, run):
                    found.setdefault(one.name, one)
        return found


@lru_cache(maxsize=4)
def load_source(source: TaskSource) -> TaskData:
    """Load the training and validation splits of a task.

    Raises
    ------
    BitFitError
        If the task cannot be had, or one of them has no labels.
    """
    data = load_task(source.name, data_dir=source.data_dir, **dict(source.files))
    for kind in ("train", "validation"):
        splits = [split for name, split in data.splits.items() if name.split("_")[0] == kind]
        if not splits or any(split.labels is None for split in splits):
            raise BitFitError(f"the task {source.key} has no {kind} split with labels")
    return data


def _source(task: TaskEntry, grid: Grid) -> TaskSource:
    data_dir = task.data_dir or grid.values.get("data_dir")
    if task.name is None or task.name in _GENERATED:
        data_dir = None
    return TaskSource(task.name, task.files, data_dir)


class Measure(NamedTuple):
    """How many training examples a task has, of which kind, and the SHA-256 of all that it has."""

    examples: int
    kind: str
    digest: str


def measure(study: Study) -> dict[str, Measure]:
    """Load every task of a study, and return what it measures, by key.

    Raises
    ------
    BitFitError
        If a task cannot be had, has no labels, or has a setting of another kind of task.
    """
    found: dict[str, Measure] = {}
    sources: dict[str, TaskSource] = {}
    for grid in study.grids:
        for task in grid.tasks:
            source = _source(task, grid)
            if (other := sources.setdefault(source.key, source)) != source:
                places = listed([str(s.data_dir or s.files) for s in (other, source)])
                raise BitFitError(
                    f"the study takes the task {source.key} from two places: {places}; "
                    "a study has one for each built-in task, others as files (train_file)"
                )
            if source.key not in found:
                data = load_source(source)
                assert data.train is not None
                found[source.key] = Measure(len(data.train), data.kind, data.digest())
            for method in grid.methods:
                values = grid.values_of(task, method)
                given = {k: values[k] for k in ("doc_stride", "max_answer_length") if k in values}
                try:
                    Settings(**given).for_kind(KINDS[found[source.key].kind])
                except BitFitError as error:
                    raise BitFitError(f"task {task.label}: {error}") from None
    return found


def check_methods(study: Study) -> None:
    """Refuse methods, terms and layers that a model cannot take, before its weights are loaded.

    Raises
    ------
    BitFitError
        With method, model and reason.
    """
    for grid in study.grids:
        for model in grid.models:
            described = describe_model(model)
            for method in grid.methods:
                adds = METHODS[method.method].kind is not None
                if not adds and method.method != "bitfit":
                    continue
                try:
                    # a model that is not for classification gets its head later
                    prepare(
                        describe_model(model) if adds else described, method.method,
                        terms=method.terms, layers=method.layers, head=False, seed=0,
                        **dict(method.options),
                    )  # fmt: skip
                except BitFitError as error:
                    raise BitFitError(f"method '{method.label}' for {model}: {error}") from None
                except RuntimeError:
                    # what takes the weights to find out, the run will tell
                    continue


def _examples(size: float | int, available: int, task: str) -> int:
    if size > available:
        raise BitFitError(f"size {size} is more than the {available} training examples of {task}")
    return size if isinstance(size, int) else max(1, round(size * available))


def _settings(grid: Grid, values: Mapping[str, Any], available: int, examples: int) -> Settings:
    """Fill in what makes runs of several sizes comparable."""
    given = {k: v for k, v in values.items() if k not in ("lr", "seeds", "data_dir")}
    settings = Settings(
        **given,
        train_examples=examples if examples < available else None,
        validate_once=True,
    )
    per_epoch = -(-available // settings.batch_size)
    if grid.equal == "epochs" and not grid.budgets:
        # as many as the steps are of the whole set
        epochs = [settings.max_steps / per_epoch] if settings.max_steps else []
        epochs += [settings.epochs] if settings.epochs else []
        return replace(settings, epochs=min(epochs, default=float(DEFAULT_EPOCHS)), max_steps=None)
    return replace(settings, epochs=None, max_steps=step_count(settings, per_epoch))


def expand(study: Study, lengths: Mapping[str, int]) -> Plan:
    """Turn a study into runs.

    By default every size of a training set is trained for as many steps as the whole set is:
    with equal epochs, a small set would get a handful of steps, which are too few for BitFit
    whatever the data. Smaller sets are parts of larger ones of the same seed.

    Parameters
    ----------
    study : Study
        From `read_study`.
    lengths : mapping of str to int
        Sizes of the training sets: see `measure`.

    Raises
    ------
    BitFitError
        For a size larger than the set.
    """
    cells = []
    for index, grid in enumerate(study.grids):
        for model in grid.models:
            for task in grid.tasks:
                source = _source(task, grid)
                available = lengths[source.key]
                for method in grid.methods:
                    for size in grid.sizes:
                        examples = _examples(size, available, task.label)
                        for budget in grid.budgets or (None,):
                            values = grid.values_of(task, method)
                            settings = _settings(grid, values, available, examples)
                            runs = _runs(grid, model, source, method, settings, budget, values)
                            cells.append(
                                Cell(index, model, task, method, size, examples, budget, runs)
                            )
    return Plan(study, tuple(cells))


def _runs(
    grid: Grid,
    model: str,
    source: TaskSource,
    method: MethodEntry,
    settings: Settings,
    budget: Budget | None,
    values: Mapping[str, Any],
) -> tuple[Run, ...]:
    rates = values.get("lr", ())
    seeds = values.get("seeds", (0,))
    searched = len(rates) > 1
    if rates and not searched:
        settings = replace(settings, lr=rates[0])
    return tuple(
        Run(
            model, source, method, replace(settings, seed=seed),
            rates if searched else (), grid.search if searched else None, budget,
        )
        for seed in seeds
    )  # fmt: skip


def hold_back(data: TaskData, share: float, examples: int | None, seed: int) -> TaskData:
    """Return a task whose validation set is a part of its training set.

    Of questions on texts, all on one text are in the same part.

    Parameters
    ----------
    data : TaskData
        The whole task; its own validation sets are not in what is returned.
    share : float
        Of the training examples to hold back; of questions, of the texts that they are on.
    examples : int, optional
        Size of the training set to take both parts from: the one that a run of `seed` and
        `train_examples` trains on.
    seed : int
        Of the choice.
    """
    train = data.train
    assert train is not None
    if examples is not None:
        train = train.take(subset(len(train), examples, seed))
    held = max(1, round(share * len(train)))
    if held >= len(train):
        raise BitFitError(
            f"{len(train)} training examples of {data.name} are too few to hold some back"
        )
    if data.kind == "span":
        texts = list(dict.fromkeys(text for _, text in train.texts))
        if len(texts) < 2:
            raise BitFitError(
                f"the training examples of {data.name} are all on one text, and holding some back "
                "needs two"
            )
        count = min(max(1, round(share * len(texts))), len(texts) - 1)
        chosen = {texts[i] for i in subset(len(texts), count, seed)}
        judged = [i for i, (_, text) in enumerate(train.texts) if text in chosen]
    else:
        judged = subset(len(train), held, seed)
    kept = sorted(set(range(len(train))).difference(judged))
    return replace(
        data,
        splits={
            "train": train.take(kept),
            "validation": replace(train.take(judged), name="validation"),
        },
    )


def settle(run: Run, summaries: Mapping[str, dict[str, Any]]) -> Settings:
    """Return a run's final settings, from the summaries of the runs that it needs.

    Parameters
    ----------
    run : Run
        Any run.
    summaries : mapping of str to dict
        By name; trials that failed are missing, and their rates are out.

    Raises
    ------
    BitFitError
        If every trial failed, or one that measures the time.
    """
    settings = run.settings
    if run.trials:
        done = [trial for trial in run.trials if trial.name in summaries]
        if not done:
            raise BitFitError(f"no learning rate of {run.rates} could be tried: every trial failed")
        assert run.search is not None
        by = run.search.by

        def merit(trial: Run) -> tuple[float, ...]:
            summary = summaries[trial.name]
            scores = summary["final"]["validation"]
            metric = scores[summary["metrics"][0]] if by == "metric" else 0.0
            return (metric, -scores["loss"])

        settings = replace(settings, lr=max(done, key=merit).settings.lr)
    if run.budget:
        times = []
        for clock in run.clocks:
            if clock.name not in summaries:
                raise BitFitError(f"the time of a step is not known: {clock.name} failed")
            times.append(summaries[clock.name]["step_ms"] / 1e3)
        seconds = run.budget.value
        if run.budget.kind == "share":
            assert settings.max_steps is not None
            seconds *= settings.max_steps * times[1]
        steps = max(1, round(seconds / times[0]))
        settings = replace(settings, max_steps=steps, epochs=None, eval_every=None)
    return settings
