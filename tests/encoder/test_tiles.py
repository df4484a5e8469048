"""Whole encoders whose products, attention and layers' ends are our own, for CPUs."""

import pytest
import torch

from bitfit_fast import patch_encoder, select, unpatch
from bitfit_fast.encoder import LENGTHS, encoder_of, together
from bitfit_fast.encoder.stack import Stack
from bitfit_fast.kernels import library
from bitfit_fast.models.families import biases
from bitfit_fast.training.fixed import FixedSteps

WIDE = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
CHANGES = {
    "bert": WIDE,
    "electra": WIDE,
    "mpnet": WIDE,
    "distilbert": {"dim": 64, "n_heads": 2, "hidden_dim": 96},
    "vit": WIDE,
}
HEADS = ("ForSequenceClassification", "ForTokenClassification")
RULES = {"bf16": {"roundings": 2, "eps": 2.0**-7}, "fp32": {}}

of_both_precisions = pytest.mark.parametrize("precision", RULES)

pytestmark = pytest.mark.parametrize("backend", ["native"], indirect=True)


@pytest.fixture(autouse=True)
def tiles(backend, monkeypatch):
    """Skip on other CPUs, and count which kernels run."""
    if not library.has_tiles():
        pytest.skip("this CPU has no vectors of 256 bits that multiply and add (AVX2, FMA)")
    names, call = [], library.call
    monkeypatch.setattr(library, "call", lambda name, *a: (names.append(name), call(name, *a)))
    return names


@of_both_precisions
@pytest.mark.parametrize("family", CHANGES)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients(
    family, head, precision, backend, tiles, case, measure, as_exact, memory
):
    if family == "vit" and head == HEADS[1]:
        return
    each = case(family, head, **CHANGES[family])
    patch_encoder(each.model, precision=precision, memory=memory)
    found = measure(each.model, each.inputs)
    assert set(found) == set(each.exact)
    rule = RULES["bf16" if memory == "low" else precision]  # of 8 bits
    as_exact(found, getattr(each, precision), each.exact, **rule)
    # in fp32 longer vectors are no faster than the libraries, and those multiply
    ours = precision == "bf16" or library.has_matrix_units() or library.lanes() == 8
    whole = ours and family != "vit" and memory in ("fast", "low")
    if not whole:
        assert {"attention_fwd", "attention_bwd"} <= set(tiles)
        assert ("linear" in tiles) == ours
        assert not {"layers_fwd", "layers_bwd", "layer_end", "layer_end_bwd"} & set(tiles)
        return
    # a layer in which the backward pass ends goes step by step
    ends = family != "electra"
    for which, ended in (("fwd", 0), ("bwd", ends)):
        assert tiles.count(f"layers_{which}") == 1
        assert tiles.count(f"attention_{which}") == ended
    assert tiles.count("layer_end") == 0
    assert tiles.count("layer_end_bwd") == ends


@of_both_precisions
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_every_choice_gets_its_gradients_and_no_other(
    family, precision, backend, case, measure, as_exact
):
    each = case(family, **CHANGES[family])
    terms = dict.fromkeys(b.term for b in biases(each.model) if not b.zero_gradient)
    for layers in (None, "0", "1", "2"):
        for term in terms:
            try:
                selection = select(each.model, term, layers)
            except Exception:  # outside of the layers
                continue
            done = patch_encoder(each.model, precision=precision)
            found = measure(each.model, each.inputs)
            wanted = set(selection.names) - set(done.no_gradient)
            assert set(found) == {"loss"} | wanted, (term, layers)
            theirs = getattr(each, precision)
            as_exact(found, theirs, each.exact, label=f"{term} {layers}", **RULES[precision])
            unpatch(each.model)


def in_parts(*args):
    """Stand in for `together.weights` where layers run part by part."""
    return []


def one_by_one(*args, weights=together.weights):
    """Stand in for it where each layer is a call of its own."""
    return weights(*args)[:1]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_steps_parts_and_whole_layers_agree(
    family, trained, backend, tiles, build, batch, measure, monkeypatch
):
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    if family == "distilbert":
        rates = {"dropout": 0.1, "attention_dropout": 0.2}
    results = []
    for precision, whole in (("fp32", ""), ("bf16", ""), ("bf16", "end"), ("bf16", "layers")):
        # whose head has no ReLU, of which a rounding can change the side
        model = build(family, HEADS[1], **CHANGES[family], **rates)
        if trained:  # weights of the size of trained ones, which need no rounding
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_((parameter * (0.2 if parameter.ndim > 1 else 1.0)).bfloat16())
        select(model)
        patch_encoder(model, precision=precision)
        with monkeypatch.context() as patched:
            if whole != "layers":
                patched.setattr(together, "weights", in_parts)
            if not whole:
                patched.setattr(Stack, "end_weights", lambda *args: None)
            results.append(measure(model, batch(model)))
    assert tiles.count("layer_end") == 3
    # the same masks; what differs are roundings to bf16 in between
    for name, exact in results[0].items():
        steps, *whole = ((found[name] - exact).norm() / exact.norm() for found in results[1:])
        assert max(whole) <= 2 * steps + 2**-7, (name, whole, steps)
    if not trained:
        return
    # which whole layers do without, of what goes on from one to the next
    exact, steps, _, whole = (torch.cat([*map(torch.ravel, found.values())]) for found in results)
    assert (whole - exact).norm() < 0.3 * (steps - exact).norm()


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("terms", ["all", "query", "value,attention-layernorm"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("head", HEADS)
def test_layers_in_one_call_are_those_one_by_one(
    head, family, dropout, terms, backend, tiles, build, batch, measure, memory, monkeypatch
):
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout / 2}
    model = build(family, head, **WIDE, **rates)
    select(model, terms)
    patch_encoder(model, precision="bf16", memory=memory)
    inputs = batch(model)
    found = measure(model, inputs)
    assert {"layers_fwd", "layers_bwd"} <= set(tiles)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        assert torch.isfinite(logits).all()
        monkeypatch.setattr(together, "weights", one_by_one)
        assert torch.equal(model(**inputs).logits, logits)
    tiles.clear()
    expected = measure(model.train(), inputs)
    assert tiles.count("layers_fwd") == len(encoder_of(model).stack.layers)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sequences_that_fill_a_budget_change_nothing(
    backend, tiles, build, batch, measure, as_exact
):
    model = build("bert", **WIDE)
    select(model)
    patch_encoder(model, precision="bf16")
    inputs = batch(model)
    expected = measure(model, inputs)
    tiles.clear()
    lengths = inputs["attention_mask"].sum(1).tolist()
    taken = []

    def step(given, lr):
        for parameter in model.parameters():
            parameter.grad = None
        loss = model(**given).loss
        loss.backward()
        taken.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        return loss.detach()

    model.train()
    steps = FixedSteps(model, encoder_of(model), step, (128,), torch.device("cpu"), after=0)
    loss = steps({**inputs, LENGTHS: tuple(lengths)})
    assert loss is not None and {"layers_fwd", "layers_bwd"} <= set(tiles)
    torch.testing.assert_close(loss, expected["loss"], rtol=2.0**-7, atol=0)
    for name, gradient in taken[-1].items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 2.0**-6, name


@of_both_precisions
def test_what_packed_weights_take_is_known_before(precision, backend, build, batch, measure):
    model = build("bert", **WIDE)
    select(model)
    patch_encoder(model, precision=precision)
    layers = encoder_of(model).stack.layers
    expected = encoder_of(model).stack.bytes_packed()
    measure(model, batch(model))
    products = [product for at in layers for product in (at.qkv, at.out, at.up, at.down)]
    packed = [p.data for product in products for p in product._packed.values() if p is not None]
    # of oneDNN's, those of the last layer's parts are none of the whole
    products += encoder_of(model).stack.first_products()
    ordered = [weight for product in products for weight in product._ordered.values()]
    # the bottom layer's gradient goes no further than its queries
    taken = sum(data.untyped_storage().nbytes() for data in packed)
    taken += sum(weight.numel() * weight.element_size() for weight in ordered)
    assert 0.8 * expected <= taken <= expected


def test_triton_comes_first(backend, build, batch, measure, monkeypatch):
    model = build("bert", **WIDE)
    select(model)
    patch_encoder(model, precision="bf16")
    product = encoder_of(model).stack.layers[0].up
    rows = torch.zeros(3, 64, dtype=torch.bfloat16)
    assert product.packed(rows, "forward") is not None
    monkeypatch.setattr("bitfit_fast.encoder.product.uses_triton", lambda *tensors: True)
    assert product.packed(rows, "forward") is None


@of_both_precisions
def test_a_copied_model_has_weights_of_its_own(precision, backend, build, batch, measure):
    import copy

    model = build("bert", **WIDE)
    select(model)
    patch_encoder(model, precision=precision)
    before = measure(model, batch(model))
    twin = copy.deepcopy(model)
    again = measure(twin, batch(twin))
    assert all(torch.equal(before[name], again[name]) for name in before)
