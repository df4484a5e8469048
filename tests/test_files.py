"""Files that are old or new, and never between."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bitfit_fast.files import append_json_line, replace_file, to_json, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "scores.txt"
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert names(path.parent) == ["scores.txt"]


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "scores.txt"
    path.write_text("something longer")
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert names(tmp_path) == ["scores.txt"]


def test_text_is_written_as_utf8(tmp_path):
    path = tmp_path / "predictions.tsv"
    write_text(path, "na\u00efve\n\u4e2d\n")
    assert path.read_bytes() == b"na\xc3\xafve\n\xe4\xb8\xad\n"


def test_the_temporary_file_lies_beside_and_has_the_same_ending(tmp_path):
    seen = []

    def write(temporary):
        seen.append(temporary)
        temporary.write_text("x")

    replace_file(tmp_path / "curves.svg", write)
    (temporary,) = seen
    assert (temporary.parent, temporary.suffix) == (tmp_path, ".svg")
    assert temporary.name.startswith(".")


def test_a_folder_that_takes_no_file_is_told_with_the_files_own_name(tmp_path, monkeypatch):
    def refuse(dir, prefix, suffix):
        raise PermissionError(13, "Permission denied", f"{dir}/{prefix}x7a{suffix}")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    path = tmp_path / "scores.txt"
    with pytest.raises(PermissionError) as caught:
        write_text(path, "new")
    assert str(caught.value) == f"[Errno 13] Permission denied: '{path}'"


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("old", ["old", None])
def test_a_writer_that_raises_leaves_the_old_file_and_no_other(error, old, tmp_path):
    path = tmp_path / "scores.txt"
    if old is not None:
        path.write_text(old)

    def write(temporary):
        temporary.write_text("half")
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        replace_file(path, write)
    assert names(tmp_path) == ([] if old is None else ["scores.txt"])
    if old is not None:
        assert path.read_text() == old


def test_a_writer_that_removes_its_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "scores.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError):
        replace_file(path, Path.unlink)
    assert (path.read_text(), names(tmp_path)) == ("old", ["scores.txt"])


KILLED = """
import importlib.util, sys, time
from pathlib import Path

# the module alone: the package would import torch
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)

def write(temporary):
    with temporary.open("w") as file:
        file.write("new" * 1000)
        file.flush()
        print("halfway", flush=True)
        time.sleep(600)

files.replace_file(Path(sys.argv[2]), write)
"""


def test_a_kill_in_the_midst_of_writing_leaves_the_old_file_whole(tmp_path):
    module = Path(sys.modules[replace_file.__module__].__file__)
    path = tmp_path / "scores.txt"
    path.write_text("old")
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(module), str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "halfway\n"
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    replace_file(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_an_ordinary_file(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        replace_file(tmp_path / "scores.txt", lambda temporary: temporary.write_text("x"))
        now = os.umask(mask)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "scores.txt").stat().st_mode) == mode
    assert now == mask


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        (1.5, 1.5),
        (0, 0),
        (True, True),
        (None, None),
        ("na\u00efve \u4e2d", "na\u00efve \u4e2d"),
        ("NaN", "NaN"),
        (Path("a") / "b", str(Path("a") / "b")),
        (
            {"loss": math.nan, "rows": [1.0, (math.inf, 2)]},
            {"loss": None, "rows": [1.0, [None, 2]]},
        ),
        ({1: {None: 2}}, {"1": {"None": 2}}),
        ((), []),
        ({}, {}),
    ],
)
def test_json_holds_what_every_reader_takes(value, expected, tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    path = tmp_path / "value.json"
    write_json(path, value)
    append_json_line(tmp_path / "value.jsonl", value)
    for text in (to_json(value), path.read_text(), (tmp_path / "value.jsonl").read_text()):
        assert json.loads(text, parse_constant=refuse) == expected


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["summary.json"]


def test_lines_of_json_are_added_at_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        append_json_line(path, {"step": step, "text": "two\nlines"})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert path.read_text().endswith("}\n")
