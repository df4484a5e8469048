"""From the folders of finished runs to the numbers of a report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .runner import run_folder
from .sweeps import FINAL, Cell, Plan, Run
from .worker import DONE, FAILED, OPEN, noted_of, state, summary_of

__all__ = [
    "Collected",
    "Result",
    "Spread",
    "Trouble",
    "average",
    "collect",
    "costs",
    "mean_changes",
    "metric_name",
    "pareto_front",
    "spread",
]

#: Metrics that reports give in percent, as papers do; all of ours are.
PERCENT = 100.0
_NAMES = {"f1": "F1", "mcc": "MCC", "pearson": "Pearson", "spearman": "Spearman"}


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes
    ----------
    run : Run
        What it was.
    metric : str
        The task's main metric.
    score, train_score : float
        Of the last step, in percent: on the first validation set, and on as many training
        examples.
    loss : float
        On that validation set.
    scores : dict of str to float
        Every metric on every validation set, in percent: `metric`, or `metric (set)` where
        there are several.
    lr : float
        Learning rate, searched or not.
    share, trained : float, int
        Trained parameters: as a share of the base model without the head, as the paper counts;
        and with the head.
    step_ms, seconds, memory, file : float
        Time of a step (see `mean_step_ms`); of all the run; bytes.
    commit : str, or None
        Of the code that did it.
    changes : dict of (term, layer) to float
        How far biases moved.
    """

    run: Run
    metric: str
    score: float
    train_score: float
    loss: float
    scores: dict[str, float]
    lr: float
    steps: int
    share: float
    trained: int
    step_ms: float
    seconds: float
    memory: float
    file: float
    backend: str
    device: str
    versions: dict[str, str]
    commit: str | None
    changes: dict[tuple[str, int | None], float]
    warnings: tuple[str, ...]

    @property
    def gap(self) -> float:
        """Generalisation gap: training minus validation score, in points."""
        return self.train_score - self.score


@dataclass(frozen=True)
class Trouble:
    """A run without a result: failed, with its error, or missing."""

    run: Run
    state: str
    error: str


@dataclass(frozen=True)
class Collected:
    """What lies in a study's folder.

    Attributes
    ----------
    plan : Plan
        The runs that were asked for.
    results : dict of str to Result
        Finished ones by name, the searches' included.
    troubles : tuple of Trouble
        All others.
    """

    plan: Plan
    results: dict[str, Result]
    troubles: tuple[Trouble, ...]

    def of(self, cell: Cell) -> list[Result]:
        """Return the finished runs of a cell, in the order of their seeds."""
        return [self.results[run.name] for run in cell.runs if run.name in self.results]

    @property
    def final(self) -> list[Result]:
        """Finished runs that are no searches."""
        return [result for result in self.results.values() if result.run.purpose == FINAL]


@dataclass(frozen=True)
class Spread:
    """Statistics over seeds; `deviation` is the sample's, None of a single seed."""

    mean: float
    deviation: float | None
    median: float
    lowest: float
    highest: float
    count: int


def metric_name(metric: str) -> str:
    """Return a metric's name as a reader writes it."""
    name, _, rest = metric.partition(" ")
    return " ".join([_NAMES.get(name, name.replace("_", " ")), rest]).strip()


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean, standard deviation and median of `values`, or None where there are none."""
    if not values:
        return None
    return Spread(
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 else None,
        statistics.median(values),
        min(values),
        max(values),
        len(values),
    )


def average(spreads: Iterable[Spread | None]) -> float | None:
    """Return the mean over tasks, or None where one is missing: it would not compare."""
    found = list(spreads)
    known = [s.mean for s in found if s is not None]
    return statistics.fmean(known) if known and len(known) == len(found) else None


def _result(run: Run, folder: Path) -> Result:
    summary = summary_of(folder)
    assert summary is not None
    noted = noted_of(folder)
    assert noted is not None
    changes = json.loads((folder / "changes.json").read_text(encoding="utf-8"))
    final, metrics = summary["final"], summary["metrics"]
    judged = [name for name in final if name.startswith("validation")]
    scores = {
        metric if name == judged[0] else f"{metric} ({name.partition('_')[2]})": PERCENT
        * final[name][metric]
        for name in judged
        for metric in metrics
    }
    parameters = summary["parameters"]
    return Result(
        run=run,
        metric=metrics[0],
        score=scores[metrics[0]],
        train_score=PERCENT * final["train"][metrics[0]],
        loss=final[judged[0]]["loss"],
        scores=scores,
        lr=summary["lr"],
        steps=summary["steps"],
        share=parameters["share"],
        trained=parameters["trained"],
        step_ms=summary["step_ms"],
        seconds=summary["seconds"],
        memory=summary["peak_memory_bytes"],
        file=summary["file_bytes"],
        backend=summary["backend"],
        device=summary["device"],
        versions=summary["versions"],
        commit=noted.get("commit"),
        changes={(c["term"], c["layer"]): c["change"] for c in changes},
        warnings=tuple(noted["warnings"]),
    )


def collect(plan: Plan, output: Path) -> Collected:
    """Read the results of every run in a study's folder.

    Raises
    ------
    BitFitError
        For a summary that is not whole.
    """
    results, troubles = {}, []
    for name, run in plan.runs.items():
        folder = run_folder(output, run)
        found = state(folder)
        if found == DONE:
            results[name] = _result(run, folder)
        elif found == FAILED:
            told = json.loads((folder / "failure.json").read_text(encoding="utf-8"))
            troubles.append(Trouble(run, FAILED, told["error"]))
        else:
            troubles.append(Trouble(run, OPEN, "not done"))
    return Collected(plan, results, tuple(troubles))


def costs(results: Sequence[Result]) -> dict[str, float]:
    """Return what runs cost: means of `trained`, `share`, `step_ms`, `seconds`, `memory`, `file`.

    The training time counts the steps alone, without evaluations.
    """
    means = {
        key: statistics.fmean(getattr(result, key) for result in results)
        for key in ("trained", "share", "step_ms", "memory", "file")
    }
    means["seconds"] = statistics.fmean(r.step_ms * r.steps / 1e3 for r in results)
    return means


def mean_changes(results: Sequence[Result]) -> dict[tuple[str, int | None], float]:
    """Return the mean over runs of how far each kind of bias moved, where any did."""
    keys = dict.fromkeys(key for result in results for key in result.changes)
    return {
        key: statistics.fmean(r.changes[key] for r in results if key in r.changes) for key in keys
    }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points that no other one beats, by rising cost.

    Parameters
    ----------
    points : sequence of (cost, quality)
        A lower cost and a higher quality are better.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front
