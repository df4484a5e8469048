"""The fast step: many of them against the reference, and a run that goes on."""

import pytest
import torch

from bitfit_fast import patch_encoder, select
from bitfit_fast.training.fast import FastBackend, FastStep
from bitfit_fast.training.reference import ReferenceStep
from bitfit_fast.training.settings import Plan, Settings

STEPS = 32
pytestmark = pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")


@pytest.fixture
def plan():
    settings = Settings(max_steps=STEPS, batch_size=4, lr=1e-3)
    return Plan.of(settings, "bitfit", 60)


@pytest.fixture
def batches(batch):
    lengths = [(5, 9, 1, 7), (16, 2, 3, 11), (8, 8, 8, 8), (1, 4, 6, 13)]

    def of(model, steps=range(STEPS)):
        return [batch(model, lengths[step % 4], seed=step) for step in steps]

    return of


def trained(model, names):
    return {name: model.get_parameter(name).detach().clone() for name in names}


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_many_steps_lead_where_those_of_the_reference_lead(family, plan, build, batches):
    results = []
    for kind in (ReferenceStep, FastStep):
        model = build(family)
        selection = select(model)
        start = trained(model, selection.names)
        if kind is FastStep:
            done = patch_encoder(model, selection, precision="fp32")
        step = kind(model, plan)
        losses = torch.stack([step(inputs) for inputs in batches(model)])
        step.close()
        results.append((losses, trained(model, selection.names)))
    (losses, ends), (fast_losses, fast_ends) = results
    torch.testing.assert_close(fast_losses, losses, rtol=1e-4, atol=0)
    assert losses[-4:].mean() < losses[:4].mean()
    for name, end in fast_ends.items():
        if name in done.no_gradient:
            assert torch.equal(end, start[name])
        else:
            torch.testing.assert_close(end, ends[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_bit_by_bit(precision, plan, build, batches):
    def start():
        model = build("bert", hidden_dropout_prob=0.1)
        selection = select(model)
        patch_encoder(model, selection, precision=precision)
        return model, selection, FastStep(model, plan)

    model, selection, step = start()
    inputs = batches(model, range(8))
    torch.manual_seed(3)
    for one in inputs[:4]:
        step(one)
    state, values = step.state(), trained(model, selection.names)
    random = torch.get_rng_state()
    expected = [step(one) for one in inputs[4:]]
    ends = trained(model, selection.names)
    again, _, resumed = start()
    with torch.no_grad():
        for name, value in values.items():
            again.get_parameter(name).copy_(value)
    resumed.restore(state, 4)
    torch.set_rng_state(random)
    assert [resumed(one) for one in inputs[4:]] == expected
    found = trained(again, selection.names)
    assert all(torch.equal(found[name], ends[name]) for name in ends)
    assert resumed.steps == 8


def test_gradients_go_straight_into_the_arena(plan, build, batches, measure, as_exact):
    model = build("bert")
    select(model)
    patch_encoder(model, precision="fp32")
    inputs = batches(model, [1])[0]
    expected = measure(model, inputs)
    step = FastStep(model, plan)
    step.arena.zero_gradients()
    model(**inputs).loss.backward()
    step.arena.check()
    for name in step.arena.parameters:
        assert torch.equal(step.arena.view(name, step.arena.gradients), expected[name]), name
    # a second one adds to them
    model(**inputs).loss.backward()
    for name in step.arena.parameters:
        assert torch.equal(model.get_parameter(name).grad, 2 * expected[name]), name
    step.close()
    assert step.encoder.sinks is None
    found = measure(model, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_that_run_one_by_one_fill_the_same_arena(plan, build, batches):
    model = build("bert")
    select(model)
    patch_encoder(model, precision="fp32")
    step = FastStep(model, plan)
    gradients = []
    for asked in ({}, {"output_hidden_states": True}):
        step.arena.zero_gradients()
        model(**batches(model, [1])[0], **asked).loss.backward()
        step.arena.check()
        gradients.append(step.arena.gradients.clone())
    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_backend_patches_and_takes_it_back(plan, build, batches):
    model = build("bert")
    selection, kind = select(model), type(model.bert)
    backend = FastBackend()
    assert backend.refusal(model, selection, plan) is None
    undo, text = backend.patch(model, selection, plan)
    assert "3 layers run as one operation in fp32" in text
    step = backend.step(model, plan)
    step(batches(model, [0])[0])
    step.close()
    undo()
    assert type(model.bert) is kind
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_()
    assert "trains" in backend.refusal(model, selection, plan)
