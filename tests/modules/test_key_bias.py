"""The key bias: its gradient is zero, so nobody computes it, and nobody loses it either."""

import pytest
import torch

import bitfit_fast
from bitfit_fast import BitFitError, Selection, patch, select, unpatch
from bitfit_fast.models.families import biases


def keys(model):
    names = [bias.name for bias in biases(model) if bias.term == "key"]
    assert names
    return names


def optimizer_of(model, selection):
    parameters = dict(model.named_parameters())
    return torch.optim.AdamW([parameters[name] for name in selection.names], lr=1e-2)


@pytest.mark.parametrize("dropout", [False, True])
def test_it_is_zero_but_for_rounding(
    dropout, plain_family, build, batch, measure, changed, float64_softmax
):
    model = build(plain_family).double().train(dropout)
    select(model)
    grads = measure(model, batch(model))
    largest = max(grads[name].abs().max() for name in changed(grads))
    for name in keys(model):
        assert grads[name].abs().max() < 1e-13 * largest


@pytest.mark.parametrize("family", ["deberta-v2", "gpt2"])
def test_a_key_that_positions_or_the_query_share_a_bias_with_is_like_any_other(
    family, build, batch, measure
):
    model = build(family).double()
    selection = select(model)
    assert not any(bias.zero_gradient for bias in biases(model))
    assert "zero" not in str(selection)
    done = patch(model)
    assert done.no_gradient == () and "key" not in str(done)
    term = "key" if family == "deberta-v2" else "query-key-value"
    names = [bias.name for bias in biases(model) if bias.term == term]
    grads = measure(model, batch(model))
    assert len(names) == 2
    assert all(grads[name].abs().max() > 1e-4 for name in names)
    unpatch(model)
    assert term in select(model, term).terms


def test_it_stays_where_it_is_and_is_no_less_selected(plain_family, build, batch, measure):
    model = build(plain_family)
    selection = select(model)
    assert set(keys(model)) <= set(selection.names)
    done = patch(model)
    assert list(done.no_gradient) == keys(model)
    line = str(done).splitlines()[-1]
    assert all(word in line for word in (str(len(keys(model))), "key", "zero", "not computed"))
    assert Selection.of(model) == selection
    assert Selection.of(model).counts["key"] == selection.counts["key"] == 32 * len(keys(model))
    optimizer = optimizer_of(model, selection)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        measure(model, batch(model))
        assert all(model.get_parameter(name).grad is None for name in keys(model))
        optimizer.step()
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    trained = set(selection.names)
    assert still == (set(before) - trained) | set(keys(model))
    unpatch(model)
    assert Selection.of(model) == selection
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_it_is_saved_from_a_patched_model_and_loaded_into_one(plain_family, build, batch, tmp_path):
    model = build(plain_family)
    selection = select(model)
    patch(model)
    optimizer = optimizer_of(model, selection)
    model(**batch(model)).loss.backward()
    optimizer.step()
    bitfit_fast.save(model, tmp_path / "model.safetensors")
    stored = bitfit_fast.read(tmp_path / "model.safetensors")
    assert set(stored.tensors) == set(selection.names)
    assert set(stored.header.terms) == set(selection.terms)
    assert stored.header.method == "bitfit"

    logits = model(**batch(model)).logits
    fresh, plain = build(plain_family), build(plain_family)
    select(fresh)
    patch(fresh)
    for other in (fresh, plain):
        bitfit_fast.load(other, tmp_path / "model.safetensors")
        state = other.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(fresh(**batch(fresh)).logits, logits)
    torch.testing.assert_close(plain(**batch(plain)).logits, logits)
    unpatch(model)
    assert torch.equal(model(**batch(model)).logits, plain(**batch(plain)).logits)


def test_alone_it_cannot_train_and_the_refusal_says_why(plain_family, build):
    model = build(plain_family)
    before = Selection.of(model)
    with pytest.raises(BitFitError) as info:
        select(model, "key")
    text = str(info.value)
    assert text.startswith("the gradient of every key bias is zero under softmax attention, so ")
    assert "alone it cannot train" in text and "query, value" in text
    assert "\n" not in text
    assert Selection.of(model) == before
    assert select(model, "key,query").terms == ("query", "key")


def test_the_table_says_so_where_it_is_selected(plain_family, build):
    model = build(plain_family)
    assert "key: its gradient is zero under softmax attention" in str(select(model))
    assert "zero" not in str(select(model, "query"))


def test_a_key_bias_that_was_not_selected_is_not_trained_by_unpatching(build):
    model = build("bert")
    select(model, "query")
    assert patch(model).no_gradient == ()
    unpatch(model)
    assert not any(model.get_parameter(name).requires_grad for name in keys(model))
    select(model, "query,key", layers="1")
    assert patch(model).no_gradient == tuple(keys(model)[1:])
    unpatch(model)
    assert [model.get_parameter(name).requires_grad for name in keys(model)] == [False, True]


def test_a_layers_key_alone_cannot_train_either(build):
    with pytest.raises(BitFitError, match="gradient of every key bias is zero"):
        select(build("bert"), "key", layers="1")


def test_full_fine_tuning_of_a_patched_model_leaves_it_out_too(build, batch, measure):
    model = build("bert")
    model.requires_grad_(True)
    done = patch(model)
    assert list(done.no_gradient) == keys(model)
    assert set(done.replaced) <= {"LayerNorm", "Linear"}
    found = measure(model, batch(model))
    expected = {n for n, _ in model.named_parameters()} - set(keys(model))
    assert expected == set(found) - {"loss", "logits"}
