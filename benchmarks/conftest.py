"""One run: its options, its time limit, and the file of results that grows with it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

# pytest imports these files by path, and finds their neighbours nowhere
sys.path.insert(0, str(Path(__file__).parent))

from micro import Settings, copy_rate, measure, product_rate
from operations import OPERATIONS
from provenance import QUICK, provenance, slug, write_results

PATH = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add this run's options."""
    group = parser.getgroup("bitfit_fast")
    folder = Path(__file__).parent / "results"
    group.addoption(
        "--results-dir", type=Path, default=folder, help="folder of kernels-DEVICE.json"
    )
    group.addoption(
        "--seconds",
        type=float,
        default=225.0,
        help="no group starts later than this; the results name those left out",
    )


class Run:
    """Measures each group once, when its first row is asked for, and writes all of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.start = time.monotonic()
        self.seconds = config.getoption("--seconds")
        cuda = torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu")
        dtype = torch.bfloat16 if cuda else torch.float32
        seconds, rounds = (0.0, 3) if QUICK else (0.15, 10 if cuda else 7)
        self.settings = Settings(device, dtype, seconds, rounds, QUICK)
        seed = torch.seed()
        # the product first: it also wakes the device up
        products, copies = product_rate(self.settings), copy_rate(self.settings)
        self.limits = (copies, products)
        self.path = config.getoption("--results-dir") / f"kernels-{slug(device)}.json"
        command = " ".join(["pytest", *config.invocation_params.args])
        packages = ("torch", "triton", "transformers", "liger_kernel")
        self.results: dict[str, Any] = {
            **provenance(command, device, packages),
            "dtype": str(dtype).removeprefix("torch."),
            "quick": QUICK,
            "seed": seed,
            "compile": self.settings.compiler,
            "clock": "CUDA events" if cuda else "perf_counter",
            "copy_gb_s": round(copies / 1e9, 2),
            "product_tflop_s": round(products / 1e12, 4),
            "finished": False,
            "seconds": 0.0,
            "skipped": [],
            "rows": [],
        }
        self.groups: dict[tuple[str, int, int], dict[tuple[str, str], dict[str, Any]]] = {}

    def row(
        self, operation: str, direction: str, tokens: int, width: int, variant: str
    ) -> dict[str, Any] | None:
        """Return one row with its samples; None for a group left out."""
        group = (operation, tokens, width)
        if group not in self.groups:
            self.groups[group] = self._measure(*group)
        return self.groups[group].get((direction, variant))

    def _measure(
        self, operation: str, tokens: int, width: int
    ) -> dict[tuple[str, str], dict[str, Any]]:
        named = {"operation": operation, "tokens": tokens, "width": width}
        found = []
        if time.monotonic() - self.start > self.seconds:
            self.results["skipped"].append({**named, "why": "no time left"})
        else:
            try:
                found = measure(OPERATIONS[operation], tokens, width, self.settings, self.limits)
            except Exception as failure:  # said once, and the other groups go on
                self.groups[operation, tokens, width] = {}
                self.results["skipped"].append({**named, "why": repr(failure)[:300]})
                raise
        kept = [{k: v for k, v in row.items() if k != "samples_ms"} for row in found]
        self.results["rows"] += kept
        self.write()
        return {(row["direction"], row["variant"]): row for row in found}

    def write(self) -> None:
        """Write the results so far."""
        self.results["seconds"] = round(time.monotonic() - self.start, 1)
        write_results(self.path, self.results)


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Any:
    """Give the run to its tests, and note its end."""
    run = Run(request.config)
    yield run
    # an interrupt comes here too
    specs = (getattr(item, "callspec", None) for item in request.session.items)
    cases = (spec.params["case"] for spec in specs if spec and "case" in spec.params)
    run.results["finished"] = {(c[0], c[2], c[3]) for c in cases} <= run.groups.keys()
    run.write()
    request.config.stash[PATH] = run.path


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say where the results are."""
    if PATH in config.stash:
        terminalreporter.write_line(f"results: {config.stash[PATH]}")
