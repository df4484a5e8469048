"""What can be wrong with a model, its task or a device, said before or as soon as it matters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..additions import addition
from ..data.task import TaskData
from ..errors import BitFitError, listed
from ..kinds import KINDS, kind_of

__all__ = ["check_gradients", "check_length", "check_outputs", "choose_device"]


def check_gradients(model: nn.Module, names: Iterable[str]) -> None:
    """Check after a backward pass that exactly the parameters `names` have a gradient.

    Raises
    ------
    BitFitError
        With the names of selected parameters without a gradient, or of others with one.
    """
    names = set(names)
    have = {name for name, p in model.named_parameters() if p.grad is not None}
    if missing := sorted(names - have):
        raise BitFitError(
            f"{len(missing)} selected parameters got no gradient: {listed(missing, 5)}"
        )
    if extra := sorted(have - names):
        raise BitFitError(
            f"{len(extra)} parameters that are not selected got a gradient: {listed(extra, 5)}"
        )


def check_length(max_length: int, model: nn.Module, tokenizer: Any) -> None:
    """Check that the model and its tokenizer can take examples of `max_length` tokens.

    Raises
    ------
    BitFitError
        With the number that they can take.
    """
    limits = [tokenizer.model_max_length]
    extra = addition(model)
    before = 0 if extra is None else extra.tokens
    for name, module in model.named_modules():
        if name.endswith(".position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from behind the padding index
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - unused - before)
    if max_length > min(limits):
        raise BitFitError(f"max-length {max_length} is more than the {min(limits)} of the model")


def check_outputs(model: nn.Module, data: TaskData) -> None:
    """Check that the model has the head that the task needs, and fp32 parameters.

    Raises
    ------
    BitFitError
        With the kinds or numbers of outputs, or the name of a parameter of another dtype.
    """
    kind, made_for = KINDS[data.kind], kind_of(name := type(model).__name__)
    # a class of one's own may have any name
    if made_for is not kind and (name.endswith(made_for.head) or not kind.classes):
        raise BitFitError(
            f"the task {data.name} needs a model {kind.head}, and this is a {name}; load it with "
            f"AutoModel{kind.head}, or load_model(..., kind='{kind.name}')"
        )
    needed = 1 if data.regression else 2 if data.labels is None else len(data.labels)
    found = getattr(model.config, "num_labels", needed)
    if found != needed:
        raise BitFitError(
            f"the model has {found} outputs and the task {data.name} needs {needed}; "
            f"load it with num_labels={needed}"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise BitFitError(
                f"{name} is {parameter.dtype}, and what trains must be torch.float32; "
                "load the model with dtype=torch.float32"
            )


def choose_device(name: str) -> torch.device:
    """Return the device `name`; `auto` is a GPU where there is one.

    Raises
    ------
    BitFitError
        If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise BitFitError(f"unknown device '{name}'; valid ones are auto, cpu, cuda")
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= there:
        raise BitFitError(f"device '{name}' is asked for, and PyTorch sees {there} of them")
    return device
