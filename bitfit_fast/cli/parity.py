"""The command that checks the fast backend against plain PyTorch."""

from __future__ import annotations

from typing import Annotated

import typer

from ..data.load import TASKS, load_task
from ..encoder import MEMORY
from ..errors import listed
from ..files import write_json
from ..models.loading import DEFAULT_MODEL, load_model, load_tokenizer
from ..parity import compare
from ..selection import select
from ..training.settings import Settings
from .console import console, quiet, say
from .options import (
    DataDir,
    Device,
    DocStride,
    LabelColumn,
    Location,
    Pretrained,
    TaskKind,
    Text,
    TextColumn,
    TrainedLength,
    TrainFile,
)

__all__ = ["parity"]


def parity(
    model: Pretrained = DEFAULT_MODEL,
    task: Annotated[Text, typer.Option(help=f"One of {listed(TASKS)}.")] = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    task_kind: TaskKind = None,
    terms: Annotated[str, typer.Option(help="Kinds of bias to train.")] = "all",
    layers: Annotated[Text, typer.Option(help="Encoder layers, as in 0-5,11.")] = None,
    steps: Annotated[int, typer.Option(help="Of training, with each backend.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 16,
    max_length: TrainedLength = None,
    doc_stride: DocStride = None,
    seed: Annotated[int, typer.Option(help="Of the head and the order of examples.")] = 0,
    memory: Annotated[str, typer.Option(help=f"One of {listed(MEMORY)}.")] = MEMORY[0],
    device: Device = "auto",
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Show every parameter.")] = False,
    output: Annotated[Location, typer.Option("--output", "-o", help="JSON file to write.")] = None,
) -> None:
    """Check that the fast backend computes what plain PyTorch does, on your model and data.

    Exit code 1 says that it does not.
    """
    quiet()
    settings = Settings(
        batch_size=batch_size, max_length=max_length, doc_stride=doc_stride, seed=seed,
        memory=memory, device=device,
    )  # fmt: skip
    data = load_task(
        task,
        data_dir=data_dir,
        train_file=train_file,
        text_columns=text_column,
        label_column=label_column,
        kinds=("train",),
        task_kind=task_kind,
    )
    loaded = load_model(model, data.labels, seed, data.kind)
    select(loaded, terms, layers)
    found = compare(loaded, load_tokenizer(model), data, settings, steps, console)
    console.print(found.table(by_layer))
    if output:
        write_json(output, found.as_json())
    say(found.verdict)
    if found.failures:
        raise typer.Exit(1)
