"""The kernels as other CPUs run them: older ones, and those whose instructions AVX-512 computes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitfit_fast.kernels import library

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TESTS = tuple(
    f"tests/{name}.py"
    for name in ("kernels/test_native", "kernels/test_tiles", "encoder/test_tiles")
)
_EMULATED = f'-O1 -include "{HERE}/emulated.h"'  # or optimising takes longer than the tests
#: What the compiler is told; and what the library then says of itself: numbers that make up one of
#: fp32, their dtype and whether they stand in pairs, those of bf16, whether there are matrix units,
#: numbers of a vector.
KINDS = {
    "AVX2": (
        "-march=haswell",
        "(1, torch.float32, False) (1, torch.bfloat16, False) False 8",
    ),
    "AVX-512": (
        "-march=skylake-avx512",
        "(1, torch.float32, False) (1, torch.bfloat16, False) False 16",
    ),
    "AVX512-BF16": (
        f"-DEMULATED_BF16 {_EMULATED}",
        "(1, torch.float32, False) (1, torch.bfloat16, True) False 16",
    ),
    "AMX": (
        f"-DEMULATED_AMX {_EMULATED}",
        "(3, torch.bfloat16, True) (1, torch.bfloat16, True) True 16",
    ),
}
ASKED = """
import torch
from bitfit_fast.kernels import library
layouts = [tuple(library.layout(dtype)) for dtype in (torch.float32, torch.bfloat16)]
print(*layouts, library.has_matrix_units(), library.lanes())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tests_pass(kind, tmp_path):
    if reason := library.unavailable():
        pytest.skip(reason)
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("this CPU has no vectors of 512 bits (AVX-512)")
    told, said = KINDS[kind]
    real = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec "{real}" "$@" {told}\n')
    compiler.chmod(0o755)
    # a cache of its own, as to its name the library is the one for this CPU
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    run = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    asked = subprocess.run([sys.executable, "-c", ASKED], **run)
    assert asked.stdout.strip() == said, asked.stderr
    some = "not electra and not mpnet and not vit and not distilbert and not 128_bits"
    arguments = ("-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", some, *TESTS)
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], **run)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-3000:]
