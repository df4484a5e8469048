"""What trains, in an arena while a `transformers.Trainer` trains it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..arena import Arena, ArenaAdamW
from ..encoder import encoder_of

__all__ = ["InArena", "OverArena", "without_wrapper"]


class OverArena(ArenaAdamW):
    """`ArenaAdamW` over one arena, made of groups alone as PyTorch's optimisers are."""

    over: Arena

    def __init__(self, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        super().__init__(self.over, groups, **options)


class InArena:
    """The trained parameters of a model and their gradients in an arena.

    Parameters
    ----------
    model : nn.Module
        Its parameters with `requires_grad` move, and its encoder writes there, if it is patched.
    ends : contextlib.ExitStack
        When it closes, all is as before.

    Attributes
    ----------
    arena : Arena
        Where they lie.
    """

    def __init__(self, model: nn.Module, ends: contextlib.ExitStack) -> None:
        self.model = model
        self.arena = arena = Arena({n: p for n, p in model.named_parameters() if p.requires_grad})
        ends.callback(arena.release)
        self._views = [(p, arena.view(n, arena.gradients)) for n, p in arena.parameters.items()]
        #: Whether there are gradients of this process alone
        self._unshared = False
        self.take_gradients()
        ends.callback(self._leave_gradients)
        ends.callback(model.register_forward_pre_hook(self.attach).remove)

    def take_gradients(self) -> None:
        """Let the encoder add its gradients where the optimiser looks for them."""
        encoder = encoder_of(self.model)
        if encoder is not None:
            encoder.write_to(self.arena)

    def _leave_gradients(self) -> None:
        encoder = encoder_of(self.model)
        if encoder is not None:
            encoder.write_to(None)

    @torch.compiler.disable
    def attach(self, *_: Any) -> None:
        """Put gradients back that `Module.zero_grad` dropped, all set to zero at once."""
        if not torch.is_grad_enabled():
            return
        self._unshared = True
        if self._views[0][0].grad is None:
            for parameter, gradient in self._views:
                parameter.grad = gradient
            self.arena.gradients.zero_()

    def share(self, *_: Any) -> None:
        """Average the gradients over the processes, once a step."""
        if self._unshared:
            self.arena.all_reduce()
        self._unshared = False

    def optimizer(self) -> type[OverArena]:
        """Return the optimiser's class, which takes groups of parameters alone."""
        return type("ArenaAdamW", (OverArena,), {"over": self.arena})


def without_wrapper(model: nn.Module, accelerator: Any, ends: contextlib.ExitStack) -> None:
    """Let accelerate leave out `DistributedDataParallel`, until `ends`."""
    prepare = accelerator.prepare_model

    def prepare_model(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        # nor moves it: to be on "cpu" and to be asked to "cpu:0" costs the arena its views
        return prepare(model, device_placement=False, evaluation_mode=True)

    vars(accelerator)["prepare_model"] = prepare_model
    ends.callback(vars(accelerator).pop, "prepare_model", None)
    # a later trainer is to wrap it
    ends.callback(vars(model).pop, "_is_accelerate_prepared", None)
