"""Attention over packed sequences, by whatever does it best where the tensors are.

On a GPU that is the Triton kernel. On a CPU with tiles it is a pass of our own over each head; on
others, sequences of similar length are padded to one and go through batched products, which are
what they are fast at, with the softmax between them in one pass. Nothing but q, k and v is kept for
the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels import library, native, tiles
from ..ops import attention as pytorch
from ..ops._backend import uses_native, uses_triton
from ..ops.column_sum import bias_gradient
from ..ops.dropout import drawn
from ..packing import Packing

__all__ = ["attention_bwd", "attention_fwd", "attention_sums", "joined", "takes_tiles"]

#: Keys of a sequence whose probabilities a CPU's second-level cache holds.
_LONGEST = 1024


def _has_kernel(q: Tensor) -> bool:
    if not uses_triton(q):
        return False
    from ..kernels._attention import MAX_HEAD_SIZE

    return q.shape[-1] <= MAX_HEAD_SIZE


def takes_tiles(x: Tensor, size: int, packing: Packing) -> bool:
    """Return whether a CPU computes attention in one pass for each head of such a size.

    That is of tensors like `x`.
    """
    if packing.longest > _LONGEST or uses_triton(x) or not uses_native(x):
        return False
    return library.has_tiles() and not size % tiles.SIDE


def _starts(q: Tensor, k: Tensor, packing: Packing) -> tuple[Tensor, Tensor, int, int]:
    """Return where the queries and keys of each sequence begin, and the most of each."""
    if _is_whole(q, k):
        return packing.starts, packing.starts, packing.longest, packing.longest
    return packing.each, packing.starts, 1, packing.longest


def _is_whole(q: Tensor, k: Tensor) -> bool:
    """Return whether there is a query for each key; otherwise there is one a sequence."""
    return q.shape[0] == k.shape[0]


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    p: float,
    seed: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(D) + bias) v for each sequence and head.

    Parameters
    ----------
    q : Tensor
        `[T, H, D]`, or `[B, H, D]` with one query a sequence; the last two dimensions
        contiguous.
    k, v : Tensor
        `[T, H, D]`, likewise.
    packing : Packing
        Where the sequences lie.
    p : float
        Probability with which dropout drops a probability.
    seed : Tensor, optional
        `[1]` int64, of that dropout. The mask's row of query t and head h is `t H + h`.
    bias : Tensor, optional
        `[H, S, S]` fp32, added to the scores.

    Returns
    -------
    Tensor
        Of the shape of `q`, contiguous.
    """
    if _has_kernel(q):
        from ..kernels import attention as kernel

        return kernel.attention_fwd(q, k, v, *_starts(q, k, packing), p, seed, bias)
    if takes_tiles(q, q.shape[-1], packing):
        return tiles.attention_fwd(q, k, v, *_starts(q, k, packing)[:2], p, seed, bias)
    if uses_native(q):
        return _grouped_fwd(q, k, v, packing, p, seed, bias)
    starts_q, starts_k, _, most = _starts(q, k, packing)
    keep = drawn(q.shape[0] * q.shape[1], most, p, seed)  # type: ignore[arg-type]
    return pytorch.forward_definition(q, k, v, starts_q, starts_k, p, keep, bias)


def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    needs_kv: bool = True,
    q_sums: Tensor | None = None,
    v_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of q, k and v.

    Parameters
    ----------
    do : Tensor
        Gradient of the output, contiguous.
    q, k, v, packing, p, seed, bias
        As in the forward pass.
    needs_kv : bool
        Whether the gradients of k and v are wanted.
    q_sums, v_sums : Tensor, optional
        `[1, P, H D]` fp32 with P of `attention_sums`: where partial rows of the sums of dq and
        dv go.

    Returns
    -------
    dq, dkv : Tensor
        `[T, H, D]` and `[T, 2, H, D]`, views of one `[T, 3, H, D]` where each key has a query;
        dkv is None unless wanted.
    """
    if _has_kernel(q):
        from ..kernels import attention_bwd as kernel

        starts = _starts(q, k, packing)
        return kernel.attention_bwd(do, q, k, v, *starts, p, seed, bias, needs_kv, q_sums, v_sums)
    if q_sums is not None and v_sums is not None:
        dq, dkv = attention_bwd(do, q, k, v, packing, p, seed, bias, needs_kv)
        for sums, d in ((q_sums, dq), (v_sums, dkv[:, 1] if dkv is not None else None)):
            sums.zero_()
            if d is not None:
                sums[0, 0] = bias_gradient(d.flatten(1))
        return dq, dkv
    if takes_tiles(q, q.shape[-1], packing):
        dq, room = _gradients(q, k, needs_kv)
        dkv = room if needs_kv else None
        where = _starts(q, k, packing)[:2]
        tiles.attention_bwd(do, q, k, v, *where, p, seed, bias, dq, dkv)
        return dq, dkv
    if uses_native(q):
        return _grouped_bwd(do, q, k, v, packing, p, seed, bias, needs_kv)
    starts_q, starts_k, _, most = _starts(q, k, packing)
    keep = drawn(q.shape[0] * q.shape[1], most, p, seed)  # type: ignore[arg-type]
    dq, dkv = pytorch.backward_definition(do, q, k, v, starts_q, starts_k, p, keep, bias)
    if needs_kv and _is_whole(q, k):
        dqkv = torch.cat((dq[:, None], dkv), 1)
        return dqkv[:, 0], dqkv[:, 1:]
    return dq, dkv if needs_kv else None


def attention_sums(q: Tensor, k: Tensor, packing: Packing) -> tuple[int, int]:
    """Return how many partial rows the sums of dq and dv have."""
    if not _has_kernel(q):
        return 1, 1
    from ..kernels import attention_bwd as kernel

    starts, _, most_q, most_k = _starts(q, k, packing)
    size = q.element_size()
    return kernel.attention_sums(len(starts) - 1, most_q, most_k, q.shape[2], size, True)


def joined(dq: Tensor) -> Tensor:
    """Return the `[T, 3 H D]` that dq is a view of, where each key has a query."""
    rows, heads, size = dq.shape
    width = 3 * heads * size
    return dq.as_strided((rows, width), (width, 1), dq.storage_offset())


def _groups(
    q: Tensor, k: Tensor, packing: Packing
) -> Iterator[tuple[tuple[Tensor, Tensor, int], tuple[Tensor, Tensor, int]]]:
    """Yield starts, lengths and longest of each group's queries, and of its keys."""
    for group in packing.groups:
        keys = group.starts, group.lengths, group.longest
        yield (keys if _is_whole(q, k) else (group.order, group.ones, 1)), keys


def _gradients(q: Tensor, k: Tensor, needs_kv: bool) -> tuple[Tensor, Tensor]:
    """Return memory for the gradients of q, and of k and v, empty where these are not wanted."""
    if needs_kv and _is_whole(q, k):
        dqkv = q.new_empty(q.shape[0], 3, *q.shape[1:])
        return dqkv[:, 0], dqkv[:, 1:]
    return q.new_empty(q.shape), k.new_empty(k.shape[0], 2 * needs_kv, *k.shape[1:])


def _grouped_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    p: float,
    seed: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    o = q.new_empty(q.shape)
    for queries, keys in _groups(q, k, packing):
        padded_q, padded_k, padded_v = (
            native.spread(t, *where).flatten(0, 1)
            for t, where in ((q, queries), (k, keys), (v, keys))
        )
        scores = torch.bmm(padded_q, padded_k.mT)
        shape = (-1, q.shape[1], *scores.shape[1:])
        native.softmax_fwd(
            scores.view(shape), *queries[:2], keys[1], q.shape[-1] ** -0.5, p, seed, bias
        )
        native.gather(torch.bmm(scores, padded_v).unflatten(0, shape[:2]), *queries[:2], o)
    return o


def _grouped_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    needs_kv: bool,
) -> tuple[Tensor, Tensor | None]:
    dq, dkv = _gradients(q, k, needs_kv)
    for queries, keys in _groups(q, k, packing):
        padded_q, padded_do, padded_k, padded_v = (
            native.spread(t, *where).flatten(0, 1)
            for t, where in ((q, queries), (do, queries), (k, keys), (v, keys))
        )
        scores = torch.bmm(padded_q, padded_k.mT)
        gradients = torch.bmm(padded_do, padded_v.mT)
        shape = (-1, q.shape[1], *scores.shape[1:])
        native.softmax_bwd(
            scores.view(shape),
            gradients.view(shape),
            *queries[:2],
            keys[1],
            q.shape[-1] ** -0.5,
            p,
            seed,
            bias,
        )
        heads = shape[:2]
        native.gather(torch.bmm(gradients, padded_k).unflatten(0, heads), *queries[:2], dq)
        if needs_kv:
            dk, dv = dkv.unbind(1)
            native.gather(torch.bmm(gradients.mT, padded_q).unflatten(0, heads), *keys[:2], dk)
            native.gather(torch.bmm(scores.mT, padded_do).unflatten(0, heads), *keys[:2], dv)
    return dq, dkv if needs_kv else None
