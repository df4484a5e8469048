"""The command line: `bitfit-fast train | evaluate | predict | inspect | merge | parity | study`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from .. import __version__
from ..errors import BitFitError
from .console import console, fail, show_warning
from .parity import parity
from .study import study
from .train import train
from .trained import evaluate, inspect, merge, predict

__all__ = ["app", "main"]

app = typer.Typer(
    help="Fine-tune pretrained transformers with BitFit: train the biases and the task head.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: In the order of the help, with an example of each.
COMMANDS: dict[Callable[..., None], str] = {
    train: "train --task rte --data-dir glue --output runs/rte",
    evaluate: "evaluate runs/rte-bitfit-0 --data-dir glue",
    predict: "predict runs/rte --data-dir glue --output submission",
    inspect: "inspect runs/rte --output change.png",
    parity: "parity --task rte --data-dir glue --steps 50",
    merge: "merge runs/rte merged-rte",
    study: "study studies/smoke.yaml --output runs/smoke",
}
for command, example in COMMANDS.items():
    app.command(epilog=f"Example: bitfit-fast {example}")(command)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; bad input ends with one sentence and exit code 2."""
    warnings.showwarning = show_warning
    try:
        app(prog_name="bitfit-fast")
    except BitFitError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
