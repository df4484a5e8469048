"""Methods of PEFT's: they compute what PEFT computes, and say so where it is missing."""

from __future__ import annotations

import inspect
import sys

import peft
import pytest
import torch

from bitfit_fast import BitFitError
from bitfit_fast.methods import prepare

IDS = torch.tensor([[1, 5, 9, 12, 2], [1, 7, 2, 0, 0]])
TYPES = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
THROUGH_PEFT = ["lora", "ia3", "prefix-tuning", "prompt-tuning"]


def test_lora_computes_what_peft_does(build, move, logits):
    model = build()
    prepare(model, "lora", rank=4, alpha=12.0)
    move(model)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["query", "value"])
    theirs = peft.get_peft_model(build(), config)
    ours = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    head = dict(model.named_parameters())
    state = {f"base_model.model.{n}": p for n, p in ours.items()}
    state |= {f"base_model.model.{n}": head[n] for n in ("classifier.weight", "classifier.bias")}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(logits(model), logits(theirs))
    assert len(ours) == 2 * 2 * 2


def test_prefixes_are_what_peft_makes_of_them(build, move, logits):
    model = build()
    prepare(model, "prefix-tuning", tokens=3)
    move(model)
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    theirs = peft.get_peft_model(build(), config).eval()
    bert = theirs.base_model.bert
    forward = bert.forward
    takes = inspect.signature(forward).parameters

    # peft knows the argument by one name alone
    def called(*args, past_key_values=None, **options):
        name = "cache" if "cache" in takes else "past_key_values"
        return forward(*args, **{name: past_key_values}, **options)

    bert.forward = called
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(
            model.bert.peft_prompt.embedding.weight
        )
        for ours, other in zip(
            model.classifier.parameters(), theirs.base_model.classifier.parameters()
        ):
            other.copy_(ours)
        wrapped = theirs.base_model.classifier.modules_to_save.default
        for ours, other in zip(model.classifier.parameters(), wrapped.parameters()):
            other.copy_(ours)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)


def test_a_prompt_stands_before_the_tokens_and_the_pooler_reads_the_first_token(build, move):
    model = build()
    prepare(model, "prompt-tuning", tokens=3)
    move(model)
    plain = build()
    prompt = model.bert.peft_prompt.embedding.weight.expand(2, 3, 32)
    embeddings = torch.cat((prompt, plain.bert.embeddings.word_embeddings(IDS)), 1)
    front = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        hidden = plain.bert(
            inputs_embeds=embeddings,
            attention_mask=torch.cat((front + 1, BATCH["attention_mask"]), 1),
            token_type_ids=torch.cat((front, TYPES), 1),
        ).last_hidden_state[:, 3:]
        expected = model.classifier(plain.bert.pooler(hidden))
        found = model(**BATCH, token_type_ids=TYPES).logits
    torch.testing.assert_close(found, expected)


def test_a_prompt_begins_as_words(build):
    model = build()
    prepare(model, "prompt-tuning", tokens=5)
    words = model.bert.embeddings.word_embeddings.weight
    for vector in model.bert.peft_prompt.embedding.weight:
        assert (words == vector).all(1).any()


def test_ia3_scales_keys_values_and_the_feed_forward_part(build):
    model = build()
    selection = prepare(model, "ia3")
    assert selection.counts["ia3"] == 2 * (32 + 32 + 64)
    before = build()
    with torch.no_grad():
        layer, plain = model.bert.encoder.layer[0], before.bert.encoder.layer[0]
        layer.output.dense.ia3_l["default"].fill_(2.0)
        x = torch.randn(3, 64)
        torch.testing.assert_close(layer.output.dense(x), plain.output.dense(2 * x))
        layer.attention.self.key.ia3_l["default"].fill_(2.0)
        x = torch.randn(3, 32)
        key = plain.attention.self.key(x)
        torch.testing.assert_close(layer.attention.self.key(x), 2 * key)


@pytest.mark.parametrize("method", THROUGH_PEFT)
def test_without_peft_a_sentence_says_what_to_install(build, monkeypatch, method):
    model = build()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BitFitError) as info:
        prepare(model, method)
    assert str(info.value) == f"method '{method}' needs peft: pip install 'bitfit_fast[peft]'"
    assert all(p.requires_grad for p in model.parameters())
    assert prepare(model, "adapters").method == "adapters"
