"""The package imports where parts of its surroundings are missing, and shadows nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "bitfit_fast").rglob("*.py"))


def python(code: str, **options) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_imports_without_triton_and_without_datasets():
    code = """
import sys
for name in ("triton", "datasets", "peft"):
    sys.modules[name] = None  # import raises ImportError
import bitfit_fast, bitfit_fast.cli
print(bitfit_fast.__version__)
"""
    assert python(code).startswith("0.")


def test_what_takes_seconds_to_import_waits_until_it_is_needed():
    code = """
import sys
import bitfit_fast, bitfit_fast.cli
slow = "transformers", "datasets", "matplotlib", "torchmetrics", "triton", "torch._dynamo"
print([name for name in slow if name in sys.modules])
"""
    assert python(code) == "[]"


def test_importing_the_package_asks_nothing_of_a_gpu():
    code = """
import torch
def refuse(*a, **k): raise AssertionError("CUDA was queried at import")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = refuse
import bitfit_fast, bitfit_fast.cli
"""
    python(code)


@pytest.mark.parametrize("cwd", [ROOT, ROOT.parent])
def test_this_project_never_provides_a_package_named_kernels(cwd):
    code = """
import importlib.util
found = importlib.util.find_spec("kernels")
print(found.origin if found is not None and found.loader is not None else None)
"""
    origin = python(code, cwd=cwd)
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_folder_is_installed():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for folder in {path.parent for path in SOURCES}:
        name = ".".join(folder.relative_to(ROOT).parts)
        assert f'"{name}"' in setup, name


def test_every_kernel_is_installed_and_the_source_of_those_for_cpus():
    pytest.importorskip("setuptools", reason="only a build needs setuptools")
    code = """
import setuptools
from distutils.core import run_setup
command = run_setup("setup.py", stop_after="init").get_command_obj("build_py")
command.ensure_finalized()
print(*command.get_outputs(include_bytecode=False), sep="\\n")
"""
    outputs = [Path(line) for line in python(code, cwd=ROOT).splitlines()]
    installed = {path.name for path in outputs if path.parent.name == "kernels"}
    sources = {path.name for path in (ROOT / "kernels").iterdir() if path.is_file()}
    assert "native.cpp" in sources and sources <= installed


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
        if isinstance(node, ast.Attribute) and node.attr == "load":
            owner = getattr(node.value, "id", "")
            assert owner != "torch", f"{path}, line {node.lineno}"


#: What may import what: modules those of their own rank and of lower ones.
RANKS = {
    name: rank
    for rank, names in enumerate(
        (
            ("_version", "errors", "kernels", "random_state", "transfer"),
            ("additions", "files", "ops", "packing", "stand_in"),
            ("arena", "metrics", "modules", "plots", "tensorfile"),
            ("data", "kinds", "models"),
            ("encoder", "selection"),
            ("methods", "patching"),
            ("checkpoint",),
            ("opening", "training"),
            ("inference", "parity"),
            ("study",),
            ("__init__",),
            ("cli", "demo"),
            ("__main__",),
        )
    )
    for name in names
}


def test_layers_of_the_package_import_downwards_only():
    """`ops` know kernels, `modules` ops, `encoder` both, and only `cli` knows all."""
    package = ROOT / "bitfit_fast"
    for path in SOURCES:
        parts = path.relative_to(package).parts
        own = RANKS[parts[0].removesuffix(".py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level != len(parts):
                continue  # of another package, or of the same folder
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            for module in modules:
                top = module.split(".")[0]
                # names of the package itself are asked for by those who know all
                rank = RANKS.get(top, RANKS["__init__"])
                assert rank <= own, f"{path}, line {node.lineno}, imports {module}"
