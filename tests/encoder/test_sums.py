"""Sums that are added together: the same gradients, wherever they go and however many fit."""

import pytest
import torch

from bitfit_fast import patch_encoder, select
from bitfit_fast.arena import Arena
from bitfit_fast.encoder import backward, encoder_of, sums
from bitfit_fast.encoder.sums import Sums
from bitfit_fast.training.fast import FastStep
from bitfit_fast.training.settings import Plan

TERMS = ["all", "query", "value,output", "attention-layernorm,intermediate", "embedding-layernorm"]


@pytest.fixture
def deferred(monkeypatch):
    """Let sums wait for each other on a CPU, too, and count how often they are added."""
    added = []
    add = Sums.add

    def counting(self):
        added.append(len(self._segments))
        add(self)

    monkeypatch.setattr(Sums, "add", counting)

    def switch(on):
        monkeypatch.setattr(sums, "defers", lambda tensor: on)
        return added

    return switch


def patched(build, terms="all", family="bert", head="ForSequenceClassification", **options):
    model = build(family, head, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    selection = select(model, terms)
    patch_encoder(model, selection, precision="fp32", **options)
    return model


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-7, (name, error)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize("terms", TERMS)
def test_gradients_are_the_same_with_autograd(build, batch, measure, deferred, terms, family, head):
    if family == "vit" and ("Token" in head or "embedding" in terms):
        pytest.skip("images have neither")
    model = patched(build, terms, family, head)
    inputs = batch(model)
    deferred(False)
    expected = measure(model, inputs)
    added = deferred(True)
    assert_close(measure(model, inputs), expected)
    assert not sum(added) or max(added) > 1 or terms == "query"


@pytest.mark.parametrize("many", [0, 10_000])
def test_the_bottom_with_and_without_its_product(
    build, batch, measure, deferred, many, monkeypatch
):
    model = build("bert")  # without dropout, so that the embeddings' bias may go by the identity
    patch_encoder(model, select(model), precision="fp32")
    inputs = batch(model)
    deferred(False)
    expected = measure(model, inputs)
    monkeypatch.setattr(backward, "_MANY_ROWS", many)
    by_identity, found = [], backward.BackwardPass._embedding_beta

    def noting(*args):
        by_identity.append(1)
        found(*args)

    monkeypatch.setattr(backward.BackwardPass, "_embedding_beta", noting)
    deferred(True)
    assert_close(measure(model, inputs), expected)
    assert len(by_identity) == (many == 0)


@pytest.mark.parametrize("terms", ["all", "intermediate", "query"])
def test_gradients_are_the_same_with_the_activation_in_the_product(
    build, batch, measure, deferred, terms, monkeypatch
):
    model = patched(build, terms)
    inputs = batch(model)
    deferred(True)
    expected = measure(model, inputs)
    asked = []
    monkeypatch.setattr(backward, "fuses_backward", lambda *given: asked.append(given) or True)
    assert_close(measure(model, inputs), expected)
    assert bool(asked) == (terms != "query")


@pytest.mark.parametrize("room", [64, 2**20])
def test_they_are_added_when_there_is_no_more_room(
    build, batch, deferred, memory, room, monkeypatch
):
    monkeypatch.setattr(sums, "_ROOM", room)
    monkeypatch.setattr(sums, "_FEW", room)
    results, inputs = [], None
    for on in (False, True):
        added = deferred(on)
        model = patched(build, memory=memory)
        inputs = inputs or batch(model)
        arena = Arena({n: p for n, p in model.named_parameters() if p.requires_grad})
        encoder_of(model).write_to(arena)
        torch.manual_seed(0)
        for _ in range(2):  # gradients are added to those of the batch before
            model(**inputs).loss.backward()
        results.append({n: arena.view(n, arena.gradients).clone() for n in arena.slices})
    assert_close(results[1], results[0])
    launches = sum(count > 0 for count in added)
    assert launches == 2 if room == 2**20 else launches > 2


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("terms", ["all", "value,output", "embedding-layernorm"])
def test_sums_may_take_the_place_of_what_is_there(build, batch, deferred, memory, terms, on):
    """With the embeddings' bias, whose gradient goes where the arena has it, too."""
    deferred(on)
    model = build("bert")
    patch_encoder(model, select(model, terms), precision="fp32", memory=memory)
    inputs = batch(model)
    arena = Arena({n: p for n, p in model.named_parameters() if p.requires_grad})
    encoder = encoder_of(model)
    encoder.write_to(arena)
    inside = {*encoder.names, encoder.embedding_name} & set(arena.slices)
    found = []
    for before, factor, overwrites in ((0.0, 1, False), (7.0, 1, True), (None, 2, False)):
        if before is not None:
            arena.gradients.fill_(before)
        encoder.overwrites = overwrites
        if before:
            for parameter in model.bert.embeddings.LayerNorm.parameters():
                parameter.grad = None
        model(**inputs).loss.backward()
        assert not encoder.overwrites
        arena.check()
        found.append({n: arena.view(n, arena.gradients) / factor for n in inside})
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("name", ["embeddings.LayerNorm", "encoder.layer.1.intermediate.dense"])
def test_hooks_on_a_bias_see_its_gradient(build, batch, deferred, name, on):
    deferred(on)
    found = []
    for factor in (1, 3):
        model = patched(build)
        bias = model.bert.get_submodule(name).bias
        if factor > 1:
            bias.register_hook(lambda gradient, factor=factor: factor * gradient)
        plan = Plan(9, 3, 0, 3, 0.0, "constant", "fp32", 1e9, 6, 16, torch.device("cpu"))
        step = FastStep(model, plan)
        for _ in range(2):  # gradients of the second step are not added to those of the first
            torch.manual_seed(0)
            step(batch(model))
        arena = step.arena
        found.append({n: arena.view(n, arena.gradients).clone() for n in arena.slices})
        steps = step.of_fixed_size(after=0)
        assert ("hooks on" in (steps.refusal or "")) == (factor > 1)
    found[1][f"bert.{name}.bias"] /= 3
    assert_close(found[1], found[0])


def test_partial_rows_that_wait_are_not_overwritten():
    places = dict(enumerate(torch.zeros(4 * 16).split(16)))
    waiting = Sums(places)
    waiting.reserve(3 * 16)
    for number in range(3):
        waiting.take([number], 1, 16).fill_(number + 1.0)
    waiting.take([None, 3], 2, 16).copy_(torch.tensor([[[9.0], [9.0]], [[4.0], [5.0]]]))
    waiting.add()
    assert [place.unique().tolist() for place in places.values()] == [[1], [2], [3], [9]]
    waiting.add()
    assert places[0].tolist() == [1.0] * 16
    anew = Sums(places, overwrites=True)
    anew.take([0], 2, 16).fill_(2.0)
    anew.add()
    assert [place.unique().tolist() for place in places.values()] == [[4], [2], [3], [9]]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_kernels_leave_their_sums(build, batch, measure, monkeypatch, device):
    model = patched(build).to(device)
    inputs = {key: value.to(device) for key, value in batch(model, (16, 7, 1)).items()}
    found = measure(model, inputs)
    monkeypatch.setattr(sums, "defers", lambda tensor: False)
    assert_close(found, measure(model, inputs))


def test_a_second_backward_pass_makes_no_table(build, batch, measure, deferred, monkeypatch):
    # room for little: as many tables as a large model in a mode that saves memory
    monkeypatch.setattr(sums, "_ROOM", 1)
    model = patched(build)
    inputs = batch(model)
    added = deferred(True)
    measure(model, inputs)
    assert len(added) > 10
    made, sent = [], sums.sent
    monkeypatch.setattr(sums, "sent", lambda *args: (made.append(args), sent(*args))[1])
    measure(model, inputs)
    assert not made
