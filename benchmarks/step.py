"""Time whole training steps: forward, backward, clipping and AdamW, each way to train in turn.

    python benchmarks/step.py --model minilm --task MRPC,CoLA --dropout 0,0.1

Variants are interleaved on the same batches, two steps at a time of which the second counts; on a
GPU five of which the last four do, as what a host does for a step may pass while the device is at
the one before. The batches' lengths are drawn from those of a GLUE task, or made like those of
SST-2's phrases; their tokens are random. A variant whose bias gradients differ from those in
float64 by more than PyTorch's in the same precision is not timed. `step.py lengths --data-dir
FOLDER` counts the lengths anew.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import QUICK, command_line, provenance, short, write_results
from rich.console import Console
from rich.table import Table
from steps import (
    LENGTHS,
    MAX_LENGTH,
    MODELS,
    VARIANTS,
    Batch,
    Setting,
    batches,
    bias_gradients,
    build,
    numbers,
    relative_error,
)

import bitfit_fast
from bitfit_fast.files import write_text
from bitfit_fast.models.loading import DEFAULT_MODEL

TASKS = {"MRPC": "mrpc", "CoLA": "cola", "RTE": "rte", "STS-B": "stsb"}
#: What a variant's error may be: that of PyTorch in the same precision twice, and this.
_FLOOR = {"fp32": 1e-5, "bf16": 2e-3}
_PYTORCH = {"fp32": "fp32", "bf16": "autocast"}
_COMPILED = tuple(name for name in VARIANTS if name.endswith("-compiled"))
_DEFAULT = tuple(n for n in VARIANTS if n not in _COMPILED and not n.endswith("-torch"))
#: Steps of a GPU between two moments at which the host waits for it.
_GPU_STEPS = 4
#: What needs a GPU to be anything of its own.
_GRAPHS = tuple(name for name in VARIANTS if "-graph" in name)


def _like_sst2() -> dict[int, int]:
    """Return lengths that need as much padding as SST-2's, which are not at hand.

    Its training set has 9.6 slots for each token where every example is padded to 128, so 13.3
    tokens an example, and 2.64 in batches of 16 padded to their longest. Three tokens and a gamma
    distribution with these two properties come to 9.6 and 2.6.
    """
    shape, scale = 1.3, 8.15
    numbers = [max(0.25, length - 3) for length in range(3, MAX_LENGTH + 1)]
    weights = [x ** (shape - 1) * math.exp(-x / scale) for x in numbers]
    counts = [round(10_000 * weight / sum(weights)) for weight in weights]
    return {length: count for length, count in enumerate(counts, 3) if count}


def count_lengths(data_dir: Path) -> None:
    """Write how long the training examples of GLUE tasks are, in tokens."""
    tokenizer = bitfit_fast.load_tokenizer(DEFAULT_MODEL)
    found = {}
    for name, task in TASKS.items():
        split = bitfit_fast.load_task(task, data_dir=data_dir, kinds=("train",)).train
        assert split is not None
        texts = map(list, zip(*split.texts))
        encoded = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH)
        found[name] = dict(sorted(Counter(map(len, encoded["input_ids"])).items()))
    found["SST-2-like"] = _like_sst2()
    lines = ",\n".join(f'  "{name}": {json.dumps(counts)}' for name, counts in found.items())
    write_text(LENGTHS, f"{{\n{lines}\n}}\n")


def check(
    names: list[str], setting: Setting, batch: Batch, clock: Clock
) -> dict[str, dict[str, Any]]:
    """Return each variant's relative error, and an `error` where it is too large."""
    exact: dict[Any, Any] = {}
    # compiled references are the same, and would be compiled twice
    left = {*_COMPILED, *(n for n in names if VARIANTS[n].group == "other")}
    compared = [name for name in names if name not in left]
    needed = dict.fromkeys([*(_PYTORCH[VARIANTS[n].precision] for n in compared), *compared])
    found: dict[str, dict[str, Any]] = {name: {} for name in needed}

    def compare(name: str) -> None:
        variant, facts = VARIANTS[name], found[name]
        given = variant.input
        if given not in exact:
            exact[given] = bias_gradients(None, setting, given(batch))
        error = relative_error(bias_gradients(variant, setting, batch), exact[given])
        facts["relative_error"] = short(error)
        if variant.group != "reference":
            theirs = found[_PYTORCH[variant.precision]]["relative_error"]
            facts["relative_error_of_pytorch"] = theirs
            if not error <= 2 * theirs + _FLOOR[variant.precision]:
                facts["error"] = f"gradients differ by {error:.2g}, PyTorch's by {theirs:.2g}"

    for name in needed:
        clock.attempt(found[name], partial(compare, name))
        _free(setting.device)
    return found


class Clock:
    """Says when to begin nothing more, and lets one variant's failure be a result.

    Parameters
    ----------
    rounds, latest : float
        When to begin no further round of a setting, and nothing else either, by `time.monotonic`.
        An interrupt ends the time, too: what was measured is kept.
    """

    def __init__(self, rounds: float, latest: float) -> None:
        self.rounds, self.latest, self.interrupted = rounds, latest, False

    def is_over(self, end: float) -> bool:
        """Return whether there is no time left until then."""
        return self.interrupted or time.monotonic() > end

    def attempt(self, facts: dict[str, Any], work: Callable[[], None]) -> None:
        """Do a part of what a variant takes, or note in its facts why that is an `error`."""
        try:
            if self.is_over(self.latest):
                raise TimeoutError("no time left")
            work()
        except KeyboardInterrupt:
            self.interrupted = True
            facts["error"] = "interrupted"
        except Exception as failure:
            facts["error"] = _one_line(failure)


def _one_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".split("\n")[0][:300]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(step: Any, batch: Batch, device: torch.device) -> float:
    """Return the milliseconds of a step, where a device need not wait for the host's."""
    gpu = device.type == "cuda"
    steps = _GPU_STEPS if gpu else 1
    if gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    losses = [step(batch) for _ in range(steps)]
    if gpu:
        torch.cuda.synchronize(device)
    taken = time.perf_counter() - start
    del losses  # freeing is not timed
    return 1e3 * taken / steps


def _spread(samples: list[list[float]]) -> dict[str, float]:
    """Return quantiles over the repeats of each batch, averaged over batches."""
    cuts = [statistics.quantiles(series, n=10, method="inclusive") for series in samples]
    return {f"p{10 * i}": short(statistics.fmean(c[i - 1] for c in cuts)) for i in (2, 5, 8)}


def soonest_first(names: list[str]) -> list[str]:
    """Return variants in the order in which they are made ready, of which time may be too short.

    What takes minutes to compile comes last, and before it what the step is not measured against.
    """
    return sorted(names, key=lambda n: (n in _COMPILED, VARIANTS[n].group == "other"))


def measure(
    setting: Setting, names: list[str], count: int, repeats: int, clock: Clock
) -> list[dict[str, Any]]:
    """Check and time variants on the same batches.

    Parameters
    ----------
    setting : Setting
    names : list of str
        Of variants.
    count, repeats : int
        How many batches, and how often each.
    clock : Clock
        When to begin nothing more; of what is ready then there are two rounds in any case.

    Returns
    -------
    list of dict
        One a variant.
    """
    made = batches(setting, count)
    facts = check(names, setting, made[0], clock)
    steps: dict[str, Any] = {}
    inputs: dict[str, list[Batch]] = {}

    def make_ready(name: str) -> None:
        variant = VARIANTS[name]
        step = build(variant, setting)
        inputs[name] = [variant.input(batch) for batch in made]
        # compiles, captures, and makes the optimiser's state
        for batch in inputs[name] * variant.begins:
            step(batch)
        captured = getattr(step.inner, "fixed", None)
        if captured is not None and captured.refusal is not None:
            raise RuntimeError(captured.refusal)  # it would be timed without its graph
        steps[name] = step

    for name in soonest_first(names):
        if "error" not in facts.setdefault(name, {}):
            clock.attempt(facts[name], partial(make_ready, name))
    samples: dict[str, list[list[float]]] = {name: [[] for _ in made] for name in steps}
    order, done = list(steps), 0
    try:
        while done < repeats and order and not (done >= 2 and clock.is_over(clock.rounds)):
            for i in range(count):
                order = [*order[1:], *order[:1]]
                for name in order:
                    # in a training, too, the step before is one of the same kind: without it the
                    # fastest variants would mostly wait for weights that the others drove out
                    try:
                        steps[name](inputs[name][i])
                        taken = _timed(steps[name], inputs[name][i], setting.device)
                        samples[name][i].append(taken)
                    except Exception as failure:
                        facts[name]["error"] = _one_line(failure)
                order = [name for name in order if "error" not in facts[name]]
            done += 1
    except KeyboardInterrupt:
        clock.interrupted = True
    order = [name for name in order if "error" not in facts[name]]
    enough = [name for name in order if min(map(len, samples[name])) >= 2]
    times = {name: _spread(samples[name]) for name in enough}
    for name in set(order) - set(enough):
        facts[name]["error"] = "interrupted"
    tokens = statistics.fmean(int(batch["attention_mask"].sum()) for batch in made)
    rows = []
    for name in names:
        variant = VARIANTS[name]
        row = {**setting.named(), "variant": name, "group": variant.group, **facts[name]}
        rows.append(row)
        if name not in times:
            continue
        slots = statistics.fmean(batch["input_ids"].numel() for batch in inputs[name])
        middle = times[name]["p50"]
        row |= {
            "ms": times[name],
            "rounds": done,
            "batches": count,
            "tokens": tokens,
            "padded_tokens": slots,
            "speedup": {
                other: short(times[other]["p50"] / middle)
                for other in times
                if VARIANTS[other].group in ("reference", "other")
            },
        }
    try:
        steps.clear()
        torch._dynamo.reset()
        _free(setting.device)
    except KeyboardInterrupt:
        clock.interrupted = True
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Return what was measured in one setting."""
    first = rows[0]
    title = "{model}, {task}, batch {batch_size}, dropout {dropout}".format(**first)
    names = [r["variant"] for r in rows if "ms" in r]
    best = min(
        (r for r in rows if "ms" in r and r["group"] == "reference"),
        key=lambda r: r["ms"]["p50"],
        default=None,
    )
    against = [n for n in ("fp32-128", "fp32", "autocast") if n in names]
    if best is not None and best["variant"] not in against:
        against.append(best["variant"])
    result = Table("variant", "ms", "p20", "p80", "error", *against, title=title)
    for column in result.columns[1:]:
        column.justify = "right"
    for row in rows:
        error = row.get("relative_error")
        cells = ["" if error is None else f"{error:.1e}"]
        if "ms" not in row:
            result.add_row(row["variant"], "", "", "", *cells, row["error"][:40])
            continue
        ms = [f"{row['ms'][p]:.4g}" for p in ("p50", "p20", "p80")]
        ratios = [f"{row['speedup'][name]:.2f}" for name in against]
        result.add_row(row["variant"], *ms, *cells, *ratios)
    return result


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words, cuda = numbers(str), torch.cuda.is_available()
    parser.add_argument("--model", type=words, default=["minilm"], help=", ".join(MODELS))
    parser.add_argument(
        "--task", type=words, default=["MRPC"], help=f"{', '.join(TASKS)}, or a length in tokens"
    )
    parser.add_argument("--batch-size", type=numbers(int), default=[16])
    parser.add_argument("--dropout", type=numbers(float), default=[0.0])
    parser.add_argument("--variants", type=words, default=list(_DEFAULT), help=", ".join(VARIANTS))
    parser.add_argument(
        "--compile", action="store_true", help="add compiled references, which takes minutes"
    )
    parser.add_argument("--repeats", type=int, default=15, help="steps on each batch")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--threads", type=int, help="of the CPU; PyTorch's choice by default")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no round later")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        arguments.variants = [n for n in arguments.variants if n not in _GRAPHS]
    if unknown := set(arguments.variants) - VARIANTS.keys():
        parser.error(f"unknown variants: {', '.join(sorted(unknown))}")
    if arguments.repeats < 2:
        parser.error(f"{arguments.repeats} repeats have no spread; 2 are the least")
    if arguments.compile:
        left = (*arguments.variants, *(_GRAPHS if arguments.device == "cpu" else ()))
        arguments.variants += [name for name in _COMPILED if name not in left]
    if QUICK:
        arguments.model, arguments.batches, arguments.repeats = ["tiny"], 2, 2
        arguments.batch_size = [4]
    return arguments


def _products() -> dict[str, list[float]]:
    """Return what products were measured to choose between: milliseconds in one kernel, in two."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from bitfit_fast.kernels import measured

    return measured.known()


def main() -> None:
    """Measure every setting, and write the results after each."""
    if sys.argv[1:2] == ["lengths"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--data-dir", type=Path, required=True)
        count_lengths(parser.parse_args(sys.argv[2:]).data_dir)
        return
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    start = time.monotonic()
    results: dict[str, Any] = {
        **provenance(command_line(), device, ("torch", "triton", "transformers", "peft")),
        "threads": torch.get_num_threads(),
        "backend": os.environ.get("BITFIT_FAST_BACKEND") or "auto",
        "quick": QUICK,
        "variants": {name: VARIANTS[name].says for name in arguments.variants},
        "finished": False,
        "seconds": 0.0,
        "skipped": [],
        "rows": [],
    }
    settings = [
        Setting(*values, device)
        for values in itertools.product(
            arguments.model, arguments.task, arguments.batch_size, arguments.dropout
        )
    ]
    console = Console(width=max(Console().width, 110))
    interrupted, latest = False, start + arguments.seconds
    for number, setting in enumerate(settings):
        now = time.monotonic()
        if interrupted or now > latest:
            why = "interrupted" if interrupted else "no time left"
            results["skipped"].append({**setting.named(), "why": why})
        else:
            # those that are left share the time that is left
            clock = Clock(now + (latest - now) / (len(settings) - number), latest)
            rows = measure(setting, arguments.variants, arguments.batches, arguments.repeats, clock)
            interrupted = clock.interrupted
            results["rows"] += rows
            console.print(table(rows))
        late = any("no time left" in row.get("error", "") for row in results["rows"])
        left_out = interrupted or late or results["skipped"]
        results["finished"] = number + 1 == len(settings) and not left_out
        if products := _products():
            results["products_ms"] = products
        results["seconds"] = round(time.monotonic() - start, 1)
        if arguments.output:
            write_results(arguments.output, results)
    # a method that cannot be installed here is no failure of ours
    failed = [r for r in results["rows"] if "error" in r and r["group"] != "other"]
    for row in failed:
        console.print(f"{row['variant']}: {row['error']}", style="red")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
