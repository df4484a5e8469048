"""Every kernel compiles for GPUs from Ampere to Blackwell, without a spill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

pytest.importorskip("triton", reason="triton is installed on Linux only")

#: Shared memory that one block may use, in bytes, by compute capability.
SHARED = {80: 166912, 90: 232448, 100: 232448}


@pytest.fixture(scope="module")
def processes():
    """Compilers for all architectures, at work side by side."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_ahead.py")
    started = {
        capability: subprocess.Popen(
            [sys.executable, str(script), str(capability)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for capability in SHARED
    }  # fmt: skip
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_without_spills_and_within_shared_memory(processes, capability):
    out, err = processes[capability].communicate(timeout=900)
    assert processes[capability].returncode == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    table = Table(
        "kernel", "compiled for", "registers", "spilled", "shared", title=f"sm_{capability}"
    )
    for row in rows:
        table.add_row(*(str(row[k]) for k in ("kernel", "of", "registers", "spilled", "shared")))
    Console(width=140).print(table)
    assert {row["kernel"] for row in rows} == {
        "column_sum_kernel",
        "add_partial_rows_kernel",
        "activation_fwd_kernel",
        "activation_bwd_kernel",
        "layer_norm_fwd_kernel",
        "layer_norm_bwd_kernel",
        "linear_bwd_kernel",
    }
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED[capability], row
