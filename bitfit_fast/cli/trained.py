"""Commands on a trained file: evaluate, predict, inspect, merge."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..checkpoint import load, read
from ..errors import BitFitError
from ..files import write_json
from ..inference import bias_changes, evaluate_checkpoint, predict_checkpoint, task_of
from ..models.loading import describe_model, load_model
from ..opening import merge as merge_checkpoint
from ..opening import open_model
from ..plots import change_heatmap, check_picture
from ..selection import select
from .console import console, quiet, say
from .options import DataDir, Device, LabelColumn, Location, Number, Precision, Text, TextColumn

__all__ = ["evaluate", "inspect", "merge", "predict"]

Trained = Annotated[Path, typer.Argument(help="A run's folder, or its model.safetensors.")]
Base = Annotated[
    Text, typer.Option(help="Base model, where it is not to be had by the name in the file.")
]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Load onto other frozen weights than those trained with.")
]
OneFile = Annotated[
    Location, typer.Option("--file", help="A file instead, of a form that train takes.")
]
TaskName = Annotated[Text, typer.Option("--task", help="Task; by default the one trained on.")]
MaxLength = Annotated[Number, typer.Option(help="Tokens an example; by default as trained.")]


def evaluate(
    trained: Trained,
    task: TaskName = None,
    data_dir: DataDir = None,
    file: OneFile = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    base: Base = None,
    any_base: AnyBase = False,
    max_length: MaxLength = None,
    precision: Precision = "fp32",
    device: Device = "auto",
    output: Annotated[Location, typer.Option(help="Write the scores to a JSON file.")] = None,
) -> None:
    """Measure a trained file on a split with labels."""
    quiet()
    data = task_of(read(trained), split, task, data_dir, file, text_column, label_column)
    model, tokenizer, checkpoint = open_model(trained, base, any_base)
    scores = evaluate_checkpoint(
        model, tokenizer, checkpoint, data, split,
        max_length=max_length, precision=precision, device=device,
    )  # fmt: skip
    table = Table("split", *next(iter(scores.values())), title=escape(f"{data.name}, {trained}"))
    for name, row in scores.items():
        table.add_row(name, *(f"{value:.4f}" for value in row.values()))
    console.print(table)
    if output:
        write_json(output, scores)


def predict(
    trained: Trained,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")],
    task: TaskName = None,
    data_dir: DataDir = None,
    file: OneFile = None,
    text_column: TextColumn = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    base: Base = None,
    any_base: AnyBase = False,
    max_length: MaxLength = None,
    precision: Precision = "fp32",
    device: Device = "auto",
) -> None:
    """Write predictions: TSV files as GLUE's server takes them, SQuAD's JSON, or tagged words."""
    quiet()
    data = task_of(read(trained), split, task, data_dir, file, text_column, labelled=False)
    model, tokenizer, checkpoint = open_model(trained, base, any_base)
    for path in predict_checkpoint(
        model, tokenizer, checkpoint, data, output, split,
        max_length=max_length, precision=precision, device=device,
    ):  # fmt: skip
        say(f"wrote {path}")


def inspect(
    trained: Annotated[
        Location, typer.Argument(help="A run's folder, or its model.safetensors.")
    ] = None,
    model: Annotated[
        Text, typer.Option(help="Instead: show which terms a model has, by name or folder.")
    ] = None,
    output: Annotated[
        Location, typer.Option("--output", "-o", help="PNG or SVG; default beside the file.")
    ] = None,
    base: Base = None,
    any_base: AnyBase = False,
) -> None:
    """Show what a trained file holds, and draw how far each bias moved, by term and layer."""
    quiet()
    if (trained is None) == (model is None):
        raise BitFitError("give either a trained file or --model")
    if model is not None:
        if output is not None or base is not None or any_base:
            raise BitFitError(
                "--output, --base and --any-base are of a trained file, not of --model"
            )
        console.print(select(describe_model(model)).table())
        return
    assert trained is not None
    checkpoint = read(trained)
    picture = output or checkpoint.path.with_name("bias_change.png")
    check_picture(picture)
    header = checkpoint.header
    table = Table("", title=escape(str(checkpoint.path)), show_header=False)
    table.add_column()
    rows: dict[str, Any] = {
        "base": header.base,
        "fingerprint": header.fingerprint[:16],
        "model": header.model_class,
        "method": header.method,
        "terms": ", ".join(header.terms) or "none",
        "layers": ", ".join(map(str, header.layers)) or "none",
        "options": ", ".join(f"{k} {v}" for k, v in header.options.items()) or "none",
        "head": "trained" if header.head else "not trained",
        "labels": ", ".join(header.labels or ["a score" if checkpoint.kind.classes else "spans"]),
        "task": header.task.get("name", ""),
        "parameters": f"{sum(t.numel() for t in checkpoint.tensors.values()):,}",
        "size": f"{checkpoint.path.stat().st_size / 1e3:.1f} kB",
        "written by": ", ".join(f"{k} {v}" for k, v in header.versions.items()),
    }
    for key, value in rows.items():
        table.add_row(key, escape(str(value)))
    console.print(table)
    before = load_model(base or header.base, header.labels, kind=checkpoint.kind.name)
    changes = bias_changes(before, checkpoint)
    load(before, checkpoint, any_base=any_base)  # refuses another base
    if not changes:
        console.print("no bias of the base model was trained, so there is no change to draw")
        return
    moved = Table("term", "mean |change|", "layer of the largest", title="How far biases moved")
    terms = dict.fromkeys(term for term, _ in changes)
    by_layer = {t: {layer: v for (u, layer), v in changes.items() if u == t} for t in terms}
    means = {term: statistics.fmean(values.values()) for term, values in by_layer.items()}
    for term in sorted(terms, key=lambda term: -means[term]):
        largest = max(by_layer[term], key=by_layer[term].__getitem__)
        moved.add_row(term, f"{means[term]:.3e}", "-" if largest is None else str(largest))
    console.print(moved)
    name = header.task.get("name", checkpoint.path.name)
    change_heatmap(changes, picture, f"Mean absolute change of the biases, {name}")
    say(f"wrote {picture}")


def merge(
    trained: Trained,
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    base: Base = None,
    any_base: AnyBase = False,
) -> None:
    """Write an ordinary Hugging Face model folder, which needs this package no more."""
    quiet()
    merge_checkpoint(trained, output, base, any_base)
    say(f"wrote {output}")
