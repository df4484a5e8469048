"""What the Functions have in common: rows of tensors, outputs, and derivatives taken once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import BitFitError

__all__ = [
    "as_rows",
    "check_shapes",
    "contiguous",
    "in_autocast",
    "is_watched",
    "once",
    "operation",
    "shaped",
]


def as_rows(tensor: Tensor) -> Tensor:
    """Return `[M, N]` of `[..., N]`."""
    return tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[None]


def shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return the tensor in another shape, no view of itself to autograd.

    Autograd forbids changing a Function's output in place where it is a view.
    """
    return torch.ops.aten._unsafe_view(tensor, shape)


def check_shapes(x: Tensor, residual: Tensor | None = None, **vectors: Tensor | None) -> None:
    """Refuse what kernels would read beyond: a residual unlike x, vectors not as long as a row.

    Raises
    ------
    BitFitError
        With the name and both shapes.
    """
    named = {"residual": (residual, x.shape)}
    named |= {name: (vector, x.shape[-1:]) for name, vector in vectors.items()}
    for name, (tensor, shape) in named.items():
        if tensor is not None and tensor.shape != shape:
            raise BitFitError(
                f"{name} has shape {tuple(tensor.shape)}, and must have {tuple(shape)}"
            )


def contiguous(*tensors: Any) -> tuple[Any, ...]:
    """Return the tensors in row-major order, as kernels read vectors and operations promise."""
    return tuple(t if t is None else t.contiguous() for t in tensors)


def in_autocast(tensor: Tensor) -> bool:
    """Return whether autocast is on for the tensor's device."""
    kind = tensor.device.type
    # not asked by `is_autocast_available`, which torch 2.11 cannot compile
    return kind != "meta" and torch.is_autocast_enabled(kind)


def is_watched(tensor: Any) -> bool:
    """Return whether a compiler, a mode or the tensor's own kind wants to see operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(tensor) not in (Tensor, torch.nn.Parameter)
    )


def operation(
    name: str, schema: str, writes: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Register a custom operation, and return what calls it only where somebody watches.

    The way through PyTorch's dispatcher takes a Python function 10 to 50 us, as long as many a
    kernel. Nothing is lost without it: autograd ends above operations.

    Parameters
    ----------
    name, schema : str
        As `torch.library.custom_op` takes them.
    writes : tuple of str
        Which of its arguments it writes to.

    Returns
    -------
    callable
        Decorator of the implementation. What it returns has a `register_fake`.
    """

    def register(implementation: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(
            f"bitfit_fast::{name}", implementation, mutates_args=writes, schema=schema
        )

        @functools.wraps(implementation)
        def call(*arguments: Any) -> Any:
            return (registered if is_watched(arguments[0]) else implementation)(*arguments)

        call.register_fake = registered.register_fake  # type: ignore[attr-defined]
        return call

    return register


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward pass refuse to be differentiated, with `create_graph` already.

    PyTorch's `once_differentiable` would let a second derivative go missing where the gradient
    that comes in does not depend on anything.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "bias-only operations cannot be differentiated twice; "
                "unpatch the model for create_graph=True"
            )
        return backward(ctx, *gradients)

    return wrapper
