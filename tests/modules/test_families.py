"""Patched models of every family against the same models unpatched."""

import pytest
import torch

from bitfit_fast import patch, select, unpatch
from bitfit_fast.methods import METHODS
from bitfit_fast.models.families import FAMILIES, biases
from bitfit_fast.selection import Selection

#: In two layers: LayerNorms with a bias, with a residual too, with the sum of them as an output
#: beside; activations with a bias.
POST_NORM, PRE_NORM = (4, 4, 0, 2), (2, 2, 2, 2)


@pytest.fixture
def choices():
    """List what the paper and its users train: (label, function that selects)."""

    def of(model):
        terms = dict.fromkeys(bias.term for bias in biases(model))
        query = "query" if "query" in terms else "query-key-value"
        useless = {bias.term for bias in biases(model) if bias.zero_gradient}
        wanted = [("all", "all"), (query, "intermediate"), *((t,) for t in terms)]
        yield "layers=0", lambda: select(model, layers="0")
        yield "head", lambda: METHODS["frozen"].select(model, "all", None, True)
        yield "no head", lambda: select(model, head=False)
        for chosen in wanted:
            if not useless.issuperset(chosen):
                words = ["all"] if "all" in chosen else chosen
                yield "+".join(words), lambda words=words: select(model, words)

    return of


def expected_fusions(family):
    pre_norm = family in ("vit", "gpt2") or family.startswith("opt")
    return PRE_NORM if pre_norm else POST_NORM


def test_every_row_has_a_model_here(build, every_model):
    rows = [FAMILIES[build(name).config.model_type] for name in every_model]
    # several families have one row between them
    assert all(any(row is tested for tested in rows) for row in FAMILIES.values())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_loss_logits_and_gradients_are_the_same_whatever_trains(
    family, training, build, batch, measure, changed, choices, as_exact, calls, without_gradient,
    same_dropout,
):  # fmt: skip
    model = build(family).train(training)
    twin = build(family).double().train(training)
    for each in (model, twin):
        select(each)
    inputs = batch(model)
    pytorch, exact = measure(model, inputs), measure(twin, batch(twin))
    zero = without_gradient(model)
    largest = max(exact[name].abs().max() for name in changed(exact))
    for name in changed(exact) - zero:
        assert exact[name].abs().max() > 1e-4 * largest, name

    for label, choose in choices(model):
        selection = choose()
        done = patch(model)
        with calls() as seen:
            found = measure(model, inputs)
        assert seen.fused == expected_fusions(family), label
        assert changed(found) == set(selection.names) - set(done.no_gradient), label
        assert Selection.of(model) == selection, label
        for name in zero & set(found):
            assert found.pop(name).abs().max() < 1e-5 * largest, (label, name)
        as_exact(found, pytorch, exact, label=label)
        unpatch(model)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("family", ["bert", "albert", "deberta", "vit", "gpt2", "opt"])
def test_the_kernels_give_the_same_too(
    family, device, build, batch, measure, changed, as_exact, calls, same_dropout
):
    model, twin = build(family, device).train(), build(family, device).double().train()
    for each in (model, twin):
        select(each)
    inputs = batch(model, tokens=9)
    pytorch, exact = measure(model, inputs), measure(twin, batch(twin, tokens=9))
    done = patch(model)
    with calls() as seen:
        found = measure(model, inputs)
    assert seen.fused == expected_fusions(family)
    assert changed(found) == changed(exact) - set(done.no_gradient)
    as_exact(found, pytorch, exact)


@pytest.mark.parametrize("fuse", [True, False])
def test_float64_differs_by_rounding_alone(fuse, family, build, batch, measure, same_dropout):
    model = build(family).double().train()
    select(model)
    inputs = batch(model)
    pytorch = measure(model, inputs)
    patch(model, fuse=fuse)
    found = measure(model, inputs)
    largest = max(pytorch[name].abs().max() for name in found).item()
    # DeBERTa's own LayerNorm goes through fp32
    eps = 1e-5 if family == "deberta" else 1e-11
    for name, value in found.items():
        torch.testing.assert_close(value, pytorch[name], rtol=100 * eps, atol=eps * largest)


def test_two_steps_add_their_gradients_up(family, build, batch):
    model = build(family)
    select(model)
    patch(model)
    model(**batch(model)).loss.backward()
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model(**batch(model)).loss.backward()
    for name, parameter in model.named_parameters():
        if name in first:
            torch.testing.assert_close(parameter.grad, 2 * first[name])
