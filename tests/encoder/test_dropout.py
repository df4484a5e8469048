"""Dropout of patched encoders: the same masks as in a padded model that is told them."""

import copy

import pytest
import torch
from torch.nn import functional as F

from bitfit_fast import patch_encoder, select
from bitfit_fast.encoder.depth import END, INPUT, MIDDLE, QKV, place
from bitfit_fast.encoder.run import SEEDS_APART, Run
from bitfit_fast.ops.dropout import kept, new_seed
from bitfit_fast.packing import Packing

TOKEN = "ForTokenClassification"
BACKENDS = pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
#: Which dropouts of a layer a family has, as they come.
PLACES = {"bert": (QKV, MIDDLE, END), "distilbert": (QKV, END), "vit": (QKV, MIDDLE, END)}
LAYERS = 3


class Masks:
    """Stands in for `F.dropout` in a padded model with eager attention.

    The dropouts of embeddings and layers get the masks of a packed, patched one, by their place.
    All others are PyTorch's.
    """

    def __init__(self, packing, first_only, slots):
        self.packing, self.first_only = packing, first_only
        self.slots, self.base, self.pytorch = iter(slots), None, F.dropout

    def rows(self, at):
        """Return the packed rows of a dropout, and where they are in the padded batch."""
        if self.first_only and at >= place(LAYERS - 1, 0):
            count = len(self.packing.lengths)
            return count, torch.arange(count) * self.packing.padded
        return self.packing.tokens, self.packing.rows

    def __call__(self, x, p=0.5, training=True, inplace=False):
        if not training or not p:
            return x
        if x.ndim == 2:
            return self.pytorch(x, p, training, inplace)
        at = next(self.slots)
        if self.base is None:
            self.base = new_seed(x.device)
        seed = self.base + at * 2**40
        count, places = self.rows(at)
        keep = torch.zeros(
            x.shape[0] * self.packing.padded, *x.shape[1:2] * (x.ndim == 4), x.shape[-1]
        )
        if x.ndim == 4:  # [B, H, S, S]: a row for each token and head
            heads = x.shape[1]
            mask = kept(count * heads, x.shape[-1], p, seed).view(count, heads, -1)
            keep[places] = mask.float()
            keep = keep.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        else:
            keep[places] = kept(count, x.shape[-1], p, seed).float()
            keep = keep.view(x.shape)
        return torch.where(keep.bool(), x / (1 - p), 0)


@pytest.fixture
def same_masks(monkeypatch, float64_softmax):
    """Let the next step of a padded model drop what the patched one drops."""

    def arrange(family, model, inputs, first_only, hidden, attention):
        rates = {QKV: attention, MIDDLE: hidden, END: hidden}
        slots = [INPUT] * (hidden > 0)
        for layer in range(LAYERS):
            slots += [place(layer, part) for part in PLACES[family] if rates[part]]
        if "input_ids" in inputs:
            packing = Packing.of_mask(inputs["attention_mask"])
        else:
            packing = Packing.uniform(6, 17, torch.device("cpu"))
        monkeypatch.setattr(F, "dropout", Masks(packing, first_only, slots))

    yield arrange
    monkeypatch.undo()


def rates_of(family, hidden, attention):
    if family == "distilbert":
        return {"dropout": hidden, "attention_dropout": attention, "seq_classif_dropout": 0.3}
    return {"hidden_dropout_prob": hidden, "attention_probs_dropout_prob": attention}


@BACKENDS
@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize(("hidden", "attention"), [(0.1, 0.2), (0.0, 0.2), (0.2, 0.0)])
def test_the_same_masks_give_the_same_gradients(
    family, hidden, attention, backend, build, batch, measure, to_double, as_exact, key_biases,
    same_masks, monkeypatch,
):  # fmt: skip
    model = build(family, attn_implementation="eager", **rates_of(family, hidden, attention))
    select(model)
    inputs = batch(model)
    results = []
    for each, given in ((model, inputs), to_double(model, inputs)):
        same_masks(family, each, given, True, hidden, attention)
        results.append(measure(each, given))
        monkeypatch.setattr(F, "dropout", F.dropout.pytorch)
    pytorch, exact = results
    assert patch_encoder(model, precision="fp32").first_only
    found = measure(model, inputs)
    assert set(found) == set(exact) - key_biases(model)
    as_exact(found, pytorch, exact)


@BACKENDS
@pytest.mark.parametrize("memory", ["fast", "lower", "lowest"])
@pytest.mark.parametrize("terms", ["embedding-layernorm", "value", "all"])
def test_masks_are_the_same_in_every_memory_mode_and_for_every_choice(
    terms, memory, build, batch, measure, to_double, as_exact, same_masks, monkeypatch
):
    rates = rates_of("bert", 0.1, 0.2)
    model = build("bert", "ForTokenClassification", attn_implementation="eager", **rates)
    model.dropout.p = 0.0  # the head's is drawn for padding, too
    selection = select(model, terms)
    inputs = batch(model)
    results = []
    for each, given in ((model, inputs), to_double(model, inputs)):
        same_masks("bert", each, given, False, 0.1, 0.2)
        results.append(measure(each, given))
        monkeypatch.setattr(F, "dropout", F.dropout.pytorch)
    done = patch_encoder(model, precision="fp32", memory=memory)
    found = measure(model, inputs)
    assert set(found) == {"loss", *selection.names} - set(done.no_gradient)
    as_exact(found, *results)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_as_much_is_dropped_as_asked_for(p):
    for number in range(9):
        seed = torch.tensor([77]) + number * SEEDS_APART
        keep = kept(500, 800, p, seed)
        assert abs(keep.double().mean() - (1 - p)) < 0.004
        assert abs(keep.double().mean(0) - (1 - p)).max() < 5 * (p * (1 - p) / 500) ** 0.5


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit"])
def test_every_step_drops_anew_and_a_seed_brings_it_back(family, build, batch):
    model = build(family, **rates_of(family, 0.2, 0.2))
    select(model)
    patch_encoder(model, precision="fp32")
    inputs = batch(model)
    torch.manual_seed(5)
    losses = [model(**inputs).loss.item() for _ in range(3)]
    assert len(set(losses)) == 3
    torch.manual_seed(5)
    assert [model(**inputs).loss.item() for _ in range(3)] == losses
    model.eval()
    assert len({model(**inputs).loss.item() for _ in range(3)}) == 1


def test_seeds_of_one_pass_are_apart_and_those_of_two_differ(build, batch, monkeypatch):
    seen = []
    drop = Run.drop

    def spy(self, at):
        seen.append((at, drop(self, at)[1].item()))
        return drop(self, at)

    monkeypatch.setattr(Run, "drop", spy)
    model = build("bert", **rates_of("bert", 0.1, 0.2))
    select(model)
    patch_encoder(model, precision="fp32")
    passes = []
    for _ in range(2):
        seen.clear()
        model(**batch(model)).loss.backward()
        passes.append(dict(seen))
        # the backward pass draws the same, and that of the embeddings, too
        assert len(set(seen)) == 10 and len(seen) == 19
    for seeds in passes:
        assert [seeds[at] - seeds[INPUT] for at in seeds] == [at * 2**40 for at in seeds]
    assert passes[0][INPUT] != passes[1][INPUT]


def test_rates_are_asked_for_at_each_step(build, batch):
    model = build("bert", **rates_of("bert", 0.2, 0.2))
    select(model)
    patch_encoder(model, precision="fp32")
    inputs = batch(model)
    torch.manual_seed(0)
    first = model(**inputs).loss
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = model(**inputs).loss
    assert first != plain
    assert torch.equal(copy.deepcopy(model).eval()(**inputs).loss, plain)


@BACKENDS
def test_gradients_are_as_noisy_as_pytorchs(backend, build, batch, key_biases):
    """Over many steps they have the same mean and spread, and one tells nothing of the next."""
    draws, found = 200, []
    for patched in (False, True):
        model = build("bert", **rates_of("bert", 0.1, 0.1))
        inputs, zero = batch(model), key_biases(model)
        select(model)
        if patched:
            patch_encoder(model, precision="fp32")
        parameters = [p for n, p in model.named_parameters() if p.requires_grad and n not in zero]
        torch.manual_seed(1)
        gradients = []
        for _ in range(draws):
            model.zero_grad()
            model(**inputs).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        found.append(torch.stack(gradients).double())
    noise = [g - g.mean(0) for g in found]
    plain, ours = (n.square().sum() / (draws - 1) for n in noise)
    assert ours / plain == pytest.approx(1, abs=0.1)
    between = (found[1].mean(0) - found[0].mean(0)).square().sum()
    # 1 on average under one law; means that differ add the square of that
    assert between / ((plain + ours) / draws) < 2
    for apart in (1, 2, 3):
        together = (noise[1][apart:] * noise[1][:-apart]).sum() / (draws - 1)
        assert abs(together / ours) < 0.1


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_evaluation_is_that_of_the_model_unpatched(family, build, batch, to_double):
    model = build(family, **rates_of(family, 0.2, 0.2)).eval()
    inputs = batch(model)
    wide, given = to_double(model, inputs)
    exact = wide(**given).logits
    expected = model(**inputs).logits
    select(model)
    patch_encoder(model, precision="fp32")
    with torch.no_grad():
        found = model(**inputs).logits
    error = (found - exact).abs().max()
    assert error <= 2 * (expected - exact).abs().max() + 16 * 2.0**-23 * exact.abs().max()


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_the_head_of_tokens_drops_by_a_seed(backend, build, monkeypatch):
    """What it drops going forward it drops going back, as often as asked for, and keeps no mask."""
    rate, rows = 0.25, 600
    model = build("bert", TOKEN, **rates_of("bert", rate, 0.0))
    select(model)
    patch_encoder(model, precision="fp32")
    head, pytorchs = model.dropout, F.dropout
    monkeypatch.setattr(F, "dropout", lambda *args: pytest.fail("a mask was drawn by PyTorch"))
    x = torch.ones(rows, 3, 48, requires_grad=True)
    torch.manual_seed(0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = head(x)
    (y * y).sum().backward()
    assert sum(t.numel() for t in saved) == 1
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
    # the same elements, by the chain rule
    assert torch.allclose(x.grad, 2 * y / (1 - rate))
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - rate) < 5 * (rate * (1 - rate) / y.numel()) ** 0.5
    assert not torch.equal(head(x), y)
    head.eval()
    monkeypatch.setattr(F, "dropout", pytorchs)
    assert torch.equal(head(x), x)


def test_few_elements_of_a_head_and_hooked_ones_are_pytorchs(build, batch, monkeypatch):
    drawn = []

    def spy(x, p=0.5, training=True, inplace=False):
        drawn.append(x.shape)
        return x

    monkeypatch.setattr(F, "dropout", spy)
    model = build("bert", TOKEN, **rates_of("bert", 0.1, 0.0))
    model.dropout.register_forward_hook(lambda *args: None)
    select(model)
    patch_encoder(model, precision="fp32")
    assert type(model.dropout) is torch.nn.Dropout
    model = build("bert", **rates_of("bert", 0.1, 0.0))
    select(model)
    patch_encoder(model, precision="fp32")
    inputs = batch(model)
    model(**inputs)
    assert drawn == [torch.Size((len(inputs["labels"]), 48))]
