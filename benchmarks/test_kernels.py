"""Every operation against PyTorch: `pytest benchmarks --benchmark-only`.

The variants of a group are timed interleaved, on a GPU by its own events, which pytest-benchmark
cannot do one callable at a time. Its clock here is one that shows these measured times again, so
its table has the very samples that `results/kernels-DEVICE.json` sums up.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from operations import OPERATIONS

if os.environ.get("BITFIT_FAST_QUICK") == "1":
    SHAPES: tuple[tuple[int, int], ...] = ((32, 16), (48, 16))
elif torch.cuda.is_available():
    # BERT-base, and BERT-large, which has the widths of ViT-L; what matters most comes first
    SHAPES = tuple((tokens, width) for tokens in (8192, 32768, 2048) for width in (768, 1024))
else:
    # MiniLM and BERT-base
    SHAPES = tuple((tokens, width) for width in (384, 768) for tokens in (256, 1024))

CASES = [
    (operation.name, direction, tokens, width, variant)
    for tokens, width in SHAPES
    for operation in OPERATIONS.values()
    for direction in operation.directions
    for variant in operation.variants
]


class _Clock:
    now = 0.0


def clock() -> float:
    """Return the time that the samples shown so far took."""
    return _Clock.now


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernel(case: tuple[str, str, int, int, str], run: Any, benchmark: Any) -> None:
    """Report one variant in one direction; fail where it is wrong or does not run."""
    operation, direction, tokens, width, variant = case
    row = run.row(*case)
    if row is None:
        pytest.skip("left out: the results say why")
    assert "error" not in row, row["error"]
    samples = iter(row["samples_ms"])

    def show() -> None:
        _Clock.now += next(samples) / 1e3

    benchmark.group = f"{operation}, {direction}, {tokens} tokens, width {width}"
    benchmark.name = variant
    benchmark.extra_info.update({k: v for k, v in row.items() if k != "samples_ms"})
    benchmark.pedantic(show, rounds=len(row["samples_ms"]))
