"""The one exception whose message is written for the person at the keyboard."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["BitFitError", "BitFitWarning", "check_known", "listed"]


class BitFitError(ValueError):
    """Input that cannot be used; the message is one sentence that names the value.

    The command line prints the message without a traceback and exits with code 2.
    """


def listed(values: Iterable[object], limit: int = 12) -> str:
    """Join values for an error message, shortened after `limit` of them."""
    texts = [str(v) for v in values]
    more = f", ... ({len(texts) - limit} more)" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def check_known(what: str, value: object, valid: Iterable[object]) -> None:
    """Check that a value is one of a few.

    Raises
    ------
    BitFitError
        With the value, what it was to be, and the valid ones.
    """
    valid = list(valid)
    if value not in valid:
        raise BitFitError(f"unknown {what} '{value}'; valid ones are {listed(valid, 40)}")


class BitFitWarning(UserWarning):
    """Something that can be used but is probably not what was meant."""
