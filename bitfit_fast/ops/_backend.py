"""Which implementation an operation runs: Triton's kernels, those for CPUs, or PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ..errors import BitFitError, listed
from ..kernels._launch import INTERPRETED

__all__ = ["BACKEND_VARIABLE", "uses_native", "uses_triton"]

#: Environment variable that chooses: `auto` (the default), `triton`, `native` or `torch`.
BACKEND_VARIABLE = "BITFIT_FAST_BACKEND"
_BACKENDS = ("auto", "triton", "native", "torch")
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


def _chosen() -> str:
    chosen = os.environ.get(BACKEND_VARIABLE) or "auto"
    if chosen not in _BACKENDS:
        raise BitFitError(f"{BACKEND_VARIABLE} is '{chosen}'; valid values are {listed(_BACKENDS)}")
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
    from ..kernels import native

    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in native.DTYPES):
            return False
    reason = native.unavailable()
    if reason is not None and chosen == "native":
        raise BitFitError(f"{BACKEND_VARIABLE} is 'native', but {reason}")
    return reason is None
