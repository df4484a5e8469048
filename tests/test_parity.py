"""`compare` and the parity command: they see that the fast step is right, and that it is not."""

import json
import math
from dataclasses import replace

import pytest
import torch

import bitfit_fast
from bitfit_fast import parity
from bitfit_fast.errors import BitFitError
from bitfit_fast.training.settings import Settings

SMALL = Settings(batch_size=8, max_length=16)


@pytest.fixture
def things(bert_folder):
    def make():
        model = bitfit_fast.load_model(str(bert_folder), ["no", "yes"])
        bitfit_fast.select(model)
        return model, bitfit_fast.load_tokenizer(str(bert_folder)), DATA

    return make


TEXTS = (("good plot",), ("the acting was very dull and poor",), ("fine",), ("bad but great",)) * 4
DATA = bitfit_fast.TaskData(
    name="toy",
    labels=("no", "yes"),
    metrics=("accuracy",),
    splits={"train": bitfit_fast.Split("train", TEXTS, (0, 1, 0, 1) * 4)},
)


def test_parity_is_found_and_shown(things):
    model, tokenizer, data = things()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = parity.compare(model, tokenizer, data, SMALL, steps=3)
    assert found.failures == [] and found.verdict.startswith("parity: gradients in fp32 within")
    assert found.whole.fp32 < 1e-5 and 0 < found.whole.bf16 <= 2 * found.whole.bf16_pytorch
    terms = {row.term for row in found.rows}
    assert {"query", "value", "output-layernorm", "head"} <= terms and "key" not in terms
    assert all(len(losses) == 3 for losses in found.losses.values())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not model.training  # as it came
    assert found.table().row_count < found.table(by_layer=True).row_count
    assert json.loads(json.dumps(found.as_json()))["failures"] == []


def test_the_number_of_epochs_is_no_matter(things):
    found = [
        parity.compare(*things(), replace(SMALL, epochs=epochs), steps=6) for epochs in (None, 1)
    ]
    assert found[0].losses == found[1].losses


def test_a_wrong_gradient_is_no_parity(things, monkeypatch):
    from bitfit_fast.encoder import backward

    right = backward.bias_gradient
    monkeypatch.setattr(backward, "bias_gradient", lambda dy: 1.01 * right(dy))
    found = parity.compare(*things(), SMALL, steps=2)
    assert found.verdict.startswith("no parity: the gradient in fp32 is off by")


def test_nan_is_no_parity():
    row = parity.Row("all", "all", None, *[math.nan] * 4)
    losses = {f"{b} {p}": [0.5] for b in ("reference", "fast") for p in ("fp32", "bf16")}
    assert len(parity.Parity((row,), row, losses).failures) == 2
    fine = parity.Row("all", "all", None, 1e-7, 1e-7, 1e-3, 1e-3)
    assert parity.Parity((fine,), fine, losses).failures == []
    broken = {**losses, "fast bf16": [math.nan]}
    assert parity.Parity((fine,), fine, broken).failures == ["a loss is not finite"]


def test_what_cannot_be_compared_is_refused(things):
    model, tokenizer, data = things()
    with pytest.raises(BitFitError, match="steps must be at least 1, not 0"):
        parity.compare(model, tokenizer, data, SMALL, steps=0)
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(True)
    with pytest.raises(
        BitFitError, match=r"'fast' cannot train this model: the weight of .* trains"
    ):
        parity.compare(model, tokenizer, data, SMALL, steps=1)
