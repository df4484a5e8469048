"""The one exception whose message is written for the person at the keyboard."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["BitFitError", "BitFitWarning", "listed"]


class BitFitError(ValueError):
    """Input that cannot be used; the message is one sentence that names the value.

    The command line prints the message without a traceback and exits with code 2.
    """


def listed(values: Iterable[object], limit: int = 12) -> str:
    """Join values for an error message, shortened after `limit` of them."""
    texts = [str(v) for v in values]
    more = f", ... ({len(texts) - limit} more)" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


class BitFitWarning(UserWarning):
    """Something that can be used but is probably not what was meant."""
