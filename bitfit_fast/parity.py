"""Whether the fast backend computes what plain PyTorch does, on a given model and given data.

Gradients are compared with those of the same model in float64, beside PyTorch's own error in the
same precision; losses over some steps of training with each other. Dropout is off throughout, as
masks drawn in another order are no error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from .data.batches import Batch, move, training_batches
from .data.task import TaskData
from .errors import BitFitError
from .kinds import KINDS, forward
from .models.families import biases
from .models.loading import align_weights, ensure_padding
from .random_state import device_of
from .selection import Selection
from .training.backends import BACKENDS
from .training.checks import check_length, check_outputs, choose_device
from .training.settings import MIN_STEPS, Plan, Settings

__all__ = ["Parity", "Row", "compare"]

#: How far the gradient in fp32 may be from the true one, where PyTorch is not farther.
_FP32 = 1e-6
#: By how much more than PyTorch the fast backend may err.
_FACTOR = 2.0
#: Gradients in float64 that are rounding, compared with the largest.
_NOTHING = 1e-12
#: Differences of losses that are none.
_LOSS = {"fp32": 1e-4, "bf16": 1e-2}


@dataclass(frozen=True)
class Row:
    """Relative errors of one gradient, |g - g64| / |g64|: the fast backend's and PyTorch's.

    PyTorch's in bf16 are those of autocast.
    """

    name: str
    term: str
    layer: int | None
    fp32: float
    fp32_pytorch: float
    bf16: float
    bf16_pytorch: float


@dataclass(frozen=True)
class Parity:
    """What `compare` found.

    Attributes
    ----------
    rows : tuple of Row
        One for each trained parameter whose gradient is not identically zero.
    whole : Row
        All gradients as one vector.
    losses : dict of str to list of float
        Over the steps: of `reference` and `fast`, in fp32 and bf16.
    """

    rows: tuple[Row, ...]
    whole: Row
    losses: dict[str, list[float]]

    def difference(self, precision: str) -> float:
        """Return the largest difference of the losses between fast and reference."""
        pairs = zip(self.losses[f"reference {precision}"], self.losses[f"fast {precision}"])
        return max(abs(a - b) for a, b in pairs)

    @property
    def failures(self) -> list[str]:
        """What is not as it should be, in words; empty for parity."""
        whole, found = self.whole, []  # comparisons are so that nan is a failure
        if not all(math.isfinite(loss) for losses in self.losses.values() for loss in losses):
            return ["a loss is not finite"]
        if not whole.fp32 <= max(_FP32, _FACTOR * whole.fp32_pytorch):
            found.append(
                f"the gradient in fp32 is off by {whole.fp32:.1e}, "
                f"where PyTorch's is by {whole.fp32_pytorch:.1e}"
            )
        if not whole.bf16 <= _FACTOR * whole.bf16_pytorch:
            found.append(
                f"the gradient in bf16 is off by {whole.bf16:.1e}, "
                f"where autocast's is by {whole.bf16_pytorch:.1e}"
            )
        rounding = max(
            abs(a - b) for a, b in zip(self.losses["reference fp32"], self.losses["reference bf16"])
        )
        for precision, allowed in _LOSS.items():
            if precision == "bf16":
                allowed = max(allowed, _FACTOR * rounding)
            if not self.difference(precision) <= allowed:
                found.append(
                    f"losses in {precision} differ by up to {self.difference(precision):.1e}"
                )
        return found

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if self.failures:
            return "no parity: " + "; ".join(self.failures)
        whole = self.whole
        return (
            f"parity: gradients in fp32 within {whole.fp32:.1e} of float64 (PyTorch "
            f"{whole.fp32_pytorch:.1e}), in bf16 {whole.bf16:.1e} (autocast "
            f"{whole.bf16_pytorch:.1e}); losses over {len(self.losses['fast fp32'])} steps "
            f"within {self.difference('fp32'):.1e} and {self.difference('bf16'):.1e}"
        )

    def table(self, by_layer: bool = False) -> Table:
        """Return the errors by term, the worst of its layers, or of every parameter."""
        table = Table(
            "parameter" if by_layer else "term (worst layer)",
            *("fp32", "PyTorch", "bf16", "autocast"),
            title="Relative error of the gradients against float64",
        )
        for column in table.columns[1:]:
            column.justify = "right"

        def show(label: str, row: Row, style: str | None = None) -> None:
            errors = (row.fp32, row.fp32_pytorch, row.bf16, row.bf16_pytorch)
            table.add_row(label, *(f"{error:.1e}" for error in errors), style=style)

        if by_layer:
            for row in self.rows:
                show(row.name, row)
        else:
            for term in dict.fromkeys(row.term for row in self.rows):
                worst = max((r for r in self.rows if r.term == term), key=lambda r: r.bf16)
                show(term if worst.layer is None else f"{term} ({worst.layer})", worst)
        table.add_section()
        show("all as one", self.whole, "bold")
        return table

    def as_json(self) -> dict[str, Any]:
        """Return everything as numbers and words."""
        return {**asdict(self), "failures": self.failures, "verdict": self.verdict}


@contextmanager
def _fast(model: nn.Module, plan: Plan, precision: str) -> Iterator[None]:
    plan = replace(plan, precision=precision)
    undo, _ = BACKENDS["fast"].patch(model, Selection.of(model), plan)
    try:
        yield
    finally:
        undo()


def _gradients(model: nn.Module, batch: Batch, autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    device = device_of(model).type
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = forward(model, batch).loss
    loss.backward()
    return {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _relative(ours: Tensor, true: Tensor) -> float:
    return float((ours - true).norm() / true.norm().clamp_min(1e-300))


def _widened(batch: Batch) -> Batch:
    return {
        key: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for key, v in batch.items()
    }


def _losses(
    model: nn.Module, batches: list[Batch], plan: Plan, backend: str, label: str, show: bool
) -> list[float]:
    chosen = BACKENDS[backend]
    model = copy.deepcopy(model)
    undo, _ = chosen.patch(model, Selection.of(model), plan)
    step = chosen.step(model, plan)
    try:
        steps = track(batches, f"{label:14}", disable=not show, transient=True)
        return [float(step(batch)) for batch in steps]
    finally:
        step.close()
        undo()


def compare(
    model: nn.Module,
    tokenizer: Any,
    data: TaskData,
    settings: Settings | None = None,
    steps: int = 50,
    console: Console | None = None,
) -> Parity:
    """Compare the fast backend with plain PyTorch.

    Parameters
    ----------
    model : PreTrainedModel
        After `select`; it is not changed.
    tokenizer : PreTrainedTokenizerBase
        The model's own.
    data : TaskData
        Its `train` split is used: the first batch for the gradients, and one batch a step.
    settings : Settings, optional
        Batch size, length, learning rate, seed, device and memory mode.
    steps : int
        Of training, in each precision and with each backend.
    console : rich.console.Console, optional
        Where progress goes.

    Returns
    -------
    Parity

    Raises
    ------
    BitFitError
        If the fast backend cannot train this model, or there is nothing to train on.
    """
    kind = KINDS[data.kind]
    settings = (settings or Settings()).for_kind(kind)
    assert settings.max_length is not None
    selection = Selection.of(model)
    if steps < 1:
        raise BitFitError(f"steps must be at least 1, not {steps}")
    if data.train is None or data.train.labels is None:
        raise BitFitError(f"the task {data.name} has no training split with labels")
    check_outputs(model, data)
    model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    check_length(settings.max_length, model, tokenizer)
    ensure_padding(model, tokenizer)
    device = choose_device(settings.device)
    # the schedule is that of a run no shorter than BitFit needs, whatever else was asked for
    settings = replace(settings, epochs=None, max_steps=max(steps, MIN_STEPS))
    plan = Plan.of(settings, selection.method, 1, device)
    if (refusal := BACKENDS["fast"].refusal(model, selection, plan)) is not None:
        raise BitFitError(f"backend 'fast' cannot train this model: {refusal}")
    model.to(device).eval()
    align_weights(model)
    if data.labels is None:
        model.config.problem_type = "regression"  # type: ignore[union-attr]
    sample = data.train.take(list(range(min(len(data.train), steps * settings.batch_size))))
    options = {name: getattr(settings, name) for name in kind.options}
    features = kind.encode(sample, tokenizer, options).features
    collate = kind.collate(tokenizer)
    stream = training_batches(features, collate, settings.batch_size, settings.seed)
    batches = [move(next(stream)[1], device) for _ in range(steps)]

    found = {"fp32_pytorch": _gradients(model, batches[0])}
    found["bf16_pytorch"] = _gradients(model, batches[0], autocast=True)
    for precision in ("fp32", "bf16"):
        with _fast(model, plan, precision):
            found[precision] = _gradients(model, batches[0])
    true = _gradients(copy.deepcopy(model).double(), _widened(batches[0]))
    zero = {bias.name for bias in biases(model) if bias.zero_gradient}
    # nor is there anything to compare where the loss does not depend on a parameter, as on the
    # bias of a span's scores, which is added to all of them
    largest = max((float(g.norm()) for g in true.values()), default=0.0)
    zero |= {name for name, g in true.items() if float(g.norm()) <= _NOTHING * largest}
    trained = [t for t in selection.trained if t.name in true and t.name not in zero]
    kinds = ("fp32", "fp32_pytorch", "bf16", "bf16_pytorch")
    rows = tuple(
        Row(
            t.name, t.term, t.layer,
            *(_relative(found[kind][t.name], true[t.name]) for kind in kinds),
        )
        for t in trained
    )  # fmt: skip

    def joined(gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([gradients[t.name].flatten() for t in trained])

    whole = Row(
        "all", "all", None,
        *(_relative(joined(found[kind]), joined(true)) for kind in kinds),
    )  # fmt: skip
    losses = {
        f"{backend} {precision}": _losses(
            model,
            batches,
            replace(plan, precision=precision, memory="fast" if backend != "fast" else plan.memory),
            backend,
            f"{backend} {precision}",
            console is not None,
        )
        for precision in ("fp32", "bf16")
        for backend in ("reference", "fast")
    }
    return Parity(rows, whole, losses)
