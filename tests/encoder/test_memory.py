"""What is kept for the backward pass in each memory mode, and that gradients are the same."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from bitfit_fast import patch_encoder, select
from bitfit_fast.encoder import forward
from bitfit_fast.encoder.run import Run

BACKENDS = pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256}
#: Bytes a token and layer for a width of 1, above the 8 of the statistics.
BYTES = {"fast": 18, "low": 14, "lower": 10, "lowest": 4}


@BACKENDS
@pytest.mark.parametrize("family", ["bert", "vit", "electra", "distilbert"])
def test_gradients_are_the_same_in_every_memory_mode(family, memory, case, measure, as_exact):
    each = case(family)
    patch_encoder(each.model, precision="fp32", memory=memory)
    found = measure(each.model, each.inputs)
    if memory != "low":
        as_exact(found, each.fp32, each.exact)
        return
    torch.testing.assert_close(found["loss"].double(), each.exact["loss"], rtol=1e-6, atol=0)
    ours, size = (
        torch.cat([(found[n].double() * k - each.exact[n]).flatten() for n in found]).norm()
        for k in (1, 0)
    )
    assert 1e-5 < ours / size < 5e-3


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_bf16_is_as_exact_in_every_memory_mode(family, memory, case, measure, as_exact):
    each = case(family)
    patch_encoder(each.model, precision="bf16", memory=memory)
    found = measure(each.model, each.inputs)
    as_exact(found, each.bf16, each.exact, roundings=2, eps=2.0**-7)


@pytest.mark.parametrize("memory", ["lower", "lowest"])
@pytest.mark.parametrize("family", ["bert", "vit"])
@BACKENDS
def test_a_block_that_runs_in_parts_is_the_same(
    family, memory, backend, case, measure, as_exact, monkeypatch
):
    monkeypatch.setattr(forward, "_CHUNK", 16)
    each = case(family, "ForTokenClassification" if family == "bert" else "Model")
    patch_encoder(each.model, precision="fp32", memory=memory)
    as_exact(measure(each.model, each.inputs), each.fp32, each.exact)


def kept_bytes(model, inputs):
    """Return the bytes that autograd keeps, each storage once, without parameters."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del loss
    return sum(size for pointer, size in storages.items() if pointer not in own)


@BACKENDS
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bytes_kept_of_a_token_and_layer(memory, dropout, build, batch):
    totals = []
    for layers in (3, 4):
        model = build(
            "bert",
            "ForTokenClassification",
            num_hidden_layers=layers,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **WIDE,
        )
        select(model)
        patch_encoder(model, precision="bf16", memory=memory)
        inputs = batch(model)
        totals.append(kept_bytes(model, inputs))
    tokens, width = int(inputs["attention_mask"].sum()), WIDE["hidden_size"]
    # one for each place of a layer, each twice
    seeds = 4 * 16 if dropout else 0
    each = (totals[1] - totals[0] - seeds) / tokens
    assert each <= BYTES[memory] * width + 8
    # and no less: what is not found here would be kept somewhere else
    assert each >= 0.9 * BYTES[memory] * width


@BACKENDS
def test_bytes_kept_in_a_pre_norm_encoder(memory, build, batch):
    totals = []
    for layers in (3, 4):
        model = build("vit", num_hidden_layers=layers, **WIDE)
        select(model)
        patch_encoder(model, precision="bf16", memory=memory)
        inputs = batch(model)
        totals.append(kept_bytes(model, inputs))
    tokens, width = 6 * 17, WIDE["hidden_size"]
    assert (totals[1] - totals[0]) / tokens <= BYTES[memory] * width + 16


def test_what_a_layer_kept_is_freed_behind_it(patched, batch, memory, monkeypatch):
    seen, alive, take = [], [], Run.taken

    def taken(run, count):
        alive.append(sum(not reference.expired() for reference in seen))
        tensors = take(run, count)
        seen.extend(StorageWeakRef(t.untyped_storage()) for t in tensors if t is not None)
        return tensors

    model = patched("bert", memory=memory, num_hidden_layers=4)
    loss = model(**batch(model)).loss
    monkeypatch.setattr(Run, "taken", taken)
    loss.backward()
    assert len(seen) >= 4 * 4
    assert max(alive) <= 2, alive


def test_weights_of_attention_are_kept_once_in_fp32(build):
    model = build("bert", "Model")
    select(model)
    patch_encoder(model, precision="fp32")
    for layer in model.encoder.layer:
        own = layer.attention.self
        storages = {m.weight.untyped_storage().data_ptr() for m in (own.query, own.key, own.value)}
        assert len(storages) == 1


def test_nothing_is_kept_without_gradients(patched, batch):
    model = patched("bert")
    with torch.no_grad():
        assert kept_bytes(model, batch(model)) == 0
