"""The command that does the runs of a study and writes its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import BitFitError, listed
from ..study import collect, read_study, report_folder, run_study, study_of_options, write_report
from ..study.reading import option_of
from ..study.runner import open_folder
from .console import console, errors, quiet, say
from .options import DataDir, Location, Number, Reals, Text, Texts

__all__ = ["study"]

GRID = "Instead of a file"


def study(
    file: Annotated[
        Location, typer.Argument(help="YAML file of the study; else the options below.")
    ] = None,
    output: Annotated[
        Location, typer.Option("--output", "-o", help="Study folder; default runs/NAME.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing; draw what is there.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Do failed runs again.")] = False,
    model: Annotated[
        Texts, typer.Option(help="Without a file: a model; may be repeated.", rich_help_panel=GRID)
    ] = None,
    task: Annotated[
        Texts, typer.Option(help="A task; may be repeated.", rich_help_panel=GRID)
    ] = None,
    method: Annotated[
        Texts,
        typer.Option(
            help="A method, or b_m2+b_q, b_m2, b_q; may be repeated.", rich_help_panel=GRID
        ),
    ] = None,
    seeds: Annotated[Number, typer.Option(help="Number of seeds.", rich_help_panel=GRID)] = None,
    size: Annotated[
        Reals, typer.Option(help="Share or count of training examples.", rich_help_panel=GRID)
    ] = None,
    lr: Annotated[
        Reals, typer.Option(help="Peak learning rate; several are searched.", rich_help_panel=GRID)
    ] = None,
    max_steps: Annotated[
        Number, typer.Option(help="Optimiser steps at most.", rich_help_panel=GRID)
    ] = None,
    precision: Annotated[Text, typer.Option(help="fp32 or bf16.", rich_help_panel=GRID)] = None,
    data_dir: DataDir = None,
) -> None:
    """Do a grid of runs, each once, and write a report of them.

    A killed study goes on with the same command; several may work on one folder.
    """
    quiet()
    options = {
        "models": model, "tasks": task, "methods": method, "seeds": seeds, "sizes": size,
        "lr": lr, "max_steps": max_steps, "precision": precision,
        "data_dir": None if data_dir is None else str(data_dir),
    }  # fmt: skip
    if file is not None:
        if given := [option_of(key) for key, value in options.items() if value not in (None, [])]:
            raise BitFitError(f"give the study {file} or options ({listed(given)}), not both")
        asked = read_study(file)
    else:
        if output is None or not task or not method:
            raise BitFitError("give a study's file, or --output with --task and --method")
        asked = study_of_options(output.name, **options)
    output = output or Path("runs") / asked.name
    plan = open_folder(asked, output, report_only)
    command = f"bitfit-fast study {file}" if file else f"bitfit-fast study --output {output}"
    stopped = False
    if not report_only:
        try:
            run_study(plan, output, jobs=jobs, retry=retry, console=console)
        except KeyboardInterrupt:
            stopped = True
            say("stopped; the same command goes on", errors)
    with report_folder(output):
        collected = collect(plan, output)
        for path in write_report(collected, output, command):
            say(f"wrote {path}")
    for trouble in collected.troubles:
        if trouble.state == "failed":
            say(f"{trouble.run.name} failed: {trouble.error}", errors)
    if stopped:
        raise typer.Exit(130)
    if any(trouble.state == "failed" for trouble in collected.troubles):
        raise typer.Exit(1)
