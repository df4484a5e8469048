"""Put the bias-only modules or the whole encoder into a model, and take them out again."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from .additions import obstacle
from .encoder import install, uninstall
from .errors import BitFitError, BitFitWarning, listed
from .models.families import biases, family_of, fused_pairs
from .modules import LayerNorm, activation_name, drop_in, original
from .selection import NO_GRADIENT, Selection

__all__ = ["Patched", "PatchedEncoder", "patch", "patch_encoder", "unpatch"]

#: Attribute of a patched model and of every module in it that got a drop-in.
_PATCHED = "_bitfit_fast_patched"

#: Everything that `patch` sets on modules.
_FIELDS = (NO_GRADIENT, _PATCHED, "_passes", "_leaves", "_used_again", "_few_bits")

#: Modules that hold a model, and its parameters' `requires_grad`, as they found it.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class Patched:
    """What `patch` did.

    Attributes
    ----------
    replaced : dict of str to int
        How many modules of each class have drop-ins now.
    fused : int
        How many linear layers leave their bias to the activation or LayerNorm behind them.
    left : dict of str to str
        Linear layers and LayerNorms that cannot have one, and why.
    no_gradient : tuple of str
        Selected parameters whose gradient is identically zero, and is not computed.
    """

    replaced: dict[str, int]
    fused: int
    left: dict[str, str]
    no_gradient: tuple[str, ...]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.replaced.items())
        lines = [f"replaced {kinds or 'nothing'}; {self.fused} of them in one with what follows"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"left {listed(names, 3)}: {reason}" for reason, names in reasons.items()]
        return "\n".join([*lines, *_zero_gradients(self.no_gradient)])


@dataclass(frozen=True)
class PatchedEncoder:
    """What `patch_encoder` did.

    Attributes
    ----------
    layers : int
        How many run as one operation.
    precision, memory : str
        As asked for.
    first_only : bool
        Whether the last layer computes first tokens only.
    no_gradient : tuple of str
        Selected parameters whose gradient is identically zero, and is not computed.
    reads_padding : bool
        Whether batches with padding take the model's own layers.
    """

    layers: int
    precision: str
    memory: str
    first_only: bool
    no_gradient: tuple[str, ...]
    reads_padding: bool = False

    def __str__(self) -> str:
        last = ", the last one for first tokens only" if self.first_only else ""
        line = f"{self.layers} layers run as one operation in {self.precision}{last}"
        if self.memory != "fast":
            line += f"; memory mode {self.memory}"
        if self.reads_padding:
            line += "; batches with padding take the model's own, as its head may read padding"
        return "\n".join([line, *_zero_gradients(self.no_gradient)])


def _zero_gradients(names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    biases = "key bias has" if len(names) == 1 else "key biases have"
    return [f"{len(names)} {biases} a gradient of zero, which is not computed"]


def _concerns(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or LayerNorm, or has a bias and such a name."""
    kind = type(module).__name__
    alike = "Linear" in kind or "LayerNorm" in kind
    return isinstance(module, (nn.Linear, nn.LayerNorm)) or (
        alike and module._parameters.get("bias") is not None
    )


def _obstacle(name: str, module: nn.Module) -> str | None:
    """Return why a module that computes a bias gradient cannot have a drop-in, or None."""
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if name.rpartition(".")[2] == "base_layer":
        return "an adapter wraps it"
    if "forward" in vars(module):
        return "its forward method was replaced"
    if drop_in(type(module)) is None:
        return f"there is no drop-in for {type(module).__name__}"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return "it normalises more than the last dimension"
    weight = getattr(module, "weight", None)
    if weight is None:
        return "it has no weight"
    if type(weight.data) is not torch.Tensor or not weight.is_floating_point():
        return f"its weight is a {type(weight.data).__name__} of {weight.dtype}"
    return None


def _replaceable(name: str, module: nn.Module) -> bool:
    return _obstacle(name, module) is None and not module.get_parameter("weight").requires_grad


def _around(name: str) -> dict[str, None]:
    """Return the names of a module and of those around it."""
    path = name.split(".")
    return dict.fromkeys(".".join(path[:end]) for end in range(1, len(path) + 1))


def _passed(modules: dict[str, nn.Module], linear: str, taker: str) -> tuple[nn.Module, ...]:
    """Return the modules that the output of one passes on its way into the other.

    Those are the ones around either but not both, and the dropouts beside them.
    """
    around = [_around(name) for name in (linear, taker)]
    passed = [
        name for name in {**around[0], **around[1]} if (name in around[0]) != (name in around[1])
    ]
    beside = {name.rpartition(".")[0] for name in (linear, taker)}
    dropouts = [
        child
        for parent in sorted(beside)
        for child in modules[parent].children()
        if isinstance(child, nn.Dropout)
    ]
    return (*(modules[name] for name in passed if name != linear), *dropouts)


def patch(
    model: nn.Module,
    selection: Selection | None = None,
    fuse: bool = True,
    few_bits: bool = False,
) -> Patched:
    """Give every linear layer and LayerNorm with a frozen weight its bias-only drop-in, in place.

    Modules change their class and stay where they are: parameters, names, state dict, hooks,
    dtype, device and training mode are the same. Selected key biases whose gradient is
    identically zero stop requiring one, so that neither autograd nor a data-parallel wrapper
    waits for it.

    Parameters
    ----------
    model : nn.Module
        Any model, on any device, after `select` or any other choice of `requires_grad`.
    selection : Selection, optional
        What `select` returned; by default what the model's `requires_grad` flags say.
    fuse : bool
        Whether, in the families of the table, dense layers and their activation, and dense
        layers, dropout, residual and LayerNorm run as one operation.
    few_bits : bool
        Whether fused activations keep their derivative in 8 bits; see `ops.bias_activation`.

    Returns
    -------
    Patched
        What was replaced and what was not; printing it says so.

    Raises
    ------
    BitFitError
        If the model or a part of it is patched already, or wrapped: patch it before
        `torch.compile` and `DistributedDataParallel`.

    Warns
    -----
    BitFitWarning
        If a module with a trained bias stays as it was.
    """
    _refuse_patched(model)
    if (reason := obstacle(model)) is not None:
        raise BitFitError(f"the model cannot be patched: {reason}")
    selection = selection or Selection.of(model)
    modules = dict(model.named_modules())
    chosen = {name: m for name, m in modules.items() if _replaceable(name, m)}
    pairs = [
        (linear, taker)
        for linear, taker in (fused_pairs(model) if fuse else ())
        if linear in chosen
        and modules[linear].bias is not None
        and (taker in chosen or activation_name(modules[taker]) is not None)
    ]
    left = {
        name: reason
        for name, module in modules.items()
        if _concerns(module) and (reason := _obstacle(name, module))
    }
    replaced = Counter(type(module).__name__ for module in chosen.values())
    for module in chosen.values():
        module.__class__ = drop_in(type(module))
        setattr(module, _PATCHED, True)
        if isinstance(module, LayerNorm):
            module._used_again = family_of(model).pre_norm
    for linear, taker in pairs:
        modules[linear]._passes = _passed(modules, linear, taker)
        modules[linear]._leaves = linear.rpartition(".")[0] != taker.rpartition(".")[0]
        if taker not in chosen and _PATCHED not in vars(modules[taker]):
            modules[taker].__class__ = drop_in(type(modules[taker]))
            modules[taker]._few_bits = few_bits
            setattr(modules[taker], _PATCHED, True)
    no_gradient = _skip_zero_gradients(model, selection)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    if slow := [name for name in left if f"{name}.bias" in names]:
        text = f"modules with a trained bias that stay as they were: {listed(slow, 3)}"
        warnings.warn(f"{text} ({left[slow[0]]})", BitFitWarning, stacklevel=2)
    return Patched(dict(replaced), len(pairs), left, no_gradient)


def _refuse_patched(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or isinstance(model, _WRAPPERS):
        raise BitFitError(f"patch the model before it is wrapped in {type(model).__name__}")
    if any(_PATCHED in vars(module) for module in model.modules()):
        raise BitFitError("the model is patched already; unpatch it first")


def _skip_zero_gradients(model: nn.Module, selection: Selection) -> tuple[str, ...]:
    """Let selected biases whose gradient is identically zero require none; return their names."""
    zero = {bias.name for bias in biases(model) if bias.zero_gradient}
    still = {name: p for name, p in model.named_parameters() if name in zero and p.requires_grad}
    names = tuple(name for name in selection.names if name in still)
    for name in names:
        still[name].requires_grad_(False)
    setattr(model, NO_GRADIENT, frozenset(names))
    setattr(model, _PATCHED, True)
    return names


def patch_encoder(
    model: nn.Module,
    selection: Selection | None = None,
    precision: str = "fp32",
    memory: str = "fast",
    reads_padding: bool | None = None,
) -> PatchedEncoder:
    """Let all encoder layers of a model run as one operation, in place.

    The forward pass takes the padding out of a batch, runs the layers on the tokens that are
    left with their weights in `precision`, and computes in the last one only what the head
    reads. The backward pass computes the gradients of biases alone and ends at the lowest one
    that trains. Embeddings, pooler and head are the model's, in fp32. Names, parameters and
    state dict stay as they are; what the operation cannot do, such as returning all hidden
    states, the model's own layers do. A head that reads first tokens only gets these alone,
    `[B, 1, d]`; under others the base model's output at padding is zero, and where the base
    model is called otherwise than by such a head, its own layers run.

    Parameters
    ----------
    model : nn.Module
        BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, MPNet, DistilBERT, ViT or DeiT, with any head,
        after `select`.
    selection : Selection, optional
        What `select` returned; by default what the model's `requires_grad` flags say.
    precision : str
        `fp32`, which agrees with the unpatched model to the rounding of fp32, or `bf16`:
        a copy of the layers' weights is made once, and multiplied in it.
    memory : str
        `fast`, `low`, `lower` or `lowest`: how much is kept for the backward pass. In 16 bits
        and for a width of d at most 18 d + 8, 14 d + 8, 10 d + 8, 4 d + 8 bytes a token and
        layer (8 more in ViT and DeiT). `low` keeps the activation's derivative in 8 bits,
        which is the only approximation; the last two compute again what they do not keep.
    reads_padding : bool, optional
        Whether what the caller makes of the outputs depends on those at padding. By default it
        does under the heads for question answering, whose own loss compares all scores, and may
        under heads that are not transformers' own: with them, batches with padding take the
        model's own layers. False promises that it does not.

    Returns
    -------
    PatchedEncoder
        Printing it says what was done.

    Raises
    ------
    BitFitError
        If the model is patched or wrapped already, or cannot run so: says what is missing.
        Later, at the next batch, if a frozen weight has changed; what is written through its
        `data` in place leaves no trace to see that by.
    """
    _refuse_patched(model)
    encoder = install(model, precision, memory, reads_padding=reads_padding)
    names = _skip_zero_gradients(model, selection or Selection.of(model))
    stack = encoder.stack
    return PatchedEncoder(
        len(stack.layers), precision, memory, stack.first_only, names, encoder.reads_padding
    )


def unpatch(model: nn.Module) -> None:
    """Undo `patch` and `patch_encoder`; a model that is not patched stays as it is.

    Modules have the classes that they had, and selected key biases require a gradient again.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    """
    uninstall(model)
    for module in model.modules():
        if _PATCHED not in vars(module):
            continue
        module.__class__ = original(module)
        names: frozenset[str] = vars(module).get(NO_GRADIENT, frozenset())
        for name in names:
            module.get_parameter(name).requires_grad_(True)
        for field in _FIELDS:
            vars(module).pop(field, None)
