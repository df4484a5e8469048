"""What trains: biases by term and layer, the task head, and the audit of that choice."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from .additions import Addition, add, addition
from .errors import BitFitError, listed
from .models.families import ALIASES, PAPER_TERMS, Bias, biases, head_prefix

__all__ = [
    "NO_GRADIENT",
    "Selection",
    "Trained",
    "head_names",
    "is_patched",
    "parse_layers",
    "parse_terms",
    "refuse_choice",
    "select",
    "select_added",
    "select_frozen",
    "select_full",
    "trained_names",
    "undone_on_failure",
]

#: Terms that stand for what is not a bias of the base model.
HEAD, WEIGHTS = "head", "weights"
#: Such as a method that trains more than biases of the base has words of its own for.
LAYERNORM_WEIGHT = "layernorm-weight"
_NO_BIASES = (LAYERNORM_WEIGHT,)

#: Attribute of a model whose head was chosen by name: the names of the head's parameters.
_CHOSEN_HEAD = "_bitfit_fast_head"
#: Attribute of a patched model: its selected parameters whose gradient is zero and not computed.
NO_GRADIENT = "_bitfit_fast_no_gradient"
#: No model has as many layers; a longer range is cut here, before it fills the memory.
_MANY_LAYERS = 10_000


@dataclass(frozen=True)
class Trained:
    """One trained parameter: its name, term, layer (None outside of layers) and size.

    `zero_gradient` says that its gradient is identically zero, so that it stays where it is;
    `added` that it is none of the base model's own.
    """

    name: str
    term: str
    layer: int | None
    count: int
    named: bool = True
    zero_gradient: bool = False
    added: bool = False


@dataclass(frozen=True)
class Selection:
    """The parameters of a model that train, and what the rest amounts to.

    Printing it shows the audit table.

    Attributes
    ----------
    trained : tuple of Trained
        In model order.
    base_parameters, head_parameters : int
        Size of the whole model, below and in the task head; what a method added is in neither.
    by : str, optional
        The method that added something to the model.
    """

    trained: tuple[Trained, ...]
    base_parameters: int
    head_parameters: int
    by: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Selection:
        """Describe the selection that the model's `requires_grad` flags make."""
        known = {bias.name: bias for bias in biases(model)}
        base, chosen, extra = _base_names(model), trained_names(model), addition(model)
        trained, sizes = [], {True: 0, False: 0}
        for name, parameter in model.named_parameters():
            added = extra is not None and extra.owns(name)
            if not added:
                sizes[name in base] += parameter.numel()
            if name not in chosen:
                continue
            bias = known.get(name)
            if extra is not None and (term := extra.term(name)) is not None:
                row = Trained(name, term, None, parameter.numel(), added=added)
            elif name not in base:
                row = Trained(name, HEAD, None, parameter.numel())
            elif bias is not None:
                size = parameter.numel()
                row = Trained(name, bias.term, bias.layer, size, bias.named, bias.zero_gradient)
            else:
                row = Trained(name, WEIGHTS, None, parameter.numel())
            trained.append(row)
        by = None if extra is None else extra.method
        return cls(tuple(trained), sizes[True], sizes[False], by)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the trained parameters, the head's included, in model order."""
        return tuple(t.name for t in self.trained)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Trained parameters by term, in the paper's order, the head last."""
        counts: dict[str, int] = {}
        for t in self.trained:
            counts[t.term] = counts.get(t.term, 0) + t.count
        order = {term: i for i, term in enumerate((*PAPER_TERMS, "", WEIGHTS, HEAD))}
        return dict(sorted(counts.items(), key=lambda item: order.get(item[0], order[""])))

    @property
    def terms(self) -> tuple[str, ...]:
        """Terms of the trained biases, without the head."""
        others = {t.term for t in self.trained if t.added} | {HEAD, WEIGHTS, *_NO_BIASES}
        return tuple(t for t in self.counts if t not in others)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers in which a bias trains."""
        return tuple(sorted({t.layer for t in self.trained if t.layer is not None}))

    @property
    def biases(self) -> int:
        """Trained bias parameters of the base, the head apart."""
        return sum(self.counts[term] for term in self.terms)

    @property
    def total(self) -> int:
        """All trained parameters."""
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """Trained parameters over all parameters, the head apart from both, as in the paper."""
        return (self.total - self.counts.get(HEAD, 0)) / max(self.base_parameters, 1)

    @property
    def method(self) -> str:
        """The method that trains these parameters, a key of `METHODS`."""
        if self.by is not None:
            return self.by
        if WEIGHTS in self.counts:
            return "full"
        return "bitfit" if self.biases else "frozen"

    def table(self) -> Table:
        """Return the audit table."""
        model = self.base_parameters + self.head_parameters
        table = Table("term", "tensors", "parameters", "share of model", title="What trains")
        for column in table.columns[1:]:
            column.justify = "right"

        def row(label: str, members: Iterable[Trained], style: str | None = None) -> None:
            members = list(members)
            count = sum(t.count for t in members)
            share = f"{count / max(model, 1):.4%}"
            table.add_row(label, str(len(members)), f"{count:,}", share, style=style)

        for term in self.counts:
            if term != HEAD:
                row(term, (t for t in self.trained if t.term == term))
        table.add_section()
        row("all but the head", (t for t in self.trained if t.term != HEAD))
        row("head", (t for t in self.trained if t.term == HEAD))
        row("trained", self.trained, style="bold")
        table.add_row("model", "", f"{model:,}", "")
        unnamed = [t.name for t in self.trained if not t.named]
        notes = [f"named by module type only: {listed(unnamed)}"] if unnamed else []
        if zero := dict.fromkeys(t.term for t in self.trained if t.zero_gradient):
            notes.append(f"{listed(zero)}: its gradient is zero under softmax attention")
        if notes:
            table.caption = "\n".join(notes)
        return table

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def _below_head(model: nn.Module) -> set[str]:
    """Return the names of the base's parameters, as far as the model itself tells them apart."""
    prefix = head_prefix(model) or ""
    return {name for name, _ in model.named_parameters() if name.startswith(prefix)}


def _base_names(model: nn.Module) -> set[str]:
    return _below_head(model) - getattr(model, _CHOSEN_HEAD, frozenset())


def trained_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters that train, whether or not a gradient is computed."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    return names | getattr(model, NO_GRADIENT, frozenset())


def head_names(model: nn.Module) -> set[str]:
    """Return the names of the head's parameters, whether they train or not."""
    return {name for name, _ in model.named_parameters()} - _base_names(model)


def parse_terms(terms: str | Iterable[str]) -> tuple[str, ...] | None:
    """Read a choice of terms.

    Parameters
    ----------
    terms : str or iterable of str
        Names or the paper's symbols (`m1 LN1 m2 m3 LN2`), separated by commas, plus signs
        or blanks; `"all"` for every bias.

    Returns
    -------
    tuple of str, or None
        Canonical names without repetition; None for all.

    Raises
    ------
    BitFitError
        If nothing is named, or something beside `"all"`.
    """
    given = terms if isinstance(terms, Iterable) else (terms,)
    words = re.split(r"[,+\s]+", terms) if isinstance(terms, str) else list(given)
    if not all(isinstance(word, str) for word in words):
        raise BitFitError(f"terms {terms!r} are not text like 'query,intermediate', or several")
    words = [w.strip().lower() for w in words if w.strip()]
    if not words:
        raise BitFitError("no terms given; use 'all' or some of " + listed(PAPER_TERMS))
    if "all" in words:
        if others := [word for word in words if word != "all"]:
            raise BitFitError(f"'all' stands for every term, so it goes without {listed(others)}")
        return None
    return tuple(dict.fromkeys(ALIASES.get(word, word) for word in words))


def parse_layers(layers: str | int | Iterable[int] | None) -> tuple[int, ...] | None:
    """Read a choice of layers such as `"0-5,11"`; None stands for all of them.

    Raises
    ------
    BitFitError
        If it is not made of numbers and ranges, or no layer is named.
    """
    if layers is None:
        return None
    if not isinstance(layers, str):
        numbers = tuple(layers) if isinstance(layers, Iterable) else (layers,)
        if not numbers:
            raise BitFitError("no layers given; leave layers out for all of them")
        if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers):
            raise BitFitError(f"layers {layers!r} are not numbers of layers, or text like 0-5,11")
        return tuple(dict.fromkeys(map(int, numbers)))
    chosen: list[int] = []
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise BitFitError(f"layers '{layers}' is not a list of numbers and ranges like 0-5,11")
        chosen.extend(range(first, min(last, first + _MANY_LAYERS) + 1))
    return tuple(dict.fromkeys(chosen))


def _choose(
    model: nn.Module,
    terms: tuple[str, ...] | None,
    layers: tuple[int, ...] | None,
    head: set[str],
) -> list[Bias]:
    found = [bias for bias in biases(model) if bias.name not in head]
    who = type(model).__name__
    has = list(dict.fromkeys(bias.term for bias in found))
    has.sort(key=lambda t: PAPER_TERMS.index(t) if t in PAPER_TERMS else len(PAPER_TERMS))
    if not found:
        raise BitFitError(
            f"{who} has no bias terms outside its head (terms it has: none), "
            "so BitFit has nothing to train"
        )
    for term in terms or ():
        if term not in has:
            problem = (
                f"{who} has no bias of term '{term}'"
                if term in PAPER_TERMS
                else f"unknown term '{term}'"
            )
            raise BitFitError(f"{problem}; the terms of this model are all, {listed(has, 30)}")
    there = sorted({bias.layer for bias in found if bias.layer is not None})
    for layer in layers or ():
        if layer not in there:
            raise BitFitError(f"layer {layer} is out of range: {who} has {_in_words(there)}")

    def wanted(bias: Bias) -> bool:
        if terms is not None and bias.term not in terms:
            return False
        if layers is None:
            return True
        # a bias outside of the layers trains with a choice of layers only where it is named
        return bias.layer in layers if bias.layer is not None else terms is not None

    chosen = [bias for bias in found if wanted(bias)]
    if not chosen:
        raise BitFitError(f"no bias of {who} is of the terms {listed(terms or ())} in those layers")
    if all(bias.zero_gradient for bias in chosen):
        raise BitFitError(
            f"the gradient of every {listed(dict.fromkeys(b.term for b in chosen))} bias is zero "
            f"under softmax attention, so alone it cannot train; {who} also has "
            + listed([term for term in has if term not in {b.term for b in chosen}], 30)
        )
    return chosen


def _in_words(layers: Sequence[int]) -> str:
    if not layers:
        return "no numbered layers"
    first, last = layers[0], layers[-1]
    if len(layers) == last - first + 1:
        return f"layers {first}-{last}"
    return f"biases in the layers {listed(layers)}"


def _head_names(model: nn.Module, head: bool | Sequence[str]) -> set[str]:
    if head is False:
        return set()
    names = [name for name, _ in model.named_parameters()]
    if head is not True:
        head = [head] if isinstance(head, str) else head
        for prefix in head:
            if not any(name.startswith(prefix) for name in names):
                raise BitFitError(f"no parameter of {type(model).__name__} begins with '{prefix}'")
        return {name for name in names if name.startswith(tuple(head))}
    if head_prefix(model) is None:
        raise BitFitError(
            f"{type(model).__name__} does not say which part is its head; "
            "name it, as in head=['classifier'], or pass head=False"
        )
    return set(names) - _below_head(model)


def _check_free(model: nn.Module) -> None:
    """Refuse a model in which something else is in place already."""
    if is_patched(model):
        raise BitFitError("the model is patched; unpatch it before another selection")
    if (extra := addition(model)) is not None:
        raise BitFitError(
            f"the model has what method '{extra.method}' added to it; take a fresh one, or "
            "bitfit_fast.methods.remove it, before another selection"
        )


def is_patched(model: nn.Module) -> bool:
    """Tell whether `patch` or `patch_encoder` changed the model."""
    return hasattr(model, NO_GRADIENT)


@contextlib.contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Let what a model's parameters are chosen for be as it was, where something goes wrong."""
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    chosen: frozenset[str] = getattr(model, _CHOSEN_HEAD, frozenset())
    try:
        yield
    except BaseException:
        _train_only(model, trains, chosen)
        raise


def _train_only(
    model: nn.Module, names: set[str], chosen_head: frozenset[str] = frozenset()
) -> Selection:
    # later looks at the model, as by `save`, need to know what only the caller could tell
    setattr(model, _CHOSEN_HEAD, chosen_head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return Selection.of(model)


def select(
    model: nn.Module,
    terms: str | Iterable[str] = "all",
    layers: str | int | Iterable[int] | None = None,
    head: bool | Sequence[str] = True,
) -> Selection:
    """Let the chosen biases and the head train, and freeze everything else.

    This is BitFit (Ben Zaken et al., ACL 2022): the gradient reaches no weight matrix of
    the base model.

    Parameters
    ----------
    model : nn.Module
        Changed in place: only `requires_grad` flags are touched, and which parameters
        `head` names is kept in an attribute.
    terms : str or iterable of str
        `"all"`, or the kinds of bias to train, by the paper's names or symbols:
        `query`, `key`, `value`, `attention-output` (m1), `attention-layernorm` (LN1),
        `intermediate` (m2), `output` (m3), `output-layernorm` (LN2),
        `embedding-layernorm`, `pooler`, and what else the model's family has.
    layers : str, int or iterable of int, optional
        Encoder layers, as `"0-5,11"` or numbers from 0. With a choice of layers, biases
        outside of the layers (embedding, pooler) train only where `terms` names them.
    head : bool or sequence of str
        Whether the task head trains; or the name prefixes of its parameters, for a
        module that does not say which part is its head.

    Returns
    -------
    Selection
        The trained parameters; printing it shows the audit table.

    Raises
    ------
    BitFitError
        For a term or layer that the model does not have.
    """
    _check_free(model)
    head_names = _head_names(model, head)
    chosen = _choose(model, parse_terms(terms), parse_layers(layers), head_names)
    names = {bias.name for bias in chosen} | head_names
    return _train_only(
        model, names, frozenset() if isinstance(head, bool) else frozenset(head_names)
    )


def select_full(
    model: nn.Module,
    terms: str | Iterable[str] = "all",
    layers: Any = None,
    head: bool | Sequence[str] = True,
) -> Selection:
    """Let every parameter train, or all but the head; names say which part is the head."""
    refuse_choice("full", terms, layers)
    _check_free(model)
    names = {name for name, _ in model.named_parameters()}
    if isinstance(head, bool) or not head:
        return _train_only(model, names if head else names & _below_head(model))
    return _train_only(model, names, frozenset(_head_names(model, head)))


def select_frozen(
    model: nn.Module,
    terms: str | Iterable[str] = "all",
    layers: Any = None,
    head: bool | Sequence[str] = True,
) -> Selection:
    """Let the head alone train."""
    refuse_choice("frozen", terms, layers)
    if not head:
        raise BitFitError("method 'frozen' trains only the head, so it cannot go without it")
    _check_free(model)
    names = _head_names(model, head)
    return _train_only(model, names, frozenset() if isinstance(head, bool) else frozenset(names))


def select_added(model: nn.Module, extra: Addition, head: bool | Sequence[str] = True) -> Selection:
    """Add `extra` to the model, and let it and the head train."""
    _check_free(model)
    names = _head_names(model, head)
    add(extra, model, names if names else head_names(model))
    chosen = frozenset() if isinstance(head, bool) else frozenset(names)
    return _train_only(model, names | extra.trains(model), chosen)


def refuse_choice(method: str, terms: str | Iterable[str], layers: Any) -> None:
    """Refuse a choice of biases for a method that trains something else."""
    if parse_terms(terms) is not None or layers is not None:
        raise BitFitError(f"terms and layers choose biases; method '{method}' does not take them")
