"""What a person sees of a run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Display"]


class Display:
    """A bar while a run trains, and a line for each evaluation.

    Parameters
    ----------
    console : rich.console.Console or None
        Where they go; None shows nothing.
    title : str
        Of the bar.
    steps, done : int
        Of the whole run, and before this call of it.
    """

    def __init__(self, console: Console | None, title: str, steps: int, done: int) -> None:
        self.console, self.steps = console, steps
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[loss]}  {task.fields[metric]}  {task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            disable=console is None,
            transient=True,
        )
        self.task = self.bar.add_task(
            title, total=steps, completed=done, loss="", metric="", speed=""
        )

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def trained(self, step: int, losses: Sequence[float], examples_per_second: float) -> None:
        """Show the steps up to `step`, by the losses of the last ones."""
        self.bar.update(
            self.task,
            completed=step,
            loss=f"loss {statistics.fmean(losses):.3f}",
            speed=f"{examples_per_second:.0f} examples/s",
        )

    def evaluating(self, split: str) -> None:
        """Show that a split is being evaluated."""
        self.bar.update(self.task, speed=f"evaluating {split}")

    def evaluated(
        self, step: int, rows: Mapping[str, Mapping[str, Any]], metrics: Sequence[str], judge: str
    ) -> None:
        """Show the scores of each split in a line, and the main one of `judge` at the bar."""
        shown = rows.get(judge, rows["train"])
        self.bar.update(self.task, metric=f"{metrics[0]} {shown[metrics[0]]:.3f}")
        if self.console:
            parts = [
                f"{name} " + " ".join(f"{k} {row[k]:.3f}" for k in ("loss", *metrics))
                for name, row in rows.items()
            ]
            self.console.print(
                f"step {step:>5}/{self.steps}  " + "  |  ".join(parts),
                highlight=False,
                soft_wrap=True,
            )
