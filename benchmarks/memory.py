"""Measure the memory of training steps: what is kept for backward, and the peak.

    python benchmarks/memory.py --model bert-base --task 64 --batch-size 16

Kept is what autograd saves, each storage once, parameters apart; copies of frozen weights in
another dtype, as autocast makes them, are named apart. The peak is that of a whole step above
what was allocated before it: on a GPU as PyTorch's allocator counts it, on a CPU from the
allocations that its profiler sees, also those inside an operation.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from provenance import QUICK, command_line, provenance, write_results
from rich.console import Console
from rich.table import Table
from saved import Saved
from steps import VARIANTS, Setting, batches, build, numbers
from torch.profiler import ProfilerActivity, profile

MEASURED = (
    "fp32",
    "autocast",
    "bf16",
    "fast-fp32",
    "fast-bf16",
    "fast-bf16-low",
    "fast-bf16-lower",
    "fast-bf16-lowest",
)


def peak_bytes(call: Any, device: torch.device) -> int:
    """Return how much more memory of tensors there is during a call than before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Return the memory of a variant's second step and after."""
    variant = VARIANTS[name]
    (batch,) = batches(setting, 1)
    batch = variant.input(batch)
    tokens = int(batch["attention_mask"].sum())
    row = {**setting.named(), "variant": name, "tokens": tokens}
    try:
        step = build(variant, setting)
        step(batch)
        model = step.inner.model  # type: ignore[attr-defined]
        with Saved(model) as saved:
            step(batch)
        layers = model.config.num_hidden_layers
        row |= {
            "saved_bytes": saved.bytes,
            "saved_bytes_per_token_layer": round(saved.bytes / tokens / layers, 1),
            "saved_weight_copies": saved.copies,
            "peak_bytes": peak_bytes(lambda: step(batch), setting.device),
        }
    except Exception as failure:  # one variant's failure is a result, and the rest goes on
        row["error"] = f"{type(failure).__name__}: {failure}".split("\n")[0][:300]
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """Return all rows."""
    title = "{model}, {tokens} tokens, batch {batch_size}".format(**rows[0])
    head = ("variant", "dropout", "kept, B/token/layer", "MB kept", "MB of weights", "MB peak")
    result = Table(*head, title=title)
    for column in result.columns[1:]:
        column.justify = "right"
    for row in rows:
        cells = [row["variant"], f"{row['dropout']:g}"]
        if "error" in row:
            result.add_row(*cells, row["error"][:60])
            continue
        sizes = (row[k] / 1e6 for k in ("saved_bytes", "saved_weight_copies", "peak_bytes"))
        each = f"{row['saved_bytes_per_token_layer']:,.0f}"
        result.add_row(*cells, each, *(f"{size:,.1f}" for size in sizes))
    return result


def main() -> None:
    """Measure every variant, and write the results."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bert-base")
    parser.add_argument("--task", default="128" if cuda else "64", help="as in step.py")
    parser.add_argument("--batch-size", type=int, default=64 if cuda else 16)
    parser.add_argument("--dropout", type=numbers(float), default=[0.0, 0.1])
    parser.add_argument("--variants", type=numbers(str), default=list(MEASURED))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    a = parser.parse_args()
    if QUICK:
        a.model, a.batch_size = "tiny", 4
    if a.threads:
        torch.set_num_threads(a.threads)
    device, start = torch.device(a.device), time.monotonic()
    rows: list[dict[str, Any]] = []
    results = {
        **provenance(command_line(), device),
        "threads": torch.get_num_threads(),
        "quick": QUICK,
        "finished": False,
        "seconds": 0.0,
        "rows": rows,
    }
    for dropout, name in itertools.product(a.dropout, a.variants):
        rows.append(measure(name, Setting(a.model, a.task, a.batch_size, dropout, device)))
        results["finished"] = len(rows) == len(a.dropout) * len(a.variants)
        results["seconds"] = round(time.monotonic() - start, 1)
        if a.output:
            write_results(a.output, results)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    Console(width=max(Console().width, 110)).print(table(rows))


if __name__ == "__main__":
    main()
