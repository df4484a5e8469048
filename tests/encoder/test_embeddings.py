"""Embeddings in one kernel: the same numbers, wherever they are wanted, and otherwise not."""

import pytest
import torch
from torch.nn import functional as F

from bitfit_fast import patch_encoder, select, unpatch
from bitfit_fast.encoder import embeddings, encoder_of, sums
from bitfit_fast.encoder.embeddings import Dropout, Embedding, Gathered, Onward

TEXTS = ["bert", "roberta", "electra", "electra, as wide", "mpnet", "distilbert"]


@pytest.fixture
def gathered(monkeypatch):
    """Let rows wait for their LayerNorm on a CPU, too; note a kernel's tables, dropout, dtype."""
    seen = []
    one_kernel = embeddings.embedding_layer_norm

    def counting(ids, tables, *rest):
        seen.append((len(tables), rest[2], rest[-1]))
        return one_kernel(ids, tables, *rest)

    monkeypatch.setattr(embeddings, "embedding_layer_norm", counting)

    def switch(on):
        monkeypatch.setattr(embeddings, "gathers", lambda table: on)
        monkeypatch.setattr(sums, "defers", lambda tensor: on)
        return seen

    return switch


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm()
        assert error <= tolerance * value.norm() + 1e-7, (name, error)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("terms", ["all", "embedding-layernorm", "query"])
@pytest.mark.parametrize("family", TEXTS)
def test_gradients_are_the_same(family, terms, dropout, patched, batch, measure, gathered):
    name = "dropout" if family == "distilbert" else "hidden_dropout_prob"
    model = patched(family, terms=terms, **{name: dropout})
    inputs = batch(model)
    gathered(False)
    expected = measure(model, inputs)
    seen = gathered(True)
    assert_close(measure(model, inputs), expected)
    tables = 3 if family in ("bert", "roberta") or "electra" in family else 2
    assert seen == [(tables, dropout, torch.float32)]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_layers_in_bf16_are_given_bf16(patched, batch, measure, gathered, dropout, head):
    model = patched("bert", head, precision="bf16", hidden_dropout_prob=dropout)
    inputs = batch(model)
    gathered(False)
    expected = measure(model, inputs)
    seen = gathered(True)
    found = measure(model, inputs)
    assert found["loss"].dtype == torch.float32
    # the head is given numbers that were not rounded to bf16
    assert_close(found, expected, 5e-2)
    assert seen == [(3, dropout, torch.bfloat16)]
    model.eval()
    measure(model, inputs)
    assert seen[1:] == [(3, 0.0, torch.bfloat16)]


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_dropout_of_the_models_own_stays_behind_the_layer_norm(
    hooked, waits, build, batch, measure, gathered
):
    model = build("bert", hidden_dropout_prob=0.1)
    select(model)
    own, dropped = model.bert.embeddings.dropout, []
    if hooked:
        own.register_forward_hook(lambda module, args, out: dropped.append((out == 0).sum()))
    patch_encoder(model, precision="bf16")
    assert (type(own) is Dropout) != hooked
    seen = gathered(waits)
    found = measure(model, batch(model))
    assert found["bert.embeddings.LayerNorm.bias"].norm() > 0
    assert len(dropped) == hooked and all(dropped)
    # where some module has hooks, rows are the model's own, too
    assert len(seen) == (waits and not hooked)


def test_the_head_is_given_fp32(patched, batch, gathered):
    model = patched("bert", precision="bf16")
    gathered(True)
    given = []
    model.bert.pooler.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model(**batch(model)).loss.backward()
    assert given[0].dtype == torch.float32
    assert not torch.equal(given[0], given[0].bfloat16().float())


@pytest.mark.parametrize(
    "change", ["hook on a table", "hook on the LayerNorm", "table trains", "bf16 table"]
)
def test_everything_else_takes_the_models_own_way(change, build, batch, measure, gathered):
    model = build("bert")
    select(model)
    words = model.bert.embeddings.word_embeddings
    if change == "table trains":
        words.weight.requires_grad_()
    if change == "bf16 table":
        words.weight.data = words.weight.data.bfloat16()
    patch_encoder(model, precision="fp32")
    called = []
    hooked = {"hook on a table": words, "hook on the LayerNorm": model.bert.embeddings.LayerNorm}
    if change in hooked:
        hooked[change].register_forward_hook(lambda module, args, out: called.append(type(out)))
    seen = gathered(True)
    found = measure(model, batch(model))
    assert not seen and set(called) <= {torch.Tensor}
    assert len(called) == (change in hooked)
    if change == "table trains":
        assert found["bert.embeddings.word_embeddings.weight"].norm() > 0


@pytest.mark.parametrize("terms", ["all", "query"])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_dropout_may_be_replaced(family, terms, build, batch, measure, gathered):
    model = build(family, hidden_dropout_prob=0.1)
    select(model, terms)
    model.base_model.embeddings.dropout = torch.nn.Identity()
    patch_encoder(model, precision="fp32")
    inputs = batch(model)
    found = []
    for waits in (False, True):
        gathered(waits)
        found.append(measure(model, inputs))
    assert_close(found[1], found[0])


def test_hidden_states_are_those_of_the_model(patched, batch, gathered):
    model = patched("bert")
    seen = gathered(True)
    out = model(**batch(model), output_hidden_states=True)
    assert not seen and out.hidden_states[0].dtype == torch.float32


def test_it_is_undone(build, batch):
    model = build("bert")
    select(model)
    patch_encoder(model)
    tables = [m for m in model.bert.embeddings.children() if type(m) is Embedding]
    assert len(tables) == 3
    unpatch(model)
    assert all(type(table) is torch.nn.Embedding for table in tables)
    assert encoder_of(model) is None


def test_a_sum_of_rows_is_a_tensor_to_whoever_asks():
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(7, 6, generator=generator) for _ in range(4)]
    ids = [torch.randint(7, (2, 3), generator=generator) for _ in range(4)]
    made = [Gathered([i], [t], Onward(torch.float32)) for i, t in zip(ids, tables)]
    rows = [F.embedding(i, t) for i, t in zip(ids, tables)]
    assert made[0].shape == (2, 3, 6) and made[0].size(1) == 3
    for found, expected in (
        (made[0] + made[1], rows[0] + rows[1]),
        (made[0] + rows[1], rows[0] + rows[1]),
        (rows[0] + made[1], rows[0] + rows[1]),
        (made[0] + made[1] + made[2] + made[3], sum(rows)),
        (made[0] + 1, rows[0] + 1),
        (made[0] * 2, rows[0] * 2),
        (F.dropout(made[0], 0.5, False), rows[0]),
        (torch.relu(made[2]), rows[2].relu()),
        (made[1].mean(), rows[1].mean()),
    ):
        found = found.tensor() if isinstance(found, Gathered) else found
        assert torch.equal(found, expected)
    onward = Onward(torch.float32)
    two = Gathered(ids[:1], tables[:1], onward) + Gathered(ids[1:2], tables[1:2], onward)
    assert isinstance(two, Gathered)
    tensor = two.tensor()
    assert two.tensor() is tensor and torch.equal(tensor, rows[0] + rows[1])
    gamma = torch.randn(6, generator=generator)
    found = two.normalised(gamma, None, 1e-5, False)
    torch.testing.assert_close(found, F.layer_norm(tensor, (6,), gamma, None, 1e-5))
