"""The kernels for CPUs: `native.cpp`, built once by the machine's C++ compiler, and its launchers.

A launcher computes what the Triton one of the same name does, with the same dropout masks. On CPUs
with 512-bit vectors (AVX-512) it has more, which `tiles` launches: `has_tiles`.
Where there is no compiler `unavailable` says so, and the operations run their definitions in
PyTorch. The library is kept under `$XDG_CACHE_HOME/bitfit_fast`, by the hash of its source, the
compiler and the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ._cache import cache_folder, put
from ._constants import ACTIVATIONS, ROUNDS, keeps_sum, quantisation, sum_dtype, threshold

__all__ = [
    "DTYPES",
    "activation_bwd",
    "activation_fwd",
    "column_sum",
    "dropout",
    "embedding_layer_norm",
    "gather",
    "has_matrix_units",
    "has_tiles",
    "kept",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "layout",
    "softmax_bwd",
    "softmax_fwd",
    "spread",
    "unavailable",
]

#: Dtypes of tensors, by the code that the library knows them by.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_SOURCE = Path(__file__).with_suffix(".cpp")
_HEADERS = tuple(
    _SOURCE.with_name(f"{name}.h")
    for name in ("heads", "layers", "norm", "tiles", "units", "vectors")
)
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fopenmp", "-shared", "-fPIC"),
)
ACTS = {act: i for i, act in enumerate(ACTIVATIONS)}
INPUT, SLOPE, LEVELS = range(3)

#: Pointer, 64-bit and 32-bit number, and the two kinds of real number.
C_TYPES = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double
_P, _L, _I, _F, _D = C_TYPES
#: What dropout is told: threshold, scale, seed, rounds.
_DROPOUT = (_I, _F, _L, _I)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "layer_norm_fwd": (_I, _I, _P, _L, _P, _P, _L, *[_P] * 7, _L, _L, _D, *_DROPOUT, _I),
    "layer_norm_bwd": (
        *(_I, _I, _P, _L, _P, _L, _P, _P, _P, _P, _L, *[_P] * 5, _L, _L),
        *(*_DROPOUT, _I),
    ),
    "activation_fwd": (_I, _I, _P, _L, _P, _P, _P, _P, _F, _F, _L, _L, _I),
    "activation_bwd": (_I, _I, _P, _L, _P, _L, _I, _P, _F, _F, _P, _P, _L, _L, _I),
    "softmax": (_I, *[_P] * 5, *[_L] * 4, _P, _L, _L, _F, *_DROPOUT, _I),
    "spread": (_I, _I, _P, _L, _P, _P, _P, *[_L] * 4, _I),
    "column_sum": (_I, _P, _L, _P, _L, _L, *_DROPOUT, _I),
    "dropout": (_I, _P, _L, _P, _L, _L, *_DROPOUT, _I),
    "embedding_layer_norm": (_I, _P, _P, _P, _I, *[_P] * 3, _L, _L, _D, _P, *_DROPOUT, _I),
    "kept": (_P, _L, _L, _I, _L, _I, _I),
}
#: Of those that are there where `has_tiles` is true: what attention is told, and all of them.
_ATTENTION = (_P, _L, _P, _L, _P, _L, _P, _P, *[_L] * 3, _P, _L, _L, _F)
_TILES: dict[str, tuple[Any, ...]] = {
    "layout": (_I, _P, _P),
    "pack": (_I, _P, _L, _L, _L, _L, _P, _I),
    "linear": (_I, _P, _L, _P, _P, _P, _I, _L, _I),
    "linear_activation": (_I, _I, _P, _L, _P, _P, _P, _P, _L, _I),
    "linear_activation_bwd": (_I, _I, _P, _L, _P, _P, _P, _P, _P, _L, _I),
    "layer_end": (_I, _I, *[_P] * 10, _L, _I, _I),
    "layer_end_bwd": (_I, _I, *[_P] * 15, _L, _I, _I),
    "attention_fwd": (_I, *_ATTENTION, _P, *_DROPOUT, _I),
    "attention_bwd": (_I, *_ATTENTION, _P, _P, _L, _P, _P, _L, *_DROPOUT, _I),
    "layers_fwd": (_I, _I, _P, _P, _I),
    "layers_bwd": (_I, _I, _P, _P, _P, _I),
}


def _cpu() -> str:
    """Return what `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({ln for ln in lines if ln.startswith(("flags", "Features", "model"))}))


def _build(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    sources = [path.read_text(encoding="utf-8") for path in (_SOURCE, *_HEADERS)]
    parts = (*sources, version.stdout, " ".join(_FLAGS), _cpu())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = cache_folder() / f"native-{name}.so"
    if not library.exists():
        command = [compiler, *_FLAGS, str(_SOURCE), "-o"]
        put(
            library,
            lambda at: subprocess.run([*command, at], capture_output=True, text=True, check=True),
        )
    return library


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "there is no C++ compiler (g++ or clang++, or CXX)"
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # or without a home
        said = (getattr(error, "stderr", None) or "").strip() or str(error)
        return f"{compiler} could not build {_SOURCE.name}: {said.splitlines()[0].rstrip('.')}"
    there = _ARGUMENTS | (_TILES if library.bitfit_has_tiles() else {})
    for name, types in there.items():
        function = getattr(library, f"bitfit_{name}")
        function.argtypes, function.restype = types, None
    return library


def unavailable() -> str | None:
    """Return why the library cannot be had on this machine, or None; builds it the first time."""
    library = _library()
    return library if isinstance(library, str) else None


def has_tiles() -> bool:
    """Return whether there are products and attention for the CPU, as `units.h` says."""
    library = _library()
    return not isinstance(library, str) and bool(library.bitfit_has_tiles())


def has_matrix_units() -> bool:
    """Return whether these are done by matrix units (AMX)."""
    library = _library()
    return not isinstance(library, str) and bool(library.bitfit_has_matrix_units())


def layout(dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """Return how many numbers of an operand make up one of a dtype, and of which dtype they are."""
    library, planes, size = _library(), ctypes.c_int(), ctypes.c_int()
    assert not isinstance(library, str)
    library.bitfit_layout(DTYPES[dtype], ctypes.byref(planes), ctypes.byref(size))
    return planes.value, next(other for other in DTYPES if other.itemsize == size.value)


def _call(name: str, *arguments: Any) -> None:
    getattr(_library(), f"bitfit_{name}")(*arguments, torch.get_num_threads())


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@overload
def _vector(tensor: Tensor) -> Tensor: ...
@overload
def _vector(tensor: None) -> None: ...
def _vector(tensor: Tensor | None) -> Tensor | None:
    # most are what is asked for, and every call of PyTorch's takes time
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """Return `[M, N]` whose rows are contiguous."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _dropped(p: float, seed: Tensor | int | None) -> tuple[int, float, int, int]:
    if not p:
        return 0, 1.0, 0, ROUNDS
    assert seed is not None
    return threshold(p), 1 / (1 - p), int(seed), ROUNDS


def layer_norm_fwd(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    b: Tensor | None,
    residual: Tensor | None,
    p: float,
    seed: Tensor | None,
    eps: float,
    keeps: bool,
    returns_sum: bool,
) -> list[Tensor]:
    """Return y, then the sum if asked for, then what the backward pass keeps.

    That is xhat and rstd, or where the sum is in memory anyway mean and rstd.
    """
    rows, columns = x.shape
    dtype = sum_dtype(x, residual)
    keeps_hat = keeps and not keeps_sum(b, residual, p, returns_sum)
    x, gamma, beta, b = _rows(x), _vector(gamma), _vector(beta), _vector(b)
    residual = None if residual is None else _rows(residual)
    y = x.new_empty(rows, columns, dtype=dtype)
    total = torch.empty_like(y) if returns_sum else None
    xhat = torch.empty_like(y) if keeps_hat else None
    mean = gamma.new_empty(rows) if keeps and not keeps_hat else None
    rstd = gamma.new_empty(rows) if keeps else None
    _call(
        "layer_norm_fwd",
        DTYPES[x.dtype],
        DTYPES[(x if residual is None else residual).dtype],
        x.data_ptr(),
        x.stride(0),
        _pointer(b),
        _pointer(residual),
        0 if residual is None else residual.stride(0),
        gamma.data_ptr(),
        _pointer(beta),
        y.data_ptr(),
        _pointer(total),
        _pointer(xhat),
        _pointer(mean),
        _pointer(rstd),
        rows,
        columns,
        eps,
        *_dropped(p, seed),
    )
    return [t for t in (y, total, xhat, mean, rstd) if t is not None]


def layer_norm_bwd(
    dy: Tensor,
    kept: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor,
    dsum: Tensor | None,
    p: float,
    seed: Tensor | None,
    ds_dtype: torch.dtype,
    dx_dtype: torch.dtype,
    needs_dbeta: bool,
    needs_db: bool,
    needs_dgamma: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ds, dx (ds itself where they are the same), and the sums asked for, in one tensor."""
    rows, columns = dy.shape
    dy, kept, gamma = _rows(dy), _rows(kept), _vector(gamma)
    dsum = None if dsum is None else _rows(dsum)
    ds = dy.new_empty(rows, columns, dtype=ds_dtype)
    dx = dy.new_empty(rows, columns, dtype=dx_dtype) if p or dx_dtype != ds_dtype else None
    sums = gamma.new_empty(needs_dbeta + needs_db + needs_dgamma, columns)
    parts = iter(sums)
    dbeta, db, dgamma = (
        next(parts).data_ptr() if needed else None
        for needed in (needs_dbeta, needs_db, needs_dgamma)
    )
    _call(
        "layer_norm_bwd",
        DTYPES[dx_dtype],
        DTYPES[ds_dtype],
        dy.data_ptr(),
        dy.stride(0),
        kept.data_ptr(),
        kept.stride(0),
        _pointer(mean),
        rstd.data_ptr(),
        gamma.data_ptr(),
        _pointer(dsum),
        0 if dsum is None else dsum.stride(0),
        ds.data_ptr(),
        _pointer(dx),
        dbeta,
        db,
        dgamma,
        rows,
        columns,
        *_dropped(p, seed),
    )
    return ds, ds if dx is None else dx, sums


def activation_fwd(
    x: Tensor, b: Tensor | None, act: str, few_bits: bool, slope: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return h, and act' in 8 bits where asked for; `slope` gets act', and may be `x` itself."""
    assert slope is None or slope.is_contiguous()
    x, b = _rows(x), _vector(b)
    h = x.new_empty(x.shape)
    levels = x.new_empty(x.shape, dtype=torch.uint8) if few_bits else None
    _call(
        "activation_fwd",
        DTYPES[x.dtype],
        ACTS[act],
        x.data_ptr(),
        x.stride(0),
        _pointer(b),
        h.data_ptr(),
        _pointer(slope),
        _pointer(levels),
        *quantisation(act),
        *x.shape,
    )
    return h, levels


def activation_bwd(
    dh: Tensor,
    kept: Tensor,
    b: Tensor | None,
    act: str,
    is_slope: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return dz and db; `kept` is x, or act' itself, or act' in 8 bits."""
    dh, kept, b = _rows(dh), _rows(kept), _vector(b)
    dz = dh if in_place and dh.is_contiguous() else dh.new_empty(dh.shape)
    db = dh.new_empty(dh.shape[1], dtype=torch.float32)
    _call(
        "activation_bwd",
        DTYPES[dh.dtype],
        ACTS[act],
        dh.data_ptr(),
        dh.stride(0),
        kept.data_ptr(),
        kept.stride(0),
        LEVELS if kept.dtype == torch.uint8 else SLOPE if is_slope else INPUT,
        _pointer(b),
        *quantisation(act),
        dz.data_ptr(),
        db.data_ptr(),
        *dh.shape,
    )
    return dz, db


def column_sum(dy: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Return the sum of the rows, in fp32."""
    dy = _rows(dy)
    out = dy.new_empty(dy.shape[1], dtype=torch.float32)
    shape = (dy.stride(0), out.data_ptr(), *dy.shape)
    _call("column_sum", DTYPES[dy.dtype], dy.data_ptr(), *shape, *_dropped(p, seed))
    return out


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return `[M, N]` dropped out and scaled."""
    x = _rows(x)
    y = x.new_empty(x.shape)
    shape = (x.stride(0), y.data_ptr(), *x.shape)
    _call("dropout", DTYPES[x.dtype], x.data_ptr(), *shape, *_dropped(p, seed))
    return y


def embedding_layer_norm(
    gamma: Tensor,
    beta: Tensor | None,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    p: float,
    seed: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return `[M, N]`: rows of contiguous fp32 tables added up, normalised and dropped out.

    Raises
    ------
    IndexError
        If a table has no row for one of its ids, as PyTorch does.
    """
    rows, columns = len(ids[0]), tables[0].shape[1]
    y = gamma.new_empty(rows, columns, dtype=dtype)
    gamma, beta, ids = _vector(gamma), _vector(beta), [index.contiguous() for index in ids]
    count, lacking = len(tables), ctypes.c_int(-1)
    tables_at, ids_at = ((_P * count)(*map(_pointer, some)) for some in (tables, ids))
    sizes = (_L * count)(*map(len, tables))
    _call(
        "embedding_layer_norm",
        DTYPES[dtype],
        *(ctypes.addressof(table) for table in (tables_at, ids_at, sizes)),
        count,
        gamma.data_ptr(),
        _pointer(beta),
        y.data_ptr(),
        rows,
        columns,
        eps,
        ctypes.addressof(lacking),
        *_dropped(p, seed),
    )
    if lacking.value >= 0:
        raise IndexError(f"an id is out of range for a table of {sizes[lacking.value]} rows")
    return y


def kept(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """Return which elements dropout keeps, `[M, N]` bool."""
    mask = torch.empty(rows, columns, dtype=torch.bool, device="cpu")
    _call("kept", mask.data_ptr(), rows, columns, threshold(p), int(seed), ROUNDS)
    return mask


def _softmax(
    scores: Tensor,
    gradients: Tensor | None,
    starts_q: Tensor,
    lengths_q: Tensor,
    lengths_k: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    bias: Tensor | None,
) -> None:
    _call(
        "softmax",
        DTYPES[scores.dtype],
        scores.data_ptr(),
        _pointer(gradients),
        starts_q.data_ptr(),
        lengths_q.data_ptr(),
        lengths_k.data_ptr(),
        *scores.shape,
        _pointer(bias),
        *(0, 0) if bias is None else bias.stride()[:2],
        scale,
        *_dropped(p, seed),
    )


def softmax_fwd(
    scores: Tensor,
    starts_q: Tensor,
    lengths_q: Tensor,
    lengths_k: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Turn scores into dropped-out probabilities, in place.

    Parameters
    ----------
    scores : Tensor
        `[n, H, Sq, Sk]`, contiguous, Sk a multiple of 16; keys behind a sequence's length get 0.
    starts_q, lengths_q, lengths_k : Tensor
        `[n]` int32: each sequence's first query among the packed rows, its queries, its keys.
    scale : float
        Of the scores.
    p, seed
        Dropout; the row of head h of packed query t is `t H + h`.
    bias : Tensor, optional
        `[H, >= Sq, >= Sk]` fp32 with contiguous rows, added to the scaled scores.
    """
    _softmax(scores, None, starts_q, lengths_q, lengths_k, scale, p, seed, bias)


def softmax_bwd(
    scores: Tensor,
    gradients: Tensor,
    starts_q: Tensor,
    lengths_q: Tensor,
    lengths_k: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Turn scores into dropped-out probabilities and `gradients`, theirs, into the scores'.

    Both in place and of the shape of the scores, which are those before their scaling.
    """
    _softmax(scores, gradients, starts_q, lengths_q, lengths_k, scale, p, seed, bias)


def _move(packed: Tensor, starts: Tensor, lengths: Tensor, padded: Tensor, back: bool) -> None:
    _call(
        "spread",
        DTYPES[packed.dtype],
        int(back),
        packed.data_ptr(),
        packed.stride(0),
        starts.data_ptr(),
        lengths.data_ptr(),
        padded.data_ptr(),
        *padded.shape,
    )


def spread(packed: Tensor, starts: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Return `[n, H, S, D]` of packed rows `[*, H, D]`, with zeros behind each sequence."""
    padded = packed.new_empty(len(starts), packed.shape[1], longest, packed.shape[2])
    _move(packed, starts, lengths, padded, back=False)
    return padded


def gather(padded: Tensor, starts: Tensor, lengths: Tensor, packed: Tensor) -> None:
    """Write the real rows of `[n, H, S, D]` into packed rows `[*, H, D]`."""
    _move(packed, starts, lengths, padded, back=True)
