"""The demonstration, on a tiny model."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import bitfit_fast
from bitfit_fast import demo
from bitfit_fast.models.loading import DEFAULT_MODEL, locate

pytestmark = pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")


def test_the_demo_leaves_a_table_and_two_pictures(bert_folder, tmp_path, monkeypatch, capfd):
    arguments = ["demo", "--output", tmp_path, "--model", bert_folder, "--steps", 5]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    demo.main()
    out = capfd.readouterr().out
    for name in ("frozen", "BitFit", "full"):
        assert name in out
    for picture in ("learning_curves.png", "bias_change.png"):
        assert (tmp_path / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert str(tmp_path / picture) in out
    summaries = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    trained = {m: s["parameters"]["trained"] for m, s in summaries.items()}
    assert trained["frozen"] < trained["bitfit"] < trained["full"]


def test_the_default_model_is_a_real_bert_that_saves_and_loads(tmp_path):
    labels = ["negative", "positive"]
    model = bitfit_fast.load_model(DEFAULT_MODEL, labels)
    selection = bitfit_fast.select(model)
    assert selection.biases == 26_112
    tokenizer = bitfit_fast.load_tokenizer(DEFAULT_MODEL)
    batch = tokenizer(["the plot was hardly dull", "dreadful"], padding=True, return_tensors="pt")
    model(**batch, labels=torch.tensor([1, 0])).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
        logits = model(**batch).logits
    bitfit_fast.save(model, tmp_path / "demo.safetensors")
    assert (tmp_path / "demo.safetensors").stat().st_size < 130_000
    fresh = bitfit_fast.load_model(DEFAULT_MODEL, labels, seed=1)
    header = bitfit_fast.load(fresh, tmp_path / "demo.safetensors")
    assert header.base == DEFAULT_MODEL
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, logits)
    # the same bits in a model whose weights are still mapped from the file
    mapped = AutoModelForSequenceClassification.from_pretrained(locate(DEFAULT_MODEL)).eval()
    bitfit_fast.load(mapped, tmp_path / "demo.safetensors")
    with torch.no_grad():
        assert torch.equal(mapped(**batch).logits, logits)
