"""Products with a frozen weight, where PyTorch's libraries multiply."""

import copy

import pytest
import torch

from bitfit_fast import patch_encoder, select
from bitfit_fast.encoder import encoder_of
from bitfit_fast.encoder.product import Product, _prefers_onednn
from bitfit_fast.kernels import tiles

of_both_backends = pytest.mark.parametrize("backend", ["native", "torch"], indirect=True)


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def library(request, monkeypatch):
    """The library that multiplies fp32: PyTorch's choice, or oneDNN as with AMD's AVX-512."""
    if request.param and not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        pytest.skip("this PyTorch was built without oneDNN")
    monkeypatch.setattr("bitfit_fast.encoder.product._prefers_onednn", lambda: request.param)
    monkeypatch.setattr(tiles, "beat_libraries", lambda weight: False)
    return request.param


_AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 {}\n\nvendor_id\t: AuthenticAMD\n"
CPUS = {
    "intel": ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f\n", False),
    "amd": (_AMD.format("fma"), False),
    "amd-avx512": (_AMD.format("avx512f"), True),
    "arm": ("processor\t: 0\nFeatures\t: fp asimd\n", False),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_onednn_multiplies_where_mkl_leaves_vectors_unused(cpu, monkeypatch):
    text, expected = CPUS[cpu]
    for library in ("mkl", "mkldnn"):
        monkeypatch.setattr(f"torch.backends.{library}.is_available", lambda: True)
    monkeypatch.setattr("bitfit_fast.kernels.library.cpuinfo", text.splitlines)
    able = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    assert _prefers_onednn.__wrapped__() == (expected and able)


@of_both_backends
@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("sizes", [(96, 64), (17, 33)])
def test_forward_and_backward(rows, sizes, backend, library, as_exact):
    outputs, inputs = sizes
    weight, b = torch.randn(outputs, inputs), torch.randn(outputs)
    # rows of a wider tensor, as q, k and v are
    x, dy = torch.randn(rows, 2 * inputs)[:, :inputs], torch.randn(rows, outputs)
    product, exact = Product(weight), weight.double()
    start, dx = torch.randn(rows, inputs), dy.double() @ exact
    onto = start.clone()
    assert product.backward(dy, onto) is onto
    ours = {"y": product(x), "with b": product(x, b), "dx": product.backward(dy), "onto": onto}
    theirs = {"y": x @ weight.t(), "with b": torch.addmm(b, x, weight.t()),
              "dx": dy @ weight, "onto": torch.addmm(start, dy, weight)}  # fmt: skip
    y = x.double() @ exact.t()
    as_exact(ours, theirs, {"y": y, "with b": y + b, "dx": dx, "onto": dx + start})


@of_both_backends
def test_a_part_has_some_of_the_rows(backend, library):
    product, x = Product(torch.randn(96, 64)), torch.randn(5, 64)
    whole = product(x)
    torch.testing.assert_close(product.part(32, 64)(x), whole[:, 32:64])


@of_both_backends
def test_loss_and_gradients(backend, library, case, measure, as_exact):
    each = case("bert", "ForSequenceClassification")
    patch_encoder(each.model, precision="fp32")
    found = measure(each.model, each.inputs)
    assert set(found) == set(each.exact)
    as_exact(found, each.fp32, each.exact)


@of_both_backends
def test_what_ordered_weights_take_is_known_before(backend, library, build, batch, measure):
    model = build("bert")
    select(model)
    patch_encoder(model, precision="fp32")
    stack = encoder_of(model).stack
    expected = stack.bytes_packed()
    measure(model, batch(model))
    products = [p for at in stack.layers for p in (at.qkv, at.out, at.up, at.down)]
    products += stack.first_products()
    ordered = [weight for product in products for weight in product._ordered.values()]
    if library:
        # the bottom layer's gradient goes no further than its queries
        assert 0.8 * expected <= sum(w.numel() * 4 for w in ordered) <= expected
    else:
        assert not ordered and not expected


@of_both_backends
def test_a_copied_model_orders_weights_of_its_own(backend, library, build, batch, measure):
    model = build("bert")
    select(model)
    patch_encoder(model, precision="fp32")
    before = measure(model, batch(model))
    twin = copy.deepcopy(model)
    again = measure(twin, batch(twin))
    assert all(torch.equal(before[name], again[name]) for name in before)
