"""Adapters: where they stand, how they begin, that LayerNorms train with them."""

from __future__ import annotations

import pytest
import torch

from bitfit_fast.methods import prepare
from bitfit_fast.methods.adapters import SPREAD, Bottleneck

IDS = torch.tensor([[1, 5, 9, 12, 2], [1, 7, 2, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


@pytest.mark.parametrize("prefix", ["Bert", "DistilBert", "GPT2"])
def test_two_a_layer_near_the_identity(build, prefix):
    model = build(prefix)
    with torch.no_grad():
        before = model(**BATCH).logits
        selection = prepare(model, "adapters", bottleneck=8)
        after = model(**BATCH).logits
    names = [n for n, m in model.named_modules() if isinstance(m, Bottleneck)]
    assert len(names) == 4
    assert selection.counts["adapters"] == 4 * (32 * 8 + 8 + 8 * 32 + 32)
    assert 0 < (after - before).abs().max() < 1e-2 * before.abs().max()


def test_the_papers_size_in_bert_base():
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
        selection = prepare(model, "adapters")
    # 2 m d + d + m each, as the paper counts them
    assert selection.counts["adapters"] == 12 * 2 * (2 * 64 * 768 + 64 + 768)
    norms = sum(selection.counts[t] for t in ("attention-layernorm", "output-layernorm"))
    assert norms == selection.counts["layernorm-weight"] == 12 * 2 * 768


def test_it_stands_between_the_linear_layer_and_the_residual(build):
    model = build()
    prepare(model, "adapters", bottleneck=4)
    dense = model.bert.encoder.layer[0].output.dense
    with torch.no_grad():
        for parameter in dense.adapter.parameters():
            parameter.normal_()
        x = torch.randn(3, 64)
        y = x @ dense.weight.t() + dense.bias
        bottleneck = dense.adapter
        inner = torch.nn.functional.gelu(y @ bottleneck.down.weight.t() + bottleneck.down.bias)
        expected = y + inner @ bottleneck.up.weight.t() + bottleneck.up.bias
        torch.testing.assert_close(dense(x), expected)


def test_new_weights_are_small_cut_off_and_by_seed(build):
    def weights(seed):
        model = build()
        prepare(model, "adapters", seed=seed)
        return model.bert.encoder.layer[1].attention.output.dense.adapter

    one, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(one.up.weight, again.up.weight)
    assert not torch.equal(one.up.weight, other.up.weight)
    assert one.down.weight.abs().max() <= 2 * SPREAD
    assert 0.7 * SPREAD < one.down.weight.std() < SPREAD
    assert not one.up.bias.any() and not one.down.bias.any()


def test_preparing_leaves_the_generator_of_random_numbers_alone(build):
    for method in ("adapters", "lora", "prompt-tuning", "random-uniform"):
        model = build()
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        prepare(model, method)
        assert torch.equal(torch.rand(2), expected)
