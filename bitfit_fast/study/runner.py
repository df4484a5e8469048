"""Doing the runs of a study: each once, each in a process of its own, whatever is killed."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import BitFitError, listed
from ..files import write_json
from .claims import SIGN, Claims
from .grid import Study
from .sweeps import FINAL, Plan, Run, check_methods, expand, measure, settle
from .worker import DONE, FAILED, OPEN, data_of, fail, state, summary_of, work

__all__ = ["open_folder", "run_folder", "run_study"]

#: Seconds between looks at what other processes have done.
_LOOK = 0.5
#: Imported once for all runs; what takes long below the second level is imported on use.
_PRELOAD = (
    "bitfit_fast.study.worker", "matplotlib.backends.backend_agg", "matplotlib.figure",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert", "transformers.data.data_collator",
)  # fmt: skip


def run_folder(output: Path, run: Run) -> Path:
    """Return where a run of the study in `output` lies."""
    return output / "runs" / run.name


def open_folder(study: Study, output: Path, report_only: bool = False) -> Plan:
    """Make or check a study's folder, and return its runs; nothing else is changed.

    Parameters
    ----------
    study : Study
        From `read_study`.
    output : Path
        An empty folder, or one of the study of this name, which may have grown since, on the same
        data.
    report_only : bool
        Whether to do without the data: the sizes of the sets are taken from the folder.

    Raises
    ------
    BitFitError
        For a folder of another study or with something else in it; for data, sizes or
        methods that are not possible.
    """
    if output.exists() and not output.is_dir():
        raise BitFitError(f"{output} is a file, so it cannot be a study folder")
    marker = output / "study.json"
    known: dict[str, int] = {}
    if marker.exists():
        try:
            before = json.loads(marker.read_text(encoding="utf-8"))
            name, known = before["study"], before["training_examples"]
        except (ValueError, KeyError, TypeError):
            raise BitFitError(f"{marker} is altered: it describes no study") from None
        if name != study.name:
            raise BitFitError(f"{output} is the folder of the study '{name}', not '{study.name}'")
    elif report_only:
        raise BitFitError(f"{output} holds no study to report on")
    elif output.exists() and (other := sorted(p.name for p in output.iterdir())):
        raise BitFitError(f"{output} is no study folder: it holds {listed(other, 5)}")
    if report_only:
        try:
            return expand(study, known)
        except KeyError as error:
            raise BitFitError(
                f"the task {error.args[0]} is new in the study, and no run of it is in {output}"
            ) from None
    measured = measure(study)
    lengths = {key: found.examples for key, found in measured.items()}
    plan = expand(study, lengths)
    check_methods(study)
    there = {path.name for path in (output / "runs").glob("*")}
    if there and not there & set(plan.runs):
        raise BitFitError(
            f"{output} has {len(there)} runs of another study, and none of this one's; "
            "choose another folder"
        )
    for run in plan.runs.values():
        folder = run_folder(output, run)
        if data_of(run, folder) not in (None, measured[run.task.key].digest):
            raise BitFitError(
                f"the data of {run.task.key} has changed since {folder} was done; "
                "choose another folder, or bring the data back"
            )
    write_json(marker, {"study": study.name, "training_examples": {**known, **lengths}})
    return plan


@dataclass
class _Active:
    """A run that is being done by a process of ours."""

    run: Run
    process: Any
    began: float


class _Runner:
    """One call of `run_study`."""

    def __init__(self, plan: Plan, output: Path, jobs: int, console: Console | None) -> None:
        self.plan, self.output, self.jobs, self.console = plan, output, jobs, console
        self.runs = plan.runs
        self.claims = Claims(output / "claims")
        self.active: list[_Active] = []
        self.threads = max(1, torch.get_num_threads() // jobs)
        # a fork of a fresh process that has imported everything: a run begins at once, and
        # no run's memory is counted for another
        method = "forkserver" if sys.platform == "linux" else "spawn"
        self.context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload(list(_PRELOAD))

    def folder(self, run: Run) -> Path:
        return run_folder(self.output, run)

    def state(self, run: Run) -> str:
        return state(self.folder(run))

    def retry(self) -> None:
        """Forget failed runs, so that they begin again."""
        for run in self.runs.values():
            if self.state(run) == FAILED and self.claims.take(run.name):
                shutil.rmtree(self.folder(run))
                self.claims.release(run.name)

    def run(self) -> None:
        with self._bar() as self.bar:
            self.task = self.bar.add_task("runs", total=len(self.runs))
            try:
                self._loop()
            finally:
                for active in self.active:
                    active.process.terminate()
                    active.process.join()
                    self.claims.release(active.run.name)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=self.console is None,
            transient=True,
        )

    def _loop(self) -> None:
        while True:
            states = {name: self.state(run) for name, run in self.runs.items()}
            self.bar.update(self.task, completed=sum(s != OPEN for s in states.values()))
            waiting = self._start(states)
            if not self.active and not waiting:
                return
            if not self.active:
                time.sleep(_LOOK)
                continue
            self.claims.keep_up(active.run.name for active in self.active)
            doing = ", ".join(active.run.name.rpartition("-")[0] for active in self.active)
            self.bar.update(self.task, description=doing)
            # while a place is free, what others have done may let a run of ours begin
            patience = _LOOK if waiting else SIGN
            multiprocessing.connection.wait([a.process.sentinel for a in self.active], patience)
            for active in [a for a in self.active if not a.process.is_alive()]:
                self._finish(active)

    def _start(self, states: dict[str, str]) -> bool:
        """Begin what can begin, and return whether something waits for other processes."""
        busy = {active.run.name for active in self.active}
        waiting = False
        for name, run in self.runs.items():
            if len(self.active) >= self.jobs:
                return False
            if states[name] != OPEN or name in busy:
                continue
            if any(states[need.name] == OPEN for need in run.needs):
                waiting = True
                continue
            if not self.claims.take(name):
                continue
            # it may have been done since we looked
            if self.state(run) != OPEN or not self._begin(run):
                self.claims.release(name)
                waiting = True  # for another look: the states have changed
        return waiting

    def _begin(self, run: Run) -> bool:
        summaries = {
            need.name: summary
            for need in run.needs
            if self.state(need) == DONE and (summary := summary_of(self.folder(need)))
        }
        try:
            settings = settle(run, summaries)
        except BitFitError as error:
            fail(self.folder(run), str(error), "")
            self._say(run, f"failed: {error}")
            return False
        keep = self.plan.study.keep if run.purpose == FINAL else "none"
        process = self.context.Process(
            target=work, args=(run, settings, self.folder(run), keep, self.threads), daemon=True
        )
        process.start()
        self.active.append(_Active(run, process, time.perf_counter()))
        return True

    def _finish(self, active: _Active) -> None:
        run, process = active.run, active.process
        process.join()
        code = process.exitcode
        self.active.remove(active)
        if code == 130:
            self.claims.release(run.name)
            raise KeyboardInterrupt
        if self.state(run) == OPEN:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
            fail(self.folder(run), f"its process ended with {how}{hint}", "")
        self.claims.release(run.name)
        if self.state(run) == FAILED:
            told = json.loads((self.folder(run) / "failure.json").read_text(encoding="utf-8"))
            self._say(run, f"failed: {told['error']}")
        else:
            summary = summary_of(self.folder(run))
            assert summary is not None
            scores = summary["final"]["validation" if run.purpose != FINAL else _judge(summary)]
            key = summary["metrics"][0] if run.purpose == FINAL else "loss"
            took = time.perf_counter() - active.began
            self._say(run, f"{key} {scores[key]:.4f}, {took:.0f} s")

    def _say(self, run: Run, text: str) -> None:
        if self.console:
            line = f"{run.name.rpartition('-')[0]}: {text}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _judge(summary: dict[str, Any]) -> str:
    return next(name for name in summary["final"] if name.startswith("validation"))


def run_study(
    plan: Plan,
    output: Path,
    *,
    jobs: int = 1,
    retry: bool = False,
    console: Console | None = None,
) -> Counter[str]:
    """Do every run of a study that nobody has done or is doing.

    A run that fails is noted in its folder and stops no other one. Several processes may work
    on one folder. Runs of other processes are waited for only where one of ours needs them.

    Parameters
    ----------
    plan : Plan
        From `open_folder`.
    output : Path
        The study's folder.
    jobs : int
        Runs at a time; they share the processor's cores.
    retry : bool
        Whether to do failed runs again, from their beginning.
    console : rich.console.Console, optional
        Where progress goes.

    Returns
    -------
    Counter
        Runs by state: `done`, `failed`, `open`.

    Raises
    ------
    BitFitError
        For a number of jobs below 1.
    """
    if jobs < 1:
        raise BitFitError(f"jobs must be at least 1, not {jobs}")
    runner = _Runner(plan, output, jobs, console)
    if retry:
        runner.retry()
    runner.run()
    return Counter(runner.state(run) for run in runner.runs.values())
