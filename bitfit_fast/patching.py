"""Put the bias-only modules into a model, and take them out again."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from .errors import BitFitError, BitFitWarning, listed
from .models.families import biases, family_of, fused_pairs
from .modules import activation_name, drop_in, original
from .selection import NO_GRADIENT, Selection

__all__ = ["Patched", "patch", "unpatch"]

#: Attribute of a patched model: what `unpatch` gives `requires_grad` back to.
_PATCHED = "_bitfit_fast_patched"


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
        if self.no_gradient:
            lines.append(
                f"{len(self.no_gradient)} key biases have a gradient of zero, which is not computed"
            )
        return "\n".join(lines)


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
    if getattr(module, "weight", None) is None:
        return "it has no weight"
    return None


def _replaceable(name: str, module: nn.Module) -> bool:
    return (
        _obstacle(name, module) is None
        and not any(
            p.requires_grad for n, p in module.named_parameters(recurse=False) if n == "weight"
        )
        and activation_name(module) is None
    )


def patch(
    model: nn.Module,
    selection: Selection | None = None,
    fuse: bool = True,
    few_bits: bool = False,
) -> Patched:
    """Give every linear layer and LayerNorm with a frozen weight its bias-only drop-in, in place.

    Only the classes of modules change: parameters, names, state dict, hooks, dtype, device and
    training mode stay. Selected key biases whose gradient is identically zero stop requiring
    one, so that neither autograd nor a data-parallel wrapper waits for it.

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
        If the model is patched already.

    Warns
    -----
    BitFitWarning
        If a module with a trained bias stays as it was.
    """
    if hasattr(model, _PATCHED):
        raise BitFitError("the model is patched already; unpatch it first")
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
    for linear, taker in pairs:
        modules[linear]._defers = True
        if taker in chosen:
            modules[taker]._used_again = family_of(model).pre_norm
        elif original(modules[taker]) is type(modules[taker]):
            modules[taker].__class__ = drop_in(type(modules[taker]))
            modules[taker]._few_bits = few_bits
    zero = {bias.name for bias in biases(model) if bias.zero_gradient}
    still = {name: p for name, p in model.named_parameters() if name in zero and p.requires_grad}
    no_gradient = tuple(name for name in selection.names if name in still)
    for name in no_gradient:
        still[name].requires_grad_(False)
    setattr(model, NO_GRADIENT, frozenset(no_gradient))
    setattr(model, _PATCHED, True)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    if slow := [name for name in left if f"{name}.bias" in names]:
        text = f"modules with a trained bias that stay as they were: {listed(slow, 3)}"
        warnings.warn(f"{text} ({left[slow[0]]})", BitFitWarning, stacklevel=2)
    return Patched(dict(replaced), len(pairs), left, no_gradient)


def unpatch(model: nn.Module) -> None:
    """Take every drop-in out again; a model that has none stays as it is.

    Modules have the classes that they had, and selected key biases require a gradient again.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    """
    for module in model.modules():
        module.__class__ = original(module)
        for field in ("_defers", "_used_again", "_few_bits"):
            vars(module).pop(field, None)
    names: frozenset[str] = getattr(model, NO_GRADIENT, frozenset())
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(True)
    for field in (NO_GRADIENT, _PATCHED):
        vars(model).pop(field, None)
