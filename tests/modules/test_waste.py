"""What a patched step neither computes nor keeps."""

import pytest
import torch
from torch import nn

from bitfit_fast import modules, patch, select

#: No two of these are alike, so that a shape tells what was multiplied.
DISTINCT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 30,
    "vocab_size": 65,
    "num_labels": 5,
}
ROWS, TOKENS, LAYERS, HEADS = 3, 7, 2, 2
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear")


@pytest.fixture
def inputs(batch):
    def make(model):
        return batch(model, rows=ROWS, tokens=TOKENS)

    return make


def products(seen):
    """Return the shape of every matrix product's output."""
    return [shapes[0] for name, _, shapes in seen.seen if name in PRODUCTS]


def weight_gradients(model, seen):
    frozen = {tuple(p.shape) for p in model.base_model.parameters() if p.dim() == 2}
    return [s for s in products(seen) if s in frozen or s[::-1] in frozen]


def step(model, inputs, calls):
    with calls() as seen:
        model(**inputs(model)).loss.backward()
    return seen


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_no_product_makes_a_weight_gradient_below_the_head(fuse, training, build, inputs, calls):
    model = build("bert", **DISTINCT)
    select(model)
    patch(model, fuse=fuse)
    seen = step(model.train(training), inputs, calls)
    assert weight_gradients(model, seen) == []
    assert len([s for s in products(seen) if s in ((5, 24), (24, 5))]) == 1  # the head's
    # each linear layer once forward and once backward, and of attention two products forward
    # and four backward
    assert len(products(seen)) == 2 * (6 * LAYERS + 2) + 1 + 6 * LAYERS


@pytest.mark.parametrize("fuse", [False, True])
def test_a_linear_layer_is_one_product_over_all_tokens_each_way(fuse, build, inputs, calls):
    model = build("bert", **DISTINCT)
    select(model)
    patch(model, fuse=fuse)
    shapes = products(step(model, inputs, calls))
    linear = [s for s in shapes if len(s) == 2 and s[0] in (ROWS * TOKENS, ROWS)]
    attention = [s for s in shapes if len(s) == 3]
    assert {s[0] for s in attention} == {ROWS * HEADS}
    assert (len(linear), len(attention)) == (2 * (6 * LAYERS + 2), 6 * LAYERS)


def test_full_fine_tuning_shows_that_the_count_finds_weight_gradients(build, inputs, calls):
    model = build("bert", **DISTINCT)
    assert len(weight_gradients(model, step(model, inputs, calls))) == 6 * LAYERS + 1


def test_the_backward_pass_ends_at_the_first_layer_that_trains(build, inputs, calls):
    model = build("bert", **DISTINCT)
    select(model, "intermediate", layers="1", head=False)
    patch(model)
    seen = step(model, inputs, calls)
    linear = [s for s in products(seen) if len(s) == 2 and s[0] in (ROWS * TOKENS, ROWS)]
    # backward through the head, the pooler and the last dense layer alone
    assert len(linear) == (6 * LAYERS + 2) + 3
    assert len([s for s in products(seen) if len(s) == 3]) == 2 * LAYERS


@pytest.mark.parametrize(
    "family", ["bert", "albert, two groups", "distilbert", "deberta-v2", "gpt2"]
)
@pytest.mark.parametrize("training", [False, True])
def test_no_input_of_a_frozen_linear_layer_is_kept(family, training, build, batch, saved):
    model = build(family).train(training)
    select(model)
    patch(model)
    layers = [
        m for m in model.modules() if isinstance(m, (modules.Linear, modules._TransposedLinear))
    ]
    received = []

    def note(module, args):
        x = args[0]
        # the scores of positions are made of a table of which a view is an input
        received.append(x.tensor() if isinstance(x, modules.Deferred) else x)

    for layer in layers:
        layer.register_forward_pre_hook(note)
    with saved() as kept:
        loss = model(**batch(model)).loss
    assert len(received) >= len(layers) > 6
    inputs = {x.untyped_storage().data_ptr() for x in received}
    found = [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() in inputs]
    assert found == []
    loss.backward()


def test_full_fine_tuning_shows_that_kept_inputs_are_found(build, batch, saved):
    model = build("bert")
    received = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    with saved() as kept:
        model(**batch(model))
    inputs = {x.untyped_storage().data_ptr() for x in received}
    assert sum(t.untyped_storage().data_ptr() in inputs for t in kept) >= len(received)


def test_a_layer_keeps_normalised_rows_what_the_activation_takes_and_attention(build, saved):
    model = build("bert", **DISTINCT)
    select(model)
    patch(model)
    torch.manual_seed(0)
    x = torch.randn(ROWS, TOKENS, 24).requires_grad_()
    with saved() as kept:
        model.bert.encoder.layer[0](x, attention_mask=None)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # a tensor may be kept by two operations
    other = {t.untyped_storage().data_ptr(): t for t in kept}
    tensors = [t for at, t in other.items() if at not in own]
    heads = [t for t in tensors if t.shape[0] == ROWS * HEADS or t.shape[:2] == (ROWS, HEADS)]
    assert len(heads) == 4  # query, key, value, probabilities
    rows = [t.reshape(ROWS * TOKENS, -1) for t in tensors if not any(t is h for h in heads)]
    assert sorted(t.shape[1] for t in rows if t.shape[1] > 1) == [24, 24, 40]
    assert sum(t.shape[1] == 1 for t in rows) <= 4


def test_nothing_is_kept_for_a_frozen_model(build, batch, saved):
    model = build("bert")
    model.requires_grad_(False)
    patch(model)
    with saved() as kept:
        out = model(**batch(model))
    assert kept == [] and not out.loss.requires_grad


def test_where_only_the_head_trains_nothing_below_it_is_kept(build, batch, saved):
    model = build("bert")
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    patch(model)
    with saved() as kept:
        model.bert(**{n: t for n, t in batch(model).items() if n != "labels"})
    assert kept == []
