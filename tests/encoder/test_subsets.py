"""Whatever is chosen to train gets its gradient, nothing else does, and no more is computed."""

from itertools import combinations

import pytest
import torch

import bitfit_fast
from bitfit_fast import patch_encoder, select, unpatch
from bitfit_fast.encoder import backward, install
from bitfit_fast.methods import METHODS
from bitfit_fast.models.families import biases

BACKENDS = pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
TOKEN = "ForTokenClassification"
#: Tokens of the batch, and its sequences.
ROWS, SEQUENCES = 56, 6


def choices(model):
    """List choices of what trains: label, and the function that chooses."""
    found = list(biases(model))
    zero = {bias.term for bias in found if bias.zero_gradient}
    terms = list(dict.fromkeys(bias.term for bias in found if bias.term not in zero))
    inside = list(dict.fromkeys(b.term for b in found if b.layer is not None))
    for term in terms:
        yield term, lambda term=term: select(model, term)
        yield f"{term}, no head", lambda term=term: select(model, term, head=False)
    for pair in combinations(terms, 2):
        yield "+".join(pair), lambda pair=pair: select(model, pair)
    yield "key+query", lambda: select(model, ["key", "query"])
    for layers in ("0", "1", "2", "0,2", "1-2"):
        yield f"layers {layers}", lambda layers=layers: select(model, layers=layers)
        for term in set(inside) - zero:
            yield (
                f"{term} of layers {layers}",
                lambda term=term, layers=layers: select(model, term, layers, head=False),
            )
    yield "all, no head", lambda: select(model, head=False)
    yield "head", lambda: METHODS["frozen"].select(model, "all", None, True)


@BACKENDS
@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", "ForSequenceClassification"), ("vit", "ForSequenceClassification")],
)
def test_every_choice_gets_its_gradients_and_no_other(family, head, case, measure, as_exact):
    each = case(family, head)
    model = each.model
    for label, choose in choices(model):
        selection = choose()
        done = patch_encoder(model, precision="fp32")
        found = measure(model, each.inputs)
        wanted = set(selection.names) - set(done.no_gradient)
        assert set(found) == {"loss"} | wanted, label
        as_exact(found, each.fp32, each.exact, label=label)
        unpatch(model)


@pytest.mark.parametrize("family", ["electra", "electra, as wide", "mpnet", "distilbert", "deit"])
@pytest.mark.parametrize("memory", ["fast", "lowest"])
def test_the_lowest_that_trains_is_anywhere(family, memory, case, measure, as_exact):
    each = case(family)
    model = each.model
    outside = [b.term for b in biases(model) if b.layer is None]
    for words in [*outside, "query", "value", "intermediate", "output-layernorm"]:
        selection = select(model, words)
        patch_encoder(model, precision="fp32", memory=memory)
        found = measure(model, each.inputs)
        assert set(found) == {"loss", *selection.names}, words
        as_exact(found, each.fp32, each.exact, label=words)
        unpatch(model)


@BACKENDS
@pytest.mark.parametrize("terms", ["all", "embedding-layernorm", "embedding-layernorm+query"])
def test_one_layer_is_first_and_last(terms, backend, case, measure, as_exact, memory):
    if memory == "low":
        return
    each = case("bert", num_hidden_layers=1)
    selection = select(each.model, terms)
    done = patch_encoder(each.model, precision="fp32", memory=memory)
    found = measure(each.model, each.inputs)
    assert set(found) == {"loss", *selection.names} - set(done.no_gradient)
    as_exact(found, each.fp32, each.exact)


@pytest.mark.parametrize("family", ["bert", "electra, as wide", "electra", "distilbert", "vit"])
def test_embeddings_that_train_too_get_their_gradients(
    family, build, batch, measure, to_double, as_exact, key_biases
):
    model = build(family)
    select(model)
    for parameter in model.base_model.embeddings.parameters():
        parameter.requires_grad_()
    inputs = batch(model)
    exact, pytorch = measure(*to_double(model, inputs)), measure(model, inputs)
    patch_encoder(model, precision="fp32")
    found = measure(model, inputs)
    assert set(found) == set(exact) - key_biases(model)
    as_exact(found, pytorch, exact)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_one_example_without_a_choice_of_bias_keeps_nothing(family, build, batch, measure):
    model = build(family)
    METHODS["frozen"].select(model, "all", None, True)
    patch_encoder(model, precision="fp32")
    out = model.base_model(**{k: v for k, v in batch(model).items() if k != "labels"})
    assert not out.last_hidden_state.requires_grad


def backward_products(seen):
    """Count products with the tokens' gradients; the head's have a padded batch's rows."""
    names = {"aten::mm", "aten::addmm", "aten::addmm_", "bitfit_fast::linear_activation_bwd"}
    return sum(
        name in names and any(shape[:1] == (ROWS,) for shape in given)
        for name, given, _ in seen.seen
    )


@pytest.mark.parametrize(
    ("terms", "layers", "products"),
    [
        ("output-layernorm", "2", 0),
        ("output", "2", 0),
        ("intermediate", "2", 1),
        ("attention-layernorm", "2", 2),
        ("attention-output", "2", 2),
        ("value", "2", 3),
        ("query", "2", 3),
        ("output-layernorm", "1", 4),
        ("intermediate", "1,2", 5),
        ("query", "0,2", 11),
        ("all", "0", 11),
        ("all", None, 11),  # the embeddings' bias needs no gradient of the embeddings
        ("embedding-layernorm", None, 11),
    ],
)
def test_the_backward_pass_ends_at_the_lowest_bias_that_trains(
    terms, layers, products, build, batch, calls
):
    model = build("bert", TOKEN)
    select(model, terms, layers)
    patch_encoder(model, precision="fp32")
    loss = model(**batch(model)).loss
    with calls() as seen:
        loss.backward()
    assert backward_products(seen) == products


def test_a_head_alone_has_no_backward_pass_through_the_encoder(build, batch, calls):
    model = build("bert", TOKEN)
    METHODS["frozen"].select(model, "all", None, True)
    patch_encoder(model, precision="fp32")
    loss = model(**batch(model)).loss
    with calls() as seen:
        loss.backward()
    assert backward_products(seen) == 0
    assert not any("bitfit_fast" in name for name, _, _ in seen.seen)


@pytest.mark.parametrize("stops", [True, False])
def test_stopping_can_be_switched_off_and_changes_no_gradient(stops, build, batch, measure, calls):
    model = build("bert", TOKEN)
    select(model, "intermediate", "1,2")
    inputs = batch(model)
    expected = measure(model, inputs)
    install(model, "fp32", stops=stops)
    with calls() as seen:
        found = measure(model, inputs)
    # the last products above lead to the gradient of the embeddings
    assert (seen.count("aten::bmm") > 0) and set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    with calls() as seen:
        model(**inputs).loss.backward()
    forward = 4 * 3
    assert backward_products(seen) - forward == (5 if stops else 12)


@pytest.mark.parametrize(
    ("terms", "layers", "dropout", "needs"),
    [
        ("query", None, 0.0, [True, True, False]),
        ("value", None, 0.0, [True, True, False]),
        ("value", None, 0.1, [True, True, True]),
        ("query", None, 0.1, [True, True, False]),
        ("all", None, 0.0, [True, True, False]),
        ("all", None, 0.1, [True, True, True]),
        ("value", "2", 0.0, [False]),
        ("output", "1", 0.0, [True]),
    ],
)
def test_gradients_of_keys_and_values_are_left_out_where_nothing_needs_them(
    terms, layers, dropout, needs, build, batch, monkeypatch
):
    asked = []
    attention_bwd = backward.attention_bwd

    def spy(*args):
        asked.append(args[8])
        return attention_bwd(*args)

    monkeypatch.setattr(backward, "attention_bwd", spy)
    model = build("bert", attention_probs_dropout_prob=dropout)
    select(model, terms, layers)
    patch_encoder(model, precision="fp32")
    model(**batch(model)).loss.backward()
    assert asked == needs


def whole(layers, rows=ROWS):
    return [(rows, 144), (rows, 48), (rows, 80), (rows, 48)] * layers


FIRST = [(ROWS, 96), *[(SEQUENCES, n) for n in (48, 48, 80, 48)]]


@pytest.mark.parametrize("memory", ["fast", "lowest"])
@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("ForSequenceClassification", [*whole(2), *FIRST]),
        ("ForMultipleChoice", [*whole(2), *FIRST]),
        ("ForTokenClassification", whole(3)),
        ("Model", whole(3)),
        ("ForMaskedLM", whole(3)),
    ],
)
def test_the_last_layer_computes_what_the_head_reads(head, memory, expected, build, batch, calls):
    model = build("bert", head)
    bitfit_fast.select(model)
    done = patch_encoder(model, precision="fp32", memory=memory)
    inputs = batch(model)
    inputs.pop("labels", None)
    with calls() as seen:
        model(**inputs)
    shapes = [made for _, made in seen.products]
    assert shapes[: len(expected)] == expected
    assert done.first_only == (expected[-1] == FIRST[-1])
    assert ("the last one for first tokens only" in str(done)) == done.first_only


def test_first_only_can_be_switched_off_and_changes_nothing(case, measure, as_exact):
    each = case("bert")
    install(each.model, "fp32", first_only=False)
    found = measure(each.model, each.inputs)
    as_exact({n: found[n] for n in each.exact}, each.fp32, each.exact)


@pytest.mark.parametrize("family", ["electra"])
@pytest.mark.parametrize("summary", ["mean", "last", "first"])
def test_a_head_that_reads_other_tokens_gets_them(summary, family, case, measure, as_exact):
    each = case(family, "ForMultipleChoice", summary_type=summary, lengths=(12,) * 6)
    done = patch_encoder(each.model, precision="fp32")
    assert done.first_only == (summary == "first")
    as_exact(measure(each.model, each.inputs), each.fp32, each.exact)
