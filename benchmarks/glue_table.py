"""BitFit, full fine-tuning and the frozen model on GLUE tasks: the table of the README.

    python benchmarks/glue_table.py --data-dir FOLDER

For each task and method the learning rate is the one with the lowest loss, after a short run,
on a tenth of the training set that is held back; the validation set is looked at once a run,
at the last step. Finished runs are kept, so that a killed table goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import bitfit_fast
from bitfit_fast.data.glue import GLUE
from bitfit_fast.files import write_json
from bitfit_fast.models.loading import DEFAULT_MODEL
from bitfit_fast.selection import METHODS
from bitfit_fast.training.measure import commit
from bitfit_fast.training.settings import MIN_STEPS

TASKS = ("rte", "mrpc", "cola", "stsb")
LEARNING_RATES = {
    "bitfit": (3e-4, 1e-3, 3e-3),
    "full": (3e-5, 1e-4),
    "frozen": (1e-3, 1e-2),
}
NAMES = {"bitfit": "BitFit", "full": "full fine-tuning", "frozen": "frozen (head only)"}
BATCH_SIZE = 16
#: Steps of a run that only compares learning rates.
SEARCH_STEPS = 200
HELD_BACK = 0.1
#: Passes over the training set in a final run, of no fewer than `MIN_STEPS` steps.
EPOCHS = 2


@dataclass(frozen=True)
class Job:
    """One training run; `search` runs are judged on the held-back tenth."""

    task: str
    method: str
    lr: float
    seed: int
    search: bool

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.task}-{self.method}-{self.lr:g}-{'search' if self.search else self.seed}"


def hold_back(data: bitfit_fast.TaskData) -> bitfit_fast.TaskData:
    """Return the task with a tenth of its training set in place of its validation set."""
    train = data.train
    assert train is not None
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    held = round(HELD_BACK * len(train))
    splits = {
        "train": train.take(order[held:]),
        "validation": replace(train.take(order[:held]), name="validation"),
    }
    return replace(data, splits=splits)


def run(job: Job, model: str, data_dir: Path, output: Path, precision: str) -> dict[str, Any]:
    """Do one run, or return what the same run left before."""
    import transformers

    folder = output / job.name

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # runs side by side do not share cores
    data = bitfit_fast.load_task(job.task, data_dir=data_dir)
    if job.search:
        data = hold_back(data)
        # that they are short is meant
        warnings.simplefilter("ignore", bitfit_fast.BitFitWarning)
    assert data.train is not None
    final_steps = max(MIN_STEPS, math.ceil(EPOCHS * len(data.train) / BATCH_SIZE))
    network = bitfit_fast.load_model(model, data.labels, job.seed)
    METHODS[job.method].select(network, "all", None, True)
    settings = bitfit_fast.Settings(
        lr=job.lr,
        seed=job.seed,
        precision=precision,
        backend="reference",
        max_steps=SEARCH_STEPS if job.search else final_steps,
        batch_size=BATCH_SIZE,
        eval_every=1_000_000,
    )
    if (folder / "summary.json").exists():
        before = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        same = {"model": model, **{k: getattr(settings, k) for k in ("max_steps", "precision")}}
        if all(before[key] == value for key, value in same.items()):
            return before
    tokenizer = bitfit_fast.load_tokenizer(model)
    return bitfit_fast.train(network, tokenizer, data, settings, folder, overwrite=True)


def run_all(
    jobs: list[Job], workers: int, title: str, *arguments: Any
) -> dict[Job, dict[str, Any]]:
    """Do the runs side by side and return their summaries."""
    done = {}
    context = multiprocessing.get_context("spawn")
    with (
        Progress() as progress,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        bar = progress.add_task(title, total=len(jobs))
        futures = {pool.submit(run, job, *arguments): job for job in jobs}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            progress.advance(bar)
    return done


def score(summary: dict[str, Any], metric: str) -> float:
    """Return a metric, or the loss, of the last step on the validation split."""
    return summary["final"]["validation"][metric]


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the table of the final runs: mean and standard deviation over seeds, in percent."""
    metrics = [(task, metric) for task in TASKS for metric in GLUE[task].metrics]
    head = ["", "trained", *(f"{GLUE[t].folder} {m}" for t, m in metrics), "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, name in NAMES.items():
        rows = [r for r in results if r["method"] == method]
        if not rows:
            continue
        cells = [name, f"{min(r['trained'] for r in rows):,}"]
        for task, metric in metrics:
            values = [100 * r["scores"][metric] for r in rows if r["task"] == task]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}" if values else "")
        cells.append(str(len({r["seed"] for r in rows})))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Search, run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of GLUE's folders")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--output", type=Path, default=Path("runs/glue-table"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/glue-minilm.json"))
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, a core each")
    parser.add_argument(
        "--seeds", default="bitfit=3,full=3,frozen=3", help="seeds of each method's final runs"
    )
    arguments = parser.parse_args()
    seeds = {k: int(v) for k, v in (pair.split("=") for pair in arguments.seeds.split(","))}
    rest = (arguments.model, arguments.data_dir, arguments.output, arguments.precision)

    search = [
        Job(task, method, lr, 0, search=True)
        for task in TASKS
        for method in seeds
        for lr in LEARNING_RATES[method]
    ]
    found = run_all(search, arguments.workers, "learning rates", *rest)
    final = []
    for task in TASKS:
        for method, count in seeds.items():
            tried = [job for job in search if (job.task, job.method) == (task, method)]
            # in short runs many metrics still stand at the majority class, and the loss does not
            best = min(tried, key=lambda job: score(found[job], "loss"))
            final += [replace(best, seed=seed, search=False) for seed in range(count)]
    done = run_all(final, arguments.workers, "final runs", *rest)

    def described(runs: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                **asdict(job),
                "steps": s["steps"],
                "trained": s["parameters"]["trained"],
                "step_ms": s["step_ms"],
                "scores": {m: score(s, m) for m in s["metrics"]},
                "train_scores": {m: s["final"]["train"][m] for m in s["metrics"]},
            }
            for job, s in runs.items()
        ]

    results = described({job: done[job] for job in final})
    some = next(iter(done.values()))
    table = markdown(results)
    write_json(
        arguments.results,
        {
            "command": " ".join(["python", *sys.argv]),
            "commit": commit(),
            "model": arguments.model,
            "precision": arguments.precision,
            "device": some["device"],
            "versions": some["versions"],
            "search": described({job: found[job] for job in search}),
            "runs": results,
            "table": table,
        },
    )
    print(table)


if __name__ == "__main__":
    main()
