"""Count what a training step does on a GPU: launches, bytes, operations, and what it keeps.

    python benchmarks/cost_model.py                  # a table
    python benchmarks/cost_model.py --compiled --long --output benchmarks/results/cost-model.json

The step runs on CPU tensors under a dispatch mode that sees every operation before it runs. What
takes long is not computed. An operation of `bitfit_fast` counts as what its launcher would
launch; each tensor that an operation takes or gives counts once, as if the cache held it no longer
and no shorter than that. There is no noise in the counts, and no GPU is needed.

Predicted is the time that an H200 would take if every operation reached the hardware's limit or
took a launch, one after the other: `predicted_ms` with each launch asked for by the host, and
`graph_ms` with all in CUDA graphs that can be there, for which a launch is assumed to take a third
of that. `--compiled` adds the references as inductor would fuse them; see `compiled` for what is
approximate about that. `--long` counts 64 sequences of 128 tokens, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from live import Live
from provenance import command_line, provenance
from rich.console import Console
from rich.table import Table
from saved import Saved
from steps import VARIANTS, Setting, backend, batches, build
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from work import DEVICE, Counted, Work, flash_backward, plus, size, tensors

from bitfit_fast import arena
from bitfit_fast.encoder import backward, embeddings, forward, product, sums
from bitfit_fast.files import write_json
from bitfit_fast.kernels._attention import attention_config
from bitfit_fast.kernels._launch import column_config
from bitfit_fast.kernels.attention_bwd import attention_bwd_passes, attention_sums
from bitfit_fast.kernels.layer_norm import layer_norm_config
from bitfit_fast.packing import Packing
from bitfit_fast.training import fixed
from bitfit_fast.training.fast import FastStep

__all__ = ["COUNTED", "count", "count_all"]

aten = torch.ops.aten

#: What is counted, by the names of `steps.VARIANTS`.
COUNTED = {
    "reference": "autocast",
    "fast": "fast-bf16",
    "low": "fast-bf16-low",
    "lower": "fast-bf16-lower",
    "lowest": "fast-bf16-lowest",
}

#: What is counted on request: references as `torch.compile` runs them.
COMPILED = {"compiled": "autocast-compiled", "compiled-bf16": "bf16-compiled"}
#: Sequences and tokens of each: a batch of GLUE's kind, and one of 8,192 tokens.
LONG = ("128", 64)

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


def _linear_activation_bwd(args: tuple[Any, ...], out: Any) -> Work:
    # the vendor's product, and the activation's backward pass over what it gave
    dy, w, saved, b = args[:4]
    dz = out[0]
    product = Work(1, size([dy, w, dz]), 2 * dz.numel() * dy.shape[1])
    after = [t for t in (saved, b, dz) if t is not None]
    return plus(product, plus(_column_work(dz, after, 1), Work(0, size([dz]))))


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


_OURS: dict[str, Callable[[tuple[Any, ...], Any], Work]] = {
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
    "linear_activation_bwd": _linear_activation_bwd,
    "squares": _squares,
}


# ------------------------------------------------------------------------------- the counter


class _Mode(TorchDispatchMode):
    """Sees every operation, computes those that are quick, and counts what all of them do."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()
        #: Whether the step is one that a GPU is given to capture
        self.fixed = False
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
        if func.namespace == "bitfit_fast" and packet.__name__ not in _OURS:
            raise RuntimeError(f"it is not known what {func} launches")
        heavy = packet in _HEAVY or func.namespace == "bitfit_fast"
        out = _uncomputed(func, args, kwargs) if heavy else func(*args, **kwargs)
        if not (func.is_view or packet in _FREE):
            # the loss is copied for the caller, behind the graph
            outside = packet is aten.clone and self.fixed
            self.counted.note(packet.__name__, _work(func, args, kwargs, out), outside)
        if self.live is not None:
            self.live.note((args, kwargs), out)
        return out


def _uncomputed(func: Any, args: Any, kwargs: Any) -> Any:
    """Return an operation's output with any values."""
    meta = tree_map_only(
        Tensor,
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"),
        (args, kwargs),
    )
    out = func(*meta[0], **meta[1])
    if func._schema.is_mutable and func.namespace == "aten":
        return args[0]
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), out
    )


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> Work:
    packet, name = func.overloadpacket, func.overloadpacket.__name__
    if func.namespace == "bitfit_fast":
        return _OURS[name](args, out)
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


# --------------------------------------------------------------------------------- attention


def _our_attention(
    counted: Counted, q: Tensor, k: Tensor, packing: Any, backward: bool, kv: bool, sums: int = 0
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
    offsets += sums
    sizes = queries, packing.longest, q.shape[2], q.element_size()
    passes = attention_bwd_passes(*sizes, kv)
    one_launch = kv and len(passes) == 1
    one_block = packing.longest <= attention_config(*sizes, passes[0])["BLOCK_N"]
    numbers = 0 if one_launch else 8 * q.shape[0] * q.shape[1]
    products = (3 if one_block else 5) + (2 if one_launch else 0)
    moved = 3 * of_q + of_kv + (of_kv if one_launch else 0) + numbers + offsets
    counted.note("attention_bwd", Work(1, moved, products * product))
    if len(passes) == 2:
        moved = 2 * of_q + 2 * of_kv + numbers + offsets
        counted.note("attention_bwd_kv", Work(1, moved, 4 * product))


def _stack_attention(mode: _Mode) -> tuple[Any, Any]:
    """Return what stands in for the stack's attention while it is counted."""

    def fwd(q, k, v, packing, p, seed, bias):  # type: ignore[no-untyped-def]
        _our_attention(mode.counted, q, k, packing, False, True)
        return torch.empty(q.shape, dtype=q.dtype)

    def bwd(do, q, k, v, packing, p, seed, bias, needs_kv=True, q_sums=None, v_sums=None):  # type: ignore[no-untyped-def]
        sums = size(tensors((q_sums, v_sums)))
        _our_attention(mode.counted, q, k, packing, True, needs_kv, sums)
        if needs_kv and q.shape[0] == k.shape[0]:
            joined = torch.empty(q.shape[0], 3, *q.shape[1:], dtype=q.dtype)
            return joined[:, 0], joined[:, 1:]
        dkv = torch.empty(k.shape[0], 2, *k.shape[1:], dtype=q.dtype) if needs_kv else None
        return torch.empty(q.shape, dtype=q.dtype), dkv

    return fwd, bwd


def _flash(mode: _Mode) -> Any:
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


# -------------------------------------------------------------------------------- the counts


_of_mask = Packing.of_mask


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


def _loading(mode: _Mode) -> Any:
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


def _clip(mode: _Mode) -> Any:
    """Return what clips as on a GPU, where `clip_grad_norm_` works on lists."""

    def clip(parameters: Any, max_norm: float) -> None:
        mode.before_clipping = len(mode.counted.works)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0)))
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))

    return clip


@contextlib.contextmanager
def _as_on_a_gpu(mode: _Mode) -> Iterator[None]:
    fwd, bwd = _stack_attention(mode)
    with (
        backend("torch"),
        mock.patch.object(forward, "attention_fwd", fwd),
        mock.patch.object(backward, "attention_bwd", bwd),
        mock.patch.object(backward, "attention_sums", _attention_sums),
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


def _batch(variant: str, setting: Setting) -> tuple[dict[str, Any], int]:
    """Return what a variant is given, and how many tokens that is."""
    (batch,) = batches(setting, 1)
    batch = VARIANTS[variant].input(batch)
    tokens = int(batch["attention_mask"].sum())
    if tokens == batch["attention_mask"].numel():
        # without padding there is no mask to look at, which a GPU would be waited for
        del batch["attention_mask"]
    return batch, tokens


def count(variant: str, setting: Setting) -> tuple[dict[str, Any], Counted]:
    """Count the second step of a variant.

    Parameters
    ----------
    variant : str
        A key of `steps.VARIANTS`.
    setting : Setting
        On a CPU.

    Returns
    -------
    dict, Counted
        Launches, bytes, flops, bytes kept for backward a token and layer, and the time that
        `DEVICE` would need, with `graph_ms` for what a GPU is given to capture; and all of it
        by operation.
    """
    mode = _Mode()
    batch, tokens = _batch(variant, setting)
    step = build(VARIANTS[variant], setting)
    if isinstance(step.inner, FastStep):  # type: ignore[attr-defined]
        # what a GPU is given to capture
        step.inner.fixed = step.inner.of_fixed_size(after=0)  # type: ignore[attr-defined]
        mode.fixed = True
    for group in step.inner.optimizer.param_groups:  # type: ignore[attr-defined]
        group["foreach"] = None if group["fused"] else True
    with _as_on_a_gpu(mode):
        for _ in range(max(2, VARIANTS[variant].begins)):
            step(batch)
        mode.counted = counted = Counted()
        step(batch)
        counted.tail = counted.works[mode.before_clipping :]
        mode.counted = Counted()
        with Saved(step.inner.model) as saved:  # type: ignore[attr-defined]
            step(batch)
        mode.live = live = Live()
        step(batch)
        live.close()
    layers = step.inner.model.config.num_hidden_layers  # type: ignore[attr-defined]
    kept = round(saved.bytes / tokens / layers, 1)
    memory = {"saved_bytes_per_token_layer": kept, "peak_bytes": live.peak}
    return _row(counted, mode.fixed, **memory), counted


def _row(counted: Counted, in_graphs: bool, **more: Any) -> dict[str, Any]:
    total = counted.total
    row = {"launches": total.launches, "bytes": total.bytes, "flops": total.flops, **more}
    row["predicted_ms"] = float(f"{1e3 * counted.seconds:.4g}")
    if in_graphs:
        row["graph_ms"] = float(f"{1e3 * counted.seconds_in_graphs:.4g}")
    return row


def count_all(setting: Setting, compiled: bool = False) -> dict[str, dict[str, Any]]:
    """Count every variant of `COUNTED`, and on request those of `COMPILED`."""
    counts, works = {}, {}
    for name, variant in COUNTED.items():
        counts[name], works[name] = count(variant, setting)
    if compiled:
        from compiled import count_compiled

        batch, _ = _batch(COUNTED["reference"], setting)
        for name, variant in COMPILED.items():
            counted = count_compiled(variant, setting, batch, works["reference"].tail)
            counts[name] = _row(counted, True)
    return counts


def table(counts: dict[str, dict[str, Any]], title: str) -> Table:
    """Return the counts, and the best time of each over that of the fast step in a graph."""
    result = Table(
        "", "launches", "MB moved", "GFLOP", "kept, B/token/layer", "predicted ms", "in graphs",
        "/ fast in a graph", title=title,
    )  # fmt: skip
    for column in result.columns[1:]:
        column.justify = "right"
    for name, row in counts.items():
        graph, kept = row.get("graph_ms"), row.get("saved_bytes_per_token_layer")
        best = graph or row["predicted_ms"]
        result.add_row(
            name,
            str(row["launches"]),
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['flops'] / 1e9:,.1f}",
            "" if kept is None else f"{kept:,.0f}",
            f"{row['predicted_ms']:.3f}",
            "" if graph is None else f"{graph:.3f}",
            f"{best / counts['fast']['graph_ms']:.2f}",
        )
    return result


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bert-base")
    parser.add_argument("--task", default="64", help="a task of lengths.json, or a length")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--compiled", action="store_true", help="compiled references, too")
    parser.add_argument("--long", action="store_true", help="64 sequences of 128 tokens, too")
    parser.add_argument("--json", action="store_true", help="print JSON of the first setting")
    parser.add_argument("--output", type=Path, help="file for the counts, and where they come from")
    parser.add_argument("--operations", choices=COUNTED, help="print each operation of one")
    return parser.parse_args()


def main() -> None:
    """Count, and print a table or JSON."""
    a = parse()
    sizes = [(a.task, a.batch_size), *([LONG] if a.long else [])]
    device = torch.device("cpu")
    settings = [Setting(a.model, task, number, a.dropout, device) for task, number in sizes]
    if a.operations:
        for name, work in count(COUNTED[a.operations], settings[0])[1].by_name().items():
            print(
                f"{name:32} {work.launches:6} {work.bytes / 1e6:10.2f} MB {work.flops / 1e9:10.2f}"
            )
        return
    found = [count_all(setting, a.compiled) for setting in settings]
    if a.output:
        results = {**provenance(command_line(), device), "counts": found[0]}
        if a.long:
            results["long"] = {**settings[1].named(), "counts": found[1]}
        write_json(a.output, results)
    if a.json:
        print(json.dumps(found[0], indent=2))
        return
    for setting, counts in zip(settings, found):
        length = f"{setting.task} tokens" if setting.task.isdigit() else setting.task
        words = f"{a.model}, {length}, batch {setting.batch_size}, dropout {a.dropout:g}"
        Console(width=max(Console().width, 120)).print(table(counts, f"{words}; {DEVICE.name}"))


if __name__ == "__main__":
    main()
