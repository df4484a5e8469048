"""Softmax attention over packed sequences, with dropout of its probabilities.

    S = q k^T / sqrt(D) + bias,   P = softmax(S),   o = (P * keep / (1 - p)) v

for each sequence and head. Backward: the gradients of `q`, `k` and `v`, from these alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["backward_definition", "forward_definition"]


def _sequences(starts_q: Tensor, starts_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield each sequence's rows of the queries and of the keys."""
    cuts_q, cuts_k = starts_q.tolist(), starts_k.tolist()
    for i in range(len(cuts_q) - 1):
        yield slice(cuts_q[i], cuts_q[i + 1]), slice(cuts_k[i], cuts_k[i + 1])


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return `[H, n, m]` probabilities of `[H, n, D]` queries and `[H, m, D]` keys."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias[:, : q.shape[1], : k.shape[1]].to(q.dtype)
    return scores.softmax(-1)


def _dropped(x: Tensor, keep: Tensor | None, rows: slice, p: float) -> Tensor:
    """Drop from `[H, n, m]` what a mask `[T * H, max]` of all sequences drops."""
    if keep is None:
        return x
    heads, _, keys = x.shape
    of_sequence = keep.view(-1, heads, keep.shape[1])[rows, :, :keys].transpose(0, 1)
    return torch.where(of_sequence, x, 0) * (1 / (1 - p))


def forward_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    p: float,
    keep: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Compute o with PyTorch operations; parameters as in `kernels.attention`.

    `keep` is the `[Tq * H, max_k]` mask of what dropout keeps, or None.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    o = torch.zeros(q.shape, dtype=wide, device=q.device)
    for rows, keys in _sequences(starts_q, starts_k):
        one_q, one_k, one_v = (t.to(wide).transpose(0, 1) for t in (q[rows], k[keys], v[keys]))
        probabilities = _dropped(_probabilities(one_q, one_k, bias), keep, rows, p)
        o[rows] = (probabilities @ one_v).transpose(0, 1)
    return o.to(q.dtype)


def backward_definition(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    p: float,
    keep: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute dq `[Tq, H, D]` and dkv `[Tk, 2, H, D]` with PyTorch operations."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    dkv = torch.zeros(k.shape[0], 2, *k.shape[1:], dtype=wide, device=q.device)
    scale = q.shape[-1] ** -0.5
    for rows, keys in _sequences(starts_q, starts_k):
        parts = (q[rows], k[keys], v[keys], do[rows])
        one_q, one_k, one_v, one_do = (t.to(wide).transpose(0, 1) for t in parts)
        probabilities = _probabilities(one_q, one_k, bias)
        dkv[keys, 1] = (_dropped(probabilities, keep, rows, p).mT @ one_do).transpose(0, 1)
        dp = _dropped(one_do @ one_v.mT, keep, rows, p)
        ds = probabilities * (dp - (probabilities * dp).sum(-1, keepdim=True))
        dq[rows] = (ds @ one_k).transpose(0, 1) * scale
        dkv[keys, 0] = (ds.mT @ one_q).transpose(0, 1) * scale
    return dq.to(q.dtype), dkv.to(q.dtype)
