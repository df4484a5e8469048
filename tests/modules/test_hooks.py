"""What hooks on patched layers see, and what a model hands out besides its output, is as it was."""

import pytest
import torch

from bitfit_fast import patch, select

from .conftest import assert_same

LAYER = "bert.encoder.layer.1."
HOOKED = [
    "attention.self.query",
    "attention.output.dense",
    "attention.output.dropout",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "intermediate.intermediate_act_fn",
    "output.dense",
    "output.LayerNorm",
    "output",
]


def copied(tensors):
    return [None if t is None else t.detach().clone() for t in tensors]


#: By kind: register on a module a hook that keeps the tensors that it gets.
HOOKS = {
    "forward pre": lambda m, keep: m.register_forward_pre_hook(lambda m, args: keep(args)),
    "forward": lambda m, keep: m.register_forward_hook(lambda m, args, out: keep([*args, out])),
    "backward pre": lambda m, keep: m.register_full_backward_pre_hook(lambda m, dy: keep(dy)),
    "backward": lambda m, keep: m.register_full_backward_hook(lambda m, dx, dy: keep([*dx, *dy])),
}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", HOOKED)
def test_a_hook_sees_the_tensors_that_it_would_see(name, kind, build, batch, measure):
    results = []
    for patched, first in ((False, True), (True, True), (True, False)):
        model, seen = build("bert"), []
        select(model)
        module = model.get_submodule(LAYER + name)

        def keep(tensors, seen=seen):
            seen.append(copied(tensors))

        if first:
            HOOKS[kind](module, keep)
        if patched:
            patch(model)
        if not first:
            HOOKS[kind](module, keep)
        results.append((seen, measure(model, batch(model))))
    (expected, grads), *others = results
    assert len(expected) == 1
    for seen, found in others:
        assert len(seen) == 1
        assert len(seen[0]) == len(expected[0])
        for ours, true in zip(seen[0], expected[0]):
            torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-6)
        assert_same(found, {name: grads[name] for name in found})


def test_a_forward_hook_on_a_layer_that_leaves_its_bias_sees_a_tensor(patched, batch):
    model, seen = patched(), []
    for name in ("attention.output.dense", "intermediate.dense", "output.dense"):
        module = model.get_submodule(LAYER + name)
        module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    model(**batch(model))
    assert [type(t) for pair in seen for t in pair] == [torch.Tensor] * 6


@pytest.mark.parametrize("name", ["attention.output.dense", "output.LayerNorm"])
def test_a_hook_can_replace_what_a_layer_returns(name, build, batch, measure):
    results = []
    for patched in (False, True):
        model = build("bert")
        select(model)
        if patched:
            patch(model)
        model.get_submodule(LAYER + name).register_forward_hook(lambda m, args, out: 2 * out)
        results.append(measure(model, batch(model)))
    expected, found = results
    assert_same(found, {name: expected[name] for name in found})


def test_a_removed_hook_lets_the_layer_fuse_again(patched, batch, calls):
    model = patched()
    dense = model.get_submodule(LAYER + "output.dense")
    handle = dense.register_forward_hook(lambda m, args, out: None)
    for expected in ((3, 3, 0, 2), (4, 4, 0, 2)):
        with calls() as seen:
            model(**batch(model))
        assert seen.fused == expected
        handle.remove()


def test_hidden_states_and_attentions_are_as_they_were(build, batch):
    for family in ("bert", "vit", "gpt2", "albert"):
        model = build(family)
        select(model)
        options = {"output_hidden_states": True, "output_attentions": True}
        expected = model(**batch(model), **options)
        patch(model)
        found = model(**batch(model), **options)
        assert len(found.hidden_states) == len(expected.hidden_states) == 3
        for name in ("hidden_states", "attentions"):
            for ours, theirs in zip(getattr(found, name), getattr(expected, name)):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
