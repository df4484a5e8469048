"""Which implementation an operation runs: Triton's kernels, those for CPUs, or PyTorch.

And of Triton's, whether a product and an activation's pass beside it are one kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import BitFitError, listed
from ..kernels._launch import INTERPRETED, next_power_of_2, processors, product_config
from ._autograd import is_watched

__all__ = [
    "BACKEND_VARIABLE",
    "PRODUCTS_VARIABLE",
    "fuses_product",
    "is_worth_measuring",
    "uses_native",
    "uses_triton",
]

#: Environment variable that chooses: `auto` (the default), `triton`, `native` or `torch`.
BACKEND_VARIABLE = "BITFIT_FAST_BACKEND"
_BACKENDS = ("auto", "triton", "native", "torch")
#: Environment variable that chooses: `auto` (the default), what was measured to be faster; `fused`,
#: one kernel, where there is one; or `vendor`, PyTorch's product and a pass of its own.
PRODUCTS_VARIABLE = "BITFIT_FAST_PRODUCTS"
_PRODUCTS = ("auto", "fused", "vendor")
#: The least product, in elements, that it is worth measuring for.
_LEAST = 2**18
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _refusal(tensor: Tensor, dtype: torch.dtype | None, most: int | None) -> str | None:
    if not _has_triton():
        return "triton is not installed"
    if not (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")):
        hint = " without TRITON_INTERPRET=1" if tensor.device.type == "cpu" else ""
        return f"there are no Triton kernels for a tensor on {tensor.device.type}{hint}"
    for kind in (tensor.dtype, dtype or tensor.dtype):
        if kind not in _DTYPES:
            refused, *valid = (str(t).removeprefix("torch.") for t in (kind, *_DTYPES))
            return f"there are no Triton kernels for {refused}; they take {listed(valid)}"
    if most is not None and tensor.shape[1] > most:
        return f"rows of {tensor.shape[1]} columns are wider than the kernel's {most}"
    return None


def _chosen(variable: str = BACKEND_VARIABLE, valid: tuple[str, ...] = _BACKENDS) -> str:
    chosen = os.environ.get(variable) or "auto"
    if chosen not in valid:
        raise BitFitError(f"{variable} is '{chosen}'; valid values are {listed(valid)}")
    return chosen


def uses_triton(tensor: Tensor, dtype: torch.dtype | None = None, most: int | None = None) -> bool:
    """Return whether an operation on this tensor runs as a Triton kernel.

    `auto` takes the kernel where there is one: on a CUDA device, or on the CPU under Triton's
    interpreter (`TRITON_INTERPRET=1`), for fp32, fp16 and bf16.

    Parameters
    ----------
    tensor : Tensor
        The operation's main input.
    dtype : torch.dtype, optional
        Of the output, where it is another.
    most : int, optional
        The widest row that the kernel takes.

    Raises
    ------
    BitFitError
        If `BITFIT_FAST_BACKEND` is none of its values, or is `triton` where there is no
        kernel.
    """
    chosen = _chosen()
    if chosen in ("torch", "native"):
        return False
    if chosen == "auto" and not (tensor.is_cuda or INTERPRETED):
        return False  # asked at every operation, so without its reasons
    refusal = _refusal(tensor, dtype, most)
    if refusal is not None and chosen == "triton":
        raise BitFitError(f"{BACKEND_VARIABLE} is 'triton', but {refusal}")
    return refusal is None


def uses_native(*tensors: Tensor | None) -> bool:
    """Return whether an operation on these tensors runs as a kernel for CPUs.

    Asked after `uses_triton` has said no. `auto` takes them where there is a compiler to build
    them, for fp32 and bf16; other dtypes get PyTorch.

    Raises
    ------
    BitFitError
        If `BITFIT_FAST_BACKEND` is none of its values, or is `native` where the kernels cannot
        be built.
    """
    chosen = _chosen()
    if chosen in ("torch", "triton"):
        return False
    from ..kernels import library

    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in library.DTYPES):
            return False
    reason = library.unavailable()
    if reason is not None and chosen == "native":
        raise BitFitError(f"{BACKEND_VARIABLE} is 'native', but {reason}")
    return reason is None


def is_worth_measuring(rows: int, columns: int) -> bool:
    """Return whether a product of this size may be better off in one kernel with what follows."""
    return rows * columns >= _LEAST


def fuses_product(
    a: Tensor, w: Tensor, fused: Callable[[], object], apart: Callable[[], object], *problem: object
) -> bool:
    """Return whether a product and an activation's pass beside it are to be one Triton kernel.

    `auto` measures, the first time that a device meets such a problem, and goes by what was
    measured ever after; see `kernels.measured`.

    Parameters
    ----------
    a, w : Tensor
        `[M, K]` and `[K, N]`, the factors.
    fused, apart : callable
        Do it in one kernel, and in two; called where it is to be measured.
    *problem : object
        What tells this kernel from others.

    Raises
    ------
    BitFitError
        If `BITFIT_FAST_PRODUCTS` is none of its values.
    """
    if not uses_triton(a):
        return False
    chosen = _chosen(PRODUCTS_VARIABLE, _PRODUCTS)
    if chosen != "auto":
        return chosen == "fused"
    (rows, inner), columns = a.shape, w.shape[1]
    # fp32 has no matrix units to itself, and for few rows the vendor divides a product by its depth
    if not a.is_cuda or a.dtype == torch.float32 or not is_worth_measuring(rows, columns):
        return False
    if is_watched(a):
        return False  # and would see what is measured
    from ..kernels.measured import is_faster

    # another number of rows, of as high tiles, is not another problem
    tile = product_config(rows, columns, inner, a.element_size(), processors(a))["BLOCK_M"]
    size = f"{next_power_of_2(rows)}x{columns}x{inner} in tiles of {tile}"
    dtype = str(a.dtype).removeprefix("torch.")
    return is_faster(fused, apart, a.device, " ".join(map(str, (*problem, dtype, size))))
