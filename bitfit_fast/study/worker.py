"""One run of a study, from its settings to its folder; and what is left where it fails."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import read
from ..errors import BitFitError, BitFitWarning
from ..files import write_json, write_text
from ..inference import bias_changes
from ..methods import prepare
from ..models.loading import load_model, load_tokenizer
from ..training.loop import train
from ..training.measure import commit
from ..training.run_folder import RunFolder
from ..training.settings import Settings
from .sweeps import FINAL, TRIAL, Run, hold_back, load_source

__all__ = [
    "DONE",
    "FAILED",
    "OPEN",
    "data_of",
    "noted_of",
    "perform",
    "state",
    "summary_of",
    "work",
]

#: States of a run's folder.
DONE, FAILED, OPEN = "done", "failed", "open"
#: Share of the training set that judges the runs that only measure time; nobody reads it.
_CLOCK_SHARE = 0.1
#: Trained files below this size are kept where a study keeps small ones.
_SMALL = 10_000_000
#: What a run notes of itself when it is done.
_NOTED = "run.json"


def summary_of(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run, or None."""
    return _read(RunFolder(folder).summary)


def noted_of(folder: Path) -> dict[str, Any] | None:
    """Return what a finished run noted of itself besides, or None."""
    return _read(folder / _NOTED)


def data_of(run: Run, folder: Path) -> str | None:
    """Return the SHA-256 of the data that a run was done on; None where nothing says so."""
    if (found := (noted_of(folder) or {}).get("data")) is not None:
        return found
    # of others, the summary knows of the part that was not held back
    return (summary_of(folder) or {}).get("data") if run.purpose == FINAL else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise BitFitError(f"{path} is altered: it is not JSON") from None


def state(folder: Path) -> str:
    """Return whether the run of a folder is done, has failed or is open."""
    # written last of all, so the rest is there
    if (folder / _NOTED).exists() and RunFolder(folder).summary.exists():
        return DONE
    return FAILED if (folder / "failure.json").exists() else OPEN


def perform(run: Run, settings: Settings, folder: Path, keep: str) -> None:
    """Do a run, or go on with what a killed process left of it.

    Besides what `train` writes, the folder gets `run.json`, with what the run was for, its
    settled settings, the SHA-256 of its task's data and the warnings on the way, and
    `changes.json`, with how far each kind of bias moved.

    Parameters
    ----------
    run : Run
        What to do.
    settings : Settings
        From `settle`.
    folder : Path
        The run's own.
    keep : str
        Trained files to keep: see `Study`.
    """
    data = load_source(run.task)
    digest = data.digest()
    if run.purpose != FINAL:
        share = run.search.held_back if run.search and run.purpose == TRIAL else _CLOCK_SHARE
        data = hold_back(data, share, settings.train_examples, settings.seed)
        settings = replace(settings, train_examples=None)
    trained = summary_of(folder)
    if trained is not None and trained.get("data") not in (None, data.digest()):
        raise BitFitError(f"the data of {run.task.key} has changed since {folder} was done")
    files = RunFolder(folder)
    method = run.method
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BitFitWarning)
        if not files.summary.exists():
            model = load_model(run.model, data.labels, settings.seed, data.kind)
            prepare(
                model, method.method, terms=method.terms, layers=method.layers, head=method.head,
                seed=settings.seed, **dict(method.options),
            )  # fmt: skip
            tokenizer = load_tokenizer(run.model)
            train(model, tokenizer, data, settings, folder, resume=files.settings.exists())
        changes: list[dict[str, Any]] = []
        summary = summary_of(folder)
        assert summary is not None
        if run.purpose == FINAL and summary["terms"]:
            before = load_model(run.model, data.labels, settings.seed, data.kind)
            changes = [
                {"term": term, "layer": layer, "change": change}
                for (term, layer), change in bias_changes(before, read(folder)).items()
            ]
    write_json(folder / "changes.json", changes)
    told = [str(w.message) for w in caught if issubclass(w.category, BitFitWarning)]
    write_json(
        folder / _NOTED,
        {
            **run.identity,
            "name": run.name,
            "lr": summary["lr"],
            "data": digest,
            "warnings": told,
            "commit": commit(),
        },
    )
    # what a finished run needs no more; an unfinished one would
    files.state.unlink(missing_ok=True)
    if keep == "none" or (keep == "small" and files.model.stat().st_size > _SMALL):
        files.model.unlink(missing_ok=True)


def fail(folder: Path, error: str, details: str) -> None:
    """Leave one sentence, and where the program was, in the folder of a failed run."""
    write_text(folder / "traceback.txt", details)
    write_json(folder / "failure.json", {"error": error})


def work(run: Run, settings: Settings, folder: Path, keep: str, threads: int) -> None:
    """Do a run in a process of its own, which ends with the one that started it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        # a run whose study was killed must not go on beside the process that takes it over
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    try:
        perform(run, settings, folder, keep)
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        told = text if isinstance(error, BitFitError) else f"{type(error).__name__}: {text}"
        fail(folder, told, traceback.format_exc())


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
