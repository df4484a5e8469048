"""Whole runs, plain PyTorch against the fast backend: the metrics and the time that they take.

    python benchmarks/end_to_end.py --data-dir FOLDER --output benchmarks/results/end-to-end.json

A variant is a backend and its precision. All get the same examples in the same batches and the
same learning rate; dropout draws other masks, so two variants differ as two seeds do. Finished runs
are kept, and a killed script goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from provenance import command_line, provenance

import bitfit_fast
from bitfit_fast.data.glue import GLUE
from bitfit_fast.files import write_json
from bitfit_fast.models.loading import DEFAULT_MODEL

VARIANTS = "reference-fp32,fast-fp32,fast-bf16"


def run(arguments: argparse.Namespace, task: str, seed: int, variant: str) -> dict[str, Any]:
    """Train, or return what the same run left before."""
    folder = arguments.runs / f"{task}-{variant}-{seed}"
    backend, _, precision = variant.partition("-")
    settings = bitfit_fast.Settings(
        lr=arguments.lr[task],
        seed=seed,
        precision=precision,
        backend=backend,
        max_steps=arguments.steps,
        eval_every=arguments.steps,
    )
    if (folder / "summary.json").exists():
        before = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if all(before[key] == getattr(settings, key) for key in ("lr", "precision", "max_steps")):
            return before
    data = bitfit_fast.load_task(task, data_dir=arguments.data_dir)
    model = bitfit_fast.load_model(arguments.model, data.labels, seed)
    bitfit_fast.select(model)
    tokenizer = bitfit_fast.load_tokenizer(arguments.model)
    return bitfit_fast.train(model, tokenizer, data, settings, folder, overwrite=True)


def row(summaries: list[dict[str, Any]], task: str) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds, and the median step.

    Of each metric and of the loss, which tells runs apart where none learns the task.
    """
    scores = {
        metric: [summary["final"]["validation"][metric] for summary in summaries]
        for metric in (*GLUE[task].metrics, "loss")
    }
    return {
        "scores": scores,
        "mean": {metric: statistics.fmean(values) for metric, values in scores.items()},
        "deviation": {
            metric: statistics.stdev(values) if len(values) > 1 else 0.0
            for metric, values in scores.items()
        },
        "step_ms": statistics.median(summary["step_ms"] for summary in summaries),
        "seconds": statistics.fmean(summary["seconds"] for summary in summaries),
    }


def main() -> None:
    """Run everything, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of GLUE's folders")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--lr", default="mrpc=3e-3,cola=3e-3", help="tasks and learning rates")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--variants", default=VARIANTS, help="backends and their precisions")
    parser.add_argument("--runs", type=Path, default=Path("runs/end-to-end"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/end-to-end.json"))
    arguments = parser.parse_args()
    arguments.lr = {k: float(v) for k, v in (pair.split("=") for pair in arguments.lr.split(","))}
    arguments.variants = arguments.variants.split(",")
    results: dict[str, Any] = {}
    for task in arguments.lr:
        done: dict[str, list[dict[str, Any]]] = {variant: [] for variant in arguments.variants}
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for variant, summaries in done.items():
                summaries.append(run(arguments, task, seed, variant))
                score = summaries[-1]["final"]["validation"]
                shown = (*GLUE[task].metrics, "loss")
                print(task, variant, seed, {m: round(score[m], 4) for m in shown}, flush=True)
        results[task] = {variant: row(summaries, task) for variant, summaries in done.items()}
    write_json(
        arguments.output,
        {
            **provenance(command_line(), torch.device("cpu")),
            "model": arguments.model,
            "steps": arguments.steps,
            "lr": arguments.lr,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
