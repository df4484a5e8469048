"""The choice between two ways is measured once, kept, and the same ever after."""

import contextlib
import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import measured
from bitfit_fast.kernels._launch import INTERPRETED

DEVICE = torch.device("cuda", 0)
NAME = "products-test.json"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where times are kept, of a device that need not be there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_name", lambda index: NAME)
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tmp_path / "bitfit_fast"


@pytest.fixture
def timed(monkeypatch):
    """Let ways take given times; return those that were timed."""
    asked = []

    def times(ways):
        asked.append(ways)
        return [way() for way in ways]

    monkeypatch.setattr(measured, "_times", times)
    return asked


def ask(ours, other, *problem):
    return measured.is_faster(lambda: ours, lambda: other, DEVICE, *problem)


def test_the_faster_is_taken_where_it_is_clearly_so(folder, timed):
    assert ask(1.0, 2.0, "a")
    assert not ask(2.0, 1.0, "b")
    assert not ask(0.99, 1.0, "noise")


def test_a_problem_is_measured_once(folder, timed):
    assert ask(1.0, 2.0, "a", 64) and ask(9.0, 2.0, "a", 64)
    assert len(timed) == 1
    assert not ask(9.0, 2.0, "a", 128)
    assert len(timed) == 2


def test_another_process_goes_by_what_was_measured(folder, timed, monkeypatch):
    assert ask(1.0, 2.0, "a")
    assert json.loads((folder / NAME).read_text()) == {"a": [1.0, 2.0]}
    monkeypatch.setattr(measured, "_known", {})
    assert ask(9.0, 2.0, "a")
    assert len(timed) == 1


def test_what_others_measured_meanwhile_stays(folder, timed):
    assert ask(1.0, 2.0, "a")
    (folder / NAME).write_text('{"theirs": [3, 4]}')
    assert ask(1.0, 2.0, "b")
    assert json.loads((folder / NAME).read_text()) == {"b": [1.0, 2.0], "theirs": [3.0, 4.0]}
    assert [path.name for path in folder.iterdir()] == [NAME]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 3}', '{"a": [1]}', '{"a": ["x", 1]}'])
def test_what_cannot_be_read_is_measured_again(folder, timed, text):
    folder.mkdir()
    (folder / NAME).write_text(text)
    assert ask(1.0, 2.0, "a")
    assert json.loads((folder / NAME).read_text()) == {"a": [1.0, 2.0]}


def test_a_folder_that_cannot_be_written_to_does_no_harm(folder, timed):
    folder.write_text("a file where the folder would be")
    assert ask(1.0, 2.0, "a") and ask(9.0, 2.0, "a")
    assert len(timed) == 1


def test_nothing_is_measured_while_a_graph_is_captured(folder, timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not ask(1.0, 2.0, "a") and not timed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert ask(1.0, 2.0, "a")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask(1.0, 2.0, "a") and len(timed) == 1


def test_without_memory_to_measure_the_other_is_taken_for_now(folder, timed, monkeypatch):
    def without_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert not measured.is_faster(without_memory, lambda: 2.0, DEVICE, "a")
    assert not (folder / NAME).exists()
    assert ask(1.0, 2.0, "a")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_a_long_way_from_a_short_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_known", {})
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 4096))
    problem = "a product of 256 and one of 4096"
    assert measured.is_faster(lambda: small @ small, lambda: large @ large, DEVICE, problem)
    (file,) = (tmp_path / "bitfit_fast").iterdir()
    ours, other = json.loads(file.read_text())[problem]
    assert 0 < ours < other
