"""Models without a row: speech, contrastive vision, RMSNorm; and biases that are zero."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

from bitfit_fast import BitFitError, modules, patch, select, unpatch
from bitfit_fast.models.families import biases

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
IMAGE = {"image_size": 16, "patch_size": 8}


def clip():
    text = SMALL | {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=text | {"bos_token_id": 1, "pad_token_id": 0, "projection_dim": 16},
        vision_config=SMALL | IMAGE | {"projection_dim": 16},
        projection_dim=16,
    )
    ids = torch.randint(5, 64, (3, 9))
    ids[:, -1] = 2
    inputs = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 16, 16), "return_loss": True}
    return transformers.CLIPModel(config), inputs


def clip_vision():
    config = transformers.CLIPVisionConfig(**SMALL | IMAGE)
    return transformers.CLIPVisionModel(config), {"pixel_values": torch.randn(3, 3, 16, 16)}


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=10, max_target_positions=12, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, init_std=0.2, dropout=0.0,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    inputs = {"input_features": torch.randn(2, 8, 20), "labels": torch.randint(3, 64, (2, 6))}
    return model, inputs


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **SMALL, vocab_size=32, conv_dim=(16, 16), conv_kernel=(5, 3), conv_stride=(4, 2),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0, layerdrop=0.0, classifier_proj_size=16, num_labels=3,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    return model, {"input_values": torch.randn(3, 200), "labels": torch.tensor([0, 2, 1])}


def llama():
    config = transformers.LlamaConfig(
        **SMALL, vocab_size=64, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
        max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=3,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    inputs = {"input_ids": torch.randint(5, 64, (3, 9)), "labels": torch.tensor([0, 2, 1])}
    return model, inputs


MODELS = [clip, clip_vision, whisper, wav2vec2, llama]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def other(request, perturb):
    torch.manual_seed(0)
    model, inputs = request.param()
    if request.param is not llama:  # whose biases stay as they are made, at zero
        perturb(model)
    return model.eval(), inputs


def gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    loss = getattr(out, "loss", None)
    loss = out.pooler_output.square().sum() if loss is None else loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | grads


def wide(inputs):
    return {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for name, t in inputs.items()
    }


@pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")
def test_every_bias_has_the_same_gradient(other, as_exact, float64_softmax):
    model, inputs = other
    twin = copy.deepcopy(model).double()
    for each in (model, twin):
        select(each)
    pytorch, exact = gradients(model, inputs), gradients(twin, wide(inputs))
    done = patch(model)
    assert done.fused == 0 and done.no_gradient == ()
    assert done.replaced["Linear"] >= 12
    found = gradients(model, inputs)
    assert found.keys() == exact.keys()
    trained = {bias.name for bias in biases(model)} & exact.keys()
    assert len(trained) >= 14
    largest = max(exact[name].abs().max() for name in trained)
    zero = {n for n in trained if exact[n].abs().max() < 1e-6 * largest}
    # only what the softmax does not see: a key's bias, where the row of no family says so
    assert all("k_proj" in name for name in zero)
    for name in zero:
        assert found.pop(name).abs().max() < 1e-5 * largest
    as_exact(found, pytorch, exact)
    unpatch(model)
    again = gradients(model, inputs)
    assert all(torch.equal(again[name], pytorch[name]) for name in pytorch)


def test_a_parametrized_convolution_is_left_alone():
    torch.manual_seed(0)
    model, _ = wav2vec2()
    conv = model.wav2vec2.encoder.pos_conv_embed.conv
    assert parametrize.is_parametrized(conv)
    kind = type(conv)
    select(model)
    done = patch(model)
    assert type(conv) is kind and parametrize.is_parametrized(conv)
    assert done.replaced == {"LayerNorm": 6, "Linear": 13}
    assert not any("conv" in name for name in done.left)


def test_rms_norms_are_left_without_a_word():
    torch.manual_seed(0)
    model, inputs = llama()
    select(model)
    done = patch(model)
    assert done.replaced == {"Linear": 14}
    assert done.left == {}
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert len(norms) == 5
    with torch.no_grad():
        model(**inputs)


def test_biases_that_begin_at_zero_train():
    torch.manual_seed(0)
    model, inputs = llama()
    selection = select(model)
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("_proj.bias"))
    patch(model)
    parameters = [model.get_parameter(name) for name in selection.names]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append(gradients(model, inputs)["loss"].item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    moved = [n for n, p in model.named_parameters() if n.endswith("_proj.bias") and p.any()]
    assert len(moved) == 14


def test_a_model_without_biases_has_nothing_to_train_and_nothing_to_lose():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SMALL, vocab_size=64, num_key_value_heads=2, pad_token_id=0, num_labels=3
    )
    model = transformers.LlamaForSequenceClassification(config).eval()
    with pytest.raises(BitFitError, match="no bias terms"):
        select(model)
    ids = torch.randint(5, 64, (2, 5))
    model.requires_grad_(False)
    expected = model(input_ids=ids).logits
    patch(model)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(isinstance(m, modules.Linear) for m in linear)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_a_decoder_with_cross_attention_gives_the_same_gradients(perturb):
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=20, add_cross_attention=True
    )
    torch.manual_seed(0)
    model = perturb(transformers.GPT2LMHeadModel(config)).eval()
    select(model, head=False)
    ids, memory = torch.randint(0, 64, (2, 7)), torch.randn(2, 5, 32)

    def gradients():
        model.zero_grad()
        model(ids, encoder_hidden_states=memory, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    patch(model)
    found = gradients()
    assert found.keys() == expected.keys() and any("cross" in name for name in found)
    size = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * size.item())
