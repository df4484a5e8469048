"""Products with a frozen weight, forward and backward, by the faster of the libraries at hand."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..kernels import library, native, tiles
from ..ops._backend import uses_native, uses_triton
from ..ops.activation import activation_fwd
from ..ops.linear import linear_activation_bwd, linear_activation_fwd

__all__ = ["Product"]


#: Rows of a batch, roughly: oneDNN orders weights for a number of them, and takes any then.
_ROWS = 1024


def _onednn(x: Tensor, weight: Tensor, b: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, b, "none", [], "")


@functools.cache
def _prefers_onednn() -> bool:
    """Return whether oneDNN multiplies fp32 faster than PyTorch's choice, MKL.

    MKL leaves AVX-512 unused on CPUs of other makers, and took twice as long on an AMD EPYC that
    has it; on one that does not it is a little faster, and on Intel's the two are alike. By the
    maker, not by measuring, as the choice decides the last bits of results.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    parts = (line.partition(":") for line in library.cpuinfo())
    facts = {name.strip(): value.split() for name, _, value in parts}
    return facts.get("vendor_id") != ["GenuineIntel"] and "avx512f" in facts.get("flags", ())


class Product:
    """A frozen weight, which activations and gradients are multiplied by.

    Parameters
    ----------
    weight : Tensor
        `[N, K]`, with contiguous rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._onednn = self._takes_onednn()
        #: For our own kernels: the weight as they take it in the forward and the backward pass,
        #: None where others are as fast.
        self._packed: dict[str, Any] = {}
        #: The same for oneDNN, which would order it anew at each call.
        self._ordered: dict[str, Tensor] = {}
        #: Of a part: the product that it is a part of, and which rows of it.
        self._whole: tuple[Product, int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy packs its own weight when it first multiplies
        return {**self.__dict__, "_packed": {}, "_ordered": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # which may have come from another machine, or to another device
        self._onednn = self._takes_onednn()

    def _takes_onednn(self) -> bool:
        fp32 = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        return fp32 and _prefers_onednn()

    def packed(self, rows: Tensor, which: str) -> Any:
        """Return the weight as our own kernels for CPUs take it, or None where others multiply.

        `which` is the `forward` or the `backward` pass.
        """
        if uses_triton(rows) or not uses_native(rows):
            return None
        return self.packed_for_cpu(which)

    def packed_for_cpu(self, which: str) -> Any:
        """Return the same, where it is known that a CPU's kernels are used."""
        if which not in self._packed:
            self._packed[which] = self._pack(which) if tiles.beat_libraries(self.weight) else None
        return self._packed[which]

    def _pack(self, which: str) -> Any:
        if self._whole is not None:
            whole, first, last = self._whole
            if (packed := whole.packed_for_cpu(which)) is not None and not first % tiles.SIDE:
                every, some = slice(None), slice(first, last)
                return packed[(every, some) if which == "forward" else (some, every)]
        return tiles.pack(self.weight.t() if which == "forward" else self.weight)

    @property
    def bytes_packed(self) -> int:
        """How much the weight takes once it is packed for both passes, at the first of each."""
        weight = self.weight
        if not uses_triton(weight) and uses_native(weight) and tiles.beat_libraries(weight):
            return 2 * tiles.packed_bytes(weight)
        return 2 * weight.nbytes if self._onednn else 0

    def _in_order(self, which: str) -> Tensor:
        """Return the weight as oneDNN takes it in the forward or the backward pass."""
        if which not in self._ordered:
            weight = self.weight if which == "forward" else self.weight.t().contiguous()
            self._ordered[which] = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        return self._ordered[which]

    def __call__(self, x: Tensor, b: Tensor | None = None) -> Tensor:
        """Return `x W^T + b`, `[M, N]` of `[M, K]`."""
        if (packed := self.packed(x, "forward")) is not None:
            return tiles.linear(x, packed, b)
        if self._onednn:
            return _onednn(x, self._in_order("forward"), b)
        return x @ self.weight.t() if b is None else torch.addmm(b, x, self.weight.t())

    def backward(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return `dy W`, `[M, K]` of `[M, N]`; added to `onto`, in place, where it is given."""
        if (packed := self.packed(dy, "backward")) is not None:
            return tiles.linear(dy, packed, onto=onto)
        if self._onednn:
            dx = _onednn(dy, self._in_order("backward"))
            return dx if onto is None else onto.add_(dx)
        return dy @ self.weight if onto is None else onto.addmm_(dy, self.weight)

    def activated(
        self, x: Tensor, b: Tensor | None, act: str, few_bits: bool, keeps: bool
    ) -> tuple[Tensor, Tensor]:
        """Return `act(x W^T + b)`, and what `activation_bwd` of the next product is to be given.

        Parameters
        ----------
        x : Tensor
            `[M, K]`.
        b : Tensor, optional
            `[N]` fp32.
        act : str
            One of `ops.ACTIVATIONS`.
        few_bits, keeps : bool
            Whether act' is kept in 8 bits, and whether anything is.
        """
        if (packed := self.packed(x, "forward")) is not None:
            h, kept = tiles.linear_activation(x, packed, b, act, few_bits, keeps)
            return h, h if kept is None else kept
        if uses_triton(x):
            return linear_activation_fwd(x, self.weight, b, act, few_bits, keeps)
        u = self(x)
        if keeps and not few_bits and uses_native(u):
            # the derivative takes the place of u: no erf a second time
            return native.activation_fwd(u, b, act, False, slope=u)[0], u
        h, levels = activation_fwd(u, b, act, few_bits and keeps)
        return h, levels if few_bits else u

    def activation_bwd(
        self, dz: Tensor, kept: Tensor, b: Tensor | None, act: str, from_activated: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of the activation before this product, and of its bias.

        Parameters
        ----------
        dz : Tensor
            Gradient of this product, `[M, N]`.
        kept : Tensor
            What `activated` of the product before gave, or the activation's input, `[M, K]`.
        b, act
            The activation's.
        from_activated : bool
            Which of the two `kept` is.
        """
        if (packed := self.packed(dz, "backward")) is not None:
            return tiles.linear_activation_bwd(dz, packed, kept, b, act, from_activated)
        if not uses_triton(dz) and uses_native(dz):
            dh = self.backward(dz)
            return native.activation_bwd(dh, kept, b, act, is_slope=from_activated, in_place=True)
        return linear_activation_bwd(dz, self.weight, kept, b, act)

    def part(self, first: int, last: int) -> Product:
        """Return the product with some rows of the weight, which shares what is packed."""
        made = Product(self.weight[first:last])
        made._whole = self, first, last
        return made
