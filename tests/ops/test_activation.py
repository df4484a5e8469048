"""Bias and activation, against PyTorch's own."""

import pytest
import torch
from torch.nn import functional as F

from bitfit_fast.errors import BitFitError
from bitfit_fast.ops import ACTIVATIONS, activation, bias_activation, feed_forward

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STOCK = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
ops = torch.ops.bitfit_fast
definition_only = pytest.mark.parametrize("backend", ["torch"], indirect=True)
kernels_only = pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)


def own(act="gelu", few_bits=False):
    return lambda x, b=None: bias_activation(x, b, act, few_bits)


def stock(act="gelu"):
    return lambda x, b=None: STOCK[act](x if b is None else x + b)


def test_every_activation_has_a_stock_one_here():
    assert STOCK.keys() == ACTIVATIONS.keys()


@definition_only
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(act, randn):
    x = randn(2, 3, 5, dtype=torch.float64)
    b = randn(5, dtype=torch.float64)
    for needs in ((True, True), (True, False), (False, True)):
        leaves = [t.requires_grad_(n) for t, n in zip((x, b), needs)]
        assert torch.autograd.gradcheck(own(act), leaves)
    assert torch.autograd.gradcheck(own(act), [x.requires_grad_()])


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_activation_is_as_exact_as_pytorchs(dtype, act, randn, compare):
    x, dy = 2 * randn(40, 33, dtype=dtype), randn(40, 33, dtype=dtype)
    compare(own(act), stock(act), {"x": x}, dy)
    compare(own(act), stock(act), {"x": x, "b": randn(33, dtype=dtype)}, dy)


@pytest.mark.parametrize("shape", [(1,), (9,), (0, 9), (1, 1), (3, 5, 8), (2, 3, 2, 9)], ids=str)
def test_inputs_have_any_shape(shape, randn, compare):
    inputs = {"x": randn(*shape), "b": randn(shape[-1])}
    for frozen in ("", "x", "b"):
        compare(own(), stock(), inputs, randn(*shape), frozen=frozen)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_fp32_bias_is_added_and_its_gradient_summed_in_fp32(
    dtype, act, randn, unit, differentiate
):
    inputs = {"x": randn(200, 24, dtype=dtype), "b": randn(24)}
    dh = randn(200, 24, dtype=dtype)
    found = differentiate(own(act), inputs, [dh])
    exact = differentiate(
        stock(act), {name: t.double() for name, t in inputs.items()}, [dh.double()]
    )
    assert (found["y0"].dtype, found["x"].dtype) == (dtype, dtype)
    assert found["b"].dtype == torch.float32
    error = (found["b"].double() - exact["b"]).abs()
    assert bool((error <= 2.0**-20 * exact["x"].abs().sum(0)).all())
    for name, scale in (("y0", inputs["x"].abs().max() + 1), ("x", dh.abs().max())):
        # one rounding to the dtype, after some to fp32
        bound = unit(dtype) * exact[name].abs() + 2.0**-20 * scale
        assert bool(((found[name].double() - exact[name]).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_have_any_strides(dtype, randn, compare):
    x, dy = randn(12, 12, dtype=dtype), randn(12, 12, dtype=dtype)
    b = randn(12, dtype=dtype)

    def check(x, b, dy):
        compare(own(), stock(), {"x": x, "b": b}, dy)

    check(x.t(), b, dy.t())
    check(x[:1].expand(12, 12), b, dy[:1].expand(12, 12))
    check(x[:, :1].expand(12, 12), b, dy[:1, :1].expand(12, 12))
    check(x[::2, ::3], b[:4], dy[1::2, 1::3])
    check(x.view(3, 4, 12).transpose(0, 1), b, dy.view(4, 12, 3).transpose(1, 2))
    check(x.t().view(3, 4, 12), b, dy.t().view(3, 4, 12))


def test_biases_have_any_strides(randn, compare):
    x, dy = randn(5, 12), randn(5, 12)
    for b in (randn(24)[::2], randn(1).expand(12), randn(12, 3)[:, 1]):
        compare(own(), stock(), {"x": x, "b": b}, dy)


# the interpreter warns where the GPU goes to infinity and back
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_few_bits_the_gradient_is_off_by_half_a_step_at_most(
    act, dtype, randn, unit, differentiate
):
    inputs = {"x": 3 * randn(40, 33, dtype=dtype), "b": randn(33)}
    dh = randn(40, 33, dtype=dtype)
    found = differentiate(own(act, few_bits=True), inputs, [dh])
    assert torch.equal(found["y0"], bias_activation(**inputs, act=act))
    wide = {name: t.double() for name, t in inputs.items()}
    exact = differentiate(stock(act), wide, [dh.double()])
    low, high = ACTIVATIONS[act]
    bound = ((high - low) / 510 + 2.0**-20) * dh.double().abs()
    assert bool(((found["b"] - exact["b"]).abs() <= bound.sum(0)).all())
    bound += unit(dtype) * (exact["x"].abs() + bound) + torch.finfo(dtype).smallest_normal
    assert bool(((found["x"] - exact["x"]).abs() <= bound).all())


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_with_few_bits_a_quarter_of_the_bytes_is_kept(act, randn, saved):
    x, b = randn(6, 40).requires_grad_(), randn(40).requires_grad_()
    sizes = []
    for few_bits in (False, True):
        with saved() as kept:
            bias_activation(x, b, act, few_bits)
        sizes.append(sum(t.nbytes for t in kept if t.dim() == 2))
    assert sizes == [x.nbytes, x.nbytes // 4]
    assert [(t.shape, t.dtype) for t in kept] == [(x.shape, torch.uint8)]


@pytest.mark.parametrize("needs", ["x", "b", "both", "neither"])
def test_only_the_inputs_are_kept_and_not_copied(needs, randn, saved):
    x = randn(8, 5, 6).transpose(0, 2).requires_grad_(needs in ("x", "both"))
    b = randn(8).requires_grad_(needs in ("b", "both"))
    with saved() as kept:
        bias_activation(x, b)
    expected = [] if needs == "neither" else [x, b]
    assert [(t.data_ptr(), t.stride()) for t in kept] == [
        (t.data_ptr(), t.stride()) for t in expected
    ]


@kernels_only
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_equal_the_definition(dtype, act, randn):
    x, dh, b = 2 * randn(21, 33, dtype=dtype), randn(21, 33, dtype=dtype), randn(33)
    kept = activation.forward_definition(x, b, act, True)[1]
    found = [ops.activation_fwd(x, b, act, False)[0]]
    expected = [activation.forward_definition(x, b, act, False)[0]]
    for given, bias in ((x, b), (x, None), (kept, None)):
        found += ops.activation_bwd(dh, given, bias, act)
        expected += activation.backward_definition(dh, given, bias, act)
    for one, other in zip(found, expected):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        # of 16-bit numbers, the last bit may differ; sums are in fp32
        close = max(torch.finfo(one.dtype).eps, 2.0**-19)
        torch.testing.assert_close(one, other, rtol=close, atol=close)
    levels = ops.activation_fwd(x, b, act, True)[1].int() - kept.int()
    assert levels.abs().max() <= 1 and levels.count_nonzero() <= levels.numel() // 100


def test_the_same_call_gives_the_same_bits(randn, differentiate):
    inputs, dy = {"x": randn(70, 33), "b": randn(33)}, [randn(70, 33)]
    one, two = (differentiate(own(), inputs, dy) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_unknown_activation_is_named_with_the_valid_ones():
    with pytest.raises(BitFitError, match="'swish'") as raised:
        bias_activation(torch.zeros(1, 1), act="swish")
    assert all(act in str(raised.value) for act in ACTIVATIONS)


def test_a_bias_of_another_shape_is_refused():
    with pytest.raises(BitFitError, match=r"b has shape \(3,\), and must have \(4,\)"):
        bias_activation(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(BitFitError, match=r"b1 has shape \(3,\), and must have \(4,\)"):
        feed_forward(torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(3), torch.zeros(6, 4))
