"""What cannot run as one operation is refused with a sentence that says why."""

import re

import pytest
import torch
import transformers

from bitfit_fast import patch, patch_encoder, select, unpatch
from bitfit_fast.encoder import encoder_of
from bitfit_fast.errors import BitFitError

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 30,
    "max_position_embeddings": 20,
}
OTHERS = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 30}),
    "albert": ("Albert", TINY | {"embedding_size": 16}),
    "deberta": ("Deberta", TINY),
    "deberta-v2": ("DebertaV2", TINY),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_outside_the_table(kind):
    prefix, options = OTHERS[kind]
    config = getattr(transformers, f"{prefix}Config")(**options)
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(config)
    select(model)
    with pytest.raises(BitFitError, match=f"it is of type '{kind}', and the table has .*vit"):
        patch_encoder(model)


def test_a_module_that_is_no_model_of_transformers():
    with pytest.raises(BitFitError, match="cannot run as one operation: it is of type 'None'"):
        patch_encoder(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("field", ["is_decoder", "add_cross_attention"])
def test_a_decoder(field, build):
    model = build("bert")
    setattr(model.config, field, True)
    with pytest.raises(BitFitError, match="it is a decoder"):
        patch_encoder(model)


def test_relative_positions(build):
    model = build("bert")
    model.config.position_embedding_type = "relative_key"
    with pytest.raises(BitFitError, match="positions are 'relative_key', not 'absolute'"):
        patch_encoder(model)


LAYER = "encoder.layer.1."


def train_weight(model):
    model.get_submodule(f"bert.{LAYER}output.dense").weight.requires_grad_()


def train_scale(model):
    model.get_submodule(f"bert.{LAYER}output.LayerNorm").weight.requires_grad_()


def hook(model):
    model.get_submodule(f"bert.{LAYER}attention").register_forward_hook(lambda *args: None)


def hook_backward(model):
    model.get_submodule(f"bert.{LAYER}output").register_full_backward_hook(lambda *args: None)


def parametrise(model):
    module = model.get_submodule(f"bert.{LAYER}output.dense")
    torch.nn.utils.parametrizations.weight_norm(module)


def replace_linear(model):
    class Other(torch.nn.Linear):
        pass

    model.get_submodule(f"bert.{LAYER}output.dense").__class__ = Other


def replace_forward(model):
    module = model.get_submodule(f"bert.{LAYER}output.dense")
    module.forward = lambda x: x


def replace_activation(model):
    model.get_submodule(f"bert.{LAYER}intermediate").intermediate_act_fn = torch.nn.Softplus()


def to_bf16(model):
    model.bfloat16()


def drop_layers(model):
    del model.bert.encoder.layer[:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (train_weight, "the weight of encoder.layer.1.output.dense trains"),
        (train_scale, "the weight of encoder.layer.1.output.LayerNorm trains"),
        (hook, "there are hooks on encoder.layer.1.attention"),
        (hook_backward, "there are hooks on encoder.layer.1.output"),
        (parametrise, "encoder.layer.1.output.dense is a Parametrized"),
        (replace_linear, "encoder.layer.1.output.dense is a Other, not a plain Linear"),
        (replace_forward, "encoder.layer.1.output.dense is a Linear"),
        (replace_activation, "its activation is Softplus"),
        (to_bf16, "the bias of .* is torch.bfloat16, not torch.float32"),
        (drop_layers, "it has no layers"),
    ],
)
def test_a_model_that_was_changed_before(change, reason, build, batch):
    model = build("bert")
    select(model)
    change(model)
    before = [type(module) for module in model.modules()]
    with pytest.raises(BitFitError, match=f"cannot run as one operation: .*{reason}") as caught:
        patch_encoder(model)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == before


def test_full_fine_tuning(build):
    with pytest.raises(BitFitError, match=r"the weight of .* trains"):
        patch_encoder(build("bert"))


def test_a_bias_of_relative_positions_that_trains(build, batch):
    model = build("mpnet")
    select(model)
    weight = model.mpnet.encoder.relative_attention_bias.weight.requires_grad_()
    with pytest.raises(BitFitError, match=r"the weight of encoder\.relative_attention_bias trains"):
        patch_encoder(model)
    weight.requires_grad_(False)
    patch_encoder(model, precision="fp32")
    weight.requires_grad_()
    with pytest.raises(BitFitError, match=r"relative_attention_bias\.weight trains now"):
        model(**batch(model))


def test_a_bias_of_relative_positions_that_changed(build, batch):
    model = build("mpnet")
    select(model)
    patch_encoder(model, precision="fp32")
    model(**batch(model))
    weight = model.mpnet.encoder.relative_attention_bias.weight
    with torch.no_grad():
        weight.mul_(2)
    said = r"mpnet\.encoder\.relative_attention_bias\.weight was changed"
    with pytest.raises(BitFitError, match=said):
        model(**batch(model))


DENSE = "bert.encoder.layer.1.output.dense"


def change_in_place(model):
    with torch.no_grad():
        model.get_submodule(DENSE).weight.mul_(2)


def load_a_state(model):
    model.load_state_dict({name: t / 2 for name, t in model.state_dict().items()})


def load_and_assign(model):
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)


def convert(model):
    model.double()


def give_other_data(model):
    weight = model.get_submodule(DENSE).weight
    weight.data = weight.data.clone()


def give_another(model):
    module = model.get_submodule(DENSE)
    module.weight = torch.nn.Parameter(module.weight.detach(), requires_grad=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "change",
    [change_in_place, load_a_state, load_and_assign, convert, give_other_data, give_another],
)
def test_a_weight_that_is_changed_afterwards(change, precision, patched, batch, measure):
    model = patched("bert", precision=precision)
    inputs = batch(model)
    model(**inputs)
    change(model)
    with pytest.raises(BitFitError, match=r"the weight bert\.encoder\S* was changed after") as e:
        model(**inputs)
    assert "\n" not in str(e.value)
    unpatch(model)
    model.float()
    patch_encoder(model, precision=precision)
    assert measure(model, inputs)["loss"] > 0


def test_a_weight_may_be_overwritten_with_itself(patched, batch, measure):
    model = patched("bert")
    inputs = batch(model)
    expected = measure(model, inputs)
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()})
    found = measure(model, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    change_in_place(model)
    with pytest.raises(BitFitError, match="was changed"):
        model(**inputs)


@pytest.mark.parametrize("name", ["dense", "LayerNorm"])
def test_a_weight_that_trains_afterwards(name, patched, batch):
    model = patched("bert")
    model.get_parameter(f"bert.encoder.layer.1.output.{name}.weight").requires_grad_()
    text = rf"the weight bert\.encoder\.layer\.1\.output\.{name}\.weight trains now.* unpatch"
    with pytest.raises(BitFitError, match=text):
        model(**batch(model))


def test_a_functional_call_with_other_weights(patched, batch):
    model = patched("bert")
    name = f"{DENSE}.weight"
    other = {name: torch.zeros_like(model.get_parameter(name))}
    with pytest.raises(BitFitError, match=re.escape(name)):
        torch.func.functional_call(model, other, kwargs=batch(model))


@pytest.mark.parametrize("first", [patch, patch_encoder])
@pytest.mark.parametrize("second", [patch, patch_encoder])
def test_patching_twice(first, second, build):
    model = build("bert")
    select(model)
    first(model)
    with pytest.raises(BitFitError, match="patched already; unpatch it first"):
        second(model)
    unpatch(model)
    second(model)


def test_a_wrapped_model(build):
    model = build("bert")
    select(model)
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        with pytest.raises(BitFitError, match="patch the model before it is wrapped in"):
            patch_encoder(wrapped)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8'; valid ones are fp32, bf16"),
        ({"memory": "none"}, "unknown memory mode 'none'; valid ones are fast, low, lower, lowest"),
    ],
)
def test_unknown_options(options, text, build):
    model = build("bert")
    select(model)
    with pytest.raises(BitFitError, match=text):
        patch_encoder(model, **options)
    assert encoder_of(model) is None
    patch_encoder(model)


def test_another_selection_needs_an_unpatched_model(patched):
    with pytest.raises(BitFitError, match="unpatch it before another selection"):
        select(patched("bert"))


@pytest.mark.parametrize(
    ("family", "positions"), [("bert", 20), ("distilbert", 20), ("roberta", 18), ("mpnet", 18)]
)
def test_a_sequence_longer_than_the_positions(build, family, positions):
    model = build(family)
    select(model)
    patch_encoder(model, precision="fp32")
    given = [torch.full((2, positions + n), 7) for n in range(2)]
    model(input_ids=given[0], attention_mask=torch.ones_like(given[0]))
    said = f"of {positions + 1} tokens is longer than the model's {positions} positions"
    with pytest.raises(BitFitError, match=said):
        model(input_ids=given[1], attention_mask=torch.ones_like(given[1]))


def test_positions_that_skip_padding_need_no_mask(build):
    model = build("roberta")
    select(model)
    ids = torch.full((2, 19), 7)
    ids[:, 12:] = model.config.pad_token_id
    expected = model(input_ids=ids).logits
    patch_encoder(model, precision="fp32")
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_parametrized_table_of_relative_positions(build):
    model = build("mpnet")
    select(model)
    table = model.mpnet.encoder.relative_attention_bias
    torch.nn.utils.parametrize.register_parametrization(table, "weight", torch.nn.Identity())
    with pytest.raises(BitFitError, match=r"encoder\.relative_attention_bias is parametrized"):
        patch_encoder(model)
