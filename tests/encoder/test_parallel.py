"""A data-parallel wrapper around a patched model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitfit_fast
from bitfit_fast import patch_encoder, select


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch lacks its distributed part")
def test_two_processes_get_the_gradients_of_one(build, batch, tmp_path):
    model = build("bert")
    inputs = batch(model, (16, 3, 1, 12))
    torch.save(model, tmp_path / "model.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    script = Path(__file__).parents[1] / "modules" / "two_processes.py"
    run = subprocess.run(
        [sys.executable, script, tmp_path, "encoder"],
        env=os.environ | {"PYTHONPATH": str(Path(bitfit_fast.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout

    select(model)
    done = patch_encoder(model, precision="fp32")
    assert len(done.no_gradient) == 3
    model(**inputs).loss.backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"gradients-{rank}.pt")
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                assert grads[name] is None, name
            else:
                torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)
        assert all(grads[name] is None for name in done.no_gradient)
