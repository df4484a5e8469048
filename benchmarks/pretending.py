"""What stands in for a GPU while a step is counted: decisions, launches and messages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from counting import Counting
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from work import DEVICE, Counted, Work, flash_backward, size, tensors

from bitfit_fast import arena
from bitfit_fast.encoder import backward, embeddings, forward, product, sums
from bitfit_fast.kernels._attention import attention_config
from bitfit_fast.kernels.attention_bwd import attention_bwd_passes, attention_sums
from bitfit_fast.ops._backend import BACKEND_VARIABLE
from bitfit_fast.packing import Packing
from bitfit_fast.training import fixed

__all__ = ["as_on_a_gpu"]

_of_mask = Packing.of_mask


def _our_attention(
    counted: Counted,
    q: Tensor,
    k: Tensor,
    packing: Any,
    backward: bool,
    kv: bool,
    q_sums: int = 0,
    v_sums: int = 0,
):
    """Count the launches of our attention, with the bytes of partial rows that it writes."""
    whole = q.shape[0] == k.shape[0]
    queries = packing.longest if whole else 1
    pairs = sum(n * n if whole else n for n in packing.lengths)
    product = 2 * pairs * q.shape[1] * q.shape[2]
    of_q, of_kv = size([q]), 2 * size([k])
    offsets = 8 * (len(packing.lengths) + 1)
    if not backward:
        counted.note("attention_fwd", Work(1, 2 * of_q + of_kv + offsets, 2 * product))
        return
    sizes = queries, packing.longest, q.shape[2], q.element_size()
    passes = attention_bwd_passes(*sizes, kv)
    one_launch = kv and len(passes) == 1
    one_block = packing.longest <= attention_config(*sizes, passes[0])["BLOCK_N"]
    numbers = 0 if one_launch else 8 * q.shape[0] * q.shape[1]
    products = (3 if one_block else 5) + (2 if one_launch else 0)
    moved = 3 * of_q + of_kv + numbers + offsets + q_sums
    if one_launch:
        moved += of_kv + v_sums
    counted.note("attention_bwd", Work(1, moved, products * product))
    if len(passes) == 2:
        moved = 2 * of_q + 2 * of_kv + numbers + offsets + v_sums
        counted.note("attention_bwd_kv", Work(1, moved, 4 * product))


def _stack_attention(mode: Counting) -> tuple[Any, Any]:
    """Return what stands in for the stack's attention while it is counted."""

    def fwd(q, k, v, packing, p, seed, bias):  # type: ignore[no-untyped-def]
        _our_attention(mode.counted, q, k, packing, False, True)
        return torch.empty(q.shape, dtype=q.dtype)

    def bwd(do, q, k, v, packing, p, seed, bias, needs_kv=True, q_sums=None, v_sums=None):  # type: ignore[no-untyped-def]
        sums = (size(tensors(t)) for t in (q_sums, v_sums))
        _our_attention(mode.counted, q, k, packing, True, needs_kv, *sums)
        if needs_kv and q.shape[0] == k.shape[0]:
            joined = torch.empty(q.shape[0], 3, *q.shape[1:], dtype=q.dtype)
            return joined[:, 0], joined[:, 1:]
        dkv = torch.empty(k.shape[0], 2, *k.shape[1:], dtype=q.dtype) if needs_kv else None
        return torch.empty(q.shape, dtype=q.dtype), dkv

    return fwd, bwd


def _flash(mode: Counting) -> Any:
    """Return what stands in for PyTorch's flash attention, `[B, H, S, D]` in and out."""

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o = _like(q)
            lse = q.new_empty(q.shape[:3], dtype=torch.float32)
            ctx.save_for_backward(q, k, v, o, lse)
            product = 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
            mode.counted.note("flash_fwd", Work(1, size([q, k, v, o, lse]), 2 * product))
            return o

        @staticmethod
        def backward(ctx: Any, do: Tensor) -> tuple[Tensor, ...]:
            q, k, v, _, lse = ctx.saved_tensors
            gradients = _like(q), _like(k), _like(v)
            product = 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
            for launch in flash_backward(size([q]), size([lse]), q.element_size(), product):
                mode.counted.note("flash_bwd", launch)
            return gradients

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, scale=None, **rest):  # type: ignore[no-untyped-def]
        return Flash.apply(query, key, value)

    return attention


def _like(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    return torch.empty(batch, length, heads, width, dtype=x.dtype).transpose(1, 2)


def _packing(mask: Tensor) -> Packing | None:
    """Read a mask, and make the indices: the host does that, and launches nothing."""
    with _disable_current_modes():
        packing = _of_mask(mask)
        if packing is not None:
            _ = packing.starts, packing.first, packing.rows, packing.each
        return packing


def _attention_sums(q: Tensor, k: Tensor, packing: Packing) -> tuple[int, int]:
    """Return how many partial rows our attention writes."""
    queries = packing.longest if q.shape[0] == k.shape[0] else 1
    sizes = (len(packing.lengths), queries, packing.longest, q.shape[2], q.element_size())
    return attention_sums(*sizes, True)


def _loading(mode: Counting) -> Any:
    """Return what stands in for taking over a batch: messages to the GPU, made by the host."""
    load = fixed._Inputs.load

    def loading(self, batch, lengths, lr):  # type: ignore[no-untyped-def]
        with _disable_current_modes():
            load(self, batch, lengths, lr)
        apart = [] if self._rides(batch) else self.others.values()
        for tensor in (self._table, *apart):
            mode.counted.note("message", Work(1, size([tensor])), outside=True)

    return loading


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop out in one launch, as on a GPU."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _clip(mode: Counting) -> Any:
    """Return what clips as on a GPU, where `clip_grad_norm_` works on lists."""

    def clip(parameters: Any, max_norm: float) -> None:
        mode.before_clipping = len(mode.counted.works)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0)))
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))

    return clip


@contextlib.contextmanager
def as_on_a_gpu(mode: Counting) -> Iterator[None]:
    """Let a step on a CPU do what it would do on a GPU, and count that."""
    fwd, bwd = _stack_attention(mode)
    with (
        mock.patch.dict(os.environ, {BACKEND_VARIABLE: "torch"}),
        mock.patch.object(forward, "attention_fwd", fwd),
        mock.patch.object(backward, "attention_bwd", bwd),
        mock.patch.object(backward, "attention_sums", _attention_sums),
        mock.patch.object(
            backward, "fuses_backward", lambda dy, w, *rest: mode.fuses(dy, w.shape[1])
        ),
        mock.patch.object(sums, "defers", lambda tensor: True),
        mock.patch.object(embeddings, "gathers", lambda table: True),
        mock.patch.object(arena, "uses_triton", lambda tensor: True),
        mock.patch.object(product, "uses_triton", lambda tensor: True),
        mock.patch.object(sums, "processors", lambda tensor: DEVICE.processors),
        mock.patch.object(fixed._Inputs, "load", _loading(mode)),
        mock.patch.object(F, "scaled_dot_product_attention", _flash(mode)),
        mock.patch.object(F, "dropout", _dropout),
        mock.patch.object(Packing, "of_mask", _packing),
        mock.patch.object(nn.utils, "clip_grad_norm_", _clip(mode)),
        mode,
    ):
        yield
