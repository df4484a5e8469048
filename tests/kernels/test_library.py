"""Building the kernels for CPUs: once, kept in the cache, and doing without where it fails."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bitfit_fast.errors import BitFitError
from bitfit_fast.kernels import library
from bitfit_fast.ops import _backend, bias_activation, column_sum, dropout_add_layer_norm
from bitfit_fast.ops.dropout import dropout

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="its compilers are shell scripts")
OPERATIONS = {
    "layer_norm": lambda: dropout_add_layer_norm(
        torch.eye(4), torch.ones(4), p=0.5, seed=torch.tensor([3])
    )[0],
    "activation": lambda: bias_activation(torch.eye(4)),
    "column_sum": lambda: column_sum(torch.eye(4)),
    "dropout": lambda: dropout(torch.ones(4, 20), 0.5, torch.tensor([3])),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where libraries are kept: an empty folder. Nothing is loaded before or after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_backend, "INTERPRETED", False)
    library._loaded.cache_clear()
    yield tmp_path / "bitfit_fast"
    library._loaded.cache_clear()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The library itself, for compilers that only pretend."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    return library._build(compiler)


@pytest.fixture
def compiler(tmp_path, monkeypatch, built):
    """Write a compiler that notes when it runs, and return what reads the notes."""

    def write(body=f'cp "{built}" "$last"', name="c++"):
        script, notes = tmp_path / name, tmp_path / "notes"
        script.write_text(
            "#!/bin/sh\n"
            f'case "$*" in *--version) echo {name} 1.0; exit 0;; esac\n'
            f'for last in "$@"; do :; done\necho built >> "{notes}"\n{body}\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(script))
        return lambda: notes.read_text().split() if notes.exists() else []

    return write


def does_without(monkeypatch, *parts):
    """Assert that a sentence says why, that operations run in PyTorch, and refuse to if told."""
    reason = library.unavailable()
    assert reason is not None and "\n" not in reason and not reason.endswith(".")
    for part in parts:
        assert part in reason
    for run in OPERATIONS.values():
        monkeypatch.setenv(_backend.BACKEND_VARIABLE, "torch")
        expected = run()
        monkeypatch.setenv(_backend.BACKEND_VARIABLE, "auto")
        assert torch.equal(run(), expected)
        monkeypatch.setenv(_backend.BACKEND_VARIABLE, "native")
        with pytest.raises(BitFitError) as raised:
            run()
        assert str(raised.value) == f"BITFIT_FAST_BACKEND is 'native', but {reason}"


def test_without_a_compiler_pytorch_runs(cache, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    does_without(monkeypatch, "no C++ compiler", "g++", "clang++", "CXX")
    assert not cache.exists()


def test_a_compiler_that_is_not_there(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    does_without(monkeypatch, "/nowhere/c++ could not build native.cpp")


def test_a_compiler_that_only_fails(cache, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false"))
    does_without(monkeypatch, "false could not build native.cpp")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo 'unknown flag.' >&2; echo more >&2; exit 1", "unknown flag"),
        ("echo 'In file included from here:' >&2; echo 'x.h:3: error: no' >&2; exit 1", "x.h:3"),
        ("echo >&2; exit 3", "exit status 3"),
        ('echo text > "$last"', "so"),  # nothing that could be loaded
        ("true", "No such file"),
    ],
)
def test_a_compiler_that_fails_at_the_source(cache, compiler, monkeypatch, body, said):
    compiler(body)
    does_without(monkeypatch, "c++ could not build native.cpp", said)
    assert not [path for path in cache.iterdir() if path.suffix != ".so"]


def test_a_cache_that_cannot_be_written(cache, compiler, monkeypatch):
    compiler()
    cache.write_text("no folder")
    does_without(monkeypatch, f"nothing can be written to {cache} (File exists)", "XDG_CACHE_HOME")


def test_a_cache_that_nothing_may_run_from(cache, compiler, monkeypatch):
    def forbidden(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    compiler('echo text > "$last"')
    monkeypatch.setattr(ctypes, "CDLL", forbidden)
    # or memory is short
    does_without(monkeypatch, "could not build native.cpp", "failed to map segment")
    library._loaded.cache_clear()
    mounted = types.SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda path: mounted)
    does_without(monkeypatch, f"nothing may run from {cache}", "XDG_CACHE_HOME")


def test_without_a_home_pytorch_runs(cache, compiler, monkeypatch):
    def lost():
        raise RuntimeError("Could not determine home directory.")

    compiler()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lost)
    does_without(monkeypatch, "home directory")


def test_the_library_is_built_once_and_kept_in_the_cache(cache, compiler, monkeypatch):
    built = compiler()
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "native")
    for _ in range(2):
        assert library.unavailable() is None
        assert torch.equal(OPERATIONS["column_sum"](), torch.ones(4))
        library._loaded.cache_clear()
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert built() == ["built"]


def test_a_library_that_is_not_whole_is_built_anew(cache, compiler):
    built = compiler()
    kept = library._build(os.environ["CXX"])
    kept.write_bytes(b"")
    assert library.unavailable() is None
    assert torch.equal(column_sum(torch.eye(4)), torch.ones(4))
    assert built() == ["built"] * 2 and list(cache.iterdir()) == [kept]


def test_a_compiler_may_be_named_with_arguments(cache, compiler, monkeypatch):
    built = compiler()
    monkeypatch.setenv("CXX", f"'{os.environ['CXX']}' -m64")
    assert library.unavailable() is None
    assert built() == ["built"]
    library._loaded.cache_clear()
    monkeypatch.setenv("CXX", "'c++")
    does_without(monkeypatch, "'c++ could not build native.cpp", "closing quotation")


def test_without_leave_for_matrix_units_there_are_vectors(cache, compiler, monkeypatch):
    """The same library stands for both, which says of itself what it was asked for without."""
    opened, asked = library._opened, []

    class Refused:
        @staticmethod
        def bitfit_is_refused():
            return 1

    def answer(name, *more):
        asked.append(more)
        return opened(name, *more) if more else Refused

    built = compiler()
    monkeypatch.setattr(library, "_opened", answer)
    assert library.unavailable() is None
    assert asked == [(), ("-mno-amx-bf16", "-mno-amx-tile")] and built() == ["built"]
    assert torch.equal(column_sum(torch.eye(4)), torch.ones(4))


def test_another_compiler_or_flag_builds_anew(cache, compiler, monkeypatch):
    built = compiler()
    assert library.unavailable() is None
    for change in ("flag", "arguments", "compiler", "source"):
        library._loaded.cache_clear()
        if change == "flag":
            monkeypatch.setattr(library, "_FLAGS", (*library._FLAGS, "-g"))
        elif change == "arguments":
            monkeypatch.setenv("CXX", f"{os.environ['CXX']} -m64")
        elif change == "compiler":
            compiler(name="an other")
        else:
            source = cache / "native.cpp"
            source.write_text("// changed")
            monkeypatch.setattr(library, "_SOURCE", source)
        assert library.unavailable() is None
    assert len(built()) == len(list(cache.glob("*.so"))) == 5


def test_processes_that_build_at_once_do_not_break_each_other(cache, compiler, built, tmp_path):
    # neither gets a library before the other has begun to build one
    wait = f'while [ $(wc -l < "{tmp_path}/notes") -lt 2 ]; do sleep 0.05; done'
    runs = compiler(f'{wait}; cp "{built}" "$last"')
    code = """
import torch
from bitfit_fast.kernels import library, native
print("ready", flush=True)
input()
reason = library.unavailable()
assert reason is None, reason
assert torch.equal(native.column_sum(torch.eye(4)), torch.ones(4))
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    run = [sys.executable, "-c", code]
    both = [subprocess.Popen(run, cwd=ROOT, text=True, **pipes) for _ in range(2)]
    try:
        for process in both:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in both:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
    finally:
        for process in both:
            process.kill()
    assert runs() == ["built"] * 2
    assert [path.suffix for path in cache.iterdir()] == [".so"]
