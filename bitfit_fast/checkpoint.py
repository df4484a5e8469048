"""The file of trained biases and head: saving, loading, unloading."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .additions import Addition, add, addition, base_name, own_state, remove
from .errors import BitFitError, listed
from .kinds import Kind, kind_of
from .methods import METHODS
from .methods.table import option_values
from .models.loading import NEW, align_weights
from .random_state import device_of, seeded
from .selection import (
    HEAD,
    Selection,
    head_names,
    is_patched,
    trained_names,
    undone_on_failure,
)
from .tensorfile import digest, read_tensors, write_tensors

__all__ = [
    "Checkpoint",
    "Header",
    "added_kind",
    "fingerprint",
    "load",
    "read",
    "save",
    "stored",
    "unload",
    "versions",
]

_KIND = "checkpoint"
_BACKUP = "_bitfit_fast_base"


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself.

    Attributes
    ----------
    base : str
        Hub name or folder of the pretrained model.
    fingerprint : str
        SHA-256 of the base's weights that the file does not hold.
    model_class : str
        Class of the model that trained.
    method : str
        A key of `METHODS`.
    terms : list of str
        Terms of the trained biases.
    layers : list of int
        Layers in which a bias trained.
    head : bool
        Whether the head trained.
    labels : list of str, or None
        Names of classes or tags in index order; None for regression and spans.
    task : dict
        What else the training run knew: the task's name, its columns, the token limit.
    versions : dict of str to str
        Of the software that wrote the file.
    options : dict
        The method's own, for one that adds something to the model.
    """

    base: str
    fingerprint: str
    model_class: str
    method: str
    terms: list[str]
    layers: list[int]
    head: bool
    labels: list[str] | None
    task: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Backup:
    """What a model held before a checkpoint was loaded into it."""

    parameters: dict[str, Tensor]
    labels: tuple[dict[int, str], dict[str, int]] | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read into memory: its header, and its CPU tensors by parameter name."""

    path: Path
    header: Header
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> Kind:
        """The kind of task that its model is for."""
        return kind_of(self.header.model_class)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import transformers

    return {
        "bitfit_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def stored(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that a checkpoint of the model holds.

    They are those that train, and those that train or not and are not in the base model's
    files: the head, and what else began at random. What a method added is among them with
    its buffers.
    """
    own = own_state(model)
    wanted = trained_names(model) | head_names(model) | getattr(model, NEW, frozenset())
    names = [n for n, _ in model.named_parameters() if base_name(model, n) in wanted or n in wanted]
    return tuple(dict.fromkeys([*names, *own]))


def fingerprint(model: nn.Module, stored: Iterable[str]) -> str:
    """Return the SHA-256 of everything in the base's state but the parameters `stored`.

    A weight with several names (tied) counts as stored under each of them. What a method
    added to the model counts for nothing.
    """
    return _fingerprint(model, stored, {})


def _fingerprint(model: nn.Module, stored: Iterable[str], instead: Mapping[str, Tensor]) -> str:
    """Return the fingerprint that the model would have with the parameters `instead`."""
    extra = addition(model)
    with contextlib.nullcontext() if extra is None else extra.aside(model):
        parameters = _base_parameters(model, remove_duplicate=False)
        left_out = {id(parameters[name]) for name in stored if name in parameters}
        values = {id(parameters[name]): tensor for name, tensor in instead.items()}
        state = {
            base_name(model, name): tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if extra is None or not extra.owns(name)
        }
        return digest((n, values.get(id(t), t)) for n, t in state.items() if id(t) not in left_out)


def _base_parameters(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Return the parameters of the base and its head, by the names that they have there."""
    extra = addition(model)
    named = model.named_parameters(remove_duplicate=remove_duplicate)
    return {base_name(model, n): p for n, p in named if extra is None or not extra.owns(n)}


def _labels(model: nn.Module) -> list[str] | None:
    config = getattr(model, "config", None)
    if not kind_of(type(model).__name__).classes:
        return None
    names = getattr(config, "id2label", None)
    problem = getattr(config, "problem_type", None)
    # transformers, too, takes a single output without a problem type for a score
    if not names or problem == "regression" or (problem is None and len(names) == 1):
        return None
    return [names[i] for i in sorted(names)]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    task: dict[str, Any] | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Write the trained parameters, those with `requires_grad`, and the head to one file.

    The file is written beside and renamed: a kill at any moment leaves a previous one whole.

    Parameters
    ----------
    model : nn.Module
        After `select`, usually trained.
    path : str or PathLike
        File to make or replace.
    task : dict, optional
        Anything JSON can hold that a reader should know of the task.
    base_fingerprint : str, optional
        `fingerprint(model, stored(model))` where the caller has it already.

    Raises
    ------
    BitFitError
        If nothing in the model trains, or its method has not come to what it saves.
    """
    selection, extra = Selection.of(model), addition(model)
    if extra is not None and not extra.settled:
        raise BitFitError(
            f"nothing to save yet: method '{selection.method}' has not chosen what it keeps"
        )
    if not selection.names:
        raise BitFitError("nothing to save: no parameter of the model has requires_grad")
    config = getattr(model, "config", None)
    header = Header(
        base=getattr(config, "name_or_path", "") or "",
        fingerprint=base_fingerprint or fingerprint(model, stored(model)),
        model_class=type(model).__name__,
        method=selection.method,
        terms=list(selection.terms),
        layers=list(selection.layers),
        head=HEAD in selection.counts,
        labels=_labels(model),
        task=task or {},
        versions=versions(),
        options={} if extra is None else extra.options,
    )
    parameters = {**_base_parameters(model), **own_state(model)}
    tensors = {name: parameters[name] for name in map(partial(base_name, model), stored(model))}
    write_tensors(Path(path), {"kind": _KIND, **asdict(header)}, tensors)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint and check that it is whole.

    Parameters
    ----------
    path : str or PathLike
        The file, or a run's folder, which holds it as `model.safetensors`.

    Raises
    ------
    BitFitError
        If it is missing, cut short, altered, or a pickle.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    header, tensors = read_tensors(path, _KIND)
    header.pop("kind")
    try:
        return Checkpoint(path, Header(**header), tensors)
    except TypeError:
        raise BitFitError(f"{path} was written by another version of bitfit_fast") from None


def load(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    any_base: bool = False,
) -> Header:
    """Put trained parameters into a fresh model; its outputs are then bit-identical.

    Parameters
    ----------
    model : nn.Module
        The base model with a head of the right size; changed in place. What `load` or a method
        put into it before is taken out first. Where the checkpoint is refused the model holds
        what it did, of methods as new parameters, which an optimiser has to be given anew.
    checkpoint : str, PathLike or Checkpoint
        A file, a run's folder, or what `read` returned.
    any_base : bool
        Load onto other frozen weights than those it was trained with.

    Returns
    -------
    Header
        What the file says about itself.

    Raises
    ------
    BitFitError
        For a broken file, another base, parameters that do not fit the model, or a patched
        model where the file adds something to its layers.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read(checkpoint)
    header, tensors = checkpoint.header, checkpoint.tensors
    kind = added_kind(checkpoint)
    made_for = f"{checkpoint.path} was made for {header.model_class} on '{header.base}'"
    if kind is not None and is_patched(model):
        raise BitFitError(
            f"the model is patched, and method '{header.method}' of {checkpoint.path} changes what "
            "its layers compute; unpatch the model first"
        )
    own = {name: t for name, t in tensors.items() if kind is not None and kind.owns(name)}
    tensors = {name: t for name, t in tensors.items() if name not in own}
    parameters = _base_parameters(model)
    missing = [name for name in tensors if name not in parameters]
    if missing:
        raise BitFitError(
            f"{made_for}; {type(model).__name__} has no parameter {listed(missing, 3)}"
        )
    for name, tensor in tensors.items():
        if parameters[name].shape != tensor.shape:
            raise BitFitError(
                f"{made_for}; its {name} has shape {list(tensor.shape)} and the model's "
                f"{list(parameters[name].shape)}"
            )
    if not any_base:
        found = _fingerprint(model, set(tensors), _loaded_over(model))
        if found != header.fingerprint:
            name = getattr(getattr(model, "config", None), "name_or_path", "")
            same = " (its files changed, or part of it began at random)" * (name == header.base)
            raise BitFitError(
                f"{made_for} with fingerprint {header.fingerprint[:12]}, and this model is "
                f"'{name}' with fingerprint {found[:12]}{same}; loading onto another base needs "
                "any_base (--any-base)"
            )
    # only of what a method adds it shows late that it does not fit
    with contextlib.nullcontext() if kind is None else _as_before_on_failure(model):
        if hasattr(model, _BACKUP):
            unload(model)
        remove(model)
        extra = None if kind is None else _add(kind, header, model, own, made_for)
        parameters = _base_parameters(model)
        config: Any = getattr(model, "config", None)
        labels = header.labels if config is not None else None
        backup = _Backup(
            {name: parameters[name].detach().clone() for name in tensors},
            (config.id2label, config.label2id) if labels else None,
        )
        setattr(model, _BACKUP, backup)
        align_weights(model)
        _put(tensors, parameters)
        if extra is not None:
            extra.apply(model)
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
    return header


@contextlib.contextmanager
def _as_before_on_failure(model: nn.Module) -> Iterator[None]:
    """Let a model hold what it held, where an exchange for something else does not end."""
    held = _Held(model)
    # what is drawn for new parameters is written over
    with undone_on_failure(model), seeded(0, device_of(model)):
        try:
            yield
        except BaseException:
            if hasattr(model, _BACKUP):
                unload(model)
            remove(model)
            held.put_back(model)
            raise


class _Held:
    """What a model holds of a checkpoint or a method, for when another turns out not to fit."""

    def __init__(self, model: nn.Module) -> None:
        self._backup: _Backup | None = getattr(model, _BACKUP, None)
        self._extra = addition(model)
        self._own = {name: t.detach().clone() for name, t in own_state(model).items()}
        self._settled = self._extra is None or self._extra.settled
        config: Any = getattr(model, "config", None)
        labelled = self._backup is not None and self._backup.labels is not None
        self._labels = (config.id2label, config.label2id) if labelled else None
        loaded = () if self._backup is None else self._backup.parameters
        parameters = _base_parameters(model)
        self._loaded = {name: parameters[name].detach().clone() for name in loaded}

    def put_back(self, model: nn.Module) -> None:
        """Let a model, from which it was taken out, hold it again."""
        if self._extra is not None:
            add(self._extra, model, head_names(model), self._own if self._settled else None)
            _put(self._own, own_state(model))
            self._extra.apply(model)
        _put(self._loaded, _base_parameters(model))
        if self._labels is not None:
            config: Any = model.config
            config.id2label, config.label2id = self._labels
        if self._backup is not None:
            setattr(model, _BACKUP, self._backup)


def added_kind(checkpoint: Checkpoint) -> type[Addition] | None:
    """Return what the method of a checkpoint puts into a model, if anything."""
    method = checkpoint.header.method
    if method not in METHODS:
        raise BitFitError(
            f"{checkpoint.path} is of the method '{method}', which this version of bitfit_fast "
            f"does not know; it knows {listed(METHODS, 20)}"
        )
    return METHODS[method].kind


def _add(
    kind: type[Addition],
    header: Header,
    model: nn.Module,
    own: Mapping[str, Tensor],
    made_for: str,
) -> Addition:
    """Add what a method saved, or change nothing."""
    known = METHODS[header.method].options
    try:
        option_values(header.method, known, {k: v for k, v in header.options.items() if k in known})
        extra = kind(header.method, header.options)
        add(extra, model, head_names(model), own)
    except KeyError as error:
        raise BitFitError(f"{made_for} with options that lack {error}") from None
    except BitFitError as error:
        raise BitFitError(f"{made_for}; {error}") from None
    places = own_state(model)
    fits = places.keys() == own.keys() and all(places[n].shape == t.shape for n, t in own.items())
    if not fits:
        remove(model)
        raise BitFitError(f"{made_for}; what it adds does not fit {type(model).__name__}")
    _put(own, places)
    return extra


def _loaded_over(model: nn.Module) -> dict[str, Tensor]:
    """Return what the base holds where the model now holds a checkpoint's parameters."""
    backup: _Backup | None = getattr(model, _BACKUP, None)
    return {} if backup is None else backup.parameters


@torch.no_grad()
def _put(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    """Write tensors to the places of their names."""
    for name, tensor in tensors.items():
        places[name].copy_(tensor)


def unload(model: nn.Module) -> None:
    """Give back the base model exactly as it was before `load`.

    Raises
    ------
    BitFitError
        If nothing was loaded.
    """
    backup: _Backup | None = getattr(model, _BACKUP, None)
    if backup is None:
        raise BitFitError("nothing to unload: no checkpoint was loaded into this model")
    remove(model)
    _put(backup.parameters, _base_parameters(model))
    if backup.labels is not None:
        config: Any = model.config
        config.id2label, config.label2id = backup.labels
    delattr(model, _BACKUP)
