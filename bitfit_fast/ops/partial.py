"""Backward passes that leave the second stage of their column sums to the caller.

Each program of a kernel adds up its share of the rows into a partial row. To add those is a
launch of its own, which takes longer than the additions; `add_segments` does it for the sums of
several layers at once, and adds them to the gradients where they lie.
"""

from __future__ import annotations

from ..kernels._constants import MAX_COLUMNS
from ._autograd import contiguous, operation
from ._backend import uses_triton
from .activation import backward_definition as activation_definition
from .column_sum import definition as column_sum_definition
from .dropout import drawn
from .layer_norm import backward_definition as layer_norm_definition

__all__ = [
    "activation_bwd_partial_",
    "add_segments",
    "column_sum_partial",
    "layer_norm_bwd_partial",
    "linear_activation_bwd_partial",
]


def _as_first(sums, partial):
    """Write sums as the first of the partial rows, and zeros as the others."""
    partial.zero_()
    partial[:, 0] = sums


@operation(
    "layer_norm_bwd_partial",
    "(Tensor dy, Tensor kept, Tensor? mean, Tensor rstd, Tensor gamma, Tensor? dsum, "
    "float p, Tensor? seed, ScalarType ds_dtype, ScalarType dx_dtype, bool needs_dbeta, "
    "bool needs_db, Tensor(a!) partial) -> (Tensor, Tensor)",
    writes=("partial",),
)
def layer_norm_bwd_partial(dy, kept, mean, rstd, gamma, dsum, p, seed, *tail):
    """Do what `layer_norm_bwd` does, with the sums in partial rows `[k, P, N]`."""
    *tail, partial = tail
    (gamma,) = contiguous(gamma)
    if uses_triton(dy, most=MAX_COLUMNS):
        from ..kernels import layer_norm as kernel

        given = (dy, kept, mean, rstd, gamma, dsum, p, seed, *tail, False, partial)
        ds, dx, _ = kernel.layer_norm_bwd(*given)
        # an operation may not return a tensor twice
        return ds, ds.new_empty(0) if dx is ds else dx
    keep = drawn(dy.shape[0], dy.shape[1], p, seed)
    given = (dy, kept, mean, rstd, gamma, dsum, p, keep, *tail, False)
    ds, dx, sums = layer_norm_definition(*given)
    _as_first(sums, partial)
    return contiguous(ds, dx)


@layer_norm_bwd_partial.register_fake
def _(dy, kept, mean, rstd, gamma, dsum, p, seed, ds_dtype, dx_dtype, *rest):
    return (
        dy.new_empty(dy.shape, dtype=ds_dtype),
        dy.new_empty(dy.shape if p or dx_dtype != ds_dtype else (0,), dtype=dx_dtype),
    )


@operation(
    "activation_bwd_partial_",
    "(Tensor(a!) dh, Tensor kept, Tensor? b, str act, Tensor(b!) partial) -> ()",
    writes=("dh", "partial"),
)
def activation_bwd_partial_(dh, kept, b, act, partial):
    """Do what `activation_bwd` does to `dh` itself, with the sum in partial rows `[1, P, N]`."""
    (b,) = contiguous(b)
    if uses_triton(dh):
        from ..kernels import activation as kernel

        kernel.activation_bwd(dh, kept, b, act, partial, in_place=True)
        return
    dz, db = activation_definition(dh, kept, b, act)
    dh.copy_(dz)
    _as_first(db[None], partial)


@activation_bwd_partial_.register_fake
def _(dh, kept, b, act, partial):
    return None


@operation(
    "linear_activation_bwd_partial",
    "(Tensor dy, Tensor w, Tensor kept, Tensor? b, str act, Tensor(a!) partial) -> Tensor",
    writes=("partial",),
)
def linear_activation_bwd_partial(dy, w, kept, b, act, partial):
    """Do what `linear_activation_bwd` does in one kernel, with the sum in partial rows."""
    (b,) = contiguous(b)
    if uses_triton(dy):
        from ..kernels import linear as kernel

        return kernel.linear_bwd(dy, w, kept, b, act, partial)[0]
    dz, db = activation_definition(dy @ w, kept, b, act)
    _as_first(db[None], partial)
    return dz.contiguous()


@linear_activation_bwd_partial.register_fake
def _(dy, w, kept, b, act, partial):
    return dy.new_empty(dy.shape[0], w.shape[1])


@operation(
    "column_sum_partial",
    "(Tensor dy, float p, Tensor? seed, Tensor(a!) partial) -> ()",
    writes=("partial",),
)
def column_sum_partial(dy, p, seed, partial):
    """Do what `column_sum` does, with the sum in partial rows `[1, P, N]`."""
    if uses_triton(dy):
        from ..kernels import column_sum as kernel

        kernel.column_sum(dy, None, p, seed, partial)
        return
    keep = drawn(dy.shape[0], dy.shape[1], p, seed)
    _as_first(column_sum_definition(dy, None, p, keep)[None], partial)


@column_sum_partial.register_fake
def _(dy, p, seed, partial):
    return None


@operation(
    "add_segments",
    "(Tensor partial, Tensor table, int widest, Tensor(a!) out, bool adds) -> ()",
    writes=("out",),
)
def add_segments(partial, table, widest, out, adds):
    """Add partial rows, and the sums to what begins where `out` begins; see the kernel's."""
    if uses_triton(partial):
        from ..kernels import _reduce as kernel

        kernel.add_segments(partial, table, widest, out, adds)
        return
    # what is to be written may reach beyond the tensor that begins where it begins
    flat = out.as_strided((out.untyped_storage().nbytes() // 4,), (1,), 0)
    for first, rows, stride, columns, to in table.tolist():
        sums = partial.as_strided((rows, columns), (stride, 1), first)
        there = flat[out.storage_offset() + to :][:columns]
        there.copy_(there + sums.sum(0) if adds else sums.sum(0))


@add_segments.register_fake
def _(partial, table, widest, out, adds):
    return None
