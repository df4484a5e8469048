"""Read a model's modules as the layers of a stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.families import Family, StackRow, head_prefix
from ..modules import activation_name
from .parts import base_of, layers_of, linears_of
from .product import Product
from .stack import ROLES, Junction, Layer, Rate

__all__ = ["Reading", "read"]


@dataclass
class Reading:
    """What was found in a model, which is as it was.

    Attributes
    ----------
    layers : list of Layer
        From the bottom.
    entry : Junction or None
        The LayerNorm before the first layer of a pre-norm encoder.
    owners : list of nn.Module
        The modules that hold biases and weights, in the order of the stack's inputs.
    biases : list of str or None
        Names of the biases, in that order.
    weights : dict of str to Parameter
        The weights by name, in that order.
    parts : list of (Parameter, Tensor)
        Weights that are to look at a part of one buffer, so that there is no second copy.
    """

    layers: list[Layer]
    entry: Junction | None
    owners: list[nn.Module]
    biases: list[str | None]
    weights: dict[str, nn.Parameter]
    parts: list[tuple[nn.Parameter, Tensor]]


def read(model: nn.Module, family: Family, dtype: torch.dtype) -> Reading:
    """Read a model's layers, and copy what is needed in another dtype.

    Parameters
    ----------
    model : nn.Module
        Of this family, with a row for whole encoders.
    family : Family
        The model's.
    dtype : torch.dtype
        In which the weights are to be.
    """
    row, prefix = family.stack, head_prefix(model) or ""
    assert row is not None
    layers = layers_of(family, base_of(model))
    found = Reading([], None, [], [], {}, [])
    for number, (name, layer) in enumerate(layers):
        linears = linears_of(family, layer)
        for role, module in linears.items():
            path = f"{prefix}{name}.{family.inside[role]}"
            found.biases.append(None if module.bias is None else path)
            found.owners.append(module)
            found.weights[f"{path.removesuffix('bias')}weight"] = module.weight
        made, parts = _layer(family, row, number, len(layers), layer, linears, layers, dtype)
        found.layers.append(made)
        found.parts += parts
    if family.pre_norm:
        norm = linears_of(family, layers[0][1])["attention-layernorm"]
        index = ROLES.index("attention-layernorm")
        found.entry = Junction(None, index, norm.weight.detach().float(), norm.eps, None)
    return found


def _layer(
    family: Family,
    row: StackRow,
    number: int,
    count: int,
    layer: nn.Module,
    linears: dict[str, Any],
    layers: list[tuple[str, nn.Module]],
    dtype: torch.dtype,
) -> tuple[Layer, list[tuple[nn.Parameter, Tensor]]]:
    """Return a layer, and the weights that are to look at a part of its one buffer."""

    def product(role: str) -> Product:
        return Product(linears[role].weight.detach().to(dtype))

    def rate(term: str) -> Rate | None:
        if term not in row.dropouts:
            return None
        path = row.dropouts[term]
        owner, _, attribute = path.rpartition(".")
        found = getattr(layer.get_submodule(owner), attribute)
        if isinstance(found, nn.Module):
            return Rate(found, "p")
        return Rate(layer.get_submodule(owner), attribute)

    def junction(bias: str, norm: str, at: int, module: Any) -> Junction:
        gamma = module.weight.detach().float()
        return Junction(
            number * len(ROLES) + ROLES.index(bias),
            at * len(ROLES) + ROLES.index(norm),
            gamma,
            module.eps,
            rate(bias),
        )

    projections = [linears[role] for role in ("query", "key", "value")]
    joined = torch.cat([module.weight.detach() for module in projections])
    parts = []
    if joined.dtype == dtype:
        # the modules look at the one buffer, so that there is no second copy
        parts = [(m.weight, part) for m, part in zip(projections, joined.chunk(3))]
    act = activation_name(layer.get_submodule(row.activation))
    assert act is not None
    if not family.pre_norm:
        middle = junction(
            "attention-output", "attention-layernorm", number, linears["attention-layernorm"]
        )
        end = junction("output", "output-layernorm", number, linears["output-layernorm"])
    else:
        # the LayerNorm behind a block is named after the block before which it stands
        middle = junction(
            "attention-output", "output-layernorm", number, linears["output-layernorm"]
        )
        if number + 1 < count:
            above = linears_of(family, layers[number + 1][1])["attention-layernorm"]
            end = junction("output", "attention-layernorm", number + 1, above)
        else:
            index = number * len(ROLES) + ROLES.index("output")
            end = Junction(index, None, None, 0.0, rate("output"))
    made = Layer(
        Product(joined.to(dtype)),
        product("attention-output"),
        product("intermediate"),
        product("output"),
        act,
        rate("query"),
        middle,
        end,
    )
    return made, parts
