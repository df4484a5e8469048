"""Models opened from the file of trained parameters, and merged with it into folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from bitfit_fast import load_model, load_tokenizer, merge, open_model, save, select

from .conftest import IDS, LABELS, MASK, logits, refusal, tiny_bert, train


def test_a_model_opens_with_its_base(trained, bert_folder):
    model, tokenizer, opened = open_model(trained[1])
    assert torch.equal(logits(model), logits(trained[0]))
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert not model.training
    assert tokenizer("a plot")["input_ids"][0] == tokenizer.cls_token_id
    assert opened.header.base == str(bert_folder)


def test_a_model_opens_with_a_base_named_otherwise(trained, bert_folder, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(bert_folder, folder)
    model, _, _ = open_model(trained[1], str(folder))
    assert torch.equal(logits(model), logits(trained[0]))


@pytest.mark.parametrize("labels", [["a", "b", "c"], None], ids=["classes", "regression"])
def test_a_new_head_that_did_not_train_is_in_the_file(fresh, tmp_path, labels):
    model = fresh(labels, seed=5)
    select(model, head=False)
    path = tmp_path / "file.safetensors"
    save(train(model), path)
    assert torch.equal(logits(open_model(path)[0]), logits(model))


@pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")
def test_a_pooler_that_the_base_lacks_is_in_the_file(fresh, bert_folder, tmp_path):
    folder = Path(shutil.copytree(bert_folder, tmp_path / "no-pooler"))
    BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    model = fresh(folder=folder, seed=5)
    select(model)
    path = tmp_path / "file.safetensors"
    save(train(model), path)
    assert torch.equal(logits(open_model(path)[0]), logits(model))


def test_a_checkpoint_without_the_name_of_its_base(tmp_path):
    model = tiny_bert()
    select(model)
    path = tmp_path / "file.safetensors"
    save(model, path)
    assert "does not say its base model; name it (--base)" in refusal(open_model, path)


def test_a_base_that_is_gone(fresh, bert_folder, tmp_path):
    folder = Path(shutil.copytree(bert_folder, tmp_path / "base"))
    model = fresh(folder=folder)
    select(model)
    save(model, tmp_path / "file.safetensors")
    shutil.rmtree(folder)
    text = refusal(open_model, tmp_path / "file.safetensors")
    assert text == f"the model folder {folder} does not exist"


MERGED = """
import json, sys, torch, transformers
folder, ids, mask = json.loads(sys.argv[1])
model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
with torch.no_grad():
    logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
classify = transformers.pipeline("text-classification", folder, device="cpu")
labels = [found["label"] for found in classify(["the plot was good", "dull"], top_k=None)[0]]
print(json.dumps([logits.tolist(), labels, "bitfit_fast" in sys.modules]))
"""


def test_a_merged_folder_needs_this_package_no_more(trained, tmp_path):
    folder = merge(trained[1], tmp_path / "new" / "merged")
    assert folder == tmp_path / "new" / "merged"
    assert [p.name for p in folder.parent.iterdir()] == ["merged"]
    arguments = json.dumps([str(folder), IDS.tolist(), MASK.tolist()])
    run = subprocess.run(
        [sys.executable, "-c", MERGED, arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found, labels, imported = json.loads(run.stdout)
    assert torch.equal(torch.tensor(found), logits(trained[0]))
    assert set(labels) == set(LABELS)
    assert imported is False


def test_a_merged_folder_is_an_ordinary_base(trained, tmp_path):
    folder = merge(trained[1], tmp_path / "merged")
    assert torch.equal(logits(load_model(str(folder), LABELS)), logits(trained[0]))
    assert load_tokenizer(str(folder))("a plot").keys() == {
        "input_ids",
        "token_type_ids",
        "attention_mask",
    }
    assert load_file(folder / "model.safetensors").keys() == trained[0].state_dict().keys()
    assert os.access(folder, os.R_OK | os.X_OK)


@pytest.mark.parametrize("labels", [None, ["a", "b", "c"], ["a", "b", "c", "d"]])
def test_any_head_is_merged_to_the_last_bit(fresh, tmp_path, labels):
    model = fresh(labels)
    select(model)
    save(train(model), tmp_path / "file.safetensors")
    folder = merge(tmp_path / "file.safetensors", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(logits(merged), logits(model))
    assert merged.config.problem_type == model.config.problem_type
    assert merged.config.id2label == model.config.id2label


def test_merge_takes_an_empty_folder_but_no_other(trained, tmp_path, monkeypatch):
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    assert refusal(merge, trained[1], full).startswith(f"{full} exists already")
    assert refusal(merge, trained[1], full / "mine.txt").startswith(f"{full / 'mine.txt'} exists")
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    merge(trained[1], empty)
    assert (empty / "config.json").is_file()
    assert "exists already" in refusal(merge, trained[1], empty)


def test_merge_into_the_current_folder_and_through_a_link(trained, tmp_path, monkeypatch):
    here, link = tmp_path / "here", tmp_path / "link"
    here.mkdir()
    link.symlink_to(tmp_path / "target")
    (tmp_path / "target").mkdir()
    merge(trained[1], link)
    assert (tmp_path / "target" / "config.json").is_file()
    monkeypatch.chdir(here)
    merge(trained[1], ".")
    assert (here / "config.json").is_file()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_merge_leaves_nothing_behind(trained, tmp_path, monkeypatch, error, before):
    folder = tmp_path / "new"
    if before:
        folder.mkdir()

    def fail(self, target):
        (Path(target) / "config.json").write_text("{")
        raise error

    listing = sorted(tmp_path.iterdir())
    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", fail)
    with pytest.raises(type(error)):
        merge(trained[1], folder)
    assert sorted(tmp_path.iterdir()) == listing
    assert not before or list(folder.iterdir()) == []


def test_a_refused_merge_leaves_nothing_behind(trained, fresh, roberta_folder, tmp_path):
    for options in ({"base": str(roberta_folder)}, {"base": str(tmp_path / "nowhere")}):
        refusal(merge, trained[1], tmp_path / "deep" / "merged", **options)
    assert [p.name for p in tmp_path.iterdir()] == [trained[1].name]


def test_merge_onto_another_base(trained, bert_folder, tmp_path):
    folder = Path(shutil.copytree(bert_folder, tmp_path / "other"))
    model = load_model(str(folder), LABELS)
    with torch.no_grad():
        model.bert.pooler.dense.weight.mul_(1.5)
    model.save_pretrained(folder)
    assert "fingerprint" in refusal(merge, trained[1], tmp_path / "merged", str(folder))
    merge(trained[1], tmp_path / "merged", str(folder), any_base=True)
    merged = load_model(str(tmp_path / "merged"), LABELS)
    assert torch.equal(merged.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert torch.equal(merged.bert.pooler.dense.bias, trained[0].bert.pooler.dense.bias)
