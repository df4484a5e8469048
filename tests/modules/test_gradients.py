"""Gradients of patched layers: of all that asks for one, shared or not, of any shape."""

import pytest
import torch
import transformers
from torch import nn

from bitfit_fast import patch, select

from .conftest import assert_same, gradients, only_biases, replaced, rows, seeded

# what requires a gradient


def test_a_weight_that_is_unfrozen_later_gets_its_whole_gradient(
    family, build, batch, measure, without_gradient
):
    model, plain = build(family), build(family)
    selection = select(plain)
    select(model)
    patch(model)
    names = [f"{n}.weight" for n in replaced(model) if model.get_submodule(n)._parameters]
    assert len(names) > 8
    for name in names:
        for each in (model, plain):
            each.get_parameter(name).requires_grad_(True)
    found, expected = measure(model, batch(model)), measure(plain, batch(plain))
    for name in (*names, *selection.names):
        if name in found and name not in without_gradient(model):
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4 * scale)
    assert set(names) <= set(found)


@pytest.mark.parametrize("inside", [True, False])
def test_where_nothing_trains_there_is_no_graph(inside, family, build, batch):
    model = build(family)
    model.requires_grad_(False)
    expected = model(**batch(model)).logits
    patch(model)
    found = model(**batch(model))
    assert found.logits.grad_fn is None and not found.loss.requires_grad
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    model.requires_grad_(True)
    with torch.inference_mode() if inside else torch.no_grad():
        again = model(**batch(model))
    assert again.logits.grad_fn is None
    torch.testing.assert_close(again.logits, expected, rtol=1e-4, atol=1e-5)


def test_biases_frozen_after_patching_get_no_gradient(build, batch, measure, changed):
    model = build("bert")
    select(model)
    patch(model)
    expected = measure(model, batch(model))
    last = [n for n, p in model.named_parameters() if p.requires_grad and "layer.1.output" in n]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in last)
    found = measure(model, batch(model))
    assert changed(found) == set(last) and len(last) == 2
    assert_same(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(
    family, build, batch, measure, calls, same_dropout
):
    model = build(family).train()
    select(model)
    patch(model)
    expected = measure(model, batch(model))
    with calls() as plain:
        measure(model, batch(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with calls() as seen:
        found = measure(model, batch(model))
    assert seen.fused == tuple(2 * count for count in plain.fused)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("family", ["bert", "vit", "distilbert"])
def test_reentrant_checkpointing_changes_no_gradient_either(
    family, build, batch, measure, same_dropout
):
    model = build(family).train()
    select(model)
    patch(model)
    expected = measure(model, batch(model))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    found = measure(model, batch(model))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_patched_model_can_be_differentiated_for_its_input(build, batch):
    grads = []
    for patched in (False, True):
        model = build("bert")
        select(model)
        if patched:
            patch(model)
        inputs = batch(model)
        table = model.get_input_embeddings()
        x = table(inputs.pop("input_ids")).detach().requires_grad_()
        model(inputs_embeds=x, **inputs).loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


# what is shared or used twice, and tensors of any shape


def test_a_weight_shared_with_a_frozen_embedding_stays_shared(batch, build):
    torch.manual_seed(0)
    config = build("bert").config
    model = transformers.BertForMaskedLM(config).eval()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    inputs = batch(build("bert"))
    inputs["labels"] = inputs["input_ids"]

    def run():
        model.zero_grad(set_to_none=True)
        out = model(**inputs)
        out.loss.backward()
        return {"logits": out.logits.detach()} | {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None
        }

    expected = run()
    done = patch(model)
    decoder = model.cls.predictions.decoder
    assert decoder.weight is model.get_input_embeddings().weight
    assert "cls.predictions.decoder" in replaced(model)
    found = run()
    assert "cls.predictions.bias" in found
    assert set(found) == set(expected) - set(done.no_gradient)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)


def test_a_layer_used_twice_gets_the_sum_of_both_gradients():
    model = only_biases(seeded(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))))
    twice = nn.Sequential(model, nn.ReLU(), model)
    expected = gradients(twice, rows(3, 6))
    assert patch(twice).replaced == {"Linear": 1, "LayerNorm": 1}
    assert_same(gradients(twice, rows(3, 6)), expected)


def test_two_modules_with_one_bias_get_the_sum_of_both_gradients():
    model = seeded(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    model[2].bias = model[0].bias
    only_biases(model)
    expected = gradients(model, rows(3, 6))
    patch(model)
    assert_same(gradients(model, rows(3, 6)), expected)


@pytest.mark.parametrize(
    "shape", [(6,), (1, 6), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)]
)
def test_inputs_of_any_number_of_dimensions_pass(shape):
    model = only_biases(seeded(nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.LayerNorm(4))))
    expected = gradients(model, rows(*shape))
    patch(model)
    assert_same(gradients(model, rows(*shape)), expected)


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6)], ids=["2D", "3D"])
@pytest.mark.parametrize(
    "after",
    [
        nn.ReLU(inplace=True),
        lambda y: y.mul_(2),
        lambda y: y.transpose(-1, -2).mul_(2),
        lambda y: y[..., :2].div_(3).sum() + y.sum(),
    ],
    ids=["relu", "itself", "transposed", "a part"],
)
@pytest.mark.parametrize("kind", ["linear", "layer norm"])
def test_what_a_layer_returns_can_be_changed_in_place(kind, after, shape):
    layer = nn.Linear(6, 4) if kind == "linear" else nn.LayerNorm(6)
    model = only_biases(seeded(nn.Sequential(layer)))

    def loss(y):
        # autograd keeps neither layer's output
        return after(y).square().sum()

    expected = gradients(model, rows(*shape), loss)
    patch(model)
    assert_same(gradients(model, rows(*shape), loss), expected)
