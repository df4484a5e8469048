"""The demonstration: BitFit beside the frozen model and full fine-tuning, on a real model.

`python -m bitfit_fast.demo` trains all three on the built-in task and prints what each cost
and reached. Every run is a process of its own, so that their peaks of memory can be compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .files import write_json
from .models.loading import DEFAULT_MODEL
from .plots import learning_curves
from .training.checks import choose_device
from .training.measure import commit, multiplies_bf16

__all__ = ["compare", "main"]

#: (method, name in the table, learning rate); each was the best of a coarse search on this task.
RUNS = (
    ("frozen", "frozen", 5e-3),
    ("bitfit", "BitFit", 1e-3),
    ("full", "full", 1e-4),
)
TASK = "reviews"


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "bitfit_fast", *arguments], check=True)


def compare(output: Path, model: str, steps: int, precision: str) -> dict[str, dict[str, Any]]:
    """Train each method in a process of its own, and return the summaries by method."""
    summaries = {}
    for method, _, lr in RUNS:
        folder = output / method
        _command(
            "train", "--model", model, "--task", TASK, "--method", method, "--lr", str(lr),
            "--max-steps", str(steps), "--eval-every", str(max(1, steps // 5)),
            "--max-length", "64", "--precision", precision,
            "--output", str(folder), "--overwrite",
        )  # fmt: skip
        summaries[method] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summaries


def _table(summaries: dict[str, dict[str, Any]]) -> Table:
    title = f"The built-in task '{TASK}', at the last step, on unseen words and frames"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "trained", "share", "accuracy", "MCC", "step", "memory", "file"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for method, name, _ in RUNS:
        s = summaries[method]
        scores = s["final"]["validation"]
        trained = s["parameters"]["trained"]
        table.add_row(
            name,
            f"{trained:,}",
            f"{trained / s['parameters']['model']:.2%}",
            f"{scores['accuracy']:.3f}",
            f"{scores['mcc']:.3f}",
            f"{s['step_ms']:.0f} ms",
            decimal(s["peak_memory_bytes"]),
            decimal(s["file_bytes"], precision=0),
        )
    return table


def main() -> None:
    """Run the comparison, print the table, and leave the pictures."""
    parser = argparse.ArgumentParser(description="Compare BitFit on the built-in task.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps of each method")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"),
        help="by default bf16 where the processor multiplies in it",
    )  # fmt: skip
    arguments = parser.parse_args()
    console = Console()
    able = multiplies_bf16(choose_device("auto"))
    precision = arguments.precision or ("bf16" if able else "fp32")
    summaries = compare(arguments.output, arguments.model, arguments.steps, precision)
    heatmap = arguments.output / "bias_change.png"
    _command("inspect", str(arguments.output / "bitfit"), "--output", str(heatmap))
    curves = arguments.output / "learning_curves.png"
    rows = {
        name: [
            json.loads(line)
            for line in (arguments.output / method / "metrics.jsonl").open(encoding="utf-8")
        ]
        for method, name, _ in RUNS
    }
    learning_curves(rows, "accuracy", curves, f"Fine-tuning {arguments.model} on '{TASK}'")
    some = next(iter(summaries.values()))
    comparison = {
        "command": " ".join(["python -m bitfit_fast.demo", *sys.argv[1:]]),
        "commit": commit(),
        "device": some["device"],
        "versions": some["versions"],
        "runs": summaries,
    }
    write_json(arguments.output / "comparison.json", comparison)
    console.print(_table(summaries))
    console.print(f"learning curves: {curves}", highlight=False, soft_wrap=True)
    console.print(f"how far each bias moved: {heatmap}", highlight=False, soft_wrap=True)
    console.print(
        f"the trained biases and head: {arguments.output / 'bitfit' / 'model.safetensors'}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
