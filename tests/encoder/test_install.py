"""What patching leaves as it was, and what unpatching brings back."""

import importlib
import json

import pytest
import torch

import bitfit_fast
from bitfit_fast import patch_encoder, select, unpatch
from bitfit_fast.encoder import encoder_of
from bitfit_fast.models.families import biases


@pytest.fixture
def picture():
    """Take down all of a model that patching is not to change for good."""

    def of(model):
        return {
            "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "classes": {name: type(module) for name, module in model.named_modules()},
            "trains": {name: p.requires_grad for name, p in model.named_parameters()},
            "identities": {name: id(p) for name, p in model.named_parameters()},
            "fields": {name: set(vars(module)) for name, module in model.named_modules()},
        }

    return of


def same_tensors(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_unpatching_brings_everything_back(family, precision, build, picture, batch):
    model = build(family)
    select(model)
    before = picture(model)
    patch_encoder(model, precision=precision)
    during = picture(model)
    assert same_tensors(during["state"], before["state"])
    assert during["identities"] == before["identities"]
    assert [kind.__name__ for kind in during["classes"].values()] == [
        kind.__name__ for kind in before["classes"].values()
    ]
    zero = {bias.name for bias in biases(model) if bias.zero_gradient}
    assert {n for n in zero if during["trains"][n]} == set()
    unpatch(model)
    after = picture(model)
    assert same_tensors(after.pop("state"), before.pop("state"))
    # select leaves a mark on the model
    assert after == before
    assert encoder_of(model) is None
    pointers = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    unpatch(model)
    model(**batch(model))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["reading.Product", "weights._sums", "calls._subclass"])
def test_patching_that_fails_half_way_changes_nothing(
    family, precision, what, build, picture, monkeypatch
):
    def of(model):
        storages = [(p.data_ptr(), p.untyped_storage().nbytes()) for p in model.parameters()]
        return picture(model) | {"storages": storages}

    module, _, name = what.partition(".")
    module = importlib.import_module(f"bitfit_fast.encoder.{module}")
    makes, made = getattr(module, name), []

    def scarce(*args):
        made.append(what)
        if len(made) == (2 if name == "_subclass" else 6):
            raise torch.OutOfMemoryError("out of memory")
        return makes(*args)

    model = build(family)
    select(model)
    before = of(model)
    monkeypatch.setattr(module, name, scarce)
    with pytest.raises(torch.OutOfMemoryError):
        patch_encoder(model, precision=precision)
    after = of(model)
    assert same_tensors(after.pop("state"), before.pop("state"))
    assert after == before
    monkeypatch.undo()
    patch_encoder(model, precision=precision)
    model.eval()


def test_patching_says_what_it_did(build):
    model = build("bert")
    selection = select(model)
    text = str(patch_encoder(model, selection, memory="low"))
    assert text.splitlines() == [
        "3 layers run as one operation in fp32, the last one for first tokens only; "
        "memory mode low",
        "3 key biases have a gradient of zero, which is not computed",
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_patched_model_is_saved_as_the_model_it_is(precision, patched, tmp_path, batch):
    model = patched("bert", precision=precision)
    model.save_pretrained(tmp_path / "patched")
    kinds = json.loads((tmp_path / "patched" / "config.json").read_text())["architectures"]
    assert kinds == ["BertForSequenceClassification"]
    again = type(model).from_pretrained(tmp_path / "patched")
    assert same_tensors(again.state_dict(), model.state_dict())
    unpatch(model)
    model.save_pretrained(tmp_path / "unpatched")
    files = [tmp_path / name / "model.safetensors" for name in ("patched", "unpatched")]
    assert files[0].stat().st_size == files[1].stat().st_size
    torch.testing.assert_close(
        again.train()(**batch(again)).loss, model(**batch(model)).loss, rtol=1e-6, atol=0
    )


def test_a_patched_base_model_is_saved_as_the_model_it_is(patched, tmp_path):
    model = patched("bert", "Model")
    model.save_pretrained(tmp_path)
    kinds = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert kinds == ["BertModel"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpoints_of_a_patched_model_fit_an_unpatched_one(precision, patched, build, tmp_path):
    model = patched("bert", precision=precision)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    bitfit_fast.save(model, tmp_path / "patched")
    unpatch(model)
    bitfit_fast.save(model, tmp_path / "unpatched")
    first, second = (bitfit_fast.read(tmp_path / name) for name in ("patched", "unpatched"))
    assert same_tensors(first.tensors, second.tensors)
    other = build("bert")
    bitfit_fast.load(other, tmp_path / "patched")
    assert same_tensors(other.state_dict(), model.state_dict())


def test_a_checkpoint_is_loaded_into_a_patched_model(patched, tmp_path, batch):
    model = patched("bert").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    expected = model(**batch(model)).logits
    bitfit_fast.save(model, tmp_path / "run")
    other = patched("bert").eval()
    bitfit_fast.load(other, tmp_path / "run")
    # biases are read at each call, and no weight was written
    assert torch.equal(other(**batch(other)).logits, expected)
