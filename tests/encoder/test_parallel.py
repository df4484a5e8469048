"""A data-parallel wrapper around a patched model."""

from functools import partial

from bitfit_fast import patch_encoder


def test_two_processes_get_the_gradients_of_one(build, batch, of_two_processes):
    model = build("bert")
    inputs = batch(model, (16, 3, 1, 12))
    done = of_two_processes(model, inputs, "encoder", partial(patch_encoder, precision="fp32"))
    assert len(done.no_gradient) == 3
