"""Every kernel compiles for GPUs from Ampere to Blackwell, without a spill."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

pytest.importorskip("triton", reason="triton is installed on Linux only")

#: What a kernel takes, as the compiler's results name it.
TAKES = ("registers", "spilled", "shared")
#: Shared memory that one block may use, in bytes, by compute capability; the one for which most is
#: compiled comes first.
SHARED = {90: 232448, 80: 166912, 100: 232448}


@pytest.fixture(scope="module")
def results(users_environment):
    """What was compiled for an architecture, as many at once as each worker has cores for."""
    script, started = Path(__file__).with_name("compile_ahead.py"), []

    def compiled(capability):
        process = subprocess.Popen(
            [sys.executable, str(script), str(capability)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=users_environment,
        )  # fmt: skip
        started.append(process)
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        return [json.loads(line) for line in out.splitlines()]

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // workers))
    running = {capability: pool.submit(compiled, capability) for capability in SHARED}
    yield lambda capability: running[capability].result()
    # what nobody asked for
    pool.shutdown(wait=False, cancel_futures=True)
    for process in started:
        process.kill()


def summary(rows):
    """Return a line for each kernel: how many variants, and the range of what they take."""
    table = Table("kernel", "variants", "registers", "spilled", "shared memory")
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        of_kernel = [row for row in rows if row["kernel"] == kernel]
        ranges = (sorted(row[key] for row in of_kernel) for key in TAKES)
        table.add_row(kernel, str(len(of_kernel)), *(f"{r[0]} to {r[-1]}" for r in ranges))
    return table


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_without_spills_and_within_shared_memory(results, capability, capsys):
    rows = results(capability)
    with capsys.disabled():
        print(f"\nsm_{capability}")
        Console(width=100).print(summary(rows))
    for row in rows:  # pytest shows these with -rP, or where the test fails
        print(*(row[key] for key in ("kernel", "of", *TAKES)), sep=", ")
    assert {row["kernel"] for row in rows} == {
        "column_sum_kernel",
        "add_partial_rows_kernel",
        "add_segments_kernel",
        "squares_kernel",
        "adamw_kernel",
        "activation_fwd_kernel",
        "activation_bwd_kernel",
        "layer_norm_fwd_kernel",
        "layer_norm_bwd_kernel",
        "linear_bwd_kernel",
        "linear_fwd_kernel",
        "dropout_kernel",
        "embedding_layer_norm_kernel",
        "attention_fwd_kernel",
        "attention_bwd_kernel",
        "attention_bwd_all_kernel",
        "attention_bwd_kv_kernel",
    }
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED[capability], row


def test_no_row_count_compiles_a_kernel_again(results):
    # these come before all others
    rows = [row for row in results(90) if row["of"].endswith(" rows")]
    assert sorted(row["kernel"] for row in rows) == sorted(
        f"{name}_kernel"
        for name in (
            *("column_sum", "add_partial_rows", "add_segments", "squares", "adamw"),
            *("activation_fwd", "activation_bwd"),
            *("layer_norm_fwd", "layer_norm_bwd", "linear_fwd", "linear_bwd", "dropout"),
            "embedding_layer_norm",
            *("attention_fwd", "attention_bwd", "attention_bwd_all", "attention_bwd_kv"),
        )
    )
