"""The file of trained parameters: exact, and refused where it does not belong."""

from __future__ import annotations

import json
import os
import pickle
import platform
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import bitfit_fast
from bitfit_fast import (
    BitFitError,
    BitFitWarning,
    checkpoint,
    fingerprint,
    load,
    merge,
    read,
    save,
    select,
    tensorfile,
    unload,
)
from bitfit_fast.methods import METHODS
from bitfit_fast.tensorfile import write_tensors

from .conftest import logits, refusal, tiny_bert, train


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "terms", "layers", "head"),
    [
        ("bitfit", "all", None, True),
        ("bitfit", "query,m2", "1", True),
        ("bitfit", "pooler", None, False),
        ("full", "all", None, True),
        ("full", "all", None, False),
        ("frozen", "all", None, True),
    ],
)
def test_loaded_logits_are_those_that_were_trained(
    fresh, tmp_path, dtype, method, terms, layers, head
):
    model = fresh().to(dtype)
    METHODS[method].select(model, terms, layers, head)
    save(train(model), tmp_path / "file.safetensors")
    base = fresh().to(dtype)
    before, untrained = state_of(base), logits(base)
    header = load(base, tmp_path / "file.safetensors")
    assert header.method == method
    assert torch.equal(logits(base), logits(model))
    assert not torch.equal(logits(base), untrained)
    assert same_state(base, state_of(model))
    assert logits(base).dtype == dtype
    unload(base)
    assert same_state(base, before)
    assert torch.equal(logits(base), untrained)


def test_the_header_says_what_trained(fresh, tmp_path, bert_folder):
    model = fresh(["no", "perhaps", "yes"], seed=3)
    selection = select(model, "m2,query", "1")
    path = tmp_path / "made" / "file.safetensors"
    save(model, path, task={"name": "reviews", "max_length": 64})
    header = read(path).header
    assert header.base == str(bert_folder)
    assert header.fingerprint == fingerprint(model, selection.names)
    assert len(header.fingerprint) == 64
    assert header.model_class == "BertForSequenceClassification"
    assert header.method == "bitfit"
    assert header.terms == ["query", "intermediate"]
    assert header.layers == [1]
    assert header.head is True
    assert header.labels == ["no", "perhaps", "yes"]
    assert header.task == {"name": "reviews", "max_length": 64}
    assert header.versions == {
        "bitfit_fast": bitfit_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    assert tuple(sorted(read(path).tensors)) == tuple(sorted(selection.names))
    with safe_open(path, "pt") as file:
        raw = json.loads(file.metadata()["bitfit_fast"])
    assert raw["labels"] == header.labels and raw["kind"] == "checkpoint"


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"problem_type": "regression", "num_labels": 1}, None),
        ({"num_labels": 1}, None),
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {1: "b", 0: "a"}, "label2id": {"a": 0, "b": 1}}, ["a", "b"]),
    ],
)
def test_labels_are_those_of_the_configuration(tmp_path, changes, labels):
    model = tiny_bert(**changes)
    select(model)
    save(model, tmp_path / "file.safetensors")
    assert read(tmp_path / "file.safetensors").header.labels == labels


def test_the_file_of_bert_base_is_small(tmp_path):
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    selection = select(model)
    # only what is written needs memory
    for name in selection.names:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        shape = getattr(module, attribute).shape
        setattr(module, attribute, nn.Parameter(torch.randn(shape)))
    path = tmp_path / "file.safetensors"
    save(model, path, base_fingerprint="0" * 64)
    assert sum(t.numel() for t in read(path).tensors.values()) == 102_912 + 1_538
    assert 4 * (102_912 + 1_538) < path.stat().st_size < 450_000


def test_nothing_to_save(fresh, tmp_path):
    model = fresh().requires_grad_(False)
    assert "nothing to save" in refusal(save, model, tmp_path / "file.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_unload_gives_back_the_labels_too(trained, bert_folder):
    base = BertForSequenceClassification.from_pretrained(bert_folder)
    before = base.config.to_dict()
    load(base, trained[1])
    assert base.config.id2label == {0: "bad", 1: "good"}
    assert base.config.label2id == {"bad": 0, "good": 1}
    unload(base)
    assert base.config.to_dict() == before
    assert base.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_unload_without_load(fresh, trained):
    base = fresh()
    assert "nothing to unload" in refusal(unload, base)
    load(base, trained[1])
    unload(base)
    assert "nothing to unload" in refusal(unload, base)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("all", True), ("all", True)),
        (("query", True), ("m2", False)),
        (("m2", False), ("query", True)),
        (("all", True), ("value", False)),
    ],
)
def test_a_load_over_a_load_is_the_second_alone(fresh, tmp_path, first, second):
    files = []
    for seed, (terms, head) in enumerate([first, second]):
        model = fresh()
        select(model, terms, head=head)
        files.append(tmp_path / f"{seed}.safetensors")
        save(train(model, seed), files[-1])
    base = fresh()
    before = state_of(base)
    load(base, files[0])
    load(base, files[1])
    assert same_state(base, state_of(model))
    unload(base)
    assert same_state(base, before)
    assert "nothing to unload" in refusal(unload, base)


def test_a_checkpoint_in_memory_loads_like_its_file(fresh, trained):
    base = fresh()
    load(base, read(trained[1]))
    assert torch.equal(logits(base), logits(trained[0]))


def test_a_run_folder_stands_for_its_file(fresh, trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(trained[1], run / "model.safetensors")
    base = fresh()
    load(base, str(run))
    assert torch.equal(logits(base), logits(trained[0]))
    assert read(run).path == run / "model.safetensors"
    (run / "model.safetensors").unlink()
    assert "does not exist" in refusal(read, run)


def test_a_base_model_folder_is_no_checkpoint(bert_folder):
    assert "was not written by bitfit_fast" in refusal(read, bert_folder)


def test_another_base_is_refused_with_both_names(fresh, trained, bert_folder, tmp_path):
    folder = Path(shutil.copytree(bert_folder, tmp_path / "other-base"))
    other = fresh(folder=folder)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[3, 4] += 1e-3
    before = state_of(other)
    text = refusal(load, other, trained[1])
    names = read(trained[1]).tensors.keys()
    for part in (
        str(bert_folder),
        str(folder),
        fingerprint(fresh(), set(names))[:12],
        fingerprint(other, set(names))[:12],
        "any_base",
        "--any-base",
    ):
        assert part in text
    assert same_state(other, before)
    assert "nothing to unload" in refusal(unload, other)
    load(other, trained[1], any_base=True)
    assert torch.equal(other.bert.pooler.dense.bias, trained[0].bert.pooler.dense.bias)
    unload(other)
    assert same_state(other, before)


def test_a_refused_checkpoint_leaves_what_was_loaded_before(fresh, trained, tmp_path):
    other = train(fresh().requires_grad_(True))
    select(other)
    save(other, tmp_path / "other.safetensors")
    smaller = fresh(["a", "b", "c"])
    select(smaller)
    save(smaller, tmp_path / "smaller.safetensors")
    base = fresh()
    before = state_of(base)
    load(base, trained[1])
    for name in ("other", "smaller", "missing"):
        refusal(load, base, tmp_path / f"{name}.safetensors")
        assert same_state(base, state_of(trained[0]))
    unload(base)
    assert same_state(base, before)


def test_another_architecture_is_refused(trained):
    model = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    )
    for any_base in (False, True):
        text = refusal(load, model, trained[1], any_base=any_base)
        assert "was made for BertForSequenceClassification on '" in text
        assert "DistilBertForSequenceClassification has no parameter bert." in text


def test_fewer_layers_are_refused(trained):
    text = refusal(load, tiny_bert(num_hidden_layers=1), trained[1], any_base=True)
    assert "has no parameter bert.encoder.layer.1." in text


def test_another_head_is_refused(fresh, trained):
    base = fresh(["a", "b", "c"])
    before = state_of(base)
    for any_base in (False, True):
        text = refusal(load, base, trained[1], any_base=any_base)
        assert "its classifier.bias has shape [2] and the model's [3]" in text
    assert same_state(base, before)
    assert base.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("part", [0.0, 0.0005, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(fresh, trained, part):
    whole = trained[1].read_bytes()
    trained[1].write_bytes(whole[: int(part * len(whole))])
    base = fresh()
    before = state_of(base)
    text = refusal(load, base, trained[1])
    assert str(trained[1]) in text
    assert same_state(base, before)


def test_a_byte_changed_is_refused(trained):
    path = trained[1]
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, data, 97), *range(data, len(whole), 211), data - 1, data, len(whole) - 1]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        refusal(read, path)
    path.write_bytes(whole)
    read(path)


class Trap:
    """Unpickling one makes a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("dump", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_pickle_is_refused_and_never_run(fresh, tmp_path, dump, in_folder):
    mark, path = tmp_path / "mark", tmp_path / "model.safetensors"
    dump({"classifier.bias": Trap(mark)}, path)
    target = tmp_path if in_folder else path
    assert "is a pickle, which can run code" in refusal(load, fresh(), target)
    assert "is a pickle" in refusal(merge, target, tmp_path / "merged")
    assert not mark.exists()


def test_a_training_state_is_no_checkpoint(fresh, tmp_path):
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"kind": "training state"}, {"a": torch.ones(1)})
    assert "holds a training state, where a checkpoint is needed" in refusal(load, fresh(), path)


def test_a_header_of_another_version_is_refused(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"kind": "checkpoint", "unheard": 1}, {"a": torch.ones(1)})
    assert "written by another version" in refusal(read, path)


def test_a_save_that_safetensors_refuses_names_the_file(fresh, trained, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise SafetensorError("No space left on device")

    model, path = trained
    before = path.read_bytes()
    monkeypatch.setattr(tensorfile, "save_file", fail)
    assert "No space left" in refusal(save, model, path) and path.read_bytes() == before
    monkeypatch.undo()
    monkeypatch.setattr(type(fresh()), "save_pretrained", fail)
    assert str(tmp_path / "merged") in refusal(merge, path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_previous_file(fresh, trained, monkeypatch, error):
    model, path = trained
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        Path(target).write_bytes(before[:100])
        raise error

    monkeypatch.setattr(tensorfile, "save_file", fail)
    with pytest.raises(type(error)):
        save(train(model, 1), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


class Tied(nn.Module):
    """A module with one weight under two names."""

    def __init__(self, tie=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 8)
        if tie:
            self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.norm(self.embed(ids)))


def test_a_tied_weight_is_saved_once_and_stays_tied(tmp_path):
    model, path = train(Tied()), tmp_path / "file.safetensors"
    save(model, path)
    assert list(read(path).tensors) == sorted(n for n, _ in model.named_parameters())
    base = Tied()
    before = state_of(base)
    load(base, path)
    assert base.out.weight is base.embed.weight
    ids = torch.arange(8)
    assert torch.equal(base(ids), model(ids))
    unload(base)
    assert same_state(base, before)
    assert "fingerprint" in refusal(load, Tied(tie=False), path)


def test_tied_weights_of_a_transformer_train_fully(tmp_path):
    model, path = tiny_bert(BertForMaskedLM), tmp_path / "file.safetensors"
    METHODS["full"].select(model, "all", None, True)
    save(train(model), path)
    base = tiny_bert(BertForMaskedLM)
    load(base, path)
    assert torch.equal(logits(base), logits(model))
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight


def test_a_frozen_tied_weight_is_in_the_fingerprint_under_both_names():
    model = Tied()
    assert fingerprint(model, {"embed.weight"}) == fingerprint(model, {"out.weight"})
    assert fingerprint(model, {"embed.weight"}) != fingerprint(model, set())


def test_views_of_one_buffer_are_saved_and_loaded(fresh, tmp_path):
    def flatten(model):
        parts = [p for p in model.parameters() if p.requires_grad]
        flat = torch.cat([p.detach().reshape(-1) for p in parts])
        start = 0
        for part in parts:
            part.data = flat[start : start + part.numel()].view_as(part)
            start += part.numel()
        return flat

    model = fresh()
    selection = select(model)
    flat = flatten(model)
    train(model)
    path = tmp_path / "file.safetensors"
    save(model, path)
    assert path.stat().st_size < 4 * flat.numel() + 20_000
    found = read(path).tensors
    parameters = dict(model.named_parameters())
    assert all(torch.equal(found[n], parameters[n]) for n in selection.names)
    base = fresh()
    load(base, path)
    assert torch.equal(logits(base), logits(model))
    other = fresh()
    select(other)
    buffer = flatten(other)
    load(other, path)
    assert torch.equal(logits(other), logits(model))
    assert other.classifier.bias.data_ptr() != 0
    assert torch.equal(buffer, flat)


def test_the_fingerprint_is_of_what_does_not_train(fresh):
    names = select(fresh()).names
    model = fresh()
    first = fingerprint(model, names)
    train_all = dict(model.named_parameters())
    with torch.no_grad():
        train_all[names[0]].add_(1)
    assert fingerprint(model, names) == first
    assert fingerprint(model, names[1:]) != fingerprint(fresh(), names[1:])
    with torch.no_grad():
        train_all["bert.embeddings.word_embeddings.weight"][7, 0] += 1e-4
    assert fingerprint(model, names) != first


def test_buffers_are_in_the_fingerprint():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    first = fingerprint(model, ("0.bias",))
    model[1].running_mean += 1
    assert fingerprint(model, ("0.bias",)) != first


def test_the_public_names_are_those_of_the_module():
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)
    assert issubclass(BitFitWarning, UserWarning) and issubclass(BitFitError, ValueError)
