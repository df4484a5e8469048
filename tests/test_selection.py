"""What `select` lets train, and the account that it gives of it."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from bitfit_fast import BitFitError, Selection, select
from bitfit_fast.methods import METHODS
from bitfit_fast.models.families import PAPER_TERMS
from bitfit_fast.selection import parse_layers, parse_terms

LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
ROBERTA_BASE = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
#: prefix of the classes, options, biases, parameters of the base, share in percent
SIZES = [
    ("Bert", {}, 102_912, 109_482_240, "0.0940"),
    ("Bert", LARGE, 272_384, 335_141_888, "0.0813"),
    ("Roberta", ROBERTA_BASE, 102_144, 124_055_040, "0.0823"),
]
TERM_SIZES = {
    "embedding-layernorm": 768,
    **dict.fromkeys(PAPER_TERMS[1:9], 12 * 768),
    "intermediate": 12 * 3072,
    "pooler": 768,
}


def on_meta(prefix, **options):
    config = getattr(transformers, f"{prefix}Config")(**options)
    with torch.device("meta"):
        return getattr(transformers, f"{prefix}ForSequenceClassification")(config)


@pytest.fixture(scope="module")
def base():
    return on_meta("Bert")


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=66,
        )
    )


def plain():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def trains(model):
    return tuple(name for name, p in model.named_parameters() if p.requires_grad)


def layers_of(names):
    return {int(found[1]) for name in names if (found := re.search(r"layer\.(\d+)\.", name))}


@pytest.mark.parametrize(("prefix", "options", "count", "below", "percent"), SIZES)
def test_the_counts_of_the_published_models(prefix, options, count, below, percent):
    model = on_meta(prefix, **options)
    selection = select(model)
    head = sum(p.numel() for n, p in model.named_parameters() if n.startswith("classifier."))
    assert selection.biases == count
    assert selection.base_parameters == below
    assert selection.head_parameters == head
    assert f"{100 * selection.share:.4f}" == percent
    assert selection.total == count + head
    assert sum(selection.counts.values()) == count + head
    assert selection.counts["head"] == head
    assert selection.method == "bitfit"
    assert selection.names == trains(model)
    assert all(p.device.type == "meta" for p in model.parameters())


def test_counts_by_term_stand_in_the_order_of_the_paper(base):
    selection = select(base)
    assert list(selection.counts.items()) == [
        *((term, TERM_SIZES[term]) for term in PAPER_TERMS),
        ("head", 2 * 768 + 2),
    ]
    assert selection.terms == PAPER_TERMS
    assert selection.layers == tuple(range(12))


def test_the_printed_table_holds_the_counts(base):
    text = str(select(base))
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [c.strip() for c in line.strip()[1:-1].split("│")]) == 4
    }
    assert sum(TERM_SIZES.values()) == 102_912
    for term, count in TERM_SIZES.items():
        tensors = "1" if term in ("embedding-layernorm", "pooler") else "12"
        assert rows[term] == [tensors, f"{count:,}", f"{count / 109_483_778:.4%}"]
    assert rows["all but the head"] == ["98", "102,912", "0.0940%"]
    assert rows["head"] == ["2", "1,538", "0.0014%"]
    assert rows["trained"] == ["100", "104,450", "0.0954%"]
    assert rows["model"] == ["", "109,483,778", ""]
    assert "named by module type" not in text


def test_nothing_else_requires_grad_and_no_value_changes(tiny):
    before = {n: p.clone() for n, p in tiny.state_dict().items()}
    selection = select(tiny)
    assert trains(tiny) == selection.names
    assert all(name.endswith("bias") or name.startswith("classifier") for name in selection.names)
    assert all(torch.equal(before[n], p) for n, p in tiny.state_dict().items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", None),
        ("ALL", None),
        (["all"], None),
        ("query", ("query",)),
        ("m1", ("attention-output",)),
        ("LN1", ("attention-layernorm",)),
        ("ln1", ("attention-layernorm",)),
        ("Ln2", ("output-layernorm",)),
        ("M2 m3", ("intermediate", "output")),
        ("query,m2", ("query", "intermediate")),
        ("query+m2", ("query", "intermediate")),
        (" query ,  m2 ", ("query", "intermediate")),
        ("query\tm2\n", ("query", "intermediate")),
        ("m2,intermediate,M2", ("intermediate",)),
        (["Query", " m2 "], ("query", "intermediate")),
        (("m3", "key"), ("output", "key")),
        ((t for t in ["value"]), ("value",)),
    ],
)
def test_terms_are_read(text, expected):
    assert parse_terms(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("0", (0,)),
        ("0-5,11", (0, 1, 2, 3, 4, 5, 11)),
        ("11,0-2", (11, 0, 1, 2)),
        (" 1 , 3 - 4 ", (1, 3, 4)),
        ("2-2,2", (2,)),
        ([3, 1], (3, 1)),
        ((1, 1), (1,)),
        (range(2), (0, 1)),
        (0, (0,)),
        (iter([2, 0]), (2, 0)),
    ],
)
def test_layers_are_read(text, expected):
    assert parse_layers(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,,2", "1;2", "1.5", "0-", "1 2"])
def test_malformed_layers_are_refused(tiny, text):
    with pytest.raises(BitFitError, match=r"^layers '.*' is not a list of .* like 0-5,11$") as info:
        select(tiny, layers=text)
    assert f"'{text}'" in str(info.value)


@pytest.mark.parametrize("layers", [1.5, True, ["1"], [None], object()])
def test_layers_that_are_no_numbers_are_refused(tiny, layers):
    with pytest.raises(BitFitError, match=r"^layers .* are not numbers of layers"):
        select(tiny, layers=layers)


@pytest.mark.parametrize("layers", [-1, 4, [0, -1]])
def test_layers_that_are_not_there_are_refused(tiny, layers):
    with pytest.raises(BitFitError, match=r"is out of range: .* has layers 0-3"):
        select(tiny, layers=layers)


@pytest.mark.parametrize("terms", [None, 3, ["query", 1]])
def test_terms_that_are_no_text_are_refused(tiny, terms):
    with pytest.raises(BitFitError, match=r"^terms .* are not text like"):
        select(tiny, terms)


def test_a_term_by_name_and_by_symbol_is_the_same(tiny):
    for symbol, term in [("m1", 4), ("LN1", 5), ("m2", 6), ("m3", 7), ("LN2", 8)]:
        names = select(tiny, symbol).names
        assert names == select(tiny, PAPER_TERMS[term]).names == select(tiny, [symbol]).names
        assert len(names) == 4 + 2


def test_order_of_the_choice_does_not_matter(tiny):
    a = select(tiny, "m2,query", "3,0-1")
    b = select(tiny, ["query", "intermediate"], [0, 1, 3])
    assert a == b
    assert a.terms == ("query", "intermediate")
    assert a.layers == (0, 1, 3)


@pytest.mark.parametrize(
    ("layers", "expected"), [("0-1", {0, 1}), ("3", {3}), ([0, 2], {0, 2}), ("0-3", {0, 1, 2, 3})]
)
def test_layers_leave_out_what_is_outside_of_them(tiny, layers, expected):
    selection = select(tiny, layers=layers, head=False)
    assert layers_of(selection.names) == expected
    assert len(selection.names) == 8 * len(expected)
    assert not {"embedding-layernorm", "pooler"} & set(selection.terms)
    assert set(selection.layers) == expected


def test_layers_keep_what_is_outside_of_them_where_it_is_named(tiny):
    selection = select(tiny, "embedding-layernorm,pooler,m2", [1], head=False)
    assert selection.names == (
        "bert.embeddings.LayerNorm.bias",
        "bert.encoder.layer.1.intermediate.dense.bias",
        "bert.pooler.dense.bias",
    )


def test_the_head_trains_wholly_or_not_or_in_part(tiny):
    head = {"classifier.weight", "classifier.bias"}
    assert set(select(tiny, "m2", head=True).names) & head == head
    assert set(select(tiny, "m2", head=False).names) & head == set()
    assert set(select(tiny, "m2", head=["classifier.b"]).names) & head == {"classifier.bias"}
    assert select(tiny, "m2", head="classifier") == select(tiny, "m2", head=True)
    assert select(tiny, "m2", head=[]) == select(tiny, "m2", head=False)


def test_a_head_of_several_layers_is_the_head():
    model = on_meta("Roberta", **ROBERTA_BASE)
    expected = [n for n, _ in model.named_parameters() if n.startswith("classifier.")]
    selection = select(model, "value")
    assert [t.name for t in selection.trained if t.term == "head"] == expected
    assert len(expected) == 4


def test_the_head_of_a_plain_module_is_what_the_caller_names():
    model = plain()
    selection = select(model, head=["2."])
    assert selection.names == ("0.bias", "2.weight", "2.bias")
    assert selection.counts == {"linear": 4, "head": 10}
    assert (selection.base_parameters, selection.head_parameters) == (20, 10)
    assert selection.method == "bitfit"
    assert selection.biases == 4
    assert Selection.of(model) == selection
    assert Selection.of(copy.deepcopy(model)) == selection
    assert select(model, head=False).counts == {"linear": 6}


def test_a_part_of_the_base_can_be_called_the_head(tiny):
    selection = select(tiny, head=["classifier", "bert.pooler"])
    assert "pooler" not in selection.terms
    assert selection.counts["head"] == 32 * 32 + 32 + 2 * 32 + 2
    assert selection.method == "bitfit"
    assert select(tiny).counts["pooler"] == 32


def test_a_base_model_has_no_head(tiny):
    selection = select(tiny.bert)
    assert "head" not in selection.counts
    assert selection.head_parameters == 0
    assert selection.biases == select(tiny).biases


def test_the_last_choice_counts(tiny):
    select(tiny)
    first = select(tiny, "m2", "0", head=False)
    assert trains(tiny) == first.names == ("bert.encoder.layer.0.intermediate.dense.bias",)
    assert select(tiny) == select(tiny)


def test_selection_of_reads_any_choice_of_flags(tiny):
    assert Selection.of(tiny).method == "full"
    assert Selection.of(tiny).total == sum(p.numel() for p in tiny.parameters())
    made = select(tiny, "query,LN2", "0-2")
    assert Selection.of(tiny) == made
    tiny.requires_grad_(False)
    nothing = Selection.of(tiny)
    assert (nothing.names, nothing.total, nothing.share) == ((), 0, 0)
    tiny.bert.encoder.layer[2].output.dense.weight.requires_grad_(True)
    assert Selection.of(tiny).counts == {"weights": 32 * 64}
    assert "weights" in str(Selection.of(tiny))


@pytest.mark.parametrize(
    ("method", "head", "expected"),
    [
        ("bitfit", True, lambda n: n.endswith("bias") or n.startswith("classifier")),
        ("bitfit", False, lambda n: n.endswith("bias") and n.startswith("bert")),
        ("full", True, lambda n: True),
        ("full", False, lambda n: n.startswith("bert")),
        ("frozen", True, lambda n: n.startswith("classifier")),
    ],
)
def test_a_method_trains_its_part(tiny, method, head, expected):
    selection = METHODS[method].select(tiny, "all", None, head)
    assert set(selection.names) == {n for n, _ in tiny.named_parameters() if expected(n)}
    assert selection.names == trains(tiny)
    assert selection.method == method
    assert Selection.of(tiny) == selection
    assert METHODS[method].lr > 0 and METHODS[method].summary


@pytest.mark.parametrize("method", ["full", "frozen"])
@pytest.mark.parametrize(("terms", "layers"), [("query", None), ("all", "0-1"), ("m1", "0")])
def test_other_methods_take_no_choice_of_biases(tiny, method, terms, layers):
    with pytest.raises(BitFitError, match=f"'{method}'"):
        METHODS[method].select(tiny, terms, layers, True)


def test_the_frozen_method_needs_the_head(tiny):
    with pytest.raises(BitFitError, match="'frozen' trains only the head"):
        METHODS["frozen"].select(tiny, "all", None, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"terms": "querry"},
            "unknown term 'querry'; the terms of this model are all, embedding-layernorm, query, "
            "key, value, attention-output, attention-layernorm, intermediate, output, "
            "output-layernorm, pooler",
        ),
        ({"terms": ["query,key"]}, "unknown term 'query,key'; the terms of this model are all, "),
        ({"terms": ""}, "no terms given; use 'all' or some of embedding-layernorm, query, "),
        ({"terms": []}, "no terms given; use 'all' or some of "),
        ({"terms": "all,querry"}, "'all' stands for every term, so it goes without querry"),
        (
            {"layers": "2-12"},
            "layer 4 is out of range: BertForSequenceClassification has layers 0-3",
        ),
        ({"layers": [-1]}, "layer -1 is out of range: BertForSequenceClassification has layers "),
        ({"layers": "0-99999999999999"}, "layer 4 is out of range: "),
        ({"layers": "99999999999999"}, "layer 99999999999999 is out of range: "),
        ({"layers": []}, "no layers given"),
        (
            {"head": ["clasifier"]},
            "no parameter of BertForSequenceClassification begins with 'clasifier'",
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused_and_nothing_changes(tiny, options, message):
    before = select(tiny, "value", "1")
    with pytest.raises(BitFitError) as info:
        select(tiny, **options)
    assert str(info.value).startswith(message)
    assert "\n" not in str(info.value)
    assert Selection.of(tiny) == before


@pytest.mark.parametrize(
    ("prefix", "term", "has"),
    [
        ("Roberta", "pooler", "output-layernorm"),
        ("Deberta", "key", "value"),
        ("GPT2", "embedding-layernorm", "query-key-value"),
    ],
)
def test_a_term_of_the_paper_that_a_model_lacks_is_refused_with_those_it_has(prefix, term, has):
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if prefix == "GPT2":
        small = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = on_meta(prefix, **small)
    with pytest.raises(BitFitError) as info:
        select(model, term)
    text = str(info.value)
    assert text.startswith(f"{prefix}ForSequenceClassification has no bias of term '")
    assert re.search(rf"; the terms of this model are all, .*\b{has}\b", text)
    assert not re.search(rf"are all,.*\b{term}\b", text)


def test_biases_in_some_layers_only_are_told_by_number():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    with pytest.raises(BitFitError, match=r"layer 1 is out .* has biases in the layers 0, 2$"):
        select(model, layers=[1], head=False)


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        ("T5", {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2}),
        ("ModernBert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}),
    ],
)
def test_a_model_without_biases_is_refused(prefix, options):
    model = on_meta(prefix, vocab_size=64, pad_token_id=0, **options)
    with pytest.raises(BitFitError) as info:
        select(model)
    assert str(info.value) == (
        f"{prefix}ForSequenceClassification has no bias terms outside its head "
        "(terms it has: none), so BitFit has nothing to train"
    )


def test_a_plain_module_does_not_say_what_its_head_is():
    model = plain()
    with pytest.raises(BitFitError, match="Sequential does not say which part is its head; name"):
        select(model)
    with pytest.raises(BitFitError, match="Sequential does not say which part is its head"):
        METHODS["frozen"].select(model, "all", None, True)
    assert trains(model) == tuple(n for n, _ in model.named_parameters())


def test_gradients_reach_no_weight_of_the_base(tiny):
    selection = select(tiny)
    ids = torch.randint(0, 64, (3, 9))
    tiny(input_ids=ids, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert {n for n, p in tiny.named_parameters() if p.grad is not None} == set(selection.names)
