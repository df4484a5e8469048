"""The command line: `bitfit-fast train | evaluate | predict | inspect | merge | parity | study`."""

from __future__ import annotations

import statistics
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__
from .checkpoint import load, open_model, read
from .checkpoint import merge as merge_checkpoint
from .data.load import TASKS, load_task
from .encoder import MEMORY
from .errors import BitFitError, BitFitWarning, listed
from .files import write_json
from .inference import bias_changes, evaluate_checkpoint, predict_checkpoint, task_of
from .methods import METHODS, prepare
from .models.loading import DEFAULT_MODEL, describe_model, load_model, load_tokenizer
from .parity import compare
from .plots import change_heatmap, check_picture
from .selection import select
from .study import collect, read_study, report_folder, run_study, study_of_options, write_report
from .study.runner import open_folder
from .training.loop import train as run_training
from .training.run_folder import RunFolder
from .training.settings import MIN_STEPS, Settings

__all__ = ["app", "main"]

app = typer.Typer(
    help="Fine-tune pretrained transformers with BitFit: train the biases and the task head.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

# typer reads these annotations at run time, and on Python 3.10 it needs Optional
Text = Optional[str]  # noqa: UP045
Number = Optional[int]  # noqa: UP045
Real = Optional[float]  # noqa: UP045
Location = Optional[Path]  # noqa: UP045

DATA, RUN, SPEED, OPTIONS = "Data", "Run", "Hyper-parameters", "Options of methods"
GRID = "Instead of a file"
Trained = Annotated[Path, typer.Argument(help="A run's folder, or its model.safetensors.")]
Base = Annotated[
    Text, typer.Option(help="Base model, where it is not to be had by the name in the file.")
]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Load onto other frozen weights than those trained with.")
]
DataDir = Annotated[
    Location,
    typer.Option(
        help="Folder with GLUE's own task folders (RTE/train.tsv, ...), SQuAD's JSON files (or one "
        "JSON file) or a treebank's CoNLL-U files; else the hub is asked.",
        rich_help_panel=DATA,
    ),
]
OneFile = Annotated[
    Location, typer.Option("--file", help="A file instead, of a form that train takes.")
]
TaskKind = Annotated[
    Text,
    typer.Option(
        help="What files hold: sequence (texts with a label), span (questions on a text: JSON as "
        "SQuAD's, JSON lines) or token (tagged words: CoNLL-U, or two columns); by default what "
        "they look like.",
        rich_help_panel=DATA,
    ),
]
TrainFile = Annotated[
    Location,
    typer.Option(
        help="Instead of a task: CSV, TSV, JSON lines, Parquet; JSON as SQuAD's; CoNLL-U.",
        rich_help_panel=DATA,
    ),
]
ValidationShare = Annotated[
    Real,
    typer.Option(
        help="Of squad from one file: share of its articles for validation; default 0.2.",
        rich_help_panel=DATA,
    ),
]
SplitSeed = Annotated[
    int, typer.Option(help="By which those articles are chosen.", rich_help_panel=DATA)
]
DocStride = Annotated[
    Number,
    typer.Option(
        help="Tokens that windows of a long text share, for questions; default 128.",
        rich_help_panel=SPEED,
    ),
]

TextColumn = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="Column of the text in files; twice for pairs.", rich_help_panel=DATA),
]
LabelColumn = Annotated[
    Text, typer.Option(help="Column of the label in files; default label.", rich_help_panel=DATA)
]
TaskName = Annotated[Text, typer.Option("--task", help="Task; by default the one trained on.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.", rich_help_panel=SPEED)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=SPEED)]
MaxLength = Annotated[Number, typer.Option(help="Tokens an example; by default as trained.")]
TrainedLength = Annotated[
    Number,
    typer.Option(
        help="Tokens an example; default 128, and 384 for questions.", rich_help_panel=SPEED
    ),
]
Pretrained = Annotated[
    str, typer.Option(help="Hub name or local folder of any model with a head for the task.")
]


def _say(text: str, where: Console = console) -> None:
    """Print a line as it is: paths may hold what rich takes for markup."""
    where.print(text, markup=False, highlight=False, soft_wrap=True)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Read whole numbers joined by commas."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"{option} must be whole numbers joined by commas, as in 1024,2048, not '{text}'"
        raise BitFitError(message) from None


def _quiet() -> None:
    """Keep the libraries below to errors: what they say besides is no news here."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit


@app.command(epilog="Example: bitfit-fast train --task rte --data-dir glue --output runs/rte")
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
    split_seed: SplitSeed = 0,
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
    _quiet()
    settings = Settings(
        lr=lr, epochs=epochs, max_steps=max_steps, batch_size=batch_size, max_length=max_length,
        doc_stride=doc_stride, max_answer_length=max_answer_length, warmup=warmup,
        schedule=schedule, seed=seed, precision=precision,
        train_fraction=train_fraction, train_examples=train_examples, grad_clip=grad_clip,
        eval_every=eval_every, patience=patience, backend=backend, device=device, memory=memory,
        graph=graph, token_budget=_numbers("token-budget", token_budget),
    )  # fmt: skip
    if method not in METHODS:
        raise BitFitError(f"unknown method '{method}'; valid ones are {listed(METHODS, 20)}")
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
        kinds=("train", "validation", "test") if task is None else ("train", "validation"),
        task_kind=task_kind,
        validation_share=validation_share,
        split_seed=split_seed,
    )
    if data.note:
        _say(data.note)
    output = output or Path("runs") / f"{data.name}-{method}-{seed}"
    RunFolder(output).check(resume, overwrite)
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
        _say(f"stopped; the same command with --resume goes on from {output}", errors)
        raise typer.Exit(130) from None
    best = summary["best"]
    judged = [split for split in best if split.startswith("validation")] or ["train"]
    for split in judged:
        scores = ", ".join(f"{name} {best[split][name]:.4f}" for name in data.metrics)
        _say(f"best {split} (step {best['step']}): {scores}")
    _say(
        f"{summary['steps']} steps, {summary['step_ms']:.0f} ms each; "
        f"{summary['file_bytes'] / 1e3:.0f} kB in {output / 'model.safetensors'}"
    )
    if "test" in data.splits:
        best_model, tokenizer, checkpoint = open_model(output, model)
        for path in predict_checkpoint(
            best_model, tokenizer, checkpoint, data, output, precision=precision, device=device
        ):
            _say(f"wrote {path}")


@app.command(epilog="Example: bitfit-fast evaluate runs/rte-bitfit-0 --data-dir glue")
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
    _quiet()
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


@app.command(epilog="Example: bitfit-fast predict runs/rte --data-dir glue --output submission")
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
    _quiet()
    data = task_of(read(trained), split, task, data_dir, file, text_column, labelled=False)
    model, tokenizer, checkpoint = open_model(trained, base, any_base)
    for path in predict_checkpoint(
        model, tokenizer, checkpoint, data, output, split,
        max_length=max_length, precision=precision, device=device,
    ):  # fmt: skip
        _say(f"wrote {path}")


@app.command(epilog="Example: bitfit-fast inspect runs/rte --output change.png")
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
    _quiet()
    if (trained is None) == (model is None):
        raise BitFitError("give either a trained file or --model")
    if model is not None:
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
    _say(f"wrote {picture}")


@app.command(epilog="Example: bitfit-fast parity --task rte --data-dir glue --steps 50")
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
    _quiet()
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
    _say(found.verdict)
    if found.failures:
        raise typer.Exit(1)


@app.command(epilog="Example: bitfit-fast merge runs/rte merged-rte")
def merge(
    trained: Trained,
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    base: Base = None,
    any_base: AnyBase = False,
) -> None:
    """Write an ordinary Hugging Face model folder, which needs this package no more."""
    _quiet()
    merge_checkpoint(trained, output, base, any_base)
    _say(f"wrote {output}")


@app.command(epilog="Example: bitfit-fast study studies/smoke.yaml --output runs/smoke")
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
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Without a file: a model; may be repeated.", rich_help_panel=GRID),
    ] = None,
    task: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A task; may be repeated.", rich_help_panel=GRID),
    ] = None,
    method: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="A method, or b_m2+b_q, b_m2, b_q; may be repeated.", rich_help_panel=GRID
        ),
    ] = None,
    seeds: Annotated[Number, typer.Option(help="Number of seeds.", rich_help_panel=GRID)] = None,
    size: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(help="Share or count of training examples.", rich_help_panel=GRID),
    ] = None,
    lr: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(help="Peak learning rate; several are searched.", rich_help_panel=GRID),
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
    _quiet()
    options = {
        "models": model, "tasks": task, "methods": method, "seeds": seeds, "sizes": size,
        "lr": lr, "max_steps": max_steps, "precision": precision,
        "data_dir": None if data_dir is None else str(data_dir),
    }  # fmt: skip
    if file is not None:
        if given := [key.replace("_", "-") for key, value in options.items() if value]:
            raise BitFitError(f"give the study {file} or options ({listed(given)}), not both")
        asked = read_study(file)
    else:
        if output is None:
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
            _say("stopped; the same command goes on", errors)
    with report_folder(output):
        collected = collect(plan, output)
        for path in write_report(collected, output, command):
            _say(f"wrote {path}")
    for trouble in collected.troubles:
        if trouble.state == "failed":
            _say(f"{trouble.run.name} failed: {trouble.error}", errors)
    if stopped:
        raise typer.Exit(130)
    if any(trouble.state == "failed" for trouble in collected.troubles):
        raise typer.Exit(1)


def _show_warning(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    if issubclass(category, BitFitWarning):
        errors.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
    else:
        _python_showwarning(message, category, *args, **kwargs)


_python_showwarning = warnings.showwarning


def _fail(message: str) -> NoReturn:
    errors.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(2)


def main() -> None:
    """Run the command line; bad input ends with one sentence and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        app(prog_name="bitfit-fast")
    except BitFitError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))


if __name__ == "__main__":
    main()
