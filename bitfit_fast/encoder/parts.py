"""Where a model has the parts of its encoder, by its family's row of the table."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.families import Family, head_prefix
from .stack import ROLES

__all__ = ["base_of", "hooked", "layers_of", "linears_of"]


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


def hooked(module: nn.Module) -> bool:
    """Return whether there are hooks on a module itself, other than those of transformers."""
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    )
    # those with which transformers collects inner states stay for good, and do nothing mostly
    return any(not str(getattr(h, "__module__", "")).startswith("transformers.") for h in hooks)
