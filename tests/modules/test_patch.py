"""Putting drop-ins in and taking them out: what changes, and what must not."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bitfit_fast import BitFitError, BitFitWarning, Selection, modules, patch, select, unpatch
from bitfit_fast.methods import METHODS
from bitfit_fast.models.families import biases

from .conftest import assert_same, kinds, replaced


def fields(model):
    return {name: dict(vars(module)) for name, module in model.named_modules()}


# what stays as it was


def test_after_unpatching_every_module_is_what_it_was(family, build, batch):
    model = build(family)
    selection = select(model)
    before, held, flags = kinds(model), fields(model), Selection.of(model)
    logits = model(**batch(model)).logits
    patch(model)
    assert kinds(model) != before
    unpatch(model)
    assert kinds(model) == before
    assert Selection.of(model) == flags == selection
    for name, was in held.items():
        now = fields(model)[name]
        assert now.keys() == was.keys(), name
        assert all(now[field] is value for field, value in was.items() if field[0] != "_"), name
    assert torch.equal(model(**batch(model)).logits, logits)


def test_the_state_dict_has_the_same_tensors_under_the_same_names(family, build):
    model = build(family)
    select(model)

    def state():
        return [(name, t.data_ptr(), t._version) for name, t in model.state_dict().items()]

    before, parameters = state(), list(map(id, model.parameters()))
    names = [name for name, _ in model.named_modules()]
    patch(model)
    assert state() == before
    assert list(map(id, model.parameters())) == parameters
    assert [name for name, _ in model.named_modules()] == names
    unpatch(model)
    assert state() == before
    assert list(map(id, model.parameters())) == parameters


def test_drop_ins_are_instances_of_what_they_replace(family, build):
    model = build(family)
    select(model)
    before = kinds(model)
    patch(model)
    names = replaced(model)
    assert names
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, before[name]) and type(module).__name__ == before[name].__name__
        assert modules.original(module) is before[name]


def test_a_model_can_be_patched_over_and_over(build, batch, measure):
    model = build("bert")
    select(model)
    first = None
    for _ in range(3):
        patch(model)
        found = measure(model, batch(model))
        first = first or found
        assert all(torch.equal(found[name], first[name]) for name in first)
        unpatch(model)


def test_a_model_that_is_not_patched_can_be_unpatched(build):
    model = build("bert")
    select(model)
    before = kinds(model), fields(model), Selection.of(model)
    unpatch(model)
    assert (kinds(model), fields(model), Selection.of(model)) == before


def test_training_mode_stays_and_can_be_changed(build):
    model = build("bert")
    select(model)
    for training in (True, False):
        model.train(training)
        patch(model)
        assert all(module.training is training for module in model.modules())
        model.train(not training)
        assert all(module.training is not training for module in model.modules())
        unpatch(model)
        assert all(module.training is not training for module in model.modules())


def test_dtype_stays_and_can_be_changed(build, batch, measure):
    model = build("bert")
    select(model)
    patch(model)
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    found = measure(model, batch(model))
    assert {t.dtype for t in found.values()} == {torch.float64}
    unpatch(model)
    expected = measure(model, batch(model))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_a_patched_model_can_be_moved_to_a_device_without_memory(build):
    model = build("bert")
    select(model)
    patch(model)
    names = replaced(model)
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert replaced(model) == names


def test_a_copy_of_a_patched_model_is_patched_on_its_own(build, batch, measure, changed):
    model = build("bert")
    select(model)
    patch(model)
    twin = copy.deepcopy(model)
    assert replaced(twin) == replaced(model)
    found, expected = measure(twin, batch(twin)), measure(model, batch(model))
    assert_same(found, expected)
    with pytest.raises(BitFitError, match="patched already"):
        patch(twin)
    unpatch(twin)
    assert not replaced(twin) and replaced(model)
    assert changed(measure(twin, batch(twin))) > changed(found)
    assert changed(measure(model, batch(model))) == changed(found)


def test_a_patched_model_goes_through_pickle(build, batch):
    model = build("bert")
    select(model)
    patch(model)
    twin = pickle.loads(pickle.dumps(model))
    assert replaced(twin) == replaced(model)
    assert torch.equal(twin(**batch(twin)).logits, model(**batch(model)).logits)
    unpatch(twin)
    assert not replaced(twin)


def test_a_patched_model_saves_what_the_plain_one_does(build, batch, tmp_path):
    model = build("bert")
    select(model)
    logits = model(**batch(model)).logits
    patch(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert not replaced(again)
    assert torch.equal(again(**batch(again)).logits, logits)


# what is replaced and what is not


def test_the_result_says_what_was_replaced(build):
    model = build("bert")
    select(model)
    done = patch(model)
    # four projections and two dense layers a layer, and the pooler; the head's weight trains
    assert done.replaced == {"Linear": 13, "LayerNorm": 5}
    assert list(done.replaced) == ["LayerNorm", "Linear"]
    assert done.fused == 6
    assert done.left == {}
    first, second = str(done).splitlines()
    assert first == "replaced 5 LayerNorm, 13 Linear; 6 of them in one with what follows"
    assert "2" in second and "key" in second and "not computed" in second


@pytest.mark.parametrize(
    ("family", "kind", "count"),
    [("gpt2", "Conv1D", 8), ("deberta", "DebertaLayerNorm", 5), ("vit", "Linear", 12)],
)
def test_classes_like_pytorchs_are_replaced_too(family, kind, count, build):
    model = build(family)
    select(model)
    assert patch(model).replaced[kind] == count


def test_the_result_says_what_was_left_and_why():
    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(Quantised(4, 4), Quantised(4, 4), nn.Linear(4, 4))
    select(model, head=False)
    with pytest.warns(BitFitWarning):
        done = patch(model)
    assert done.left == dict.fromkeys(("0", "1"), "there is no drop-in for Quantised")
    assert str(done).splitlines() == [
        "replaced 1 Linear; 0 of them in one with what follows",
        "left 0, 1: there is no drop-in for Quantised",
    ]


def test_where_nothing_can_be_replaced_the_result_says_nothing():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU())
    done = patch(model)
    assert done.replaced == {} and done.fused == 0
    assert str(done) == "replaced nothing; 0 of them in one with what follows"


def test_without_fusing_every_module_works_alone(
    family, build, batch, measure, calls, as_exact, without_gradient
):
    model, twin = build(family), build(family).double()
    for each in (model, twin):
        select(each)
    inputs = batch(model)
    pytorch, exact = measure(model, inputs), measure(twin, batch(twin))
    done = patch(model, fuse=False)
    assert done.fused == 0
    with calls() as seen:
        found = measure(model, inputs)
    assert seen.fused == (0, 0, 0, 0)
    assert seen.count("bitfit_fast::layer_norm_fwd") >= 4
    for name in without_gradient(model) & set(found):
        del found[name]
    as_exact(found, pytorch, exact)


def test_few_bits_cost_a_little_accuracy_and_only_where_activations_are_fused(
    build, batch, measure
):
    for family in ("bert", "gpt2", "vit", "distilbert", "albert", "opt"):
        model = build(family)
        select(model)
        patch(model)
        exact = measure(model, batch(model))
        unpatch(model)
        patch(model, few_bits=True)
        found = measure(model, batch(model))
        assert torch.equal(found["loss"], exact["loss"])
        dense = next(b.name for b in biases(model) if b.term == "intermediate" and b.layer == 0)
        error = ((found[dense] - exact[dense]).norm() / exact[dense].norm()).item()
        assert (error == 0) if family == "opt" else (1e-5 < error < 1e-2), (family, error)
        unpatch(model)
        patch(model, fuse=False, few_bits=True)
        plain = measure(model, batch(model))
        unpatch(model)
        patch(model, fuse=False)
        assert_same(plain, measure(model, batch(model)))
        unpatch(model)


def test_a_model_is_not_patched_twice(build):
    model = build("bert")
    select(model)
    patch(model)
    before = kinds(model)
    with pytest.raises(BitFitError, match=r"^the model is patched already"):
        patch(model)
    assert kinds(model) == before


def test_a_model_with_a_patched_part_is_not_patched(build):
    model = build("bert")
    select(model)
    patch(model.bert.encoder)
    before = kinds(model)
    with pytest.raises(BitFitError, match="patched already"):
        patch(model)
    assert kinds(model) == before
    unpatch(model)
    assert not replaced(model)
    patch(model)


def test_a_wrapped_model_is_not_patched(build):
    model = build("bert")
    select(model)
    with pytest.raises(BitFitError, match="before it is wrapped in OptimizedModule"):
        patch(torch.compile(model, backend="eager"))
    assert not replaced(model)


def test_a_patched_model_takes_no_other_selection(build):
    model = build("bert")
    selection = select(model)
    patch(model)
    for method in METHODS.values():
        with pytest.raises(BitFitError, match="patched; unpatch it before another selection"):
            method.select(model, "all", None, True)
    assert Selection.of(model) == selection
    unpatch(model)
    assert select(model, "query").terms == ("query",)


def test_a_trained_bias_of_a_module_that_stays_is_warned_of(build):
    model = build("bert")
    pooler = model.bert.pooler
    pooler.dense = parametrizations.weight_norm(pooler.dense)
    selection = select(model)
    assert "bert.pooler.dense.bias" in selection.names
    with pytest.warns(BitFitWarning) as caught:
        done = patch(model)
    assert [str(w.message) for w in caught] == [
        "modules with a trained bias that stay as they were: bert.pooler.dense (it is parametrized)"
    ]
    assert caught[0].filename == __file__
    assert done.left == {"bert.pooler.dense": "it is parametrized"}


def test_a_module_that_stays_without_training_is_not_warned_of(build):
    model = build("bert")
    pooler = model.bert.pooler
    pooler.dense = parametrizations.weight_norm(pooler.dense)
    select(model, "query")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch(model).left == {"bert.pooler.dense": "it is parametrized"}


def test_nothing_is_warned_of_where_all_is_replaced(family, build):
    model = build(family)
    select(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch(model).left == {}
