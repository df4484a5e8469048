"""Which models can run their encoder as one operation, and why others cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..additions import obstacle
from ..errors import listed
from ..models.families import FAMILIES, family_of
from ..modules import activation_name
from .parts import base_of, hooked, layers_of, linears_of

__all__ = ["refusal"]


def refusal(model: nn.Module) -> str | None:
    """Return why a model's encoder cannot run as one operation, or None."""
    if (reason := obstacle(model)) is not None:
        return reason
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = family_of(model)
    if family.stack is None:
        known = listed([name for name, row in FAMILIES.items() if row.stack is not None], 20)
        return f"it is of type '{kind}', and the table has whole encoders for {known}"
    config: Any = model.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return f"its positions are '{config.position_embedding_type}', not 'absolute'"
    layers = layers_of(family, base_of(model))
    if not layers:
        return "it has no layers"
    if family.stack.score_bias is not None:
        path = f"{family.stack.container}.{family.stack.score_bias}"
        table = base_of(model).get_submodule(path)
        if parametrize.is_parametrized(table):
            return f"{path} is parametrized"
        if table.weight.requires_grad:
            return f"the weight of {path} trains"
    for name, layer in layers:
        for role, module in linears_of(family, layer).items():
            expected = nn.LayerNorm if "layernorm" in role else nn.Linear
            path = f"{name}.{family.inside[role].removesuffix('.bias')}"
            if type(module) is not expected or "forward" in vars(module):
                return f"{path} is a {type(module).__name__}, not a plain {expected.__name__}"
            if parametrize.is_parametrized(module):
                return f"{path} is parametrized"
            if module.weight is None:
                return f"{path} has no weight"
            if module.weight.requires_grad:
                return f"the weight of {path} trains"
            if not module.weight.is_floating_point() or type(module.weight.data) is not Tensor:
                return f"the weight of {path} is {module.weight.dtype}"
            if module.bias is not None and module.bias.dtype != torch.float32:
                return f"the bias of {path} is {module.bias.dtype}, not torch.float32"
        if found := [n for n, m in layer.named_modules() if hooked(m)]:
            return f"there are hooks on {listed([f'{name}.{n}'.strip('.') for n in found], 3)}"
        activation = layer.get_submodule(family.stack.activation)
        if activation_name(activation) is None:
            return f"its activation is {type(activation).__name__}"
    return None
