"""Drop-in modules whose backward pass computes bias gradients and no weight gradient.

Each is a subclass of what it replaces, with the same parameters: `bitfit_fast.patch` changes
the class of a module in place, so its names, state-dict keys, hooks and whoever holds it stay
as they are.

Where a family's row in the table says so, a linear layer leaves its bias to what follows: it
returns a `Deferred`, which the model's own code drops out and adds to the residual, and which
the activation or LayerNorm at the end of the line computes in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .ops.dropout import dropout, new_seed
from .stand_in import StandIn, materialised

__all__ = ["Deferred", "LayerNorm", "Linear", "activation_name", "drop_in", "original"]


class Deferred(StandIn):
    """`residual + dropout(x + b)`, not yet computed, in the place of a tensor.

    Dropout and the addition of a residual are taken note of. Everything else gets the
    tensor, computed then, and however often it is computed dropout drops the same.

    Parameters
    ----------
    x : Tensor
        `[..., N]`, a linear layer's output before its bias.
    b : Tensor
        `[N]`.
    p : float
        Probability of dropping an element, 0 in evaluation mode.
    seed : Tensor, optional
        `[1]` int64, of dropout; needed with `p > 0`.
    residual : Tensor, optional
        Of the shape of `x`.
    """

    def __init__(
        self,
        x: Tensor,
        b: Tensor,
        p: float = 0.0,
        seed: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        self._x, self._b, self._p, self._seed, self._residual = x, b, p, seed, residual
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """Return the tensor; computed once."""
        if self._tensor is None:
            tensor = self._x + self._b.to(self._x.dtype)
            if self._seed is not None:
                tensor = dropout(tensor, self._p, self._seed)
            self._tensor = tensor if self._residual is None else tensor + self._residual
        return self._tensor

    def activated(self, act: str, few_bits: bool) -> Tensor:
        """Return `act(x + b)` in one pass."""
        if self._tensor is not None or self._p or self._residual is not None:
            return ops.bias_activation(self.tensor(), None, act, few_bits)
        return ops.bias_activation(self._x, self._b, act, few_bits)

    def normalised(
        self, gamma: Tensor, beta: Tensor | None, eps: float, used_again: bool
    ) -> Tensor:
        """Return its LayerNorm in one pass; `used_again` keeps the tensor itself as well."""
        if self._tensor is not None:
            return ops.layer_norm(self._tensor, gamma, beta, eps)
        y, self._tensor = ops.dropout_add_layer_norm(
            self._x,
            gamma,
            beta,
            self._b,
            self._residual,
            self._p,
            eps,
            self._seed,
            returns_sum=used_again,
        )
        return y

    @property
    def _open(self) -> bool:
        """Whether a residual may still be taken note of."""
        return self._tensor is None and self._residual is None

    def _dropped(self, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if not training or not p:
            return self
        if not self._open or self._p or not 0 < p < 1:
            return F.dropout(self.tensor(), p, training)
        return Deferred(self._x, self._b, p, new_seed(self._x.device))

    def _plus(self, other: Any) -> Any:
        other = materialised(other)
        if self._open and isinstance(other, Tensor) and other.shape == self._x.shape:
            return Deferred(self._x, self._b, self._p, self._seed, other)
        return self.tensor() + other

    def __add__(self, other: Any) -> Any:
        # where both are deferred, the first is what goes on in a pre-norm layer
        if isinstance(other, Deferred) and not self._open:
            return other._plus(self)
        return self._plus(other)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self._x.shape

    def reshape(self, *shape: Any) -> Any:
        """Reshape; leading dimensions change nothing about what is to be computed."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if self._tensor is not None or not sizes or sizes[-1] != self._x.shape[-1]:
            return self.tensor().reshape(*shape)
        residual = None if self._residual is None else self._residual.reshape(*shape)
        return Deferred(self._x.reshape(*shape), self._b, self._p, self._seed, residual)


class Linear(nn.Linear):
    """`nn.Linear` that keeps no input of a frozen weight and sums up its bias gradient itself."""

    _replaces = nn.Linear
    #: The modules that a deferred output passes, where what follows adds the bias; and whether
    #: it leaves the one that this layer is in.
    _passes: tuple[nn.Module, ...] = ()
    _leaves = False

    def forward(self, x: Tensor) -> Any:
        """Return `[..., N]` of `[..., K]`; a `Deferred` where the bias is left to a successor."""
        return _linear(self, materialised(x), self.weight)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension that computes no scale gradient unless it trains."""

    _replaces = nn.LayerNorm
    #: Whether the model goes on with what is normalised, too.
    _used_again = False
    #: Whether somebody else computes the bias's gradient.
    _leaves_bias = False

    def forward(self, x: Any) -> Tensor:
        """Normalise a tensor, or all of what a stand-in stands for."""
        return _layer_norm(self, x, self.eps)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _linear(module: Any, x: Tensor, w: Tensor) -> Any:
    passes = module._passes
    # hooks are written for tensors, and re-entrant checkpointing, which runs a module without
    # gradients and then again with them, hands on nothing but tensors
    if (
        passes
        and not any(_hooked(m) for m in (module, *passes))
        and not (module._leaves and module.bias.requires_grad and not torch.is_grad_enabled())
    ):
        return Deferred(ops.linear(x, w), module.bias)
    return ops.linear(x, w, module.bias)


def _layer_norm(module: Any, x: Any, eps: float) -> Tensor:
    beta = module.bias.detach() if module._leaves_bias else module.bias
    if isinstance(x, StandIn):
        return x.normalised(module.weight, beta, eps, module._used_again)
    return ops.layer_norm(x, module.weight, beta, eps)


class _TransposedLinear:
    """GPT-2's `Conv1D`: a linear layer with its weight the other way round."""

    _passes: tuple[nn.Module, ...] = ()
    _leaves = False

    def forward(self, x: Tensor) -> Any:
        return _linear(self, materialised(x), self.weight.t())  # type: ignore[attr-defined]


class _DebertaLayerNorm:
    """DeBERTa's LayerNorm, written out there."""

    _used_again = False
    _leaves_bias = False

    def forward(self, x: Any) -> Tensor:
        return _layer_norm(self, x, self.variance_epsilon)  # type: ignore[attr-defined]


class _Activation:
    """An activation that adds the bias of the linear layer before it."""

    #: Whether the backward pass gets the derivative in 8 bits.
    _few_bits = False

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Deferred):
            act = activation_name(self)  # type: ignore[arg-type]
            return x.activated(str(act), self._few_bits)
        return super().forward(x)  # type: ignore[misc]


#: Modules of transformers that do what one of PyTorch's does, by their full name.
_ALIKE = {
    "transformers.pytorch_utils.Conv1D": _TransposedLinear,
    "transformers.models.deberta.modeling_deberta.DebertaLayerNorm": _DebertaLayerNorm,
}

#: Classes of activation modules, of PyTorch and transformers, by what they compute.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Tanh": "tanh",
}


def activation_name(module: nn.Module) -> str | None:
    """Return which of `ops.ACTIVATIONS` a module computes, or None."""
    kind = original(module)
    if kind is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(kind.__name__) if _is_known(kind) else None


def _is_known(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith(("torch.", "transformers."))


#: Drop-ins by the class that they replace; those of `_ALIKE` and of activations come on demand.
_DROP_INS: dict[type[nn.Module], Any] = {nn.Linear: Linear, nn.LayerNorm: LayerNorm}


def drop_in(kind: type[nn.Module]) -> Any:
    """Return the drop-in for modules of exactly this class, a subclass of it, or None."""
    if "_replaces" in vars(kind):
        return None
    if kind not in _DROP_INS:
        mixin = _ALIKE.get(f"{kind.__module__}.{kind.__qualname__}")
        if kind is nn.GELU or (kind.__name__ in _ACTIVATIONS and _is_known(kind)):
            mixin = _Activation
        fields = {"__module__": __name__, "_replaces": kind, "__reduce_ex__": _reduced}
        _DROP_INS[kind] = mixin and type(kind.__name__, (mixin, kind), fields)
    return _DROP_INS[kind]


def _reduced(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Tell copiers how to make a module whose class has no place to be found in."""
    return _made, (original(module),), vars(module)


def _made(kind: type[nn.Module]) -> nn.Module:
    made = drop_in(kind)
    return made.__new__(made)


def original(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or the one that its drop-in stands for."""
    return vars(type(module)).get("_replaces", type(module))
