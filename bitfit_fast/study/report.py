"""The report of a study: tables in the layout of the BitFit paper, figures, and what failed."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.filesize import decimal

from ..data.glue import GLUE
from ..files import write_text
from .analysis import Collected, Result, Spread, average, costs, metric_name, spread
from .blocks import Block, Heading, Picture, Table, Text, Value, html_page, markdown_page
from .figures import draw_all, names_of
from .published import PUBLISHED, published
from .sweeps import FINAL, Cell
from .worker import FAILED

__all__ = ["report_blocks", "report_folder", "write_report"]

_MISSING = Value("-")
_FIGURES = "figures"


def _score(found: Spread | None, best: bool = False) -> Value:
    if found is None:
        return _MISSING
    small = "" if found.deviation is None else f"± {found.deviation:.1f}"
    return Value(f"{found.mean:.1f}", small, best)


def _best(values: Sequence[float | None]) -> list[bool]:
    """Return which values are the largest, as they are shown."""
    shown = [None if v is None else round(v, 1) for v in values]
    known = [v for v in shown if v is not None]
    # one value alone is no better than anything, and nothing is where all are alike
    top = max(known) if len(set(known)) > 1 else None
    return [v is not None and v == top for v in shown]


def _percent(share: float) -> str:
    text = f"{100 * share:.3f}".rstrip("0").rstrip(".")
    return f"{text} %"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


class _Section:
    """A grid and one model of it."""

    def __init__(self, collected: Collected, grid: int, model: str) -> None:
        self.collected, self.model = collected, model
        self.grid = collected.plan.study.grids[grid]
        self.cells = [c for c in collected.plan.cells if c.grid == grid and c.model == model]
        self.tasks = [t.label for t in self.grid.tasks]
        self.methods = list(self.grid.methods)

    def cell(self, task: str, method: str) -> Cell:
        return next(c for c in self.cells if (c.task.label, c.method.label) == (task, method))

    def results(self, task: str, method: str) -> list[Result]:
        return self.collected.of(self.cell(task, method))

    def spread(self, task: str, method: str) -> Spread | None:
        return spread([r.score for r in self.results(task, method)])

    def of_method(self, method: str) -> list[Result]:
        return [r for c in self.cells if c.method.label == method for r in self.collected.of(c)]

    def metric(self, task: str) -> str:
        for method in self.methods:
            if found := self.results(task, method.label):
                return metric_name(found[0].metric)
        return ""

    def paper_table(self) -> Table:
        """Return rows of methods and columns of tasks, as the paper's tables are."""
        known = {
            m.label: published(m.method, m.terms) if m.layers is None and m.head else {}
            for m in self.methods
        }
        # averages over GLUE say nothing beside other tasks
        comparable = all(task.name in GLUE for task in self.grid.tasks)
        papers = [
            key
            for key in dict.fromkeys((p.model, p.split) for p in PUBLISHED)
            if comparable and any(key in row for row in known.values())
        ]
        head = (
            "method", "trained",
            *(f"{t} ({self.metric(t)})" if self.metric(t) else t for t in self.tasks),
            *(("average",) if len(self.tasks) > 1 else ()),
            *(f"paper: {model}, {split}" for model, split in papers),
        )  # fmt: skip
        grid = {m.label: [self.spread(t, m.label) for t in self.tasks] for m in self.methods}
        means = {label: average(row) for label, row in grid.items()}
        columns = [
            _best([row[i].mean if row[i] else None for row in grid.values()])  # type: ignore[union-attr]
            for i in range(len(self.tasks))
        ]
        best_mean = _best(list(means.values()))
        rows = []
        for at, method in enumerate(self.methods):
            results = self.of_method(method.label)
            label, mean = method.label, means[method.label]
            row = [Value(label), Value(_percent(costs(results)["share"])) if results else _MISSING]
            row += [_score(s, columns[i][at]) for i, s in enumerate(grid[label])]
            if len(self.tasks) > 1:
                row.append(_MISSING if mean is None else Value(f"{mean:.1f}", "", best_mean[at]))
            for paper in papers:
                row.append(Value(" / ".join(f"{v:.1f}" for v in known[label].get(paper, ()))))
            rows.append(tuple(row))
        seeds = sorted({len(found) for c in self.cells if (found := self.collected.of(c))}) or [1]
        many = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seeds"
        caption = (
            f"Mean ± standard deviation over {many}, in percent; the best of a column is bold. "
            if seeds != [1]
            else "One seed, in percent; the best of a column is bold. "
        )
        caption += "Trained: of the base model, without the head, as the paper counts."
        if papers:
            caption += (
                " The columns on the right are averages over all of GLUE from the papers, for "
                "larger models: to be compared in their order, not in their size."
            )
        return Table(head, tuple(rows), caption)

    def cost_table(self) -> Table:
        """Return what each method costs."""
        rows = []
        for method in self.methods:
            results = self.of_method(method.label)
            if not results:
                continue
            cost = costs(results)
            rates = sorted({r.lr for r in results})
            rows.append(
                (
                    Value(method.label),
                    Value(f"{cost['trained']:,.0f}"),
                    Value(_percent(cost["share"])),
                    Value(f"{cost['step_ms']:.1f} ms"),
                    Value(_duration(cost["seconds"])),
                    Value(decimal(int(cost["memory"]))),
                    Value(decimal(int(cost["file"]))),
                    Value(", ".join(f"{rate:g}" for rate in rates)),
                    Value(", ".join(sorted({r.backend for r in results}))),
                )
            )
        head = (
            "method", "trained, with head", "share", "a step", "training", "peak memory", "file",
            "learning rate", "backend",
        )  # fmt: skip
        caption = (
            "Means over the runs. Training is the time in steps alone; the memory is that of the "
            "whole process, on a GPU what is allocated."
        )
        return Table(head, tuple(rows), caption)

    def seed_table(self) -> Table:
        """Return every metric with all its statistics."""
        rows = []
        for task in self.tasks:
            for method in self.methods:
                results = self.results(task, method.label)
                for metric in results[0].scores if results else ():
                    found = spread([r.scores[metric] for r in results])
                    train = spread([r.train_score for r in results])
                    assert found is not None and train is not None
                    main = metric == results[0].metric
                    rows.append(
                        (
                            Value(task),
                            Value(method.label),
                            Value(metric_name(metric)),
                            Value(f"{found.mean:.2f}"),
                            Value("" if found.deviation is None else f"{found.deviation:.2f}"),
                            Value(f"{found.median:.2f}"),
                            Value(f"{found.lowest:.2f}"),
                            Value(f"{found.highest:.2f}"),
                            Value(str(found.count)),
                            Value(f"{train.mean - found.mean:+.2f}" if main else ""),
                        )
                    )
        head = (
            "task", "method", "metric", "mean", "deviation", "median", "lowest", "highest",
            "seeds", "gap",
        )  # fmt: skip
        caption = (
            "In percent, of the last step on the validation set. Gap: training minus validation."
        )
        return Table(head, tuple(rows), caption, names=3)

    def sweep_tables(self) -> list[Table]:
        """Return a table a task: methods by size or by time."""
        tables = []
        for task in self.tasks:
            cells = [c for c in self.cells if c.task.label == task]
            timed = bool(self.grid.budgets)
            columns = list(dict.fromkeys(c.budget if timed else c.examples for c in cells))
            # two sizes may come to as many examples, whose runs are the same
            at_column = {(c.method.label, c.budget if timed else c.examples): c for c in cells}
            found = {
                m.label: [
                    spread([r.score for r in self.collected.of(at_column[m.label, column])])
                    for column in columns
                ]
                for m in self.methods
            }
            best = [
                _best([row[i].mean if row[i] else None for row in found.values()])  # type: ignore[union-attr]
                for i in range(len(columns))
            ]
            rows = [
                (Value(label), *(_score(s, best[i][at]) for i, s in enumerate(row)))
                for at, (label, row) in enumerate(found.items())
            ]
            head = (task, *(str(c) if timed else f"{c:,}" for c in columns))
            what = "time to train" if timed else "number of training examples"
            metric = next((r.metric for c in cells for r in self.collected.of(c)), "")
            caption = f"{metric_name(metric)} in percent, by {what}.".lstrip()
            tables.append(Table(head, tuple(rows), caption))
        return tables

    def search_table(self) -> Table | None:
        """Return what each learning rate came to on the part of the training set held back."""
        rows = []
        for cell in self.cells:
            run = cell.runs[0]
            done = self.collected.of(cell)
            for trial in run.trials:
                result = self.collected.results.get(trial.name)
                chosen = bool(done) and done[0].lr == trial.settings.lr
                rows.append(
                    (
                        Value(cell.task.label),
                        Value(cell.method.label),
                        Value(f"{cell.examples:,}"),
                        Value(f"{trial.settings.lr:g}", "", chosen),
                        Value(f"{result.loss:.4f}") if result else _MISSING,
                        Value(f"{result.score:.1f}") if result else _MISSING,
                    )
                )
        if not rows:
            return None
        head = ("task", "method", "examples", "learning rate", "loss", "metric")
        search = self.grid.search
        caption = (
            f"On {100 * search.held_back:g} % of the training examples, held back, after "
            f"{search.max_steps} steps; chosen (bold) by the best {search.by}. The validation set "
            "has no part in it."
        )
        return Table(head, tuple(dict.fromkeys(rows)), caption, names=2)


def _architectures(collected: Collected, grid: int) -> Table:
    """Return the averages of methods by model."""
    asked = collected.plan.study.grids[grid]
    sections = [_Section(collected, grid, model) for model in asked.models]
    rows = []
    for section in sections:
        means = [
            average(section.spread(t, m.label) for t in section.tasks) for m in section.methods
        ]
        best = _best(means)
        found = [r for c in section.cells for r in collected.of(c)]
        share = next((r.share for r in found if r.run.method.method == "bitfit"), None)
        rows.append(
            (
                Value(section.model),
                Value("" if share is None else _percent(share)),
                *(
                    _MISSING if mean is None else Value(f"{mean:.1f}", "", best[i])
                    for i, mean in enumerate(means)
                ),
            )
        )
    head = ("model", "BitFit trains", *(m.label for m in asked.methods))
    return Table(head, tuple(rows), f"Average over {', '.join(t.label for t in asked.tasks)}.")


def _summary(collected: Collected, command: str) -> list[Block]:
    plan, results = collected.plan, list(collected.results.values())
    states = Counter(t.state for t in collected.troubles)
    seconds = sum(r.seconds for r in results)
    total = len(plan.runs)
    line = f"{len(results)} of {total} runs finished"
    if states[FAILED]:
        line += f", {states[FAILED]} failed"
    if missing := total - len(results) - states[FAILED]:
        line += f", {missing} not done"
    line += f"; {_duration(seconds)} of training and evaluation in all."
    searches = sum(r.run.purpose != FINAL for r in results)
    if searches:
        line += f" {searches} of them only search learning rates or measure times."
    blocks: list[Block] = []
    if plan.study.description:
        blocks.append(Text(plan.study.description))
    blocks.append(Text(line))
    chosen = "no step, and no learning rate, is chosen by it."
    if not all(run.rates for run in plan.runs.values() if run.purpose == FINAL):
        chosen = (
            "no step is chosen by it. Where there is one learning rate, the study's file gives it."
        )
    blocks.append(
        Text(
            "Every number is that of the last step's model on the validation set, which a run "
            f"evaluates once, at its end: {chosen}"
        )
    )
    if results:
        some = results[0]
        devices = sorted({r.device for r in results})
        precisions = sorted({r.run.settings.precision for r in results})
        versions = ", ".join(f"{k} {v}" for k, v in some.versions.items())
        commits = sorted({r.commit for r in results if r.commit})
        made = ", ".join([versions, *(f"commit {at}" for at in commits)])
        blocks.append(
            Text(
                f"Made by: {command}. Device: {'; '.join(devices)}. Precision: "
                f"{', '.join(precisions)}. {made}."
            )
        )
    return blocks


def _troubles(collected: Collected) -> list[Block]:
    if not collected.troubles:
        return []
    rows = tuple(
        (Value(t.run.name), Value("failed" if t.state == FAILED else "not done"), Value(t.error))
        for t in collected.troubles
    )
    head = ("run", "state", "why")
    caption = "A failed run's folder has a traceback.txt; --retry does failed runs again."
    return [Heading("Failed and missing runs"), Table(head, rows, caption, names=3, wrapped=True)]


def _warnings(collected: Collected) -> list[Block]:
    counted = Counter(text for r in collected.final for text in r.warnings)
    if not counted:
        return []
    rows = tuple((Value(text), Value(str(count))) for text, count in counted.most_common())
    return [Heading("Warnings"), Table(("warning", "runs"), rows, wrapped=True)]


def _published_table() -> Table:
    rows = tuple(
        (Value(p.name), Value(p.model), Value(p.split), Value(p.source), Value(f"{p.average:.1f}"))
        for p in PUBLISHED
    )
    return Table(
        ("method", "model", "set", "source", "average"), rows,
        "Averages over GLUE, in percent; the metrics are those of the tables above.", names=4,
    )  # fmt: skip


def report_blocks(
    collected: Collected, figures: dict[int, list[Picture]], command: str
) -> list[Block]:
    """Return the report's blocks, in order.

    Parameters
    ----------
    collected : Collected
        From `collect`.
    figures : dict of int to list of Picture
        By the grid's index.
    command : str
        What made the report.
    """
    study = collected.plan.study
    blocks = _summary(collected, command)
    for index, grid in enumerate(study.grids):
        default = "Results" if len(study.grids) == 1 else f"Grid {index + 1}"
        blocks.append(Heading(grid.title or default))
        swept = len(grid.sizes) > 1 or bool(grid.budgets)
        if len(grid.models) > 1 and not swept:
            blocks += [Heading("Across architectures", 3), _architectures(collected, index)]
        for model in grid.models:
            section = _Section(collected, index, model)
            blocks.append(Heading(model, 3))
            if swept:
                blocks += section.sweep_tables()
            else:
                blocks.append(section.paper_table())
                blocks.append(section.cost_table())
            if searched := section.search_table():
                blocks.append(searched)
        blocks += figures.get(index, [])
        if not swept:
            for model in grid.models:
                title = ", ".join(["Every metric", *([model] if len(grid.models) > 1 else [])])
                blocks += [
                    Heading(title, 3),
                    _Section(collected, index, model).seed_table(),
                ]
    blocks += _troubles(collected)
    blocks += _warnings(collected)
    blocks += [Heading("Published averages"), _published_table()]
    return blocks


@contextlib.contextmanager
def report_folder(output: Path) -> Iterator[None]:
    """Keep other processes of this machine from writing the report of a study meanwhile."""
    import fcntl  # not on Windows, where nothing here is known to work

    with (output / ".report.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process, however it ends
        yield


def write_report(collected: Collected, output: Path, command: str) -> tuple[Path, Path]:
    """Write the report into a study's folder: the same runs give the same bytes.

    Parameters
    ----------
    collected : Collected
        From `collect`; what is missing is said.
    output : Path
        The study's folder.
    command : str
        What made the report, for the reader.

    Returns
    -------
    html, markdown : Path
        `report.html`, one page without anything outside of it, and `report.md` with `figures/`.
    """
    folder = output / _FIGURES
    drawn = draw_all(collected, folder)
    kept = {name for figures in drawn.values() for name in names_of(figures)}
    for file in folder.glob("*"):
        # figures of an earlier report; another process may be writing hidden ones
        if file.name not in kept and not file.name.startswith("."):
            file.unlink(missing_ok=True)
    pictures = {
        index: [Picture(f.stem, f.title, f.caption) for f in figures]
        for index, figures in drawn.items()
    }
    blocks = report_blocks(collected, pictures, command)
    title = collected.plan.study.title
    html, markdown = output / "report.html", output / "report.md"
    write_text(html, html_page(title, blocks, folder))
    write_text(markdown, markdown_page(title, blocks, _FIGURES))
    return html, markdown
