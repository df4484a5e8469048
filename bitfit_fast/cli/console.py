"""What the command line says, and how it reports warnings and errors."""

from __future__ import annotations

import sys
import warnings
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

from ..errors import BitFitWarning

__all__ = ["console", "errors", "fail", "quiet", "say", "show_warning"]

console = Console()
errors = Console(stderr=True)
_python_showwarning = warnings.showwarning


def say(text: str, where: Console = console) -> None:
    """Print a line as it is: paths may hold what rich takes for markup."""
    where.print(text, markup=False, highlight=False, soft_wrap=True)


def quiet() -> None:
    """Keep the libraries below to errors: what they say besides is no news here."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def show_warning(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    """Print a warning of ours in one line, and others as Python does."""
    if issubclass(category, BitFitWarning):
        errors.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
    else:
        _python_showwarning(message, category, *args, **kwargs)


def fail(message: str) -> NoReturn:
    """Print an error and end with exit code 2."""
    errors.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(2)
