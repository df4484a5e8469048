"""The pictures of a report, each as PNG and SVG; the same numbers give the same files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..files import replace_file
from ..plots import change_heatmap
from .analysis import (
    Collected,
    Result,
    average,
    costs,
    mean_changes,
    metric_name,
    pareto_front,
    spread,
)
from .style import Look, label_ends, label_points, looks, settle_layout
from .sweeps import Cell

__all__ = ["Figure", "draw_all"]

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "bitfit_fast",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
#: What a cost's axis is called, whether it is logarithmic, and the unit's size.
_COSTS = {
    "share": ("trained parameters, % of the model", True, 1e-2),
    "seconds": ("training time, s", True, 1.0),
    "memory": ("peak memory, MB", False, 1e6),
}


@dataclass(frozen=True)
class Figure:
    """A drawn picture: its files' stem, heading and what it shows."""

    stem: str
    title: str
    caption: str


def _new(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    # no display and no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _write(figure: Any, folder: Path, stem: str) -> None:
    settle_layout(figure)
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        save = partial(figure.savefig, format=kind, metadata=metadata, dpi=150)
        replace_file(folder / f"{stem}.{kind}", save)


def _logarithmic(axis: Any, values: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic, with numbers and not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    wide = max(values) > 50 * min(values)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 3.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _label(task: str, metric: str) -> str:
    return f"{task}, {metric_name(metric)}, %"


class _Group:
    """The cells of one grid and model, which one set of pictures shows."""

    def __init__(self, collected: Collected, grid: int, model: str) -> None:
        self.collected, self.model = collected, model
        self.cells = [c for c in collected.plan.cells if c.grid == grid and c.model == model]
        self.grid = collected.plan.study.grids[grid]
        self.tasks = [t.label for t in self.grid.tasks]
        self.methods = [m.label for m in self.grid.methods]
        self.stem = f"{grid + 1}" + (
            "" if len(self.grid.models) == 1 else f"-{self.grid.models.index(model) + 1}"
        )

    def pick(self, task: str, method: str) -> list[Cell]:
        return [c for c in self.cells if (c.task.label, c.method.label) == (task, method)]

    def results(self, task: str, method: str) -> list[Result]:
        return [r for cell in self.pick(task, method) for r in self.collected.of(cell)]

    @property
    def swept(self) -> bool:
        """Whether sizes or budgets are compared, in lines, and not methods alone."""
        return len(self.grid.sizes) > 1 or bool(self.grid.budgets)


def draw_all(collected: Collected, folder: Path) -> dict[int, list[Figure]]:
    """Draw every figure that the finished runs allow.

    Parameters
    ----------
    collected : Collected
        From `collect`.
    folder : Path
        Where the files go.

    Returns
    -------
    dict of int to list of Figure
        By the grid's index.
    """
    import matplotlib

    plan = collected.plan
    look = looks((c.method.label, c.method.method) for c in plan.cells)
    drawn: dict[int, list[Figure]] = {}
    with matplotlib.rc_context(_SETTINGS):
        for index, grid in enumerate(plan.study.grids):
            figures = drawn.setdefault(index, [])
            for model in grid.models:
                group = _Group(collected, index, model)
                suffix = f", {model}" if len(grid.models) > 1 else ""
                kinds = (_curves,) if group.swept else (_pareto, _stability, _gap, _changes)
                for draw in kinds:
                    for stem, title, caption in draw(group, look, folder):
                        figures.append(Figure(stem, title + suffix, caption))
    return drawn


_Drawn = list[tuple[str, str, str]]


def _pareto(group: _Group, look: Mapping[str, Look], folder: Path) -> _Drawn:
    """Quality, averaged over the tasks, against what it costs."""
    quality, cost = {}, {}
    for method in group.methods:
        results = [group.results(task, method) for task in group.tasks]
        value = average(spread([r.score for r in found]) for found in results)
        if value is not None:
            quality[method] = value
            # of all tasks alike, however many seeds each has
            each = [costs(found) for found in results]
            cost[method] = {k: sum(c[k] for c in each) / len(each) for k in each[0]}
    if len(quality) < 2:
        return []
    figure, axes = _new(13.5, 4.6, columns=len(_COSTS))
    for axis, (key, (name, logarithmic, unit)) in zip(axes[0], _COSTS.items()):
        # the head alone trains none of the base: a place at the left end, not minus infinity
        positive = [c[key] for c in cost.values() if c[key] > 0]
        floor = min(positive, default=1.0) / 3
        points = [(max(cost[m][key], floor) / unit, quality[m]) for m in quality]
        if logarithmic:
            _logarithmic(axis, [x for x, _ in points])
        front = pareto_front(points)
        axis.plot(
            *zip(*(points[i] for i in front)), drawstyle="steps-post", color="#BBBBBB", zorder=1
        )
        for method, point in zip(quality, points):
            style = look[method]
            axis.plot(*point, style.marker, color=style.colour, markersize=7, zorder=3)
        axis.margins(0.22, 0.12)
        axis.set_xlabel(name)
        if any(c[key] <= 0 for c in cost.values()):
            axis.annotate(
                "0 at the left end", (0.01, 0.01), xycoords="axes fraction", fontsize=7,
                color="#666666",
            )  # fmt: skip
    axes[0][0].set_ylabel(f"average of {', '.join(group.tasks)}, %")
    for axis in axes[0]:
        drawn = [line.get_xydata()[0] for line in axis.lines[1:]]
        label_points(
            axis, [tuple(p) for p in drawn], list(quality), [look[m].colour for m in quality]
        )
    stem = f"pareto-{group.stem}"
    _write(figure, folder, stem)
    return [
        (
            stem, "Quality against cost",
            "Average over the tasks against trained parameters (the head apart), time in training "
            "steps and peak memory of the process. The grey line joins what no other method beats.",
        )
    ]  # fmt: skip


def _panels(count: int, width: float = 4.3, height: float = 3.4) -> Any:
    columns = 2 if count == 4 else min(3, count)
    rows = -(-count // columns)
    figure, axes = _new(width * columns, height * rows, rows, columns)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def _per_task(group: _Group, draw: Callable[[Any, str, list[str]], None], enough: int) -> Any:
    """Draw a panel a task with a row a method, or return None where there is too little."""
    shown = {
        t: [m for m in group.methods if len(group.results(t, m)) >= enough] for t in group.tasks
    }
    shown = {task: methods for task, methods in shown.items() if methods}
    if not shown:
        return None
    most = max(map(len, shown.values()))
    figure, axes = _panels(len(shown), 4.5, 1.1 + 0.27 * most)
    for axis, (task, methods) in zip(axes, shown.items()):
        draw(axis, task, methods)
        metric = group.results(task, methods[0])[0].metric
        axis.set_xlabel(_label(task, metric))
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.grid(False, axis="y")
    return figure


def _stability(group: _Group, look: Mapping[str, Look], folder: Path) -> _Drawn:
    """Every seed of every method."""

    def draw(axis: Any, task: str, methods: list[str]) -> None:
        for row, method in enumerate(methods):
            values = [r.score for r in group.results(task, method)]
            style = look[method]
            found = spread(values)
            assert found is not None
            axis.plot([found.lowest, found.highest], [row, row], color=style.colour, alpha=0.4)
            axis.plot(
                values, [row] * len(values), style.marker, color=style.colour, alpha=0.65,
                markersize=6, markeredgewidth=0,
            )  # fmt: skip
            axis.plot([found.median] * 2, [row - 0.3, row + 0.3], color=style.colour, lw=2)

    figure = _per_task(group, draw, 2)
    if figure is None:
        return []
    stem = f"stability-{group.stem}"
    _write(figure, folder, stem)
    text = "One mark a seed on the validation set, and a stroke at the median."
    return [(stem, "Stability over seeds", text)]


def _gap(group: _Group, look: Mapping[str, Look], folder: Path) -> _Drawn:
    """Training and validation scores, joined."""

    def draw(axis: Any, task: str, methods: list[str]) -> None:
        for row, method in enumerate(methods):
            results = group.results(task, method)
            style = look[method]
            ends = [
                sum(getattr(r, key) for r in results) / len(results)
                for key in ("score", "train_score")
            ]
            axis.plot(ends, [row, row], color=style.colour, lw=1.5, alpha=0.5)
            axis.plot(ends[0], row, style.marker, color=style.colour, markersize=7)
            axis.plot(
                ends[1], row, style.marker, color=style.colour, markersize=7, fillstyle="none"
            )
            axis.annotate(
                f"{ends[1] - ends[0]:+.1f}", (max(ends), row), (6, 0), textcoords="offset points",
                va="center", fontsize=7, color=style.colour,
            )  # fmt: skip
        axis.margins(x=0.14)

    figure = _per_task(group, draw, 1)
    if figure is None:
        return []
    stem = f"gap-{group.stem}"
    _write(figure, folder, stem)
    text = (
        "Filled: validation set. Hollow: as many training examples. The number is training minus "
        "validation, in points, averaged over seeds."
    )
    return [(stem, "Generalisation gap", text)]


def _changes(group: _Group, look: Mapping[str, Look], folder: Path) -> _Drawn:
    """How far each bias moved, by term and layer, where every term trains."""
    from matplotlib import rc_context

    drawn = []
    for task in group.tasks:
        for entry in group.grid.methods:
            if entry.method != "bitfit" or entry.terms != "all":
                continue
            results = group.results(task, entry.label)
            changes = mean_changes(results)
            if not changes:
                continue
            place = f"{group.tasks.index(task) + 1}-{group.methods.index(entry.label) + 1}"
            stem = f"change-{group.stem}-{place}"
            many = "1 run" if len(results) == 1 else f"{len(results)} runs"
            title = f"{entry.label} on {task}, {many}"
            with rc_context({"axes.grid": False}):
                for kind in ("png", "svg"):
                    change_heatmap(changes, folder / f"{stem}.{kind}", title)
            text = (
                "Mean absolute change of the entries of each kind of bias, by layer, from the "
                "kind that moved most to the one that moved least; averages beside the names."
            )
            drawn.append((stem, f"Change of the biases: {entry.label} on {task}", text))
    return drawn


def _curves(group: _Group, look: Mapping[str, Look], folder: Path) -> _Drawn:
    """Quality against the size of the training set, or the time to train."""
    tasks = [t for t in group.tasks if any(group.results(t, m) for m in group.methods)]
    if not tasks:
        return []
    timed = bool(group.grid.budgets)
    figure, axes = _panels(len(tasks), 5.0, 3.8)
    for axis, task in zip(axes, tasks):
        ends, ticks, metric = [], set(), ""
        for method in group.methods:
            xs: list[float] = []
            points = []
            for cell in group.pick(task, method):
                results = group.collected.of(cell)
                found = spread([r.score for r in results])
                if found is None:
                    continue
                metric = results[0].metric
                xs.append(costs(results)["seconds"] if timed else cell.examples)
                points.append(found)
            if not points:
                continue
            ticks.update(xs)
            style = look[method]
            xs, points = map(list, zip(*sorted(zip(xs, points), key=lambda pair: pair[0])))
            means = [p.mean for p in points]
            axis.errorbar(
                xs, means, [p.deviation or 0 for p in points], color=style.colour,
                marker=style.marker, markersize=5, capsize=2, lw=1.6, elinewidth=0.8,
            )  # fmt: skip
            ends.append((means[-1], method, style.colour))
        _logarithmic(axis, list(ticks))
        axis.set_xlabel("training time, s" if timed else "training examples")
        axis.set_ylabel(_label(task, metric))
        if not timed:
            from matplotlib.ticker import NullLocator

            axis.set_xticks(sorted(ticks), [f"{int(t):,}" for t in sorted(ticks)], rotation=40)
            axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(y=0.1)
        label_ends(axis, ends)
    stem = f"{'time' if timed else 'sizes'}-{group.stem}"
    _write(figure, folder, stem)
    steps = "epochs" if group.grid.equal == "epochs" else "optimiser steps"
    if timed:
        return [
            (stem, "Quality by training time",
             "Each point is a run of its own, whose schedule ends with its time budget. Bars: "
             "standard deviation over seeds.")
        ]  # fmt: skip
    return [
        (stem, "Quality by size of the training set",
         f"Equal {steps} at every size; smaller sets are parts of larger ones of the same seed. "
         "Bars: standard deviation over seeds.")
    ]  # fmt: skip


def names_of(figures: Sequence[Figure]) -> list[str]:
    """Return the files of figures, PNG and SVG."""
    return [f"{figure.stem}.{kind}" for figure in figures for kind in ("png", "svg")]
