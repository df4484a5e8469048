"""The Triton kernels in a whole encoder: on a GPU, or under the interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast import patch_encoder
from bitfit_fast.kernels import library, linear

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture
def moved(case, device):
    """Make a small case whose model and input are where the kernels run."""

    def make(family="bert", head="ForSequenceClassification", **changes):
        each = case(family, head, (9, 1, 5), **SMALL, **changes)
        each.model.to(device)
        each.inputs = {name: t.to(device) for name, t in each.inputs.items()}
        return each

    return make


def noting(launcher, launched):
    def noted(*args, **options):
        launched.append(launcher.__name__)
        return launcher(*args, **options)

    return noted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_kernels_give_the_same(family, precision, moved, measure, as_exact):
    each = moved(family)
    patch_encoder(each.model, precision=precision)
    found = {name: t.cpu() for name, t in measure(each.model, each.inputs).items()}
    assert set(found) == set(each.exact)
    if precision == "fp32":
        as_exact(found, each.fp32, each.exact)
    else:
        as_exact(found, each.bf16, each.exact, roundings=2, eps=2.0**-7)


@pytest.mark.parametrize(
    ("precision", "memory"), [("fp32", "fast"), ("bf16", "fast"), ("fp32", "lower")]
)
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_products_with_the_activation_in_them_give_the_same(
    family, precision, memory, moved, measure, as_exact, monkeypatch
):
    launched = []
    for name in ("linear_fwd", "linear_bwd"):
        inner = getattr(linear, name)
        monkeypatch.setattr(linear, name, noting(inner, launched))
    monkeypatch.setenv("BITFIT_FAST_PRODUCTS", "fused")
    each = moved(family)
    patch_encoder(each.model, precision=precision, memory=memory)
    found = {name: t.cpu() for name, t in measure(each.model, each.inputs).items()}
    assert set(found) == set(each.exact)
    assert launched.count("linear_bwd") == 2 <= launched.count("linear_fwd")
    if precision == "fp32":
        as_exact(found, each.fp32, each.exact)
    else:
        as_exact(found, each.bf16, each.exact, roundings=2, eps=2.0**-7)


@pytest.mark.parametrize("family", ["mpnet"])
def test_the_kernels_add_relative_positions(family, moved, measure, as_exact):
    each = moved(family)
    patch_encoder(each.model, precision="fp32", memory="lowest")
    found = {name: t.cpu() for name, t in measure(each.model, each.inputs).items()}
    as_exact(found, each.fp32, each.exact)


def test_one_seed_drops_the_same_in_kernels_for_every_device(moved, measure, monkeypatch, device):
    each = moved(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    patch_encoder(each.model, precision="fp32")
    found = []
    for chosen in ("triton", "torch", "native"):
        if chosen == "native" and (device != "cpu" or library.unavailable()):
            continue
        monkeypatch.setenv("BITFIT_FAST_BACKEND", chosen)
        found.append(measure(each.model, each.inputs))
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5)
