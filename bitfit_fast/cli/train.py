"""The command that trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..data.load import TASKS, load_task
from ..data.task import TaskData
from ..encoder import MEMORY
from ..errors import BitFitError, check_known, listed
from ..inference import predict_checkpoint
from ..methods import METHODS, prepare
from ..models.loading import DEFAULT_MODEL, load_model, load_tokenizer
from ..opening import open_model
from ..training.loop import train as run_training
from ..training.run_folder import RunFolder
from ..training.settings import MIN_STEPS, Settings
from .console import console, errors, quiet, say
from .options import (
    DATA,
    RUN,
    SPEED,
    DataDir,
    Device,
    DocStride,
    LabelColumn,
    Location,
    Number,
    Precision,
    Pretrained,
    Real,
    TaskKind,
    Text,
    TextColumn,
    TrainedLength,
    TrainFile,
)

__all__ = ["train"]

OPTIONS = "Options of methods"

ValidationShare = Annotated[
    Real,
    typer.Option(
        help="Of squad from one file: share of its articles for validation; default 0.2.",
        rich_help_panel=DATA,
    ),
]
SplitSeed = Annotated[
    Number,
    typer.Option(help="By which those articles are chosen; default 0.", rich_help_panel=DATA),
]


def _written(path: Path) -> int | None:
    """Return when a file was written, if there is one."""
    return path.stat().st_mtime_ns if path.exists() else None


def _with_predicted(data: TaskData, file: Path, columns: list[str] | None) -> TaskData:
    """Return the data with the texts of a file besides, whose labels nobody looks at."""
    test = load_task(
        test_file=file,
        kinds=("test",),
        text_columns=columns if data.kind == "sequence" else None,
        labels=None if data.kind == "span" else data.labels,
        regression=data.labels is None if data.kind == "sequence" else None,
        task_kind=data.kind,
        labelled=False,
    )
    ending = data.ending if data.ending == test.ending else ".tsv"
    return replace(data, splits={**data.splits, **test.splits}, ending=ending)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Read whole numbers joined by commas."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"{option} must be whole numbers joined by commas, as in 1024,2048, not '{text}'"
        raise BitFitError(message) from None


def train(
    model: Pretrained = DEFAULT_MODEL,
    task: Annotated[
        Text, typer.Option(help=f"One of {listed(TASKS)}.", rich_help_panel=DATA)
    ] = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: Annotated[
        Location, typer.Option(help="Evaluated on the way.", rich_help_panel=DATA)
    ] = None,
    test_file: Annotated[
        Location, typer.Option(help="Predicted at the end, into the folder.", rich_help_panel=DATA)
    ] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    task_kind: TaskKind = None,
    validation_share: ValidationShare = None,
    split_seed: SplitSeed = None,
    method: Annotated[
        str, typer.Option(help=", ".join(f"{n}: {m.summary}" for n, m in METHODS.items()) + ".")
    ] = "bitfit",
    terms: Annotated[
        str,
        typer.Option(
            help="Kinds of bias to train: all, or some of embedding-layernorm, query, key, value, "
            "attention-output (m1), attention-layernorm (LN1), intermediate (m2), output (m3), "
            "output-layernorm (LN2), pooler, joined by commas."
        ),
    ] = "all",
    layers: Annotated[Text, typer.Option(help="Encoder layers, as in 0-5,11; default all.")] = None,
    head: Annotated[bool, typer.Option("--head/--no-head", help="Train the task head.")] = True,
    parameters: Annotated[
        Number,
        typer.Option(
            help="random-uniform, random-row-col: weights to train; default as many as biases.",
            rich_help_panel=OPTIONS,
        ),
    ] = None,
    share: Annotated[
        Real,
        typer.Option(
            help="diff-pruning: share of the base's parameters to keep; default 0.005.",
            rich_help_panel=OPTIONS,
        ),
    ] = None,
    l0: Annotated[
        Real,
        typer.Option(
            help="diff-pruning: weight of each open gate in the loss; default 1.25e-7.",
            rich_help_panel=OPTIONS,
        ),
    ] = None,
    gate_steps: Annotated[
        Real,
        typer.Option(
            help="diff-pruning: share of the steps before it prunes; default 0.5.",
            rich_help_panel=OPTIONS,
        ),
    ] = None,
    sparse_rate: Annotated[
        Real,
        typer.Option(
            help="diff-pruning: learning rate after it prunes, as a multiple; default 10.",
            rich_help_panel=OPTIONS,
        ),
    ] = None,
    bottleneck: Annotated[
        Number, typer.Option(help="adapters: their width; default 64.", rich_help_panel=OPTIONS)
    ] = None,
    rank: Annotated[Number, typer.Option(help="lora: default 8.", rich_help_panel=OPTIONS)] = None,
    alpha: Annotated[
        Real,
        typer.Option(
            help="lora: the change is times alpha / rank; default 16.",
            rich_help_panel=OPTIONS,
        ),
    ] = None,
    tokens: Annotated[
        Number,
        typer.Option(
            help="prefix-tuning, prompt-tuning: learned tokens; default 20.",
            rich_help_panel=OPTIONS,
        ),
    ] = None,
    output: Annotated[
        Location,
        typer.Option(
            "--output", "-o", help="Run folder; default runs/TASK-METHOD-SEED.", rich_help_panel=RUN
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run.", rich_help_panel=RUN)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run.", rich_help_panel=RUN)
    ] = False,
    lr: Annotated[
        Real,
        typer.Option(
            help="Peak learning rate; default "
            + ", ".join(f"{m.lr:g} for {n}" for n, m in METHODS.items())
            + ".",
            rich_help_panel=SPEED,
        ),
    ] = None,
    epochs: Annotated[
        Real,
        typer.Option(
            help=f"Default 3, and no fewer than {MIN_STEPS} steps.", rich_help_panel=SPEED
        ),
    ] = None,
    max_steps: Annotated[
        Number, typer.Option(help="Optimiser steps at most.", rich_help_panel=SPEED)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a step.", rich_help_panel=SPEED)] = 16,
    max_length: TrainedLength = None,
    doc_stride: DocStride = None,
    max_answer_length: Annotated[
        Number,
        typer.Option(help="Tokens of the longest answer; default 30.", rich_help_panel=SPEED),
    ] = None,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps with rising rate.", rich_help_panel=SPEED)
    ] = 0.06,
    schedule: Annotated[
        str, typer.Option(help="linear (to zero) or constant.", rich_help_panel=SPEED)
    ] = "linear",
    seed: Annotated[
        int,
        typer.Option(help="Of the head, the order of examples, dropout.", rich_help_panel=SPEED),
    ] = 0,
    precision: Precision = "fp32",
    train_fraction: Annotated[
        float, typer.Option(help="Share of the training set to use.", rich_help_panel=SPEED)
    ] = 1.0,
    train_examples: Annotated[
        Number, typer.Option(help="Or the number of examples.", rich_help_panel=SPEED)
    ] = None,
    grad_clip: Annotated[
        float, typer.Option(help="Largest gradient norm; 0 for none.", rich_help_panel=SPEED)
    ] = 1.0,
    eval_every: Annotated[
        Number,
        typer.Option(help="Steps between evaluations; default a tenth.", rich_help_panel=RUN),
    ] = None,
    patience: Annotated[
        Number,
        typer.Option(
            help="Stop after so many evaluations that are no better.", rich_help_panel=RUN
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="fast for whole encoders without padding, modules for bias-only modules, "
            "reference for plain PyTorch, or auto: the fastest that takes the model.",
            rich_help_panel=RUN,
        ),
    ] = "auto",
    device: Device = "auto",
    memory: Annotated[
        str,
        typer.Option(
            help="How much the fast backend keeps for the backward pass: "
            + ", ".join(MEMORY)
            + ".",
            rich_help_panel=RUN,
        ),
    ] = MEMORY[0],
    graph: Annotated[
        bool,
        typer.Option(
            "--graph/--no-graph",
            help="Capture the fast backend's steps on a GPU in CUDA graphs.",
            rich_help_panel=RUN,
        ),
    ] = True,
    token_budget: Annotated[
        Text,
        typer.Option(
            help="Tokens of a batch that the graphs are for, as in 1024,2048; more are an error. "
            "By default what batch size and length need.",
            rich_help_panel=RUN,
        ),
    ] = None,
) -> None:
    """Fine-tune a pretrained model, and leave a run folder.

    The folder holds the trained biases and head (model.safetensors), metrics.jsonl,
    summary.json and curves.png.
    """
    quiet()
    settings = Settings(
        lr=lr, epochs=epochs, max_steps=max_steps, batch_size=batch_size, max_length=max_length,
        doc_stride=doc_stride, max_answer_length=max_answer_length, warmup=warmup,
        schedule=schedule, seed=seed, precision=precision,
        train_fraction=train_fraction, train_examples=train_examples, grad_clip=grad_clip,
        eval_every=eval_every, patience=patience, backend=backend, device=device, memory=memory,
        graph=graph, token_budget=_numbers("token-budget", token_budget),
    )  # fmt: skip
    check_known("method", method, METHODS)
    options = {
        "parameters": parameters, "share": share, "l0": l0, "gate_steps": gate_steps,
        "sparse_rate": sparse_rate, "bottleneck": bottleneck, "rank": rank, "alpha": alpha,
        "tokens": tokens,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    data = load_task(
        task,
        data_dir=data_dir,
        train_file=train_file,
        validation_file=validation_file,
        test_file=test_file,
        text_columns=text_column,
        label_column=label_column,
        task_kind=task_kind,
        validation_share=validation_share,
        split_seed=split_seed,
    )
    if test_file is not None:
        data = _with_predicted(data, test_file, text_column)
    if data.note:
        say(data.note)
    output = output or Path("runs") / f"{data.name}-{method}-{seed}"
    folder = RunFolder(output)
    folder.check(resume, overwrite)
    before = None if resume else _written(folder.state)
    loaded = load_model(model, data.labels, seed, data.kind)
    tokenizer = load_tokenizer(model)
    selection = prepare(loaded, method, terms=terms, layers=layers, head=head, seed=seed, **options)
    console.print(selection.table())
    try:
        summary = run_training(
            loaded, tokenizer, data, settings, output,
            resume=resume, overwrite=overwrite, console=console,
        )  # fmt: skip
    except KeyboardInterrupt:
        if _written(folder.state) in (None, before):
            say("stopped before an evaluation, so nothing was saved", errors)
        else:
            how = "--resume in place of --overwrite" if overwrite else "--resume"
            say(f"stopped; the same command with {how} goes on from {output}", errors)
        raise typer.Exit(130) from None
    best = summary["best"]
    judged = [split for split in best if split.startswith("validation")] or ["train"]
    for split in judged:
        scores = ", ".join(f"{name} {best[split][name]:.4f}" for name in data.metrics)
        say(f"best {split} (step {best['step']}): {scores}")
    say(
        f"{summary['steps']} steps, {summary['step_ms']:.0f} ms each; "
        f"{summary['file_bytes'] / 1e3:.0f} kB in {output / 'model.safetensors'}"
    )
    if "test" in data.splits:
        best_model, tokenizer, checkpoint = open_model(output, model)
        for path in predict_checkpoint(
            best_model, tokenizer, checkpoint, data, output, precision=precision, device=device
        ):
            say(f"wrote {path}")
