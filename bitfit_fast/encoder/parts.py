"""Where a model has the parts of its encoder, by its family's row of the table."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as hooks_of_all

from ..models.families import Family, head_prefix
from .stack import ROLES

__all__ = ["base_of", "hooked", "hooks_on", "layers_of", "linears_of"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def base_of(model: nn.Module) -> nn.Module:
    """Return the model below the head; a model without head itself."""
    prefix = (head_prefix(model) or "").removesuffix(".")
    return model.get_submodule(prefix)


def layers_of(family: Family, base: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers of a base model from the bottom, with their names."""
    path = family.layer_path()
    return [(name, m) for name, m in base.named_modules() if path.fullmatch(f"{name}.")]


def linears_of(family: Family, layer: nn.Module) -> dict[str, Any]:
    """Return a layer's linear modules and LayerNorms by the term of their bias."""
    return {role: layer.get_submodule(family.inside[role].removesuffix(".bias")) for role in ROLES}


def hooked(part: nn.Module | nn.Parameter) -> bool:
    """Return whether there are hooks on a module or parameter itself, other than our own.

    Those with which transformers collects inner states stay for good, and mostly do nothing.
    """
    if isinstance(part, nn.Parameter):
        return bool(part._backward_hooks or part._post_accumulate_grad_hooks)
    hooks = (hook for kind in _HOOKS for hook in getattr(part, kind).values())
    own = ("transformers.", "bitfit_fast.")
    return any(not str(getattr(hook, "__module__", "")).startswith(own) for hook in hooks)


def hooks_on(model: nn.Module) -> list[str]:
    """Return what has hooks, which the replay of a captured step would not call."""
    parts = (*model.named_modules(), *model.named_parameters())
    found = [name or "the model" for name, part in parts if hooked(part)]
    return [*found, "all modules"] if hooks_of_all._has_any_global_hook() else found
