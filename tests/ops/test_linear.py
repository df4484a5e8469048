"""Linear layers and the feed-forward block, against PyTorch's own."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from bitfit_fast.ops import ACTIVATIONS, bias_activation, feed_forward, linear
from bitfit_fast.ops._backend import PRODUCTS_VARIABLE
from bitfit_fast.ops.activation import composed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
definition_only = pytest.mark.parametrize("backend", ["torch"], indirect=True)


def stock_linear(x, w, b=None):
    return F.linear(x, w, b)


def own_feed_forward(act="gelu", few_bits=False):
    return lambda x, w1, b1, w2: feed_forward(x, w1, b1, w2, act, few_bits)


def stock_feed_forward(act="gelu"):
    return lambda x, w1, b1, w2: F.linear(composed(F.linear(x, w1), b1, act), w2)


def block_inputs(randn, shape, dtype=torch.float32, hidden=20, out=7):
    """Return `x`, `w1`, `b1` and `w2`, the bias in fp32."""
    columns = shape[-1]
    return {
        "x": randn(*shape, dtype=dtype),
        "w1": randn(hidden, columns, dtype=dtype) / 2,
        "b1": randn(hidden, dtype=torch.promote_types(dtype, torch.float32)),
        "w2": randn(out, hidden, dtype=dtype) / 4,
    }


@definition_only
@pytest.mark.parametrize("pattern", [*itertools.product([False, True], repeat=3)][1:], ids=str)
def test_gradients_of_linear_are_those_of_finite_differences(pattern, randn):
    tensors = [randn(*shape, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (4,))]
    leaves = [t.requires_grad_(needed) for t, needed in zip(tensors, pattern)]
    assert torch.autograd.gradcheck(linear, leaves)


@definition_only
@pytest.mark.parametrize("pattern", [*itertools.product([False, True], repeat=4)][1:], ids=str)
def test_gradients_of_the_feed_forward_block_are_those_of_finite_differences(pattern, randn):
    inputs = block_inputs(randn, (2, 3, 4), torch.float64, hidden=6, out=5).values()
    leaves = [t.requires_grad_(needed) for t, needed in zip(inputs, pattern)]
    assert torch.autograd.gradcheck(feed_forward, leaves)


@definition_only
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_of_each_feed_forward_block_are_those_of_finite_differences(act, randn):
    inputs = block_inputs(randn, (4, 3), torch.float64, hidden=6, out=5)
    leaves = [t.requires_grad_(name in ("x", "b1")) for name, t in inputs.items()]
    assert torch.autograd.gradcheck(own_feed_forward(act), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9,), (0, 9), (1, 9), (40, 9), (3, 5, 8), (2, 3, 2, 9)], ids=str)
def test_linear_is_as_exact_as_pytorchs(shape, dtype, randn, compare):
    inputs = {"x": randn(*shape, dtype=dtype), "w": randn(13, shape[-1], dtype=dtype)}
    dy = randn(*shape[:-1], 13, dtype=dtype)
    compare(linear, stock_linear, inputs, dy)
    compare(linear, stock_linear, {**inputs, "b": randn(13, dtype=dtype)}, dy)


@pytest.mark.parametrize("frozen", ["x", "w", "b", "xw", "xb", "wb"])
def test_linear_with_any_part_frozen_is_as_exact_as_pytorchs(frozen, randn, compare):
    inputs = {"x": randn(3, 6, 9), "w": randn(13, 9), "b": randn(13)}
    found = compare(linear, stock_linear, inputs, randn(3, 6, 13), frozen=frozen)
    assert found.keys() == {"y0", *inputs} - set(frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_an_fp32_bias_is_summed_in_fp32(dtype, randn):
    x, w, dy = (randn(*s, dtype=dtype) for s in ((300, 4), (24, 4), (300, 24)))
    b = randn(24).requires_grad_()
    (db,) = torch.autograd.grad(linear(x, w, b), b, dy)
    assert db.dtype == torch.float32
    error = (db.double() - dy.double().sum(0)).abs()
    assert bool((error <= 2.0**-20 * dy.double().abs().sum(0)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_takes_any_strides(dtype, randn, compare):
    x, w, dy = (randn(12, 12, dtype=dtype) for _ in range(3))
    wide = randn(24, dtype=dtype)

    def check(x, w, b, dy):
        compare(linear, stock_linear, {"x": x, "w": w, "b": b}, dy)

    check(x.t(), w.t(), wide[::2], dy.t())
    check(x[:1].expand(12, 12), w, wide[:1].expand(12), dy[:1].expand(12, 12))
    check(x[::2, ::3], w[::2, :4], wide[:6], dy[:1, :1].expand(6, 6))
    check(x.view(3, 4, 12).transpose(0, 1), w, wide[:12], dy.view(4, 12, 3).transpose(1, 2))


def test_linear_with_no_inner_or_no_outer_features_is_as_pytorchs(randn, compare):
    for inner, outer in ((0, 4), (4, 0)):
        inputs = {"x": randn(3, inner), "w": randn(outer, inner), "b": randn(outer)}
        compare(linear, stock_linear, inputs, randn(3, outer))


def same(tensor, other):
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape


@pytest.mark.parametrize("needs", [*itertools.product([False, True], repeat=3)], ids=str)
def test_linear_keeps_the_weight_for_x_and_x_for_the_weight(needs, randn, saved):
    x, w, b = (t.requires_grad_(n) for t, n in zip((randn(2, 3, 8), randn(6, 8), randn(6)), needs))
    with saved() as kept:
        linear(x, w, b)
    expected = [t for t, needed in ((x, needs[1]), (w, needs[0])) if needed]
    assert len(kept) == len(expected)
    assert all(same(t, e) for t, e in zip(kept, expected))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_feed_forward_block_is_as_exact_as_pytorchs(dtype, act, randn, compare):
    inputs = block_inputs(randn, (33, 15), dtype)
    dy = randn(33, 7, dtype=dtype)
    compare(own_feed_forward(act), stock_feed_forward(act), inputs, dy, frozen=("w1", "w2"))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_with_the_activation_in_them_are_as_exact(
    dtype, randn, compare, differentiate, monkeypatch
):
    inputs, dy = block_inputs(randn, (33, 15), dtype), randn(33, 7, dtype=dtype)
    found = []
    for chosen in ("fused", "vendor"):
        monkeypatch.setenv(PRODUCTS_VARIABLE, chosen)
        given = (own_feed_forward(), stock_feed_forward(), inputs, dy)
        found.append(compare(*given, frozen=("w1", "w2")))
        for frozen in (("x", "w1", "w2"), ("w1", "b1", "w2")):
            compare(*given, frozen=frozen)
        # of a derivative in 8 bits only the steps are the same
        few = differentiate(own_feed_forward(few_bits=True), inputs, [dy], ("w1", "w2"))
        assert torch.equal(few["y0"], found[-1]["y0"])
        torch.testing.assert_close(few["b1"], found[-1]["b1"], rtol=0.05, atol=0.1)
    # what is in the kernel is not rounded in between
    assert dtype == torch.float32 or not torch.equal(found[0]["y0"], found[1]["y0"])


@pytest.mark.parametrize("shape", [(15,), (0, 15), (1, 15), (3, 5, 15), (2, 3, 2, 15)], ids=str)
def test_the_feed_forward_block_takes_any_shape(shape, randn, compare):
    inputs = block_inputs(randn, shape)
    dy = randn(*shape[:-1], 7)
    for frozen in (("w1", "w2"), ("x", "w1", "w2"), ("w1", "b1", "w2"), ("w1",), ("w2",), ()):
        compare(own_feed_forward(), stock_feed_forward(), inputs, dy, frozen=frozen)


def test_the_feed_forward_block_takes_any_strides(randn, compare):
    inputs = block_inputs(randn, (12, 12), hidden=12, out=12)
    inputs |= {name: inputs[name].t() for name in ("x", "w1", "w2")}
    for dy in (randn(12, 12).t(), randn(1, 12).expand(12, 12), randn(1, 1).expand(12, 12)):
        compare(own_feed_forward(), stock_feed_forward(), inputs, dy, frozen=("w1", "w2"))
    inputs["b1"] = randn(24)[::2]
    compare(own_feed_forward(), stock_feed_forward(), inputs, randn(12, 12), frozen=("w1", "w2"))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_with_few_bits_the_bias_gradient_is_off_by_half_a_step_at_most(act, randn, differentiate):
    inputs = block_inputs(randn, (40, 15))
    dy = randn(40, 7)
    frozen = ("w1", "w2")
    found = differentiate(own_feed_forward(act, few_bits=True), inputs, [dy], frozen)
    wide = {name: t.double() for name, t in inputs.items()}
    exact = differentiate(stock_feed_forward(act), wide, [dy.double()], frozen)
    low, high = ACTIVATIONS[act]
    dh = (dy.double() @ wide["w2"]).abs()
    rounding = 2.0**-20 * (dy.double().abs() @ wide["w2"].abs())
    bound = (high - low) / 510 * dh + rounding
    assert bool(((found["b1"] - exact["b1"]).abs() <= bound.sum(0)).all())
    assert bool(((found["x"] - exact["x"]).abs() <= bound @ wide["w1"].abs()).all())


@pytest.mark.parametrize("few_bits", [False, True])
@pytest.mark.parametrize("needs", ["x", "b1", "both", "neither"])
def test_the_feed_forward_block_keeps_only_what_its_gradients_need(needs, few_bits, randn, saved):
    x, w1, b1, w2 = block_inputs(randn, (6, 15), hidden=64).values()
    x.requires_grad_(needs in ("x", "both"))
    b1.requires_grad_(needs in ("b1", "both"))
    with saved() as kept:
        feed_forward(x, w1, b1, w2, few_bits=few_bits)
    if needs == "neither":
        assert not kept
        return
    if x.requires_grad:
        assert same(kept.pop(0), w1)
    assert same(kept.pop(0), w2)
    # only the one tensor as wide as the block is new
    assert kept[0].shape == (6, 64)
    assert kept[0].dtype == (torch.uint8 if few_bits else torch.float32)
    assert not kept[1:] if few_bits else same(kept[1], b1) and not kept[2:]


def test_the_feed_forward_block_equals_its_three_steps(randn, differentiate):
    inputs = block_inputs(randn, (30, 15))
    dy = [randn(30, 7)]

    def steps(x, w1, b1, w2):
        return linear(bias_activation(linear(x, w1), b1), w2)

    one, three = (differentiate(f, inputs, dy, ("w1", "w2")) for f in (own_feed_forward(), steps))
    for name, found in one.items():
        torch.testing.assert_close(found, three[name], rtol=1e-6, atol=1e-6)


def test_the_same_call_gives_the_same_bits(randn, differentiate):
    inputs, dy = block_inputs(randn, (70, 15), torch.bfloat16), [randn(70, 7)]
    one, two = (differentiate(own_feed_forward(), inputs, dy, ("w1", "w2")) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    inputs = {"x": inputs["x"], "w": inputs["w1"], "b": inputs["b1"]}
    dy = [randn(70, 20)]
    one, two = (differentiate(linear, inputs, dy) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
