"""The ways to fine-tune, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..additions import Addition
from ..errors import BitFitError, check_known, listed
from ..random_state import device_of, seeded
from ..selection import Selection, refuse_choice, select, select_added, select_frozen, select_full
from .adapters import Adapters
from .diff_pruning import DiffPruning
from .random_entries import RandomLines, RandomUniform
from .through_peft import IA3, Lora, PrefixTuning, PromptTuning

__all__ = ["METHODS", "Method", "Option", "option_values", "prepare"]


@dataclass(frozen=True)
class Option:
    """One setting of a method: its default, what it may be, and both in words."""

    default: Any
    valid: Callable[[Any], bool]
    ranges: str


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes
    ----------
    select : callable
        `select(model, terms, layers, head)` makes the model ready to train, with the
        method's options by name for methods that have some.
    lr : float
        The learning rate to begin with.
    summary : str
        What trains.
    options : dict of str to Option
        What can be set.
    kind : type of Addition, optional
        What it puts into the model.
    """

    select: Callable[..., Selection]
    lr: float
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    kind: type[Addition] | None = None


def _at_least(least: int, default: int | None) -> Option:
    return Option(default, lambda v: isinstance(v, int) and v >= least, f"at least {least}")


def _added(
    name: str, kind: type[Addition], lr: float, summary: str, **options: Option
) -> tuple[str, Method]:
    """Return the row of a method that adds something to the model."""

    def choose(
        model: nn.Module,
        terms: str | Iterable[str] = "all",
        layers: str | Sequence[int] | None = None,
        head: bool | Sequence[str] = True,
        *,
        seed: int = 0,
        **given: Any,
    ) -> Selection:
        refuse_choice(name, terms, layers)
        extra = kind(name, {**option_values(name, options, given), "seed": seed})
        with seeded(seed, device_of(model)):
            return select_added(model, extra, head)

    return name, Method(choose, lr, summary, options, kind)


def option_values(
    method: str, options: Mapping[str, Option], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the value of every option of a method.

    Raises
    ------
    BitFitError
        For an option that it does not take, or a value out of its range.
    """
    if unknown := [name for name in given if name not in options]:
        takes = f"takes {listed(options)}" if options else "has no options"
        raise BitFitError(f"method '{method}' does not take {listed(unknown)}; it {takes}")
    values = {name: option.default for name, option in options.items()} | dict(given)
    for name, value in given.items():
        try:
            valid = options[name].valid(value)
        except TypeError:  # of a file, it may be of any type
            valid = False
        if not valid:
            raise BitFitError(
                f"{name.replace('_', '-')} must be {options[name].ranges}, not {value}"
            )
    return values


_PARAMETERS = _at_least(1, None)
_SHARE = Option(0.005, lambda v: 0 < v <= 1, "above 0 and at most 1")

#: Fine-tuning methods by the name that the command line takes. The learning rates are those at
#: which the papers, or PEFT's examples, begin.
METHODS: dict[str, Method] = {
    "bitfit": Method(select, 1e-3, "biases and the head"),
    "full": Method(select_full, 5e-5, "every parameter"),
    "frozen": Method(select_frozen, 1e-3, "the head alone"),
    **dict(
        (
            _added(
                "random-uniform", RandomUniform, 1e-3, "as many random weights",
                parameters=_PARAMETERS,
            ),
            _added(
                "random-row-col", RandomLines, 1e-3, "random rows and columns of weights",
                parameters=_PARAMETERS,
            ),
            _added(
                "diff-pruning", DiffPruning, 1e-4, "a sparse difference of the weights",
                share=_SHARE,
                l0=Option(1.25e-7, lambda v: v >= 0, "at least 0"),
                gate_steps=Option(0.5, lambda v: 0 < v < 1, "above 0 and below 1"),
                sparse_rate=Option(10.0, lambda v: v > 0, "above 0"),
            ),
            _added(
                "adapters", Adapters, 1e-3, "two bottlenecks a layer, and LayerNorms",
                bottleneck=_at_least(1, 64),
            ),
            _added(
                "lora", Lora, 5e-4, "low-rank changes of query and value",
                rank=_at_least(1, 8),
                alpha=Option(16.0, lambda v: v > 0, "above 0"),
            ),
            _added(
                "prefix-tuning", PrefixTuning, 1e-2, "keys and values before the tokens'",
                tokens=_at_least(1, 20),
            ),
            _added(
                "prompt-tuning", PromptTuning, 1e-2, "embeddings before the tokens'",
                tokens=_at_least(1, 20),
            ),
            _added("ia3", IA3, 3e-3, "factors of keys, values and the feed-forward part"),
        )
    ),
}  # fmt: skip


def prepare(
    model: nn.Module,
    method: str,
    *,
    terms: str | Iterable[str] = "all",
    layers: str | Sequence[int] | None = None,
    head: bool | Sequence[str] = True,
    seed: int = 0,
    **options: Any,
) -> Selection:
    """Make a model ready to be trained by a method.

    Parameters
    ----------
    model : nn.Module
        A fresh base model with a head of any kind; changed in place, or not at all where it
        is refused.
    method : str
        A key of `METHODS`.
    terms, layers
        Biases to train, for `bitfit` alone; see `select`.
    head : bool or sequence of str
        Whether the task head trains, or the name prefixes of its parameters.
    seed : int
        Of what begins at random, or is chosen so.
    **options
        The method's own, as `METHODS[method].options` lists them.

    Returns
    -------
    Selection
        What trains; printing it shows the audit table.

    Raises
    ------
    BitFitError
        For an unknown method, an option that it does not take, or a model that it cannot.
    """
    check_known("method", method, METHODS)
    row = METHODS[method]
    if row.kind is None:
        option_values(method, row.options, options)
        return row.select(model, terms, layers, head)
    return row.select(model, terms, layers, head, seed=seed, **options)
