"""Kernels for CPUs by the names of Triton's.

A launcher computes what the Triton one of the same name does, with the same dropout masks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import library
from ._constants import ROUNDS, keeps_sum, quantisation, sum_dtype, threshold
from .library import contiguous_rows, dropped, pointer, vector

__all__ = [
    "activation_bwd",
    "activation_fwd",
    "column_sum",
    "dropout",
    "embedding_layer_norm",
    "gather",
    "kept",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "softmax_bwd",
    "softmax_fwd",
    "spread",
]


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
    x, gamma, beta, b = contiguous_rows(x), vector(gamma), vector(beta), vector(b)
    residual = None if residual is None else contiguous_rows(residual)
    y = x.new_empty(rows, columns, dtype=dtype)
    total = torch.empty_like(y) if returns_sum else None
    xhat = torch.empty_like(y) if keeps_hat else None
    mean = gamma.new_empty(rows) if keeps and not keeps_hat else None
    rstd = gamma.new_empty(rows) if keeps else None
    library.call(
        "layer_norm_fwd",
        library.DTYPES[x.dtype],
        library.DTYPES[(x if residual is None else residual).dtype],
        x.data_ptr(),
        x.stride(0),
        pointer(b),
        pointer(residual),
        0 if residual is None else residual.stride(0),
        gamma.data_ptr(),
        pointer(beta),
        y.data_ptr(),
        pointer(total),
        pointer(xhat),
        pointer(mean),
        pointer(rstd),
        rows,
        columns,
        eps,
        *dropped(p, seed),
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
    dy, kept, gamma = contiguous_rows(dy), contiguous_rows(kept), vector(gamma)
    dsum = None if dsum is None else contiguous_rows(dsum)
    ds = dy.new_empty(rows, columns, dtype=ds_dtype)
    dx = dy.new_empty(rows, columns, dtype=dx_dtype) if p or dx_dtype != ds_dtype else None
    sums = gamma.new_empty(needs_dbeta + needs_db + needs_dgamma, columns)
    parts = iter(sums)
    dbeta, db, dgamma = (
        next(parts).data_ptr() if needed else None
        for needed in (needs_dbeta, needs_db, needs_dgamma)
    )
    library.call(
        "layer_norm_bwd",
        library.DTYPES[dx_dtype],
        library.DTYPES[ds_dtype],
        dy.data_ptr(),
        dy.stride(0),
        kept.data_ptr(),
        kept.stride(0),
        pointer(mean),
        rstd.data_ptr(),
        gamma.data_ptr(),
        pointer(dsum),
        0 if dsum is None else dsum.stride(0),
        ds.data_ptr(),
        pointer(dx),
        dbeta,
        db,
        dgamma,
        rows,
        columns,
        *dropped(p, seed),
    )
    return ds, ds if dx is None else dx, sums


def activation_fwd(
    x: Tensor, b: Tensor | None, act: str, few_bits: bool, slope: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return h, and act' in 8 bits where asked for; `slope` gets act', and may be `x` itself."""
    assert slope is None or slope.is_contiguous()
    x, b = contiguous_rows(x), vector(b)
    h = x.new_empty(x.shape)
    levels = x.new_empty(x.shape, dtype=torch.uint8) if few_bits else None
    library.call(
        "activation_fwd",
        library.DTYPES[x.dtype],
        library.ACTS[act],
        x.data_ptr(),
        x.stride(0),
        pointer(b),
        h.data_ptr(),
        pointer(slope),
        pointer(levels),
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
    dh, kept, b = contiguous_rows(dh), contiguous_rows(kept), vector(b)
    dz = dh if in_place and dh.is_contiguous() else dh.new_empty(dh.shape)
    db = dh.new_empty(dh.shape[1], dtype=torch.float32)
    library.call(
        "activation_bwd",
        library.DTYPES[dh.dtype],
        library.ACTS[act],
        dh.data_ptr(),
        dh.stride(0),
        kept.data_ptr(),
        kept.stride(0),
        library.kind(kept, is_slope),
        pointer(b),
        *quantisation(act),
        dz.data_ptr(),
        db.data_ptr(),
        *dh.shape,
    )
    return dz, db


def column_sum(dy: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Return the sum of the rows, in fp32."""
    dy = contiguous_rows(dy)
    out = dy.new_empty(dy.shape[1], dtype=torch.float32)
    shape = (dy.stride(0), out.data_ptr(), *dy.shape)
    library.call("column_sum", library.DTYPES[dy.dtype], dy.data_ptr(), *shape, *dropped(p, seed))
    return out


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return `[M, N]` dropped out and scaled."""
    x = contiguous_rows(x)
    y = x.new_empty(x.shape)
    shape = (x.stride(0), y.data_ptr(), *x.shape)
    library.call("dropout", library.DTYPES[x.dtype], x.data_ptr(), *shape, *dropped(p, seed))
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
    gamma, beta = vector(gamma), vector(beta)
    ids = [index.contiguous() for index in ids]
    count, lacking = len(tables), ctypes.c_int(-1)
    pointers, numbers = library.C_TYPES[:2]
    tables_at, ids_at = ((pointers * count)(*map(pointer, some)) for some in (tables, ids))
    sizes = (numbers * count)(*map(len, tables))
    library.call(
        "embedding_layer_norm",
        library.DTYPES[dtype],
        *(ctypes.addressof(table) for table in (tables_at, ids_at, sizes)),
        count,
        gamma.data_ptr(),
        pointer(beta),
        y.data_ptr(),
        rows,
        columns,
        eps,
        ctypes.addressof(lacking),
        *dropped(p, seed),
    )
    if lacking.value >= 0:
        raise IndexError(f"an id is out of range for a table of {sizes[lacking.value]} rows")
    return y


def kept(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """Return which elements dropout keeps, `[M, N]` bool."""
    mask = torch.empty(rows, columns, dtype=torch.bool, device="cpu")
    library.call("kept", mask.data_ptr(), rows, columns, threshold(p), int(seed), ROUNDS)
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
    library.call(
        "softmax",
        library.DTYPES[scores.dtype],
        scores.data_ptr(),
        pointer(gradients),
        starts_q.data_ptr(),
        lengths_q.data_ptr(),
        lengths_k.data_ptr(),
        *scores.shape,
        pointer(bias),
        *(0, 0) if bias is None else bias.stride()[:2],
        scale,
        *dropped(p, seed),
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
    library.call(
        "spread",
        library.DTYPES[packed.dtype],
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
