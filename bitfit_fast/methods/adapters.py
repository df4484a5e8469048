"""Bottleneck adapters (Houlsby et al., ICML 2019): two a layer, and the LayerNorms train.

One stands behind the output projection of attention, one behind that of the feed-forward part,
both before the residual is added. No forward pass is written again: an adapter is a module
inside the linear layer whose output it changes, called by a hook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..additions import Addition
from ..errors import BitFitError
from ..selection import LAYERNORM_WEIGHT
from .places import in_layers, of_terms, width_out

__all__ = ["Adapters", "Bottleneck"]

#: Linear layers behind which an adapter stands, by the term of their bias.
PLACES = ("attention-output", "output")
#: Standard deviation of a new adapter's weights, cut off at twice as much: nearly the identity.
SPREAD = 1e-2


class Bottleneck(nn.Module):
    """`x + up(gelu(down(x)))`.

    Parameters
    ----------
    width, size : int
        Of what passes, and of the bottleneck.
    like : Tensor
        On whose device it is made; its dtype is fp32 or wider, which autocast may narrow.
    """

    def __init__(self, width: int, size: int, like: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.down = nn.Linear(width, size, device=like.device, dtype=dtype)
        self.up = nn.Linear(size, width, device=like.device, dtype=dtype)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, changed a little; `[..., width]`."""
        change = self.up(F.gelu(self.down(x.to(self.down.weight.dtype))))
        return x + change.to(x.dtype)


def _behind(module: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.adapter(output)


class Adapters(Addition):
    """Two bottlenecks a layer."""

    marks: ClassVar[tuple[str, ...]] = (".adapter.",)
    cannot_merge: ClassVar[str | None] = "an adapter is a layer of its own"

    def __init__(self, method: str, options: Mapping[str, Any]) -> None:
        super().__init__(method, options)
        self.hosts: list[Any] = []
        self._handles: list[Any] = []
        self._norms: frozenset[str] = frozenset()

    def attach(self, model: nn.Module, head: set[str]) -> None:
        """Make new adapters."""
        places = of_terms(model, *PLACES)
        if missing := [term for term, names in places.items() if not names]:
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise BitFitError(
                f"method '{self.method}' does not know the linear layers of the terms "
                f"{' and '.join(missing)} in models of the family '{kind}', behind which "
                "adapters stand"
            )
        self._norms = frozenset(
            f"{name}.{key}"
            for name, module in in_layers(model)
            if "Norm" in type(module).__name__
            for key in dict(module.named_parameters(recurse=False))
        )
        size = self.options["bottleneck"]
        for name in sorted(name for names in places.values() for name in names):
            module: Any = model.get_submodule(name)
            module.adapter = Bottleneck(width_out(module), size, module.weight)
            self.hosts.append(module)
            self._handles.append(module.register_forward_hook(_behind))

    def trains(self, model: nn.Module) -> set[str]:
        """Return the adapters' parameters and the LayerNorms'."""
        return super().trains(model) | self._norms

    def term(self, name: str) -> str | None:
        """Tell the LayerNorms' weights apart; their biases have terms of their own."""
        if name in self._norms and name.endswith("weight"):
            return LAYERNORM_WEIGHT
        return super().term(name)

    def remove(self, model: nn.Module) -> None:
        """Take the adapters out."""
        for handle in self._handles:
            handle.remove()
        for module in self.hosts:
            del module.adapter
        self.hosts, self._handles = [], []
