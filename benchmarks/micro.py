"""How it is timed: variants interleaved call by call, on inputs that no cache still holds."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from operations import Operation
from torch import Tensor

from bitfit_fast.training.measure import reset_peak_memory

__all__ = ["Settings", "copy_rate", "measure", "product_rate"]

#: Bytes of inputs to go through before one is used again: twice the L2 of an H200.
_CACHE = 2 * 64 * 2**20
_MOST_SETS = 48
_MOST_ROUNDS = 1000
#: Largest relative error against fp64 that is timed; PyTorch's own, some of which adds up
#: bf16 in bf16, may be ten times that, and the results name it.
_ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Settings:
    """Device, dtype and how long to measure.

    Attributes
    ----------
    seconds : float
        For each variant in each direction.
    rounds : int
        How many of a group there are at least.
    quick : bool
        Whether this only tests the benchmarks.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float
    rounds: int
    quick: bool

    @property
    def compiler(self) -> str:
        """Return what the variant `compile` is."""
        # a compilation takes seconds, and batches differ in their tokens
        return ("aot_eager" if self.quick else "inductor") + ", dynamic rows"


class _Inputs:
    """One set of inputs, its output's gradient, and the inputs whose gradients are wanted."""

    def __init__(
        self,
        operation: Operation,
        rows: int,
        width: int,
        settings: Settings,
        like: _Inputs | None = None,
    ) -> None:
        device = settings.device

        def random(*size: int, dtype: torch.dtype = settings.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, device=device) * scale).to(dtype)

        self.tensors = operation.inputs(rows, width, random)
        self.wanted = [self.tensors[name].requires_grad_() for name in operation.trains]
        if like is None:
            with torch.no_grad():
                self.outputs = [t.to("meta") for t in _tuple(operation.eager(**self.tensors))]
        else:
            self.outputs = like.outputs
        self.dy = random(*self.outputs[0].shape) if operation.trains else None
        for tensor in self.tensors.values():
            if tensor.shape[0] == rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


@functools.cache
def _compiled(eager: Callable[..., Any], backend: str) -> Callable[..., Any]:
    # widths and numbers stay constants, and no width falls back to eager mode silently
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(eager, fullgraph=True, backend=backend)


def _function(operation: Operation, variant: str, settings: Settings) -> Callable[..., Any]:
    if variant == "compile":
        return _compiled(operation.eager, settings.compiler.split(",")[0])
    return operation.extra.get(variant) or getattr(operation, variant)


def _backward(out: Tensor, inputs: _Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs.wanted, inputs.dy)


def _steps(
    function: Callable[..., Any], direction: str, inputs: Iterator[_Inputs], lag: int
) -> Iterator[Callable[[], Any]]:
    """Yield calls to be timed, one after the other; what they need is done before the yield.

    A backward pass runs on the graph of `lag` forward passes ago, so that what was saved for
    it has left the cache.
    """
    if direction != "backward":
        for given in inputs:

            def call(given: _Inputs = given) -> Any:
                out = function(**given.tensors)
                return _backward(out, given) if direction == "both" else out

            yield call
    graphs: deque[Callable[[], Any]] = deque()
    for given in inputs:
        if not given.wanted:
            yield functools.partial(function, **given.tensors)
            continue
        graphs.append(functools.partial(_backward, function(**given.tensors), given))
        if len(graphs) > lag:
            yield graphs.popleft()


def _round_cpu(calls: Sequence[Callable[[], Any]], ahead: float) -> list[tuple[float, float]]:
    times = []
    for call in calls:
        start = time.perf_counter()
        out = call()
        times.append((time.perf_counter() - start,) * 2)
        del out  # freeing is not timed
    return times


def _round_cuda(calls: Sequence[Callable[[], Any]], ahead: float) -> list[tuple[float, float]]:
    # the device waits while the host launches everything, so that no launch gap is timed
    torch.cuda._sleep(int(ahead * 2e9))
    marks, host, kept = [], [], []
    for call in calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        now = time.perf_counter()
        start.record()
        kept.append(call())
        end.record()
        host.append(time.perf_counter() - now)
        marks.append((start, end))
    torch.cuda.synchronize()
    return [(start.elapsed_time(end) / 1e3, h) for (start, end), h in zip(marks, host)]


def _interleaved(
    steps: dict[str, Iterator[Callable[[], Any]]], settings: Settings
) -> dict[str, tuple[list[float], list[float]]]:
    """Return each variant's times on the device and on the host, in seconds."""
    one_round = _round_cuda if settings.device.type == "cuda" else _round_cpu
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    names, warm_up, ahead, start = list(steps), 3, 0.0, 0.0
    for count in range(-warm_up, _MOST_ROUNDS):
        if count == 0:
            start = time.perf_counter()
        if count >= settings.rounds and (
            time.perf_counter() - start > settings.seconds * len(steps)
        ):
            break
        names.append(names.pop(0))
        taken = one_round([next(steps[name]) for name in names], ahead)
        # the first rounds compile; a long sleep would only waste the device's time
        ahead = min(1.5 * sum(host for _, host in taken), 5e-3)
        for name, pair in zip(names, taken):
            if count >= 0:
                for series, value in zip(times[name], pair):
                    series.append(value)
    return times


def _saved_bytes(function: Callable[..., Any], operation: Operation, given: _Inputs) -> int:
    """Return the bytes that the forward pass keeps alive, frozen and trained parameters apart."""
    parameters = {
        t.untyped_storage().data_ptr()
        for name, t in given.tensors.items()
        if name not in operation.trains or t.dim() == 1
    }
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(**given.tensors)
    del out
    return sum(kept.values())


def _peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return what a call allocates at most; None on a CPU, whose allocator does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    reset_peak_memory(device)
    before = torch.cuda.memory_allocated(device)
    out = call()
    peak = torch.cuda.max_memory_allocated(device) - before
    del out
    return peak


def _error(function: Callable[..., Any], operation: Operation, given: _Inputs) -> float:
    """Return the largest ‖out - ref‖ / ‖ref‖ of the output and every gradient, ref in fp64."""
    some = next(iter(given.tensors.values()))
    poison = [torch.full_like(some, math.nan) for _ in range(4)]
    del poison  # the next empty tensors of this size begin as NaN
    out = function(**given.tensors)
    results = _tuple(out)
    wide = {name: t.detach().double() for name, t in given.tensors.items()}
    if operation.trains:
        gradients = _backward(out, given)
        results += gradients
        if operation.p:
            # each variant draws its own mask, which shows in the gradient of x
            mask = wide["mask"] = gradients[operation.trains.index("x")] != 0
            spread = (operation.p * (1 - operation.p) / mask.numel()) ** 0.5
            if not abs(mask.double().mean().item() - 1 + operation.p) < 6 * spread + 1e-3:
                return math.inf
        leaves = [wide[name].requires_grad_() for name in operation.trains]
        exact = operation.eager(**wide)
        references = (exact, *torch.autograd.grad(exact, leaves, given.dy.double()))
    else:
        references = _tuple(operation.eager(**wide))
    worst = 0.0
    for result, reference in zip(results, references, strict=True):
        error = ((result.double() - reference).norm() / reference.norm()).item()
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def _rate(call: Callable[[], Any], amount: float, settings: Settings) -> float:
    cuda = settings.device.type == "cuda"
    one_round = _round_cuda if cuda else _round_cpu
    count = 3 if settings.quick else 60 if cuda else 15
    times = [one_round([call], 0.0)[0][0] for _ in range(count)]
    return amount / min(times)


def copy_rate(settings: Settings) -> float:
    """Return the bytes a second that a large copy reads and writes."""
    size = 2**20 if settings.quick else 2**31 if settings.device.type == "cuda" else 2**28
    source = torch.empty(size // 4, dtype=torch.int32, device=settings.device).random_()
    target = torch.zeros_like(source)
    return _rate(lambda: target.copy_(source), 2 * size, settings)


def product_rate(settings: Settings) -> float:
    """Return the operations a second of a large square matrix product."""
    n = 64 if settings.quick else 8192 if settings.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=settings.device).to(settings.dtype) for _ in range(2))
    return _rate(lambda: a @ b, 2 * n**3, settings)


def measure(
    operation: Operation,
    rows: int,
    width: int,
    settings: Settings,
    limits: tuple[float, float],
) -> list[dict[str, Any]]:
    """Check and time every variant of an operation at one shape.

    Parameters
    ----------
    operation : Operation
    rows, width : int
        Tokens, and the width of the model.
    settings : Settings
    limits : tuple of float
        Bytes and operations a second that this device was measured to reach.

    Returns
    -------
    list of dict
        For each direction and variant: `ms` with p20, p50 and p80, `samples_ms`, and the rest;
        or an `error` in place of all of these.
    """
    cuda = settings.device.type == "cuda"
    first = _Inputs(operation, rows, width, settings)
    written = sum(t.nbytes for t in first.outputs)
    floor = operation.floor(first.tensors, written)
    size = sum(t.nbytes for t in first.tensors.values()) + written
    count = 2 if settings.quick else min(_MOST_SETS, max(2, -(-_CACHE // size)))
    more = (_Inputs(operation, rows, width, settings, first) for _ in range(count - 1))
    sets = [first, *more]
    functions, facts, failed = {}, {}, {}
    for variant in operation.variants:
        function = _function(operation, variant, settings)
        try:
            error = _error(function, operation, first)
            allowed = _ALLOWED[settings.dtype] * (10 if variant in ("eager", "compile") else 1)
            if error > allowed:
                raise ArithmeticError(f"differs from fp64 by {error:.2g}")
            saved = _saved_bytes(function, operation, first) if operation.trains else 0
            functions[variant] = function
            facts[variant] = {"relative_error": _short(error), "saved_bytes": saved}
        except Exception as failure:  # one variant's failure is a result, and the rest goes on
            failed[variant] = f"{type(failure).__name__}: {failure}".split("\n")[0][:300]
    found = []
    for direction in operation.directions:
        # no two calls in a row share inputs, whichever variants they are of
        inputs = itertools.cycle(sets)
        lag = max(1, count // max(1, len(functions)))
        steps = {
            name: _steps(function, direction, inputs, lag) for name, function in functions.items()
        }
        peaks = {name: _peak_bytes(next(step), settings.device) for name, step in steps.items()}
        times = _interleaved(steps, settings) if steps else {}
        moved, flops = floor[direction]
        floor_ms = 1e3 * max(moved / limits[0], flops / limits[1])
        for variant in operation.variants:
            row = {
                "operation": operation.name,
                "direction": direction,
                "tokens": rows,
                "width": width,
                "variant": variant,
            }
            found.append(row)
            if variant in failed:
                row["error"] = failed[variant]
                continue
            samples, host = ([1e3 * t for t in series] for series in times[variant])
            cuts = statistics.quantiles(samples, n=10, method="inclusive")
            row.update(
                ms={f"p{10 * i}": _short(cuts[i - 1]) for i in (2, 5, 8)},
                rounds=len(samples),
                host_ms=_short(statistics.median(host)) if cuda else None,
                bytes=moved,
                flops=flops,
                floor_ms=_short(floor_ms),
                share_of_limit=_short(floor_ms / cuts[4]),
                peak_bytes=peaks[variant],
                **facts[variant],
                samples_ms=samples,
            )
    return found
