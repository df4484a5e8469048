"""The kernels as other CPUs run them, whose instructions those with AVX-512 can compute."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitfit_fast.kernels import library

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TESTS = ("tests/kernels/test_tiles.py", "tests/encoder/test_tiles.py")
#: By what the library says of the three: numbers that make up one of fp32, and of which dtype
#: those of bf16 are.
KINDS = {
    "EMULATED_BF16": "(1, torch.float32) (1, torch.bfloat16) False",
    "EMULATED_AMX": "(3, torch.bfloat16) (1, torch.bfloat16) True",
}
ASKED = """
import torch
from bitfit_fast.kernels import library
print(library.layout(torch.float32), library.layout(torch.bfloat16), library.has_matrix_units())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tests_pass(kind, tmp_path):
    if reason := library.unavailable():
        pytest.skip(reason)
    if not library.has_tiles():
        pytest.skip("this CPU has no 512-bit vectors (AVX-512)")
    real = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    compiler = tmp_path / "c++"
    # emulated instructions are many, and take the optimiser longer than the tests take
    flags = f'-D{kind} -include "{HERE}/emulated.h" "$@" -O1'
    compiler.write_text(f'#!/bin/sh\nexec "{real}" {flags}\n')
    compiler.chmod(0o755)
    # a cache of its own, as to its name the library is the one for this CPU
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    run = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    asked = subprocess.run([sys.executable, "-c", ASKED], **run)
    assert asked.stdout.strip() == KINDS[kind], asked.stderr
    some = "not electra and not mpnet and not vit and not distilbert"
    arguments = ("-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", some, *TESTS)
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], **run)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-3000:]
