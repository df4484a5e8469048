"""The benchmarks run, leave what they say, and leave it whole when they are killed."""

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KILLED_AFTER = 30
KILLER = f"""
import os, signal
seen = []
def pytest_runtest_teardown(item):
    seen.append(item)
    if len(seen) == {KILLED_AFTER}:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def environment(**more):
    """Return what the benchmarks find when nobody tests them."""
    # by the variables of a worker of pytest-xdist, pytest-benchmark measures nothing
    without = ("TRITON_INTERPRET", "BITFIT_FAST_BACKEND", "OUT", "PYTEST_XDIST")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(without)}
    quick = {"BITFIT_FAST_QUICK": "1", "PYTHON": sys.executable}
    return {**kept, **quick, **more}


def run(*command, timeout=300, **more):
    """Run a program here, with small sizes, and return what it said."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def results_in(folder: Path, name: str = "kernels"):
    (path,) = (p for p in folder.glob(f"{name}-*.json") if name != "step" or "comp" not in p.name)
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Everything that the script for a GPU does, at sizes that say nothing."""
    folder = tmp_path_factory.mktemp("out")
    return folder, run(
        "bash", "benchmarks/gpu.sh", folder, timeout=600, BITFIT_FAST_COMMIT="0123abc-dirty"
    )


def test_the_script_leaves_few_files_and_a_table(done):
    folder, process = done
    assert process.returncode == 0, process.stdout + process.stderr
    names = sorted(path.name for path in folder.iterdir())
    device = results_in(folder)["device"]
    slug = "cpu" if "threads" in device else device.lower().replace(" ", "-")
    parts = ("kernels", "memory", "step", "step-compiled", "cost-model")
    assert set(names) == {"gpu.log", "gpu-tests.xml"} | {f"{n}-{slug}.json" for n in parts}
    log = (folder / "gpu.log").read_text(encoding="utf-8")
    for part in ("tests", "step", "step-compiled", "memory", "benchmarks", "cost-model"):
        assert f"== {part}: " in log
        assert f"== {part}: exit status 0" in process.stdout
    suite = xml.etree.ElementTree.parse(folder / "gpu-tests.xml").getroot()[0]
    assert int(suite.get("tests")) > 0 and suite.get("failures") == "0"
    table = process.stdout.partition("== benchmarks: ")[2]
    assert "product_gelu_bwd" in table and "eager ms" in table


def test_the_pictures_are_some(done, tmp_path):
    drawn = [p for p in done[0].glob("*.json") if p.name.startswith(("kernels", "step"))]
    assert len(drawn) == 3
    for results in drawn:
        script = "plot.py" if results.name.startswith("kernels") else "plot_step.py"
        command = [sys.executable, f"benchmarks/{script}", results, "--output", tmp_path]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
        picture = tmp_path / f"{results.stem}.png"
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_results_say_where_they_come_from(done):
    results = results_in(done[0])
    assert (results["commit"], results["dirty"]) == ("0123abc", True)
    assert results["command"].startswith("pytest benchmarks")
    assert results["finished"] and results["quick"] and not results["skipped"]
    for key in ("device", "date", "dtype", "compile", "seed", "copy_gb_s", "product_tflop_s"):
        assert results[key], key
    assert "driver" in results
    for key in ("python", "torch", "triton", "transformers"):
        assert key in results["versions"]


def test_every_row_has_its_time_its_floor_and_its_memory(done):
    rows = results_in(done[0])["rows"]
    seen = {(r["operation"], r["direction"], r["variant"]) for r in rows}
    for operation in ("bias_gelu", "bias_dropout_add_layer_norm", "layer_norm", "feed_forward"):
        for direction in ("forward", "backward", "both"):
            for variant in ("ours", "eager", "compile"):
                assert (operation, direction, variant) in seen
    assert ("column_sum", "backward", "ours") in seen
    for row in rows:
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"], row
        assert row["bytes"] > 0 and row["floor_ms"] > 0 and row["share_of_limit"] > 0, row
        assert 0 <= row["relative_error"] < 0.02 and row["rounds"] >= 3, row
        assert {"flops", "saved_bytes", "peak_bytes", "host_ms"} <= row.keys(), row


def test_steps_are_timed_against_the_references(done):
    results = results_in(done[0], "step")
    assert (results["commit"], results["dirty"]) == ("0123abc", True)
    assert results["command"].startswith("python benchmarks/step.py")
    assert results["finished"] and results["quick"] and not results["skipped"]
    assert {"device", "driver", "threads", "versions", "backend"} <= results.keys()
    rows = {row["variant"]: row for row in results["rows"]}
    assert rows.keys() == results["variants"].keys()
    assert {"fp32-128", "autocast", "full-fp32", "packing", "fast-fp32"} <= rows.keys()
    for row in rows.values():
        if row["group"] == "other" and "error" in row:  # PEFT need not be installed
            continue
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"], row
        assert row["padded_tokens"] >= row["tokens"] > 0 and row["speedup"]["fp32"] > 0, row
        assert row["group"] == "other" or 0 < row["relative_error"] < 0.03, row
    for error in ("relative_error", "relative_error_of_pytorch"):
        assert 0 < rows["fast-fp32"][error] < 1e-5
    assert rows["fp32-128"]["padded_tokens"] == 4 * 128
    compiled = {row["variant"] for row in results_in(done[0], "step-compiled")["rows"]}
    assert "autocast-compiled" in compiled


def test_a_step_with_wrong_gradients_is_not_timed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import bitfit_fast.encoder.backward as backward\n"
        "right = backward.bias_gradient\n"
        "backward.bias_gradient = lambda dy: 1.1 * right(dy)\n"
    )
    path = tmp_path / "step-cpu.json"
    command = [sys.executable, "benchmarks/step.py", "--variants=fp32,fast-fp32"]
    process = run(*command, f"--output={path}", timeout=120, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert process.returncode == 1, process.stdout + process.stderr
    right, wrong = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert "ms" in right and "ms" not in wrong
    assert wrong["error"].startswith("gradients differ by")


def test_memory_modes_keep_less(done):
    results = results_in(done[0], "memory")
    assert results["finished"] and results["commit"] == "0123abc"
    rows = {(row["variant"], row["dropout"]): row for row in results["rows"]}
    for dropout in (0.0, 0.1):
        modes = ["autocast", *(f"fast-bf16{mode}" for mode in ("", "-low", "-lower", "-lowest"))]
        kept = [rows[mode, dropout]["saved_bytes_per_token_layer"] for mode in modes]
        assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept), kept
        for mode in modes:
            assert rows[mode, dropout]["peak_bytes"] > rows[mode, dropout]["saved_bytes"]


def test_floors_count_every_tensor_once(done):
    rows = results_in(done[0])["rows"]
    size = 2 if results_in(done[0])["dtype"] == "bfloat16" else 4
    m, n = 32, 16
    expected = {
        ("column_sum", "backward"): (size * m * n + 4 * n, 0),
        ("bias_gelu", "backward"): (3 * size * m * 4 * n + 2 * 4 * 4 * n, 0),
        # dy, s, gamma, ds and dx, two sums
        ("bias_dropout_add_layer_norm", "backward"): (4 * size * m * n + (size + 8) * n, 0),
        ("bias_add_layer_norm", "backward"): (3 * size * m * n + (size + 8) * n, 0),
        ("linear", "forward"): (size * (2 * m * n + n * n) + 4 * n, 2 * m * n * n),
        ("feed_forward", "both"): (None, 4 * 2 * m * n * 4 * n),
    }
    found = {(r["operation"], r["direction"]): r for r in rows if r["tokens"] == m}
    for key, (moved, flops) in expected.items():
        assert found[key]["flops"] == flops, key
        assert moved is None or found[key]["bytes"] == moved, key


def test_what_is_kept_for_backward_is_counted_without_parameters(done):
    rows = results_in(done[0])["rows"]
    size = 2 if results_in(done[0])["dtype"] == "bfloat16" else 4
    kept = {(r["operation"], r["variant"]): r["saved_bytes"] for r in rows if r["tokens"] == 32}
    assert kept["bias_gelu", "ours"] == size * 32 * 64
    # its input, and the mean and deviation of each row
    assert kept["layer_norm", "ours"] == size * 32 * 16 + 2 * 4 * 32
    assert kept["bias_add_layer_norm", "ours"] == size * 32 * 16 + 4 * 32
    assert kept["linear", "ours"] == kept["linear", "eager"] == 0


def test_a_killed_run_leaves_what_it_had_measured(tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "pytest", "-p", "killer", "benchmarks", "--benchmark-only"]
    process = run(
        *command, "-p", "no:cacheprovider", f"--results-dir={output}", PYTHONPATH=str(tmp_path)
    )
    assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr
    results = results_in(output)
    assert not results["finished"] and len(results["rows"]) >= KILLED_AFTER
    done = run(
        sys.executable,
        "benchmarks/plot.py",
        *output.glob("*.json"),
        "--output",
        tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "the run was stopped before its end" in done.stdout
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_groups_that_no_time_is_left_for_are_named(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--seconds=0"]
    process = run(*command, "-q", "-p", "no:cacheprovider", f"--results-dir={tmp_path}")
    assert process.returncode == 0, process.stdout + process.stderr
    results = results_in(tmp_path)
    assert results["finished"] and not results["rows"]
    assert {"operation": "linear", "tokens": 32, "width": 16, "why": "no time left"} in results[
        "skipped"
    ]


INTERRUPTER = """
import sys
sys.path.insert(0, "benchmarks")
import step
build, names = step.build, []
def interrupted(variant, setting):
    names.append(variant.name)
    if len(names) == 2:
        raise KeyboardInterrupt
    return build(variant, setting)
step.build = interrupted
step.main()
"""


def test_what_takes_long_to_make_ready_comes_last(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from step import soonest_first

    names = ["autocast", "autocast-compiled", "full-fp32", "lora-fp32", "fast-bf16", "bf16"]
    assert soonest_first(names) == [
        "autocast", "fast-bf16", "bf16", "full-fp32", "lora-fp32", "autocast-compiled"
    ]  # fmt: skip


def test_an_interrupted_run_times_what_was_ready(tmp_path):
    output = tmp_path / "step.json"
    names = "fp32", "autocast", "fast-fp32"
    process = run(
        sys.executable, "-c", INTERRUPTER, "--variants", ",".join(names), "--output", output
    )
    assert process.returncode == 1, process.stdout + process.stderr
    results = json.loads(output.read_text(encoding="utf-8"))
    ready, interrupted, late = results["rows"]
    assert not results["finished"] and ready["rounds"] == 2 and ready["ms"]["p50"] > 0
    assert interrupted["error"] == "interrupted" and "no time left" in late["error"]
