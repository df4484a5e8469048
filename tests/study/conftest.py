"""Studies that take seconds: a tiny model on a few dozen sentences of one's own."""

import csv
import math
import sys
import types

import pytest

from bitfit_fast.files import write_json

SENTENCES = ("the plot was good", "the acting was dull", "it is fine", "one is bad")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with a training and a validation CSV."""
    folder = tmp_path_factory.mktemp("files")
    for name, count in (("train", 40), ("validation", 12)):
        rows = [(SENTENCES[i % 4] + " and" * (i % 3), ("good", "bad")[i % 2]) for i in range(count)]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return folder


@pytest.fixture
def study_file(tmp_path, bert_folder, files):
    """Write a study of the tiny model and files; more lines may follow."""

    def write(*lines, name="tiny.yaml", methods="[full, bitfit, frozen]"):
        path = tmp_path / name
        path.write_text(
            "\n".join(
                [
                    "title: Tiny",
                    f"models: {bert_folder}",
                    "tasks:",
                    "  - name: toy",
                    f"    train_file: {files / 'train.csv'}",
                    f"    validation_file: {files / 'validation.csv'}",
                    f"methods: {methods}",
                    "batch_size: 8",
                    "max_length: 16",
                    "max_steps: 6",
                    "eval_every: 2",
                    *lines,
                ]
            )
            + "\n"
        )
        return path

    return write


@pytest.fixture
def made_up():
    """Write results for runs of a plan that nobody has done: scores that follow a formula."""

    def write(plan, output, leave=()):
        for index, (name, run) in enumerate(plan.runs.items()):
            if name in leave:
                continue
            method, seed = run.method, run.settings.seed
            rank = (index * 37) % 23
            examples = run.settings.train_examples or 1000
            score = 0.5 + 0.01 * rank + 0.004 * seed + 0.02 * math.log10(examples)
            biases = [("query", 0), ("query", 1), ("intermediate", 0), ("intermediate", 1)]
            share = {"full": 1.0, "frozen": 0.0}.get(method.method, 0.001 / (1 + len(method.terms)))
            steps = run.settings.max_steps or 10
            row = {"step": steps, "loss": 1 - score, "accuracy": score, "mcc": score - 0.2}
            summary = {
                "final": {"step": steps, "train": {**row, "accuracy": score + 0.05},
                          "validation": row},
                "metrics": ["accuracy", "mcc"], "lr": run.settings.lr or 1e-3, "steps": steps,
                "parameters": {"share": share, "trained": int(1e6 * share) + 66},
                "step_ms": 10.0 + rank, "seconds": 60.0 + rank,
                "peak_memory_bytes": 500_000_000 + 10_000_000 * rank,
                "file_bytes": 4000 + int(4e6 * share), "backend": "fast", "device": "a CPU",
                "versions": {"bitfit_fast": "0.1.0"},
                "terms": ["query"] if method.method == "bitfit" else [],
            }  # fmt: skip
            changes = [
                {"term": t, "layer": layer, "change": 1e-3 * (1 + i + rank)}
                for i, (t, layer) in enumerate(biases)
            ]
            folder = output / "runs" / name
            write_json(folder / "summary.json", summary)
            write_json(folder / "changes.json", changes if summary["terms"] else [])
            write_json(folder / "run.json", {"warnings": ["few steps"], "commit": "0123abcd"})

    return write


@pytest.fixture(autouse=True)
def plain_main(monkeypatch):
    """Hide the test runner's main module, which processes of a study would import."""
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
