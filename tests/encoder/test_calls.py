"""However a patched model is called, it returns what it returned before."""

import copy
import io
import pickle

import pytest
import torch
import transformers

import bitfit_fast
from bitfit_fast import patch_encoder, select, unpatch
from bitfit_fast.arena import Arena
from bitfit_fast.encoder import LENGTHS, for_model
from bitfit_fast.encoder.run import Run
from bitfit_fast.packing import Packing

TOKEN = "ForTokenClassification"


@pytest.fixture
def same(case, measure, as_exact, to_double, key_biases, runs_as_one):
    """Compare a call with other inputs, and see whether the layers ran as one operation."""

    def check(change, family="bert", head="ForSequenceClassification", as_one=True, **changes):
        model = case(family, head, **changes).model
        select(model)
        inputs = change(dict(case(family, head, **changes).inputs), model)
        exact, pytorch = measure(*to_double(model, inputs)), measure(model, inputs)
        patch_encoder(model, precision="fp32")
        found = measure(model, inputs)
        assert bool(runs_as_one) == as_one
        wanted = set(exact) - key_biases(model)
        assert set(found) == wanted
        as_exact(found, pytorch, exact)

    return check


def padded_left(inputs, model):
    inputs["input_ids"] = inputs["input_ids"].flip(1)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs


def with_holes(inputs, model):
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, 3] = 0
    return inputs


def without_any_token(inputs, model):
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][2] = 0
    return inputs


def as_embeddings(inputs, model):
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    return inputs


def square_mask(inputs, model):
    inputs["attention_mask"] = inputs["attention_mask"][:, None, :, None].bool() & (
        inputs["attention_mask"][:, None, None, :].bool()
    )
    inputs["attention_mask"] |= torch.eye(16).bool()
    return inputs


@pytest.mark.parametrize(
    "change", [padded_left, with_holes, without_any_token, as_embeddings, square_mask]
)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_cannot_be_packed_runs_layer_by_layer(change, family, same):
    same(change, family, TOKEN, as_one=False)


@pytest.mark.parametrize("field", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize("asked_before", [False, True])
def test_inner_states_are_returned_where_asked_for(
    asked_before, field, family, build, batch, runs_as_one
):
    model = build(family, attn_implementation="eager").eval()
    inputs = batch(model) | {field: True}
    name = {"output_hidden_states": "hidden_states", "output_attentions": "attentions"}[field]
    twin = copy.deepcopy(model)
    expected = model(**inputs)
    # a model that was asked before its patching keeps hooks of transformers on its layers
    model = model if asked_before else twin
    select(model)
    patch_encoder(model, precision="fp32")
    model(**batch(model))
    found = model(**inputs)
    assert len(found[name]) == len(expected[name])
    for ours, theirs in zip(found[name], expected[name]):
        torch.testing.assert_close(ours, theirs)
    setattr(model.config, field, True)
    assert len(model(**batch(model))[name]) == len(expected[name])
    assert len(runs_as_one) == 1
    unpatch(model)
    patch_encoder(model, precision="fp32")


def with_positions(inputs, model):
    inputs["position_ids"] = torch.arange(16).flip(0).expand(6, -1) + 2
    return inputs


def with_one_row_of_positions(inputs, model):
    inputs["position_ids"] = torch.arange(2, 18)[None]
    return inputs


def with_types(inputs, model):
    inputs["token_type_ids"] = (torch.arange(16) > 5).long().expand(6, -1)
    return inputs


def without_mask(inputs, model):
    del inputs["attention_mask"]
    return inputs


def with_ones(inputs, model):
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return inputs


def with_none(inputs, model):
    return inputs | {"attention_mask": None, "token_type_ids": None, "inputs_embeds": None}


def as_float(inputs, model):
    inputs["attention_mask"] = inputs["attention_mask"].float()
    return inputs


def as_bool(inputs, model):
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    return inputs


def of_one(inputs, model):
    return {name: t[2:3] for name, t in inputs.items()}


def unchanged(inputs, model):
    return inputs


@pytest.mark.parametrize(
    "change",
    [
        with_positions, with_one_row_of_positions, with_types, without_mask, with_ones, with_none,
        as_float, as_bool, of_one,
    ],
)  # fmt: skip
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_inputs_of_every_kind(change, attention, same):
    same(change, "bert", TOKEN, attn_implementation=attention)


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
@pytest.mark.parametrize("change", [with_positions, without_mask, of_one])
def test_inputs_of_families_whose_positions_count_from_the_padding(change, family, same):
    same(change, family)


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "vit"])
def test_attention_of_the_model_may_be_eager(family, same, float64_softmax):
    same(unchanged, family, attn_implementation="eager")


@pytest.mark.parametrize("padded", [False, True])
def test_questions_run_as_one_without_padding(padded, same):
    # what stands at padding takes part in the softmax over positions
    lengths = (12, 9, 12) if padded else (12, 12, 12)
    same(unchanged, "bert", "ForQuestionAnswering", as_one=not padded, lengths=lengths)


def test_images_of_another_size_run_layer_by_layer(build, runs_as_one):
    model = build("vit").eval()
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = model(pixels, interpolate_pos_encoding=True).logits
    select(model)
    patch_encoder(model, precision="fp32")
    found = model(pixels, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(found, expected)
    assert not runs_as_one


def test_arguments_may_be_given_by_position(build, batch, runs_as_one):
    model = build("bert", "Model").eval()
    inputs = batch(model)
    types = torch.ones_like(inputs["input_ids"])
    expected = [model(**inputs), model(**inputs, token_type_ids=types)]
    select(model)
    patch_encoder(model, precision="fp32")
    found = [model(*inputs.values()), model(*inputs.values(), types)]
    assert len(runs_as_one) == 1
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            ours.last_hidden_state[real], theirs.last_hidden_state[real], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", ["bert", "mpnet", "distilbert", "vit"])
def test_outputs_may_be_tuples(family, build, batch, runs_as_one):
    model = build(family).eval()
    inputs = batch(model)
    expected = model(**inputs, return_dict=False)
    select(model)
    patch_encoder(model, precision="fp32")
    found = model(**inputs, return_dict=False)
    assert type(found) is tuple and len(found) == len(expected) and runs_as_one
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "vit", "distilbert"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_may_be_on(family, reentrant, case, measure, as_exact):
    each = case(family)
    each.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    patch_encoder(each.model, precision="fp32")
    as_exact(measure(each.model, each.inputs), each.fp32, each.exact)


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("family", ["bert", "distilbert", "vit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copy_is_a_model_of_its_own(family, precision, copied, patched, batch, measure):
    model = patched(family, precision=precision)
    inputs = batch(model)
    found = measure(model, inputs)
    encoder = bitfit_fast.encoder.encoder_of(model)
    encoder.write_to(Arena({n: p for n, p in model.named_parameters() if p.requires_grad}))
    twin = copied(model)
    encoder.write_to(None)
    assert type(twin) is type(model) and type(twin.base_model) is type(model.base_model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    model.zero_grad()
    of_twin = measure(twin, inputs)
    assert all(p.grad is None for p in model.parameters())
    assert set(of_twin) == set(found)
    assert all(torch.equal(of_twin[name], found[name]) for name in found)
    unpatch(twin)
    assert bitfit_fast.encoder.encoder_of(twin) is None
    assert bitfit_fast.encoder.encoder_of(model) is not None
    assert type(twin.base_model) is not type(model.base_model)
    model(**inputs).loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_refused_where_a_weight_was_changed_before(copied, patched, batch):
    model = patched("bert", precision="bf16")
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight.mul_(1.5)
    with pytest.raises(bitfit_fast.BitFitError, match=r"dense\.weight was changed"):
        copied(model)(**batch(model))


def test_a_retained_graph_gives_the_same_gradients_again(patched, batch, memory, backend):
    model = patched("bert", memory=memory, hidden_dropout_prob=0.1)
    loss = model(**batch(model)).loss
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, gradient in first.items():
        assert torch.equal(model.get_parameter(name).grad, 2 * gradient), name


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_a_retained_graph_does_so_with_kernels_that_work_in_place(patched, batch, memory, backend):
    test_a_retained_graph_gives_the_same_gradients_again(patched, batch, memory, backend)


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_two_batches_add_their_gradients_up_in_any_order(family, patched, batch, measure):
    model = patched(family)
    batches = [batch(model, (16, 7, 1, 12, 4, 16), seed) for seed in (1, 2)]
    parts = [measure(model, inputs) for inputs in batches]
    model.zero_grad(set_to_none=True)
    losses = [model(**inputs).loss for inputs in batches]  # both graphs are there at once
    for loss in losses:
        loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, parts[0][name] + parts[1][name], rtol=1e-4, atol=1e-6
            )


def test_a_second_derivative_is_refused(patched, batch):
    model = patched("bert")
    loss = model(**batch(model)).loss
    with pytest.raises(RuntimeError, match="unpatch the model for create_graph=True"):
        loss.backward(create_graph=True)


def test_a_functional_call_differentiates_the_biases_it_is_given(case, measure, as_exact):
    each = case("bert")
    model = each.model
    patch_encoder(model, precision="fp32")
    given = {
        name: p.detach().clone().requires_grad_()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    with torch.no_grad():
        for name in given:
            model.get_parameter(name).zero_()
    out = torch.func.functional_call(model, given, kwargs=each.inputs)
    found = dict(zip(given, torch.autograd.grad(out.loss, list(given.values()))))
    as_exact(found, each.fp32, each.exact)


def test_function_transforms_are_refused_and_not_answered_wrongly(patched, batch):
    model = patched("bert")
    inputs = batch(model)
    given = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(biases):
        return torch.func.functional_call(model, biases, kwargs=inputs).loss

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss)(given)


@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_around_the_call_costs_no_more_accuracy(
    family, precision, case, measure, as_exact
):
    each = case(family)
    patch_encoder(each.model, precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(each.model, each.inputs)
        each.model.zero_grad(set_to_none=True)
        loss = each.model(**each.inputs).loss
    as_exact(found, each.bf16, each.exact, roundings=2, eps=2.0**-7)
    loss.backward()  # outside of autocast
    for name, parameter in each.model.named_parameters():
        if name in found:
            assert parameter.grad.dtype == torch.float32
            assert torch.equal(parameter.grad, found[name]), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_without_gradients_the_logits_are_the_same(mode, family, patched, batch):
    model = patched(family)
    inputs = batch(model)
    expected = model(**inputs).logits
    with mode():
        found = model(**inputs).logits
    assert torch.equal(found, expected) and not found.requires_grad


def test_training_and_evaluation_by_turns(patched, batch, measure):
    model = patched("bert")
    inputs = batch(model)
    first = measure(model, inputs)
    with torch.no_grad():
        model.eval()(**inputs)
    assert all(torch.equal(t, first[n]) for n, t in measure(model.train(), inputs).items())


def test_a_failed_call_leaves_nothing_behind(patched, batch, measure):
    model = patched("bert")
    inputs = batch(model)
    expected = measure(model, inputs)
    with pytest.raises(IndexError):
        model(**inputs | {"input_ids": inputs["input_ids"] + 1000})
    found = measure(model, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_compiler_gives_the_same(family, case, measure, as_exact):
    each = case(family)
    patch_encoder(each.model, precision="fp32")
    torch._dynamo.reset()
    compiled = torch.compile(each.model, backend="aot_eager")
    as_exact(measure(each.model, each.inputs, compiled), each.fp32, each.exact)


def test_weights_in_bf16_are_not_copied(build, batch, measure):
    model = build("bert")
    select(model)
    for layer in model.bert.encoder.layer:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.bfloat16()
    install = bitfit_fast.encoder.install(model, "bf16")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for layer in install.stack.layers:
        for product in (layer.qkv, layer.out, layer.up, layer.down):
            assert product.weight.untyped_storage().data_ptr() in own
    assert len(measure(model, batch(model))) > 10


@pytest.mark.parametrize("masked", [True, False])
def test_a_head_of_ones_own_sees_every_token(masked, build, batch):
    class MeanForSequenceClassification(transformers.BertForSequenceClassification):
        def forward(self, input_ids, attention_mask, labels=None):
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask if masked else torch.ones_like(attention_mask)
            share = weight / weight.sum(1, keepdim=True)
            return self.classifier((hidden * share[..., None]).sum(1))

    model = build()
    model.__class__ = MeanForSequenceClassification
    inputs = batch(model)
    expected = model(**inputs)
    bitfit_fast.select(model)
    done = bitfit_fast.patch_encoder(model, precision="fp32")
    assert not done.first_only and "may read padding" in str(done)
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_head_of_ones_own_may_promise_not_to_read_padding(build, batch, runs_as_one):
    class OwnForSequenceClassification(transformers.BertForSequenceClassification):
        pass

    for promised in (None, False):
        model = build()
        model.__class__ = OwnForSequenceClassification
        inputs = batch(model)
        expected = model(**inputs).logits
        bitfit_fast.select(model)
        patch_encoder(model, precision="fp32", reads_padding=promised)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        assert bool(runs_as_one) == (promised is False)


@pytest.mark.parametrize("family", ["bert", "electra", "distilbert"])
def test_the_base_model_alone_gives_every_token(family, build, batch, runs_as_one):
    model = build(family)
    inputs = batch(model)
    labels = inputs.pop("labels")
    expected, logits = model.base_model(**inputs).last_hidden_state, model(**inputs).logits
    bitfit_fast.select(model)
    assert patch_encoder(model, precision="fp32").first_only
    found = model.base_model(**inputs).last_hidden_state
    assert found.shape == expected.shape and not runs_as_one
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # nor does an error in the head leave it taken for running
    with pytest.raises(TypeError):
        model(**inputs, labels=labels, unheard_of=object, input_ids=None)
    assert model.base_model(**inputs).last_hidden_state.shape == expected.shape
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-5, atol=1e-5)
    assert runs_as_one
    unpatch(model)
    assert type(model).__mro__[1].__module__.startswith("transformers.")


def test_a_tensor_that_the_base_model_does_not_know_is_no_error(build, batch, runs_as_one):
    model = build(head="ForQuestionAnswering")
    inputs = batch(model)
    inputs["labels"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64)
    expected = model(**inputs).start_logits
    bitfit_fast.select(model)
    patch_encoder(model, precision="fp32", reads_padding=False)
    torch.testing.assert_close(model(**inputs).start_logits, expected, rtol=1e-5, atol=1e-5)
    assert not runs_as_one


def test_lengths_that_cannot_be_are_not_believed(patched, batch, monkeypatch):
    model = patched()
    inputs = batch(model)
    right = model(**inputs).logits
    lengths = inputs["attention_mask"].sum(1).tolist()
    for wrong in (lengths[1:], [0, *lengths[1:]], [99, *lengths[1:]]):
        given = for_model({**inputs, LENGTHS: tuple(wrong)})
        assert torch.equal(model(**given).logits, right)
    # those that can be are, and the mask is not looked at
    monkeypatch.setattr(Packing, "of_mask", None)
    assert torch.equal(model(**for_model({**inputs, LENGTHS: tuple(lengths)})).logits, right)
    # the caller's mask, which may be another batch's next time, knows nothing of them
    assert not hasattr(inputs["attention_mask"], LENGTHS)


def test_what_is_kept_goes_with_the_backward_pass(patched, batch, monkeypatch):
    runs, begin = [], Run.__init__

    def begun(self, *arguments):
        runs.append(self)
        begin(self, *arguments)

    monkeypatch.setattr(Run, "__init__", begun)
    model = patched(terms="output-layernorm")
    loss = model(**batch(model)).loss
    loss.backward()
    assert runs[0].kept == [] and runs[0].biases == ()
