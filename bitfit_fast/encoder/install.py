"""Let a model run its encoder as one operation, in place, and undo that.

Its base model's class becomes a subclass that takes the padding out before, and the module that
runs the layers becomes one that runs the stack instead. Everything else, embeddings, poolers,
heads, losses, is the model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import BitFitError, check_known
from ..models.families import family_of, head_prefix
from ..modules import original
from . import heads
from .calls import ENCODER, base_class, container_class, head_class
from .drop_ins import put_drop_ins, take_drop_ins
from .encoder import Encoder
from .parts import base_of
from .reading import read
from .stack import MEMORY, Stack
from .support import refusal
from .weights import Weights

__all__ = ["PRECISIONS", "encoder_of", "install", "uninstall"]

#: Dtypes of frozen weights and activations, by name.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def encoder_of(model: nn.Module) -> Encoder | None:
    """Return the encoder that was installed in a model, or None."""
    return vars(base_of(model)).get(ENCODER)


def install(
    model: nn.Module,
    precision: str = "fp32",
    memory: str = "fast",
    first_only: bool | None = None,
    stops: bool = True,
    reads_padding: bool | None = None,
) -> Encoder:
    """Let a model run its encoder as one operation, in place.

    Parameters
    ----------
    model : nn.Module
        Of a family with a row for it, with frozen weights.
    precision : str
        `fp32`, or `bf16`: a copy of the layers' weights in bf16 is made once, and products
        between embeddings and head are computed in it, with what is kept of them. What goes from
        layer to layer is in it, too, except where a CPU runs layers in one call.
    memory : str
        One of `MEMORY`.
    first_only : bool, optional
        Whether the last layer computes only what a head reads that takes the first token; by
        default where the table says that it does.
    stops : bool
        Whether the backward pass ends at the lowest bias that trains.
    reads_padding : bool, optional
        Whether what comes behind the encoder looks at tokens of padding; by default where
        the table says that the model's head does.

    Returns
    -------
    Encoder
        What runs now.

    Raises
    ------
    BitFitError
        For a model that cannot, or an unknown precision or memory mode.
    """
    if (reason := refusal(model)) is not None:
        raise BitFitError(f"this encoder cannot run as one operation: {reason}")
    check_known("precision", precision, PRECISIONS)
    check_known("memory mode", memory, MEMORY)
    family, dtype = family_of(model), PRECISIONS[precision]
    row, config = family.stack, getattr(model, "config", None)
    assert row is not None
    base: Any = base_of(model)
    found = read(model, family, dtype)
    if first_only is None:
        first_only = heads.reads_first_only(model, row)
    if reads_padding is None:
        reads_padding = heads.reads_padding(model, row)
    norm = family.outside.get("embedding-layernorm")
    container = base.get_submodule(row.container)
    weights, owners = dict(found.weights), list(found.owners)
    prefix = head_prefix(model) or ""
    if row.score_bias is not None:
        table: Any = container.get_submodule(row.score_bias)
        weights[f"{prefix}{row.container}.{row.score_bias}.weight"] = table.weight
        owners.append(table)
    encoder = Encoder(
        Stack(
            found.layers,
            int(config.num_attention_heads),  # type: ignore[union-attr]
            dtype,
            family.pre_norm,
            found.entry,
            memory,
            first_only,
            stops,
        ),
        found.biases,
        found.owners,
        Weights(weights, owners),
        row,
        base.embeddings,
        None if norm is None else f"{prefix}{norm}",
        projects=hasattr(base, "embeddings_project"),
        reads_padding=reads_padding,
    )
    subclasses = [(base, base_class(type(base))), (container, container_class(type(container)))]
    if first_only and model is not base:
        encoder.in_head = False
        subclasses.append((model, head_class(type(model))))
    # all that could fail is done: until here the model is as it was
    for weight, part in found.parts:
        weight.data = part
    encoder.weights.mark()
    for module, subclass in subclasses:
        vars(module)[ENCODER] = encoder
        module.__class__ = subclass
    put_drop_ins(model)
    return encoder


def uninstall(model: nn.Module) -> None:
    """Undo `install`: modules have the classes and weights the memory that they had."""
    base, encoder = base_of(model), encoder_of(model)
    if encoder is None:
        return
    for module in (base, base.get_submodule(encoder.row.container), model):
        if vars(module).pop(ENCODER, None) is not None:
            module.__class__ = original(module)
    take_drop_ins(model)
    encoder.weights.separate()
