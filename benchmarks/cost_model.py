"""Count what a training step does on a GPU: launches, bytes, operations, and what it keeps.

    python benchmarks/cost_model.py                  # a table
    python benchmarks/cost_model.py --compiled --apart --long --output FILE   # all there is

The step runs on CPU tensors under a dispatch mode that sees every operation before it runs. What
takes long is not computed. An operation of `bitfit_fast` counts as what its launcher would
launch; each tensor that an operation takes or gives counts once, as if the cache held it no longer
and no shorter than that. There is no noise in the counts, and no GPU is needed.

Predicted is the time that an H200 would take if every operation reached the hardware's limit or
took a launch, one after the other: `predicted_ms` with each launch asked for by the host, and
`graph_ms` with all in CUDA graphs that can be there, for which a launch is assumed to take a third
of that. `--compiled` adds the references as inductor would fuse them; see `compiled` for what is
approximate about that. A large product and the activation beside it count as one kernel that
reaches the rate of the vendor's products; a GPU measures whether that is the faster
(`kernels.measured`), and `--apart` adds the fast step without such kernels. `--long` counts 64
sequences of 128 tokens, too.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from counting import Counting
from live import Live
from pretending import as_on_a_gpu
from provenance import command_line, provenance
from rich.console import Console
from rich.table import Table
from saved import Saved
from steps import VARIANTS, Setting, batches, build
from work import DEVICE, Counted, Work

from bitfit_fast.files import write_json
from bitfit_fast.training.fast import FastStep

__all__ = ["COUNTED", "count", "count_all"]

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
#: The fast step with the vendor's products and passes of their own, on request.
APART = "apart"
#: Sequences and tokens of each: a batch of GLUE's kind, and one of 8,192 tokens.
LONG = ("128", 64)


def _batch(variant: str, setting: Setting) -> tuple[dict[str, Any], int]:
    """Return what a variant is given, and how many tokens that is."""
    (batch,) = batches(setting, 1)
    batch = VARIANTS[variant].input(batch)
    tokens = int(batch["attention_mask"].sum())
    if tokens == batch["attention_mask"].numel():
        # without padding there is no mask to look at, which a GPU would be waited for
        del batch["attention_mask"]
    return batch, tokens


def count(variant: str, setting: Setting, fused: bool = True) -> tuple[dict[str, Any], Counted]:
    """Count the second step of a variant.

    Parameters
    ----------
    variant : str
        A key of `steps.VARIANTS`.
    setting : Setting
        On a CPU.
    fused : bool
        Whether large products take the activation beside them along.

    Returns
    -------
    dict, Counted
        Launches, bytes, flops, bytes kept for backward a token and layer, and the time that
        `DEVICE` would need, with `graph_ms` for what a GPU is given to capture; and all of it
        by operation.
    """
    mode = Counting()
    mode.fused = fused
    batch, tokens = _batch(variant, setting)
    step = build(VARIANTS[variant], setting)
    if isinstance(step.inner, FastStep):  # type: ignore[attr-defined]
        # what a GPU is given to capture
        step.inner.fixed = step.inner.of_fixed_size(after=0)  # type: ignore[attr-defined]
        mode.fixed = True
    for group in step.inner.optimizer.param_groups:  # type: ignore[attr-defined]
        group["foreach"] = None if group["fused"] else True
    with as_on_a_gpu(mode):
        for _ in range(max(2, VARIANTS[variant].begins)):
            step(batch)
        mode.counted = counted = Counted()
        with Saved(step.inner.model) as saved:  # type: ignore[attr-defined]
            step(batch)
        counted.tail = counted.works[mode.before_clipping :]
        # in a step of its own, as what was saved is held until the end of one that looks at it
        mode.counted, mode.live = Counted(), (live := Live())
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


def count_all(
    setting: Setting, compiled: bool = False, apart: bool = False
) -> dict[str, dict[str, Any]]:
    """Count every variant of `COUNTED`, and on request `APART` and those of `COMPILED`."""
    counts: dict[str, dict[str, Any]] = {}
    tail: list[tuple[str, Work]] = []
    asked = {name: (variant, True) for name, variant in COUNTED.items()}
    if apart:
        asked[APART] = COUNTED["fast"], False
    for name, (variant, fused) in asked.items():
        counts[name], counted = count(variant, setting, fused)
        if name == "reference":
            tail = counted.tail
        gc.collect()  # fast models are in cycles, and all of them would take gigabytes
    if compiled:
        from compiled import count_compiled

        batch, _ = _batch(COUNTED["reference"], setting)
        for name, variant in COMPILED.items():
            counted = count_compiled(variant, setting, batch, tail)
            counts[name] = _row(counted, True)
    return counts


def table(counts: dict[str, dict[str, Any]], title: str) -> Table:
    """Return the counts, and the best time of each over that of the fast step in a graph."""
    result = Table(
        "", "launches", "MB moved", "GFLOP", "kept, B/token/layer", "peak, MB", "predicted ms",
        "in graphs", "/ fast in a graph", title=title,
    )  # fmt: skip
    for column in result.columns[1:]:
        column.justify = "right"
    for name, row in counts.items():
        graph, kept = row.get("graph_ms"), row.get("saved_bytes_per_token_layer")
        peak = row.get("peak_bytes")
        best = graph or row["predicted_ms"]
        result.add_row(
            name,
            str(row["launches"]),
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['flops'] / 1e9:,.1f}",
            "" if kept is None else f"{kept:,.0f}",
            "" if peak is None else f"{peak / 1e6:,.0f}",
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
    parser.add_argument("--apart", action="store_true", help="no fused products, too")
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
    found = [count_all(setting, a.compiled, a.apart) for setting in settings]
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
