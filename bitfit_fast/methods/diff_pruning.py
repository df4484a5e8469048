"""Diff pruning: a sparse difference from the pretrained weights (Guo, Rush, Kim, ACL 2021).

In the first phase every weight `W` of the layers has a difference `z * w`, with gates `z` in
[0, 1] that are drawn from a hard-concrete distribution (Louizos et al. 2018) with location
`alpha`. The loss has the expected number of open gates added, `l0` times. Then the largest
differences are kept, as many as the target share of the base's parameters, and in the second
phase these alone train on, as a sparse addition, at a learning rate of its own: the first phase
moves every weight, as full fine-tuning does, and the second one few, which have to move further.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import BitFitError
from ..models.families import head_prefix
from .sparse import Sparse

__all__ = ["DiffPruning"]

#: Ends of the stretched interval of the hard-concrete distribution, and alpha at the start.
LOW, HIGH, ALPHA = -1.5, 1.5, 5.0
#: What trains is alpha divided by this: the gates' learning rate is so many times the other's,
#: or they would not close within a training of some thousand steps.
RATE = 500.0
#: Keeps the logarithms of a draw finite.
_EDGE = 1e-6


class _Gated(torch.autograd.Function):
    """The difference `z(s) * w`, `s` the sigmoid of alpha and noise.

    Autograd alone would keep five tensors of the weight's size; here it is two.
    """

    @staticmethod
    def forward(ctx: Any, difference: Tensor, gates: Tensor, noise: Tensor | None) -> Tensor:
        alpha = gates * RATE
        s = torch.sigmoid(alpha if noise is None else alpha.add_(noise))
        ctx.save_for_backward(difference, s)
        return difference * (s * (HIGH - LOW) + LOW).clamp_(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        difference, s = ctx.saved_tensors
        stretched = s * (HIGH - LOW) + LOW
        inside = (stretched > 0) & (stretched < 1)
        slope = s * (1 - s) * (RATE * (HIGH - LOW)) * inside
        return gradient * stretched.clamp_(0, 1), gradient * difference * slope, None


def gated(difference: Tensor, gates: Tensor, draw: bool) -> Tensor:
    """Return the difference behind its gates, drawn at random or the expected ones."""
    noise = None
    if draw:
        noise = torch.empty_like(gates).uniform_(_EDGE, 1 - _EDGE).logit_()
    return _Gated.apply(difference, gates, noise)


def _before(module: Any, arguments: tuple[Any, ...]) -> None:
    """Let the layer see another weight than the parameter of that name, until it is done."""
    weight = module._parameters["weight"]
    change = gated(module.pruning_difference, module.pruning_gates, module.training)
    vars(module)["weight"] = weight + change.to(weight.dtype)


def _behind(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
    vars(module).pop("weight", None)


class DiffPruning(Sparse):
    """Differences behind gates, then the largest of them as a sparse addition."""

    marks: ClassVar[tuple[str, ...]] = (*Sparse.marks, ".pruning_")

    def __init__(self, method: str, options: Mapping[str, Any]) -> None:
        super().__init__(method, options)
        self.gated: dict[str, Any] = {}

    def attach(self, model: nn.Module, head: set[str]) -> None:
        """Begin the first phase."""
        hosts = self.places(model, head)
        prefix = head_prefix(model) or ""
        self.base_size = sum(
            p.numel() for n, p in model.named_parameters() if n.startswith(prefix) and n not in head
        )
        self.settled = False
        self.gated = dict(hosts)
        for module in self.gated.values():
            weight: Any = module.weight
            wide = torch.promote_types(weight.dtype, torch.float32)
            module.pruning_difference = nn.Parameter(torch.zeros_like(weight, dtype=wide))
            start = torch.full_like(weight, ALPHA / RATE, dtype=wide)
            module.pruning_gates = nn.Parameter(start)
            self._handles += [
                module.register_forward_pre_hook(_before),
                module.register_forward_hook(_behind, always_call=True),
            ]

    def resume(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take up the second phase where the tensors are of it."""
        if any(name.endswith(".sparse_indices") for name in tensors):
            self.let_go_of_gates()
            self.reattach(model, set(), tensors)

    def put(self, hosts: Mapping[str, Any], indices: Mapping[str, Tensor]) -> None:
        """Begin the second phase."""
        super().put(hosts, indices)
        self.rate = self.options.get("sparse_rate", self.rate)  # files of before have none

    def term(self, name: str) -> str | None:
        """Tell gates from differences."""
        return "gates" if name.endswith(".pruning_gates") else super().term(name)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return the expected number of open gates, weighted."""
        if self.settled:
            return None
        shift = math.log(-LOW / HIGH)
        gates = [module.pruning_gates for module in self.gated.values()]
        still_open = torch.stack([torch.sigmoid(g * RATE - shift).sum() for g in gates]).sum()
        return self.options["l0"] * still_open

    def advance(self, model: nn.Module, step: int, steps: int) -> bool:
        """Prune when the first phase's share of the steps is over."""
        # the second phase has one step at least: only what it trains is a result
        last = min(round(self.options["gate_steps"] * steps), steps - 1)
        if self.settled or step < last:
            return False
        self.prune()
        return True

    @torch.no_grad()
    def prune(self) -> None:
        """Keep the largest differences, and begin the second phase with them."""
        changes = {n: gated(m.pruning_difference, m.pruning_gates, False).flatten()
                   for n, m in self.gated.items()}  # fmt: skip
        sizes = torch.cat([change.abs() for change in changes.values()])
        count = min(max(1, round(self.options["share"] * self.base_size)), len(sizes))
        kept = sizes.topk(count).indices.sort().values
        kept = kept[sizes[kept] > 0]
        if not len(kept):
            raise BitFitError(
                f"every difference is zero when method '{self.method}' prunes; "
                "it needs more steps before (--gate-steps), or less weight on the gates (--l0)"
            )
        ends = torch.tensor([len(change) for change in changes.values()]).cumsum(0)
        parts = kept.tensor_split(torch.searchsorted(kept.cpu(), ends[:-1]).tolist())
        first = [0, *ends[:-1].tolist()]
        chosen = {name: part - start for name, part, start in zip(changes, parts, first)}
        hosts = self.gated
        self.let_go_of_gates()
        self.put(hosts, chosen)
        for name, module in self.hosts.items():
            module.sparse_values.copy_(changes[name][chosen[name]])

    def let_go_of_gates(self) -> None:
        """End the first phase; the weights were never changed."""
        for handle in self._handles if self.gated else ():
            handle.remove()
        for module in self.gated.values():
            del module.pruning_difference, module.pruning_gates
        if self.gated:
            self.gated, self._handles = {}, []
        self.settled = True

    def remove(self, model: nn.Module) -> None:
        """Let go, in either phase."""
        self.let_go_of_gates()
        super().remove(model)
