"""Two processes with half a batch each compute the gradients of one with all of it."""

import runpy
from pathlib import Path

import pytest
import torch

from bitfit_fast.ops._backend import BACKEND_VARIABLE

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch lacks its distributed part")
def test_two_processes_compute_the_gradients_of_one(tmp_path, monkeypatch, two_ranks):
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    batch = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1))
    torch.save(batch, tmp_path / "batch.pt")
    two_ranks(SCRIPT, meeting=tmp_path)
    script = runpy.run_path(str(SCRIPT))
    expected = script["gradients"](script["Model"](), batch)
    assert expected.keys() == {"b1", "b2", "beta", "head", "head_b"}
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients-{rank}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
