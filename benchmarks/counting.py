"""Counts what the operations of a step would do on a GPU, launch by launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from live import Live
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from work import DEVICE, Counted, Work, plus, size, tensors

from bitfit_fast.kernels._launch import cdiv, column_config, product_config
from bitfit_fast.kernels.layer_norm import layer_norm_config
from bitfit_fast.ops._backend import is_worth_measuring

__all__ = ["Counting"]

aten = torch.ops.aten

#: Operations that touch no data, besides views.
_FREE = {
    aten._unsafe_view,
    aten._local_scalar_dense,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.lift_fresh,
    aten.new_empty,
    aten.new_empty_strided,
    aten.set_,
    aten.squeeze_,
}
#: What takes long, and whose values nothing depends on.
_HEAVY = {
    aten.addmm,
    aten.addmm_,
    aten.bmm,
    aten.gelu,
    aten.gelu_backward,
    aten.mm,
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
}
#: What takes long where it is about more numbers than this, and nothing depends on its values then.
_HEAVY_IF_LARGE = {
    aten._to_copy,
    aten.add,
    aten.mul,
    aten.native_dropout,
    aten.native_dropout_backward,
    aten.sum,
}
_LARGE = 2**16
#: Operations of more than one launch.
_LAUNCHES = {aten.native_layer_norm_backward: 2}
#: Tensors that one launch of an operation on lists takes, by how many lists there are.
_LIST_LIMIT = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


# ------------------------------------------------------------- what our launchers would launch


def _sums(rows: int, width: int, sums: int, partial_rows: int) -> Work:
    """Return the second stage of column sums, and the partial rows that the first one writes."""
    if not sums:
        return Work()
    if partial_rows == 1:
        return Work(0, 4 * sums * width)
    return Work(1, 4 * sums * width * (2 * partial_rows + 1))


def _layer_norm_fwd(args: tuple[Any, ...], out: Any) -> Work:
    return Work(1, size(tensors(args) + tensors(out)))


def _layer_norm_bwd(args: tuple[Any, ...], out: Any) -> Work:
    ds, dx, sums = out
    rows = layer_norm_config(*ds.shape, DEVICE.processors)["P"]
    own = Work(1, size([*tensors(args), ds, dx]))
    return plus(own, _sums(*ds.shape, sums.shape[0], rows))


def _in_place(args: tuple[Any, ...], out: Any) -> Work:
    # the first argument is read and written
    return Work(1, size(tensors(args) + tensors(out)) + size([args[0]]))


def _column_work(x: Tensor, tensors: list[Tensor], sums: int) -> Work:
    rows = column_config(*x.shape, DEVICE.processors)["P"]
    return plus(Work(1, size(tensors)), _sums(*x.shape, sums, rows))


def _activation_bwd(args: tuple[Any, ...], out: Any) -> Work:
    return _column_work(out[0], [*tensors(args), out[0]], 1)


def _column_sum(args: tuple[Any, ...], out: Any) -> Work:
    return _column_work(args[0], tensors(args), 1)


def _add_segments(args: tuple[Any, ...], out: Any) -> Work:
    table = args[1].tolist()
    # the sums are written, and read before where they are added to what is there
    ends = 1 + args[4]
    numbers = sum((rows + ends) * columns for _, rows, _, columns, _ in table)
    return Work(1, 4 * numbers + size([args[1]]))


def _embedding_layer_norm(args: tuple[Any, ...], out: Any) -> Work:
    gamma, beta, ids, tables = args[:4]
    # of each table a row for each token, as PyTorch's own gathering counts
    rows = sum(out.numel() * table.element_size() for table in tables)
    return Work(1, rows + size(tensors((gamma, beta, ids, out))))


def _squares(args: tuple[Any, ...], out: Any) -> Work:
    return Work(1, size(tensors((args, out))) + size([args[1]]))


def _adamw(args: tuple[Any, ...], out: Any) -> Work:
    return Work(1, size(tensors(args)) + size(list(args[:4])))


OURS: dict[str, Callable[[tuple[Any, ...], Any], Work]] = {
    "activation_bwd": _activation_bwd,
    "activation_bwd_partial_": _in_place,
    "activation_fwd": _layer_norm_fwd,
    "activation_fwd_": _in_place,
    "adamw_": _adamw,
    "add_segments": _add_segments,
    "column_sum": _column_sum,
    "column_sum_partial": _layer_norm_fwd,
    "dropout": _layer_norm_fwd,
    "embedding_layer_norm": _embedding_layer_norm,
    "layer_norm_bwd": _layer_norm_bwd,
    "layer_norm_bwd_partial": _layer_norm_fwd,
    "layer_norm_fwd": _layer_norm_fwd,
    "squares": _squares,
}


def _linear_activation_fwd(args: tuple[Any, ...], out: Any, fused: bool) -> list[Work]:
    x, w, b = args[:3]
    h, kept = out
    flops = 2 * h.numel() * x.shape[1]
    if fused:
        return [Work(1, size(tensors((x, w, b, h, kept))), flops)]
    product = Work(1, size([x, w, h]), flops)
    # the product is read, and what is kept besides it written
    levels = [kept] if kept.dtype != h.dtype else []
    return [product, Work(1, size([h]) + size(tensors((b, h, levels))))]


def _linear_activation_bwd(args: tuple[Any, ...], out: Any, fused: bool) -> list[Work]:
    dy, w, kept, b = args[:4]
    dz = out[0]
    flops = 2 * dz.numel() * dy.shape[1]
    if fused:
        config = product_config(*dz.shape, dy.shape[1], dy.element_size(), DEVICE.processors)
        own = Work(1, size(tensors((dy, w, kept, b, dz))), flops)
        return [plus(own, _sums(*dz.shape, 1, cdiv(len(dz), config["BLOCK_M"])))]
    after = _column_work(dz, tensors((kept, b, dz)), 1)
    return [Work(1, size([dy, w, dz]), flops), plus(after, Work(0, size([dz])))]


def _linear_activation_bwd_partial(args: tuple[Any, ...], out: Any, fused: bool) -> list[Work]:
    dy, dz = args[0], out
    return [Work(1, size([*tensors(args), dz]), 2 * dz.numel() * dy.shape[1])]


#: Products and the activations beside them, in one launch or in two.
PRODUCTS: dict[str, Callable[[tuple[Any, ...], Any, bool], list[Work]]] = {
    "linear_activation_bwd": _linear_activation_bwd,
    "linear_activation_bwd_partial": _linear_activation_bwd_partial,
    "linear_activation_fwd": _linear_activation_fwd,
}


# ------------------------------------------------------------------------------- the counter


class Counting(TorchDispatchMode):
    """Sees every operation, computes those that are quick, and counts what all of them do."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()
        #: Whether the step is one that a GPU is given to capture
        self.fixed = False
        #: Whether large products and the activations beside them are one kernel
        self.fused = True
        #: Operations before those of clipping and optimiser
        self.before_clipping = 0
        #: What follows memory, while something does
        self.live: Live | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        if func.namespace in ("prim", "profiler"):
            return func(*args, **kwargs)
        if func.namespace not in ("aten", "bitfit_fast"):
            raise RuntimeError(f"it is not known what {func} does on a GPU")
        if func.namespace == "bitfit_fast" and packet.__name__ not in OURS | PRODUCTS:
            raise RuntimeError(f"it is not known what {func} launches")
        heavy = packet in _HEAVY or func.namespace == "bitfit_fast"
        if packet in _HEAVY_IF_LARGE:
            given = tensors((args, kwargs))
            heavy = any(t.numel() > _LARGE and t.is_floating_point() for t in given)
        out = _uncomputed(func, args, kwargs) if heavy else func(*args, **kwargs)
        if not (func.is_view or packet in _FREE):
            # the loss is copied for the caller, behind the graph
            outside = packet is aten.clone and self.fixed
            for work in self._works(func, args, kwargs, out):
                self.counted.note(packet.__name__, work, outside)
        if self.live is not None:
            self.live.note((args, kwargs), out)
        return out

    def fuses(self, a: Tensor, columns: int) -> bool:
        """Return whether a product with this first factor is one kernel with its activation."""
        of_units = a.dtype != torch.float32
        return self.fused and of_units and is_worth_measuring(a.shape[0], columns)

    def _works(self, func: Any, args: Any, kwargs: Any, out: Any) -> list[Work]:
        name = func.overloadpacket.__name__
        if func.namespace == "bitfit_fast" and name in PRODUCTS:
            of = out[0] if isinstance(out, tuple) else out
            return PRODUCTS[name](args, out, self.fuses(args[0], of.shape[1]))
        return [_work(func, args, kwargs, out)]


def _uncomputed(func: Any, args: Any, kwargs: Any) -> Any:
    """Return an operation's output with any values."""
    meta = tree_map_only(
        Tensor,
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"),
        (args, kwargs),
    )
    if meta[1].get("device") is not None:
        meta[1]["device"] = torch.device("meta")
    out = func(*meta[0], **meta[1])
    if func._schema.is_mutable and func.namespace == "aten":
        return args[0]
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), out
    )


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> Work:
    packet, name = func.overloadpacket, func.overloadpacket.__name__
    if func.namespace == "bitfit_fast":
        return OURS[name](args, out)
    if func is aten._foreach_add_.Tensor:
        return Work()  # AdamW's step counts, which lie on the host
    inputs, outputs = tensors((args, kwargs)), tensors(out)
    moved = size(inputs) + size(outputs)
    if func._schema.is_mutable and not outputs:  # of lists
        moved += size(tensors(args[0]))
    if packet in (aten.embedding, aten.index_select):
        moved = 2 * size(outputs)
    elif packet in (aten.index_add_, aten.index_copy_):
        moved = (3 if packet is aten.index_add_ else 2) * size([args[3]])
    launches = _LAUNCHES.get(packet, 1)
    lists = [a for a in args if isinstance(a, (list, tuple)) and tensors(a)]
    if name.startswith("_foreach") or name.startswith("_fused"):
        launches = -(-len(lists[0]) // _LIST_LIMIT[len(lists)])
    flops = 0
    if packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
    elif packet is aten.addmm_:
        flops = 2 * out.numel() * args[1].shape[1]
    return Work(launches, moved, flops)
