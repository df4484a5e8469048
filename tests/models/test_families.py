"""What each family's row in the table says of real models of that family."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from bitfit_fast.models.families import (
    ALIASES,
    FAMILIES,
    PAPER_TERMS,
    biases,
    family_of,
    head_prefix,
)
from bitfit_fast.selection import select

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}

BLOCK = set(PAPER_TERMS) - {"embedding-layernorm", "pooler"}
WITH_EMBEDDING = BLOCK | {"embedding-layernorm"}

#: name: (prefix of the classes, options, layers with parameters of their own, terms)
MODELS = {
    "bert": ("Bert", TEXT, 3, set(PAPER_TERMS)),
    "roberta": ("Roberta", TEXT, 3, WITH_EMBEDDING),
    "xlm-roberta": ("XLMRoberta", TEXT, 3, WITH_EMBEDDING),
    "camembert": ("Camembert", TEXT, 3, WITH_EMBEDDING),
    "electra": ("Electra", TEXT | {"embedding_size": 32}, 3, WITH_EMBEDDING),
    "electra, projected": (
        "Electra",
        TEXT | {"embedding_size": 16},
        3,
        WITH_EMBEDDING | {"embedding-projection"},
    ),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": 64,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 2,
            "hidden_dim": 48,
            "max_position_embeddings": 40,
            "num_labels": 3,
        },
        3,
        WITH_EMBEDDING,
    ),
    "albert, shared": (
        "Albert",
        TEXT | {"embedding_size": 16},
        1,
        {*PAPER_TERMS, "embedding-projection"},
    ),
    "albert, groups": (
        "Albert",
        TEXT
        | {
            "embedding_size": 16,
            "num_hidden_layers": 4,
            "num_hidden_groups": 2,
            "inner_group_num": 2,
        },
        4,
        {*PAPER_TERMS, "embedding-projection"},
    ),
    "deberta": (
        "Deberta",
        TEXT | RELATIVE,
        3,
        (WITH_EMBEDDING - {"key"}) | {"position-query"},
    ),
    "deberta, absolute": ("Deberta", TEXT, 3, WITH_EMBEDDING - {"key"}),
    "deberta-v2": (
        "DebertaV2",
        TEXT
        | RELATIVE
        | {"share_att_key": False, "conv_kernel_size": 3, "norm_rel_ebd": "layer_norm"},
        3,
        WITH_EMBEDDING
        | {
            "position-query",
            "position-key",
            "relative-layernorm",
            "convolution",
            "convolution-layernorm",
        },
    ),
    "deberta-v2, as v3": (
        "DebertaV2",
        TEXT | RELATIVE | {"share_att_key": True, "norm_rel_ebd": "layer_norm"},
        3,
        WITH_EMBEDDING | {"relative-layernorm"},
    ),
    "mpnet": ("MPNet", TEXT, 3, WITH_EMBEDDING),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 40,
            "num_labels": 3,
            "pad_token_id": 0,
        },
        3,
        (BLOCK - {"query", "key", "value"}) | {"query-key-value", "final-layernorm"},
    ),
    "opt": (
        "OPT",
        TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0},
        3,
        BLOCK | {"final-layernorm"},
    ),
    "vit": ("ViT", IMAGE, 3, BLOCK | {"patch-embedding", "final-layernorm"}),
    "deit": ("DeiT", IMAGE, 3, BLOCK | {"patch-embedding", "final-layernorm"}),
}
TEXT_MODELS = [name for name, row in MODELS.items() if row[1] is not IMAGE]


def config_of(name, **changes):
    prefix, options, _, _ = MODELS[name]
    return getattr(transformers, f"{prefix}Config")(**options | changes)


def build(name, **changes):
    prefix = MODELS[name][0]
    task = "ImageClassification" if MODELS[name][1] is IMAGE else "SequenceClassification"
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}For{task}")(config_of(name, **changes))


def on_meta(make, *arguments):
    with torch.device("meta"):
        return make(*arguments)


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    return request.param, on_meta(build, request.param)


@pytest.fixture(scope="module")
def moved():
    """Small models whose biases differ from zero, so that no gradient vanishes by chance."""
    models = {}

    def get(name):
        if name not in models:
            model = build(name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            models[name] = model
        return models[name]

    return get


def text_batch(model):
    torch.manual_seed(1)
    ids = torch.randint(5, 64, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}


def test_every_row_has_a_model_here():
    assert {config_of(name).model_type for name in MODELS} == set(FAMILIES)


def test_the_row_names_every_bias_of_the_base(family):
    _, model = family
    prefix = head_prefix(model)
    # a bias is what stands beside a weight, or what is added to projections (DeBERTa)
    expected = {
        name
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and parameter.ndim == 1 and not name.endswith(".weight")
    }
    found = list(biases(model))
    assert {bias.name for bias in found} == expected
    assert [bias.name for bias in found if not bias.named] == []


def test_the_terms_are_those_of_the_family(family):
    name, model = family
    assert {bias.term for bias in biases(model)} == MODELS[name][3]


def test_a_term_is_one_bias_a_layer_or_one_outside(family):
    name, model = family
    layers = list(range(MODELS[name][2]))
    for term in MODELS[name][3]:
        where = [bias.layer for bias in biases(model) if bias.term == term]
        assert where in (layers, [None]), term
        assert (where == layers) == (term in BLOCK or term.startswith(("position-", "query-"))), (
            term
        )


def test_the_terms_together_are_all_biases_and_none_twice(family):
    name, model = family
    # what has a gradient of zero cannot be chosen alone
    zero = family_of(model).zero_gradient
    parts = [select(model, term, head=False).names for term in MODELS[name][3] if term not in zero]
    parts.append(tuple(bias.name for bias in biases(model) if bias.term in zero))
    every = select(model, head=False).names
    assert sorted(sum(parts, ())) == sorted(every)


def test_layers_and_what_is_outside_of_them_are_all_biases(family):
    name, model = family
    outside = {bias.name for bias in biases(model) if bias.layer is None}
    inside = [select(model, layers=[i], head=False).names for i in range(MODELS[name][2])]
    every = select(model, head=False).names
    assert sorted([*sum(inside, ()), *outside]) == sorted(every)
    sizes = {len(part) for part in inside}
    assert len(sizes) == 1


def test_the_base_alone_has_the_same_biases(family):
    _, model = family
    prefix = head_prefix(model)
    base = model.base_model
    assert base is not model and head_prefix(base) == ""
    assert [f"{prefix}{b.name}" for b in biases(base)] == [b.name for b in biases(model)]
    assert [b.term for b in biases(base)] == [b.term for b in biases(model)]


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_the_pooler_of_an_image_model_is_named(name):
    model = on_meta(getattr(transformers, f"{MODELS[name][0]}Model"), config_of(name))
    assert [b.name for b in biases(model) if b.term == "pooler"] == ["pooler.dense.bias"]
    assert all(b.named for b in biases(model))


@pytest.mark.parametrize(
    ("name", "term", "end"),
    [
        ("bert", "m1", "attention.output.dense.bias"),
        ("bert", "LN1", "attention.output.LayerNorm.bias"),
        ("bert", "m2", "intermediate.dense.bias"),
        ("bert", "m3", "encoder.layer.{}.output.dense.bias"),
        ("bert", "LN2", "encoder.layer.{}.output.LayerNorm.bias"),
        ("mpnet", "m1", "attention.attn.o.bias"),
        ("mpnet", "LN1", "attention.LayerNorm.bias"),
        ("mpnet", "m3", "encoder.layer.{}.output.dense.bias"),
        ("distilbert", "LN1", "sa_layer_norm.bias"),
        ("distilbert", "m3", "ffn.lin2.bias"),
        ("albert, groups", "m3", "ffn_output.bias"),
        ("albert, groups", "LN2", "full_layer_layer_norm.bias"),
        ("deberta", "query", "attention.self.q_bias"),
        ("deberta-v2", "key", "attention.self.key_proj.bias"),
        ("vit", "m1", "attention.o_proj.bias"),
        ("vit", "LN1", "layernorm_before.bias"),
        ("deit", "m3", "mlp.fc2.bias"),
    ],
)
def test_a_symbol_addresses_its_bias_and_no_other(name, term, end):
    model = on_meta(build, name)
    names = select(model, term, head=False).names
    assert len(names) == MODELS[name][2]
    assert all(n.endswith(end.format(i)) for i, n in enumerate(names)), names


def test_symbols_stand_for_terms_of_the_paper():
    assert set(ALIASES.values()) <= set(PAPER_TERMS)


def test_relative_position_weights_are_no_biases():
    model = on_meta(build, "mpnet")
    assert any("relative_attention_bias.weight" in name for name, _ in model.named_parameters())
    assert not any("relative" in bias.name for bias in biases(model))


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_exactly_the_selected_parameters_get_gradients(moved, name):
    model = moved(name).train()
    for terms, layers in [("all", None), ("m1,m2", None), ("m3,LN2", "0")]:
        model.zero_grad(set_to_none=True)
        selection = select(model, terms, layers)
        model(**text_batch(model)).loss.backward()
        have = {n for n, p in model.named_parameters() if p.grad is not None}
        assert have == set(selection.names)
        # the softmax does not see what a key's bias adds to every score of a query
        moves = {t.name for t in selection.trained if t.term not in ("key", "position-key")}
        flat = {n for n, p in model.named_parameters() if n in moves and not p.grad.any()}
        assert flat == set()


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_exactly_the_selected_parameters_of_an_image_model_get_gradients(moved, name):
    model = moved(name).train()
    selection = select(model)
    torch.manual_seed(1)
    model(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 2])).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(selection.names)


def bloom():
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)
    return transformers.BloomForSequenceClassification(config)


class Odd(nn.Module):
    """A module with biases of its own."""

    def __init__(self):
        super().__init__()
        self.bias_k = nn.Parameter(torch.zeros(4))
        self.unbiased = nn.Parameter(torch.zeros(4))
        self.bias_table = nn.Embedding(3, 4)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: nn.Sequential(
                nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4), nn.Unflatten(1, (4, 1)),
                nn.Conv1d(4, 4, 1),
            ),
            {"0.bias": ("linear", 0), "2.bias": ("layernorm", 1), "4.bias": ("convolution", 2)},
        ),
        (
            lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
            {
                "in_proj_bias": ("other", None),
                "bias_k": ("other", None),
                "bias_v": ("other", None),
                "out_proj.bias": ("linear", None),
            },
        ),
        (Odd, {"bias_k": ("other", None)}),
    ],
    ids=["sequential", "multihead attention", "own parameters"],
)  # fmt: skip
def test_a_plain_module_goes_by_the_type_of_its_parts(make, expected):
    found = {bias.name: (bias.term, bias.layer) for bias in biases(make())}
    assert found == expected
    assert not any(bias.named for bias in biases(make()))
    assert head_prefix(make()) is None


def test_a_family_without_a_row_goes_by_module_type_and_is_listed():
    model = on_meta(bloom)
    found = list(biases(model))
    assert {bias.term for bias in found} == {"linear", "layernorm"}
    assert {bias.layer for bias in found} == {0, 1, None}
    assert not any(bias.named for bias in found)
    expected = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert {bias.name for bias in found} == expected
    shown = " ".join(str(select(model)).split())
    assert "named by module type only: transformer.word_embeddings_layernorm.bias" in shown
    assert "named by module type only" not in str(select(on_meta(build, "bert")))


def test_a_bias_that_a_row_does_not_know_goes_by_module_type():
    model = build("bert")
    model.bert.encoder.layer[1].adapter = nn.Linear(4, 4)
    model.bert.extra = nn.LayerNorm(4)
    found = {bias.name: bias for bias in biases(model) if not bias.named}
    assert {name: (bias.term, bias.layer) for name, bias in found.items()} == {
        "bert.encoder.layer.1.adapter.bias": ("linear", 1),
        "bert.extra.bias": ("layernorm", None),
    }


def test_a_bias_shared_by_modules_comes_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.bias = first.bias
    assert [bias.name for bias in biases(nn.Sequential(first, second))] == ["0.bias"]
