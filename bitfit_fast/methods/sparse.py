"""A sparse addition to weight matrices: single entries train, everything else is frozen.

`W' = W + scatter(values)`: the entries are written into the frozen weight itself, so that the
layer costs in the forward pass what it always does and no second weight is held. Behind the
layer stands a tap, which changes nothing there, and in the backward pass computes
`dW[i, j] = sum over tokens of dy[t, i] x[t, j]` for the chosen `(i, j)` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..additions import Addition
from ..errors import BitFitError
from ..kernels import library
from .places import is_transposed, matrices

__all__ = ["Entries", "Sparse"]

#: How many multiplications of a matrix product take as long as one for a single entry. By vector
#: units, on one core with AVX-512 in fp32, it is 65 to 195 for 384x384 to 3072x768 and 300 to
#: 2,000 tokens: single entries of 0.12 % of a weight, as many as BitFit's, take a fifth to a
#: twelfth of the time of the whole product. Matrix units multiply 16-bit numbers so fast that it
#: is about 1,900 (Intel AMX, 384x384 to 1536x384, 850 tokens), and whole products are quicker.
GATHER, GATHER_OF_MATRIX_UNITS = 100, 1900
#: Numbers in a temporary of the single entries' sums, which a cache holds.
_CHUNK = 1 << 17


@dataclass
class _Plan:
    """Which entries are computed in whole rows and columns, and which one by one."""

    dense: bool
    in_rows: Tensor
    rows: Tensor
    at_row: Tensor
    in_columns: Tensor
    columns: Tensor
    at_column: Tensor
    single: Tensor


class Entries:
    """Chosen entries of one weight, and the products that give their gradients.

    For `dW = a^T b` with `a` of shape `[tokens, M]` and `b` of `[tokens, N]`: rows and columns
    with many chosen entries are computed whole, as small matrix products; other entries one by
    one; all of `dW` where that is less work than the sum of those. At most one such product is
    held at a time, and dropped when the chosen entries are out of it.

    Parameters
    ----------
    indices : Tensor
        `[k]`, of entries in the flattened weight.
    shape : (int, int)
        Of the weight, M and N.
    """

    def __init__(self, indices: Tensor, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.row = indices.long() // shape[1]
        self.column = indices.long() % shape[1]
        self._plans: dict[int, _Plan] = {}

    def plan(self, gather: int = GATHER) -> _Plan:
        """Return the least work where a single entry takes as long as so many multiplications."""
        if gather in self._plans:
            return self._plans[gather]
        rows, columns = self.shape
        whole = _crowded(self.row, rows, columns, gather)
        rest = ~whole[self.row]
        wide = _crowded(self.column[rest], columns, rows, gather)
        single = rest & ~wide[self.column]
        work = int(whole.sum()) * columns + int(wide.sum()) * rows + int(single.sum()) * gather
        self._plans[gather] = _Plan(
            # lines are copied before they are multiplied, which takes about as long again
            2 * work >= rows * columns,
            *_group(~rest, whole, self.row),
            *_group(rest & ~single, wide, self.column),
            single.nonzero().squeeze(1),
        )
        return self._plans[gather]

    def gradient(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the entries of `a^T b`, `[k]`; single entries are summed in fp32 or wider."""
        plan = self.plan(_gather(a))
        if plan.dense:
            return (a.t() @ b)[self.row, self.column]
        wide = torch.promote_types(a.dtype, torch.float32)
        found = torch.empty(len(self.row), dtype=wide, device=a.device)
        if len(plan.rows):
            product = a[:, plan.rows].t() @ b
            found[plan.in_rows] = product[plan.at_row, self.column[plan.in_rows]].to(wide)
        if len(plan.columns):
            product = a.t() @ b[:, plan.columns]
            found[plan.in_columns] = product[self.row[plan.in_columns], plan.at_column].to(wide)
        if len(plan.single):
            row, column = self.row[plan.single], self.column[plan.single]
            total = torch.zeros(len(row), dtype=wide, device=a.device)
            tokens = max(1, _CHUNK // len(row))
            for left, right in zip(a.split(tokens), b.split(tokens)):
                product = left.index_select(1, row).mul_(right.index_select(1, column))
                total += product.sum(0, dtype=wide)
            found[plan.single] = total
        return found


def _gather(a: Tensor) -> int:
    """Return what a single entry of a product of such operands costs."""
    by_matrix_units = a.itemsize == 2 and (a.is_cuda or library.has_matrix_units())
    return GATHER_OF_MATRIX_UNITS if by_matrix_units else GATHER


def _crowded(place: Tensor, count: int, size: int, gather: int) -> Tensor:
    """Tell for each of `count` lines whether it is less work as a whole, of `size`."""
    return torch.bincount(place, minlength=count) * gather >= size


def _group(members: Tensor, lines: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which entries are in these lines, the lines, and each entry's line in them."""
    chosen = members.nonzero().squeeze(1)
    return chosen, lines.nonzero().squeeze(1), (lines.cumsum(0) - 1)[place[chosen]]


class _Tap(torch.autograd.Function):
    """Pass a linear layer's output on, and compute the gradient of entries of its weight."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, values: Tensor, entries: Entries, swapped: bool
    ) -> Tensor:
        ctx.save_for_backward(inputs.to(output.dtype))
        ctx.entries, ctx.swapped, ctx.dtype = entries, swapped, values.dtype
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        values = None
        if ctx.needs_input_grad[2]:
            (inputs,) = ctx.saved_tensors
            dy = gradient.reshape(-1, gradient.shape[-1])
            x = inputs.reshape(-1, inputs.shape[-1])
            a, b = (x, dy) if ctx.swapped else (dy, x)
            values = ctx.entries.gradient(a, b).to(ctx.dtype)
        return gradient, None, values, None, None


def _write(module: Any, values: Tensor | None) -> None:
    """Put the entries' values into the weight; None for the base's."""
    entries, start = _entries(module), module.sparse_start
    now = start if values is None else (start + values.detach()).to(start.dtype)
    # not through autograd: what an earlier forward pass saved of the weight holds still
    module.weight.data[entries.row, entries.column] = now


def _entries(module: Any) -> Entries:
    """Return the entries' plan, made anew where the indices moved to another device."""
    indices = module.sparse_indices
    key = (indices.device, indices._version)
    if getattr(module, "sparse_plan", (None,))[0] != key:
        module.sparse_plan = key, Entries(indices, tuple(module.weight.shape))
    return module.sparse_plan[1]


def _mark(module: Any) -> tuple[Any, ...]:
    """Return what is another one when the values, or the weight, changed."""
    values, weight = module.sparse_values, module.weight
    return values._version, values.data_ptr(), weight._version, weight.data_ptr()


def _before(module: Any, arguments: tuple[Any, ...]) -> None:
    # a fused optimiser of PyTorch changes values without a trace of it
    if module.training or getattr(module, "sparse_written", None) != _mark(module):
        _write(module, module.sparse_values)
        module.sparse_written = _mark(module)


def _behind(module: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or not module.sparse_values.requires_grad:
        return output
    return _Tap.apply(
        output, arguments[0], module.sparse_values, _entries(module), is_transposed(module)
    )


class Sparse(Addition):
    """Values that are added to chosen entries of weight matrices.

    Attributes
    ----------
    hosts : dict of str to Module
        The linear layers with such entries, by name.
    """

    marks: ClassVar[tuple[str, ...]] = (".sparse_",)

    def __init__(self, method: str, options: Mapping[str, Any]) -> None:
        super().__init__(method, options)
        self.hosts: dict[str, Any] = {}
        self._handles: list[Any] = []

    def choose(
        self, model: nn.Module, hosts: dict[str, nn.Module], head: set[str]
    ) -> dict[str, Tensor]:
        """Return the flat indices of the entries that train in each of `hosts`."""
        raise NotImplementedError

    def places(self, model: nn.Module, head: set[str]) -> dict[str, nn.Module]:
        """Return the linear layers whose weights may change, by name; there has to be one."""
        hosts = matrices(model, head)
        if not hosts:
            raise BitFitError(
                f"{type(model).__name__} has no linear layers inside of its layers, which "
                f"method '{self.method}' needs"
            )
        return hosts

    def attach(self, model: nn.Module, head: set[str]) -> None:
        """Choose entries and begin with differences of zero."""
        hosts = self.places(model, head)
        self.put(hosts, self.choose(model, hosts, head))

    def reattach(self, model: nn.Module, head: set[str], tensors: Mapping[str, Tensor]) -> None:
        """Take the entries from the saved indices."""
        hosts, end = matrices(model, head), ".sparse_indices"
        indices = {name.removesuffix(end): t for name, t in tensors.items() if name.endswith(end)}
        for name, chosen in indices.items():
            if name not in hosts:
                raise BitFitError(f"{type(model).__name__} has no linear layer {name} to add to")
            size = hosts[name].get_parameter("weight").numel()
            if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < size:
                raise BitFitError(f"the weight of {name} has {size} entries, fewer than saved")
        self.put(hosts, indices)

    def put(self, hosts: Mapping[str, Any], indices: Mapping[str, Tensor]) -> None:
        """Give each host its entries, with differences of zero."""
        for name, chosen in indices.items():
            if not len(chosen):
                continue
            module = self.hosts[name] = hosts[name]
            weight = module.weight
            chosen = chosen.to(weight.device, torch.int64)
            small = weight.numel() <= torch.iinfo(torch.int32).max
            module.register_buffer("sparse_indices", chosen.int() if small else chosen)
            entries = _entries(module)
            start = weight.detach()[entries.row, entries.column].clone()
            module.register_buffer("sparse_start", start, persistent=False)
            wide = torch.promote_types(weight.dtype, torch.float32)
            module.sparse_values = nn.Parameter(torch.zeros_like(start, dtype=wide))
            self._handles += [
                module.register_forward_pre_hook(_before),
                module.register_forward_hook(_behind),
            ]

    def apply(self, model: nn.Module) -> None:
        """Write the values into the weights."""
        for module in self.hosts.values():
            _write(module, module.sparse_values)

    @contextlib.contextmanager
    def aside(self, model: nn.Module) -> Iterator[None]:
        """Put the base's own entries back, for a while."""
        for module in self.hosts.values():
            _write(module, None)
        try:
            yield
        finally:
            self.apply(model)

    def remove(self, model: nn.Module) -> None:
        """Put the base's own entries back, and let go."""
        for module in self.hosts.values():
            _write(module, None)
        self._let_go()

    def fold(self, model: nn.Module) -> None:
        """Leave the entries in the weights."""
        self.apply(model)
        self._let_go()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self.hosts.values():
            del module.sparse_values, module.sparse_indices, module.sparse_start
            module.__dict__.pop("sparse_plan", None)
            module.__dict__.pop("sparse_written", None)
        self.hosts, self._handles = {}, []
