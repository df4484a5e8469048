"""Options that several commands have, and the types that options are of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

# typer reads these annotations at run time, and on Python 3.10 it needs Optional
Text = Optional[str]  # noqa: UP045
Number = Optional[int]  # noqa: UP045
Real = Optional[float]  # noqa: UP045
Location = Optional[Path]  # noqa: UP045
Texts = Optional[list[str]]  # noqa: UP045
Reals = Optional[list[float]]  # noqa: UP045

#: Headings above options in the help of a command.
DATA, RUN, SPEED = "Data", "Run", "Hyper-parameters"

DataDir = Annotated[
    Location,
    typer.Option(
        help="Folder with GLUE's own task folders (RTE/train.tsv, ...), SQuAD's JSON files (or one "
        "JSON file) or a treebank's CoNLL-U files; else the hub is asked.",
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
TaskKind = Annotated[
    Text,
    typer.Option(
        help="What files hold: sequence (texts with a label), span (questions on a text: JSON as "
        "SQuAD's, JSON lines) or token (tagged words: CoNLL-U, or two columns); by default what "
        "they look like.",
        rich_help_panel=DATA,
    ),
]
TextColumn = Annotated[
    Texts, typer.Option(help="Column of the text in files; twice for pairs.", rich_help_panel=DATA)
]
LabelColumn = Annotated[
    Text, typer.Option(help="Column of the label in files; default label.", rich_help_panel=DATA)
]
Pretrained = Annotated[
    str, typer.Option(help="Hub name or local folder of any model with a head for the task.")
]
TrainedLength = Annotated[
    Number,
    typer.Option(
        help="Tokens an example; default 128, and 384 for questions.", rich_help_panel=SPEED
    ),
]
DocStride = Annotated[
    Number,
    typer.Option(
        help="Tokens that windows of a long text share, for questions; default 128.",
        rich_help_panel=SPEED,
    ),
]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.", rich_help_panel=SPEED)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=SPEED)]
