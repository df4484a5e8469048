"""What a compiled reference does on a GPU, as inductor would fuse it.

The model is compiled up to inductor's schedule of kernels, on fake tensors of static shapes, and
no further: no code is generated and nothing is computed. Each kernel of the schedule is a launch
whose bytes are those that inductor counts for it (each buffer once); what it leaves to libraries,
products and attention, is a launch with its operations, and attention what `flash` is in
`cost_model`. Behind the model come clipping and optimiser as the eager reference runs them.

What is approximate: it is inductor's schedule for a CPU, whose choices of what to fuse are a
little other than for a GPU, and whose autocast leaves LayerNorm in bf16, as that of the eager
reference here; sums over tokens are one launch, though a GPU may split them into two; and cast
weights are counted as the schedule has them, which is once a step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from steps import Batch, Setting, _store_in_bf16, load, plan
from torch import Tensor, nn
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from work import Counted, Work, flash_backward

from bitfit_fast.training.reference import ReferenceStep

__all__ = ["COMPILED", "count_compiled"]

#: The precision and whether weights are stored in it, by the names of `steps.VARIANTS`.
COMPILED = {"autocast-compiled": ("bf16", False), "bf16-compiled": ("fp32", True)}


class _Modelled(Exception):
    """The model's forward and backward pass are done; what follows is not the model's."""


def _attention(node: Any, name: str) -> list[Work]:
    """Return the launches of PyTorch's flash attention, of `[B, H, S, D]`."""
    backward = "backward" in name
    q = node.inputs[1 if backward else 0]
    batch, heads, length, width = map(int, q.get_size())
    rows, bytes_of = 4 * batch * heads * length, q.get_dtype().itemsize
    number = batch * heads * length * width * bytes_of
    product = 2 * batch * heads * length * length * width
    if backward:
        return list(flash_backward(number, rows, bytes_of, product))
    return [Work(1, 4 * number + rows, 2 * product)]


def _note(counted: Counted, node: Any) -> None:
    """Count a kernel of a schedule."""
    if isinstance(node, NopKernelSchedulerNode):
        return
    if isinstance(node, ExternKernelSchedulerNode):
        if isinstance(node.node, MultiOutput):
            return
        name = str(getattr(node.node, "op_overload", None) or node.node.python_kernel_name)
        if "scaled_dot_product" in name:
            for work in _attention(node.node, name):
                counted.note("flash_bwd" if "backward" in name else "flash_fwd", work)
            return
        flops = node.estimate_flops() or 0
        counted.note(name, Work(1, node.get_read_write_buffers_sizes(), flops))
        return
    counted.note("fused", Work(1, node.get_read_write_buffers_sizes()))


class _Scheduled(Exception):
    """The kernels of a graph are known, and need no code."""


def _scheduled(counted: Counted) -> Callable[..., Any]:
    """Return a compiler of graphs that counts their kernels, and computes zeros."""

    def codegen(lowered: GraphLowering) -> None:
        lowered._update_scheduler()
        for node in lowered.scheduler.nodes:
            _note(counted, node)
        raise _Scheduled

    def compiler(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        (outputs,) = next(n for n in graph.graph.nodes if n.op == "output").args
        made = [None if o is None else o.meta["val"] for o in outputs]
        with mock.patch.object(GraphLowering, "codegen", codegen):
            try:
                compile_fx.compile_fx_inner(graph, inputs, **options)
            except Exception as error:
                if not isinstance(getattr(error, "inner_exception", error), _Scheduled):
                    raise
        # as large and as laid out as the compiled graph's
        return compile_fx.make_boxed_func(
            lambda *arguments: [
                torch.zeros_like(o, device="cpu") if isinstance(o, Tensor) else o for o in made
            ]
        )

    return compiler


def count_compiled(
    variant: str, setting: Setting, batch: Batch, tail: list[tuple[str, Work]]
) -> Counted:
    """Count a step of a compiled reference.

    Parameters
    ----------
    variant : str
        A key of `COMPILED`.
    setting : Setting
        On a CPU.
    batch : dict
        What the model is given.
    tail : list of (str, Work)
        What an eager step does behind the model: clipping and optimiser.
    """
    counted = Counted(outside=list(tail), graphs=2)
    precision, stored = COMPILED[variant]
    model: nn.Module = load(setting)
    if stored:
        _store_in_bf16(model)
    step = ReferenceStep(model, plan(setting, precision=precision))

    backend = functools.partial(compile_fx.compile_fx, inner_compile=_scheduled(counted))
    torch._dynamo.reset()
    step.model = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    with (
        mock.patch.object(nn.utils, "clip_grad_norm_", side_effect=_Modelled),
        config.patch(force_disable_caches=True),
        contextlib.suppress(_Modelled),
    ):
        step(batch)
    torch._dynamo.reset()
    return counted
