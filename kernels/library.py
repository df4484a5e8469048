"""The library of kernels for CPUs: `native.cpp`, built once by the machine's C++ compiler.

Where there is no compiler `unavailable` says so, and the operations run their definitions in
PyTorch. The library is kept under `$XDG_CACHE_HOME/bitfit_fast`, by the hash of its source, the
compiler and the CPU. `native`, `tiles` and `layers` launch what is in it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ._cache import UnusableError, cache_folder, put
from ._constants import ACTIVATIONS, ROUNDS, threshold

__all__ = [
    "ACTS",
    "C_TYPES",
    "DTYPES",
    "INPUT",
    "LEVELS",
    "SLOPE",
    "Layout",
    "call",
    "contiguous_rows",
    "cpuinfo",
    "dropped",
    "has_matrix_units",
    "has_tiles",
    "kind",
    "lanes",
    "layout",
    "pointer",
    "unavailable",
    "vector",
]

#: Dtypes of tensors, by the code that the library knows them by.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_SOURCE = Path(__file__).with_name("native.cpp")
_HEADERS = tuple(
    _SOURCE.with_name(f"{name}.h")
    for name in ("heads", "layers", "norm", "tiles", "units", "vectors")
)
_FLAGS = (
    # some compilers are fast with mathematics unless they are told not to be
    *("-std=c++17", "-O3", "-march=native", "-fno-fast-math"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fopenmp", "-shared", "-fPIC"),
)
#: What does without matrix units, where a process may not use those of its CPU.
_WITHOUT_MATRIX_UNITS = ("-mno-amx-bf16", "-mno-amx-tile")
#: By which a library that another build would mend is told, and one that none would not.
_BROKEN = "file too short", "invalid ELF header", "not found (required by"
#: And one that lies where nothing may run, unless memory is short.
_FORBIDDEN = "failed to map segment"
#: How lines begin that compilers put before the one that says what is wrong.
_BEFORE = "In file included from", "                 from"
#: Activations, and what an activation's backward pass is given, by their codes.
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
    "layout": (_I, _P, _P, _P),
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


def cpuinfo() -> list[str]:
    """Return the lines that Linux says of the CPU; none elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _cpu() -> str:
    """Return what `-march=native` depends on."""
    known = {ln for ln in cpuinfo() if ln.startswith(("flags", "Features", "model"))}
    return "\n".join(sorted(known)) or platform.processor()


def _ran(*command: str | Path) -> str:
    """Return what a compiler says, in English."""
    english = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, env=english
    )
    return done.stdout


def _build(compiler: str, *more: str, anew: bool = False) -> Path:
    """Return the library, built with more flags if it is not there, or is to be anew."""
    # a path may hold spaces, and a command arguments
    command = [compiler] if shutil.which(compiler) else shlex.split(compiler)
    flags = (*command[1:], *_FLAGS, *more)
    sources = [path.read_text(encoding="utf-8") for path in (_SOURCE, *_HEADERS)]
    parts = (*sources, _ran(*command, "--version"), " ".join(flags), _cpu())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = cache_folder() / f"native-{name}.so"
    if anew or not library.exists():
        put(library, lambda at: _ran(command[0], *flags, str(_SOURCE), "-o", at))
    return library


def _opened(compiler: str, *more: str) -> ctypes.CDLL:
    """Return the library, built anew where the one that is there is not whole, or not for here."""
    library = _build(compiler, *more)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        if _FORBIDDEN in str(error) and os.statvfs(library.parent).f_flag & os.ST_NOEXEC:
            raise UnusableError(f"nothing may run from {library.parent}") from error
        if not any(sign in str(error) for sign in _BROKEN):
            raise
        return ctypes.CDLL(str(_build(compiler, *more, anew=True)))


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """Return the library with the types of its functions, or why there is none."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "there is no C++ compiler (g++ or clang++, or CXX)"
    try:
        library = _opened(compiler)
        if library.bitfit_is_refused():
            library = _opened(compiler, *_WITHOUT_MATRIX_UNITS)
    except UnusableError as error:
        return str(error)
    # or without a home, or a CXX whose quotes do not end
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or "").strip() or str(error)
        lines = said.splitlines()
        first = next((line for line in lines if not line.startswith(_BEFORE)), lines[0])
        return f"{compiler} could not build {_SOURCE.name}: {first.rstrip('.')}"
    there = _ARGUMENTS | (_TILES if library.bitfit_has_tiles() else {})
    for name, types in there.items():
        function = getattr(library, f"bitfit_{name}")
        function.argtypes, function.restype = types, None
    return library


def unavailable() -> str | None:
    """Return why the library cannot be had on this machine, or None; builds it the first time."""
    library = _loaded()
    return library if isinstance(library, str) else None


def has_tiles() -> bool:
    """Return whether there are products and attention for the CPU, as `units.h` says."""
    library = _loaded()
    return not isinstance(library, str) and bool(library.bitfit_has_tiles())


def has_matrix_units() -> bool:
    """Return whether these are done by matrix units (AMX)."""
    library = _loaded()
    return not isinstance(library, str) and bool(library.bitfit_has_matrix_units())


def lanes() -> int:
    """Return how many fp32 numbers a vector has."""
    library = _loaded()
    assert not isinstance(library, str)
    return int(library.bitfit_lanes())


class Layout(NamedTuple):
    """How packed weights lie.

    Attributes
    ----------
    planes : int
        Numbers that make up one of the weight.
    dtype : torch.dtype
        Of these.
    pairs : bool
        Whether those of two rows stand next to each other.
    """

    planes: int
    dtype: torch.dtype
    pairs: bool


def layout(dtype: torch.dtype) -> Layout:
    """Return how weights of a dtype lie once they are packed."""
    library, found = _loaded(), [ctypes.c_int() for _ in range(3)]
    assert not isinstance(library, str)
    library.bitfit_layout(DTYPES[dtype], *map(ctypes.byref, found))
    planes, size, pairs = (number.value for number in found)
    return Layout(planes, next(o for o in DTYPES if o.itemsize == size), bool(pairs))


def call(name: str, *arguments: Any) -> None:
    """Call one of the library's functions, which is told last how many threads there are."""
    getattr(_loaded(), f"bitfit_{name}")(*arguments, torch.get_num_threads())


def pointer(tensor: Tensor | None) -> int | None:
    """Return where a tensor begins, as functions take it."""
    return None if tensor is None else tensor.data_ptr()


@overload
def vector(tensor: Tensor) -> Tensor: ...
@overload
def vector(tensor: None) -> None: ...
def vector(tensor: Tensor | None) -> Tensor | None:
    """Return `[N]` in fp32, contiguous."""
    # most are what is asked for, and every call of PyTorch's takes time
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def contiguous_rows(tensor: Tensor) -> Tensor:
    """Return `[M, N]` whose rows are contiguous."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def dropped(p: float, seed: Tensor | int | None) -> tuple[int, float, int, int]:
    """Return what a function is told of dropout."""
    if not p:
        return 0, 1.0, 0, ROUNDS
    assert seed is not None
    return threshold(p), 1 / (1 - p), int(seed), ROUNDS


def kind(kept: Tensor, is_slope: bool) -> int:
    """Return what an activation's forward pass kept, as functions are told of it."""
    if kept.dtype == torch.uint8:
        return LEVELS
    return SLOPE if is_slope else INPUT
