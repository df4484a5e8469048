"""What a method adds to a model: how it is told from the base, saved, and taken out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

__all__ = [
    "Addition",
    "add",
    "addition",
    "base_name",
    "fold",
    "obstacle",
    "own_state",
    "remove",
]

#: Attribute of a model to which a method added something.
_ADDITION = "_bitfit_fast_addition"


class Addition:
    """What a method puts into a model beside the base's own parameters.

    It stays with the model, whose class, and names of the base's parameters in what is
    saved, remain as they are.

    Parameters
    ----------
    method : str
        A key of `METHODS`.
    options : dict
        Every option of the method with its value; what JSON can hold.

    Attributes
    ----------
    marks : tuple of str
        What the names of its parameters and buffers contain, and no name of a base does.
    cannot_merge : str, optional
        Why a model with it cannot be made an ordinary one with the same outputs.
    settled : bool
        Whether what trains is what a checkpoint would hold.
    tokens : int
        How many positions before those of the tokens it takes.
    rate : float
        What the learning rate is multiplied by, from where it is now in its training.
    """

    marks: ClassVar[tuple[str, ...]] = ()
    cannot_merge: ClassVar[str | None] = None

    def __init__(self, method: str, options: Mapping[str, Any]) -> None:
        self.method, self.options = method, dict(options)
        self.settled, self.tokens, self.rate = True, 0, 1.0

    # ------------------------------------------------------------------ into the model

    def attach(self, model: nn.Module, head: set[str]) -> None:
        """Add everything to a model, or raise `BitFitError` before anything is changed.

        `head` holds the names of the task head's parameters, which are no place for it.
        """
        raise NotImplementedError

    def reattach(self, model: nn.Module, head: set[str], tensors: Mapping[str, Tensor]) -> None:
        """Add everything as it was for the saved `tensors`, which are then copied into place."""
        self.attach(model, head)

    def remove(self, model: nn.Module) -> None:
        """Take everything out: the base is exactly as it was before."""
        raise NotImplementedError

    def fold(self, model: nn.Module) -> None:
        """Leave an ordinary model that computes the same."""
        raise NotImplementedError

    # ------------------------------------------------------------------ names

    @classmethod
    def owns(cls, name: str) -> bool:
        """Tell whether a parameter or buffer belongs to it."""
        return any(mark in name for mark in cls.marks)

    def base_name(self, name: str) -> str:
        """Return what the base calls its parameter `name`."""
        return name

    def term(self, name: str) -> str | None:
        """Return the audit's word for a parameter that trains; None for the base's own one."""
        return self.method if self.owns(name) else None

    def trains(self, model: nn.Module) -> set[str]:
        """Return the names of the parameters that train, without the head."""
        return {name for name, _ in model.named_parameters() if self.owns(name)}

    # ------------------------------------------------------------------ values

    def apply(self, model: nn.Module) -> None:
        """Bring what follows from the parameters, if anything, up to date with them."""

    @contextlib.contextmanager
    def aside(self, model: nn.Module) -> Iterator[None]:
        """Let the base's weights be as they were, for a while."""
        yield

    # ------------------------------------------------------------------ training

    def advance(self, model: nn.Module, step: int, steps: int) -> bool:
        """Prepare step `step` of `steps`; tell whether other parameters train from now on."""
        return False

    def resume(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Be as when these of the model's `tensors` were saved in a training."""

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return what is added to the loss, or None."""
        return None


def addition(model: nn.Module) -> Addition | None:
    """Return what a method added to the model, or None."""
    return getattr(model, _ADDITION, None)


def obstacle(model: nn.Module) -> str | None:
    """Return why the model's layers cannot be computed in another way, or None."""
    extra = addition(model)
    return None if extra is None else f"method '{extra.method}' changes what its layers compute"


def add(
    extra: Addition,
    model: nn.Module,
    head: set[str],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Attach `extra` to the model, as it was for `tensors` where they are given."""
    if tensors is None:
        extra.attach(model, head)
    else:
        extra.reattach(model, head, tensors)
    setattr(model, _ADDITION, extra)


def remove(model: nn.Module) -> None:
    """Take out what a method added, if anything; the rest of the base is as it was before.

    The task head, and what else of the base trained, stay as they are.
    """
    extra = addition(model)
    if extra is not None:
        extra.remove(model)
        delattr(model, _ADDITION)


def fold(model: nn.Module) -> None:
    """Make what a method added, if anything, a part of the base's own weights."""
    extra = addition(model)
    if extra is not None:
        extra.fold(model)
        delattr(model, _ADDITION)


def base_name(model: nn.Module, name: str) -> str:
    """Return what the base calls the parameter that the model calls `name`."""
    extra = addition(model)
    return name if extra is None else extra.base_name(name)


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of what a method added, by name."""
    extra = addition(model)
    if extra is None:
        return {}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if extra.owns(name)}
