"""Modules that have no drop-in, or that stay for another reason, compute what they did."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bitfit_fast import BitFitWarning, patch, select, unpatch

from .conftest import assert_same, gradients, kinds, only_biases, replaced, rows, seeded


class Quantised(nn.Linear):
    """What a library puts in the place of `nn.Linear`: its own class, its own mathematics."""

    def forward(self, x):
        return super().forward(x).round(decimals=1)


class Adapter(nn.Module):
    """What a library wraps around a layer that it leaves frozen."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Flat(nn.LayerNorm):
    """A subclass that normalises everything."""

    def forward(self, x):
        return super().forward(x) - x.mean()


def overridden():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    forward = model[0].forward
    model[0].forward = lambda x: 3 * forward(x)
    return model


OTHERS = {
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6)),
        {"0": "it is parametrized"},
        ["1"],
    ),
    "a subclass": (
        lambda: nn.Sequential(Quantised(6, 6), nn.Linear(6, 6), Flat(6)),
        {"0": "there is no drop-in for Quantised"},
        ["1"],
    ),
    "an adapter": (
        lambda: nn.Sequential(Adapter(nn.Linear(6, 6)), nn.Linear(6, 6)),
        {"0.base_layer": "an adapter wraps it"},
        ["1"],
    ),
    "a forward of its own": (overridden, {"0": "its forward method was replaced"}, ["1"]),
    "two dimensions": (
        lambda: nn.Sequential(nn.LayerNorm((5, 6)), nn.LayerNorm(6)),
        {"0": "it normalises more than the last dimension"},
        ["1"],
    ),
    "no weight": (
        lambda: nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.LayerNorm(6)),
        {"0": "it has no weight"},
        ["1"],
    ),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6, bias=False)),
        {},
        ["0", "1"],
    ),
    "neither": (lambda: nn.Sequential(nn.Conv1d(5, 5, 1), nn.ReLU(), nn.Softmax(-1)), {}, []),
    "two dimensions of inputs": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU()), {}, ["0"]),
}


@pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")
@pytest.mark.parametrize("case", OTHERS)
def test_what_has_no_drop_in_stays_and_computes_what_it_did(case):
    make, left, expected_names = OTHERS[case]
    model = seeded(make())
    only_biases(model)
    x = rows(2, 5, 6)
    before, expected = kinds(model), gradients(model, x)
    done = patch(model)
    stays = {name: reason for name, reason in done.left.items() if name in left or left == {}}
    assert stays == left
    assert [n for n in replaced(model) if "." not in n] == expected_names
    assert all(type(model.get_submodule(n)) is before[n] for n in before if n in left)
    assert_same(gradients(model, x), expected)
    unpatch(model)
    assert kinds(model) == before
    assert_same(gradients(model, x), expected)


def test_a_weight_that_holds_no_floating_point_numbers_is_left_alone():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[0].weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    select(model, head=False)
    with pytest.warns(BitFitWarning, match="int8"):
        done = patch(model)
    assert list(done.left) == ["0"] and "int8" in done.left["0"]
    assert replaced(model) == ["1"]


def test_attention_of_pytorch_keeps_its_output_projection():
    model = only_biases(seeded(nn.MultiheadAttention(8, 2, batch_first=True)))
    x = rows(2, 5, 8)

    def run():
        model.zero_grad(set_to_none=True)
        out, _ = model(x, x, x, need_weights=False)
        out.square().sum().backward()
        return {"out": out.detach(), "b": model.out_proj.bias.grad.clone()}

    expected = run()
    with pytest.warns(BitFitWarning, match=r"stay as they were: out_proj \("):
        done = patch(model)
    assert list(done.left) == ["out_proj"] and not replaced(model)
    assert_same(run(), expected)


def test_a_whole_encoder_of_pytorch_trains_as_before():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = seeded(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train()
    only_biases(model)
    expected = gradients(model, rows(2, 5, 8))
    with pytest.warns(BitFitWarning):
        done = patch(model)
    assert done.replaced == {"Linear": 4, "LayerNorm": 4}
    assert_same(gradients(model, rows(2, 5, 8)), expected)
    with torch.no_grad():
        slow = model(rows(2, 5, 8))
        torch.testing.assert_close(model.eval()(rows(2, 5, 8)), slow)


def test_layers_whose_weight_trains_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    select(model, head=["2."])
    done = patch(model)
    assert replaced(model) == ["0", "1"]
    assert done.left == {}


@pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")
def test_lora_trains_beside_patched_layers(build, batch, measure):
    peft = pytest.importorskip("peft")
    results = []
    for patched in (False, True):
        model = build("bert")
        torch.manual_seed(0)
        config = peft.LoraConfig(
            target_modules=["query", "value"], r=2, bias="all", init_lora_weights=False
        )
        model = peft.get_peft_model(model, config)
        wrapped = [n for n, m in model.named_modules() if n.endswith("base_layer")]
        assert len(wrapped) == 4
        if patched:
            done = patch(model)
            assert {n: done.left[n] for n in wrapped} == dict.fromkeys(
                wrapped, "an adapter wraps it"
            )
            assert done.replaced["LayerNorm"] == 5
        results.append(measure(model.eval(), batch(build("bert"))))
    expected, found = results
    assert any("lora_A" in name for name in found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    missing = set(expected) - set(found)
    assert all("key" in name for name in missing)
