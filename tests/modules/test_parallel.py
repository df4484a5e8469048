"""Wrappers around a patched model: data parallelism, autocast, functional calls."""

import pytest
import torch

from bitfit_fast import patch, select


def test_two_processes_get_the_gradients_of_one(build, batch, of_two_processes):
    model = build("bert")
    done = of_two_processes(model, batch(model, rows=4), "modules", patch)
    assert len(done.no_gradient) == 2


@pytest.mark.parametrize("family", ["bert", "albert", "vit", "gpt2", "opt", "deberta-v2"])
@pytest.mark.parametrize("training", [False, True])
def test_autocast_costs_no_more_accuracy_than_without_patching(
    family, training, build, batch, measure, changed, without_gradient, same_dropout
):
    results = []
    for dtype, patched in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        model = build(family).to(dtype).train(training)
        select(model)
        if patched:
            patch(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            results.append(measure(model, batch(model)))
    exact, pytorch, found = results
    assert {t.dtype for n, t in found.items() if n in changed(found)} == {torch.float32}
    names = changed(found) - without_gradient(model)

    def error(measured):
        return {n: (measured[n].double() - exact[n]).norm().item() for n in names | {"logits"}}

    ours, theirs = error(found), error(pytorch)
    # one bias is lucky where another is not; of all together the rule holds
    total = sum(e**2 for e in ours.values()) ** 0.5
    assert total <= 2 * sum(e**2 for e in theirs.values()) ** 0.5
    for name in names:
        floor = 2.0**-7 * exact[name].norm().item()
        assert ours[name] <= 2 * theirs[name] + floor, (name, ours[name], theirs[name])


def test_autocast_may_be_left_before_the_backward_pass(patched, batch, measure):
    model = patched("bert")
    inputs = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        inside = measure(model, inputs)
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in inside:
            assert torch.equal(parameter.grad, inside[name]), name


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_bf16_weights_with_fp32_biases_train(family, build, batch, measure, changed):
    model, exact = build(family), build(family).double()
    selection = select(model)
    for parameter in model.parameters():
        # both models have the same weights
        parameter.data = parameter.data.bfloat16()
    exact.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    select(exact)
    truth = measure(exact, batch(exact))
    patch(model)
    base = model.base_model_prefix
    for name in selection.names:
        if name.startswith(base):
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.float()
    found = measure(model, batch(model))
    assert {found[n].dtype for n in changed(found) if n.startswith(base)} == {torch.float32}
    for name in changed(found):
        if "attn" not in name and ".attention.self" not in name:
            error = (found[name].double() - truth[name]).norm() / truth[name].norm()
            assert error < 0.1, name


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "albert"])
def test_a_functional_call_differentiates_the_biases_it_is_given(family, build, batch, measure):
    model = build(family)
    selection = select(model)
    expected = measure(model, batch(model))
    done = patch(model)
    names = [name for name in selection.names if name not in done.no_gradient]
    given = {name: model.get_parameter(name).detach().clone() for name in names}
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.0) if parameter.requires_grad else None
    for tensor in given.values():
        tensor.requires_grad_()
    out = torch.func.functional_call(model, given, kwargs=batch(model))
    grads = torch.autograd.grad(out.loss, list(given.values()))
    torch.testing.assert_close(out.loss.detach(), expected["loss"])
    for name, grad in zip(names, grads):
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6)
