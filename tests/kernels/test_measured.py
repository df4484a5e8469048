"""The choice between two ways is measured once, kept, and the same ever after."""

import contextlib
import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")

from triton.runtime.errors import OutOfResources

from bitfit_fast.kernels import measured
from bitfit_fast.kernels._launch import INTERPRETED

DEVICE = torch.device("cuda", 0)
FOLDER = "products-test"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where times are kept, of a device that need not be there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_folder", lambda index: FOLDER)
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    return tmp_path / "bitfit_fast" / FOLDER


@pytest.fixture
def timed(monkeypatch):
    """Let ways take given times; return those that were timed."""
    asked = []

    def times(ours, other):
        asked.append((ours, other))
        return ours(), other()

    monkeypatch.setattr(measured, "_times", times)
    return asked


def ask(ours, other, problem="a"):
    return measured.is_faster(lambda: ours, lambda: other, DEVICE, problem)


def stored(folder):
    return {file.name: json.loads(file.read_text()) for file in folder.iterdir()}


def test_the_faster_is_taken_where_it_is_clearly_so(folder, timed):
    assert ask(1.0, 2.0, "a")
    assert not ask(2.0, 1.0, "b")
    assert not ask(0.99, 1.0, "noise")


def test_a_problem_is_measured_once(folder, timed):
    assert ask(1.0, 2.0, "a 64") and ask(9.0, 2.0, "a 64")
    assert len(timed) == 1
    assert not ask(9.0, 2.0, "a 128")
    assert len(timed) == 2
    assert measured.known() == {"a 64": (1.0, 2.0), "a 128": (9.0, 2.0)}


def test_another_process_goes_by_what_was_measured(folder, timed, monkeypatch):
    assert ask(1.0, 2.0, "linear_fwd gelu 8x8")
    expected = {"linear_fwd-gelu-8x8.json": {"ours_ms": 1.0, "other_ms": 2.0}}
    assert stored(folder) == expected
    monkeypatch.setattr(measured, "_known", {})
    assert ask(9.0, 2.0, "linear_fwd gelu 8x8")
    assert len(timed) == 1 and stored(folder) == expected


def test_of_two_that_measure_at_a_time_both_go_by_the_first(folder, timed):
    def meanwhile():
        folder.mkdir(parents=True)
        (folder / "a.json").write_text('{"ours_ms": 1, "other_ms": 2}')
        return 9.0

    assert measured.is_faster(meanwhile, lambda: 2.0, DEVICE, "a")
    assert stored(folder) == {"a.json": {"ours_ms": 1, "other_ms": 2}}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"ours_ms": "x", "other_ms": 1}'])
def test_what_cannot_be_read_is_measured_again(folder, timed, text):
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(text)
    assert ask(1.0, 2.0)
    assert stored(folder) == {"a.json": {"ours_ms": 1.0, "other_ms": 2.0}}


def test_a_folder_that_cannot_be_written_to_does_no_harm(folder, timed):
    folder.parent.mkdir()
    folder.write_text("a file where the folder would be")
    assert ask(1.0, 2.0) and ask(9.0, 2.0)
    assert len(timed) == 1


@pytest.mark.parametrize(
    ("name", "now"), [("is_current_stream_capturing", True), ("get_sync_debug_mode", 2)]
)
def test_nothing_is_measured_where_the_device_may_not_be_waited_for(
    folder, timed, monkeypatch, name, now
):
    usual = getattr(torch.cuda, name)
    monkeypatch.setattr(torch.cuda, name, lambda: now)
    assert not ask(1.0, 2.0) and not timed
    monkeypatch.setattr(torch.cuda, name, usual)
    assert ask(1.0, 2.0)
    monkeypatch.setattr(torch.cuda, name, lambda: now)
    assert ask(1.0, 2.0) and len(timed) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        OutOfResources(300_000, 232_448, "shared memory"),
        RuntimeError("PassManager::run failed"),
    ],
    ids=["memory", "resources", "compiler"],
)
def test_what_cannot_run_is_left_to_the_other_for_good(folder, timed, monkeypatch, error):
    def fails():
        raise error

    assert not measured.is_faster(fails, lambda: 2.0, DEVICE, "a")
    # a graph may have been captured with the other one by now
    assert not ask(1.0, 2.0) and measured.known() == {}
    assert not folder.exists()
    monkeypatch.setattr(measured, "_known", {})
    assert ask(1.0, 2.0)


def test_other_errors_are_not_hidden(folder, timed):
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        measured.is_faster(fails, lambda: 2.0, DEVICE, "a")


def test_times_are_those_of_a_device_and_of_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(measured, "_KERNELS", tmp_path)
    (tmp_path / "kernel.py").write_text("block = 64")
    name = measured._folder.__wrapped__
    first = name(0)
    assert first == name(0) != name(1)
    (tmp_path / "kernel.py").write_text("block = 128")
    assert name(0) != first


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_a_long_way_from_a_short_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_known", {})
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 4096))
    problem = "a product of 256 and one of 4096"
    assert measured.is_faster(lambda: small @ small, lambda: large @ large, DEVICE, problem)
    (file,) = (tmp_path / "bitfit_fast").glob("*/*.json")
    times = json.loads(file.read_text())
    assert 0 < times["ours_ms"] < times["other_ms"]
