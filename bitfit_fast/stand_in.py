"""Stand-ins for tensors that are not computed yet, which a model's own code hands on."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

__all__ = ["StandIn", "materialised"]


class StandIn:
    """What stands in the place of a tensor until somebody asks for it.

    Subclasses take note of some operations. Everything else gets the tensor, computed then.
    """

    def tensor(self) -> Tensor:
        """Return the tensor; computed once."""
        raise NotImplementedError

    def normalised(
        self, gamma: Tensor, beta: Tensor | None, eps: float, used_again: bool
    ) -> Tensor:
        """Return its LayerNorm in one pass; `used_again` keeps the tensor itself as well."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        raise NotImplementedError

    def size(self, dim: int | None = None) -> Any:
        """Return the shape of the tensor, or one size."""
        return self.shape if dim is None else self.shape[dim]

    def _dropped(self, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return F.dropout(self.tensor(), p, training)

    def _plus(self, other: Any) -> Any:
        return self.tensor() + materialised(other)

    def __add__(self, other: Any) -> Any:
        return self._plus(other)

    def __radd__(self, other: Any) -> Any:
        return self._plus(other)

    def __getattr__(self, name: str) -> Any:
        # without this, an object that has no fields yet would look for them here for ever
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Take note of dropout and additions; give everything else the tensor."""
        kwargs = kwargs or {}
        if func is F.dropout and args and isinstance(args[0], StandIn):
            return args[0]._dropped(*args[1:], **kwargs)
        if func in _ADDITIONS and len(args) == 2 and not kwargs:
            left, right = args
            # not by the operator, which the compiler would bring here again
            return left.__add__(right) if isinstance(left, StandIn) else right._plus(left)
        args, kwargs = tree_map(materialised, (args, kwargs))
        return func(*args, **kwargs)


_ADDITIONS = (operator.add, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


def _of_tensor(name: str) -> Any:
    def method(self: StandIn, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*map(materialised, args))

    return method


# Python looks for operators on the class, where `__getattr__` is not asked
for _name in (
    *("sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod"),
    *("pow", "rpow", "matmul", "rmatmul", "neg", "pos", "abs", "invert", "and", "or", "xor"),
    *("lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem", "len", "iter", "contains"),
    *("bool", "int", "float", "index"),
):
    setattr(StandIn, f"__{_name}__", _of_tensor(f"__{_name}__"))
StandIn.__hash__ = object.__hash__  # type: ignore[method-assign]


def materialised(value: Any) -> Any:
    """Return the tensor for a stand-in, and anything else as it is."""
    return value.tensor() if isinstance(value, StandIn) else value
