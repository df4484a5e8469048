"""Under autocast: the dtypes and the exactness of PyTorch's own composition."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

from bitfit_fast.ops import (
    bias_activation,
    dropout_add_layer_norm,
    feed_forward,
    layer_norm,
    linear,
)

DTYPE = torch.bfloat16


@pytest.fixture
def autocast(device):
    return lambda dtype=DTYPE: torch.autocast(device, dtype)


def layer_inputs(randn):
    """Return a transformer's feed-forward layer in fp32."""
    return {
        "x": randn(3, 8, 16),
        "w1": randn(24, 16) / 4,
        "b1": randn(24),
        "w2": randn(16, 24) / 5,
        "b2": randn(16),
        "gamma": 1 + randn(16) / 4,
        "beta": randn(16),
    }


def own_layer(x, w1, b1, w2, b2, gamma, beta):
    h = bias_activation(linear(x, w1), b1)
    return dropout_add_layer_norm(linear(h, w2), gamma, beta, b2, residual=x)[0]


def own_block(x, w1, b1, w2, b2, gamma, beta):
    return dropout_add_layer_norm(feed_forward(x, w1, b1, w2), gamma, beta, b2, residual=x)[0]


def stock_layer(x, w1, b1, w2, b2, gamma, beta):
    h = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    return F.layer_norm(x + h, x.shape[-1:], gamma, beta)


@pytest.mark.parametrize("frozen", [("w1", "w2"), ("x", "w1", "w2", "gamma"), ()], ids=str)
@pytest.mark.parametrize("own", [own_layer, own_block])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_a_layer_is_as_exact_as_pytorchs(
    backward_inside, own, frozen, randn, unit, autocast, differentiate, as_exact
):
    inputs, dy = layer_inputs(randn), [randn(3, 8, 16)]
    # where bf16 is cut off, the exactness shows in fp16
    rounds = unit(DTYPE) < torch.finfo(DTYPE).eps
    dtype = DTYPE if rounds else torch.float16

    def inside(function):
        def run(**leaves):
            with autocast(dtype):
                return function(**leaves)

        with autocast(dtype) if backward_inside else contextlib.nullcontext():
            return differentiate(run, inputs, dy, frozen)

    found, pytorch = inside(own), inside(stock_layer)
    assert {name: t.dtype for name, t in found.items()} == {
        name: t.dtype for name, t in pytorch.items()
    }
    wide = {name: t.double() for name, t in inputs.items()}
    exact = differentiate(stock_layer, wide, [dy[0].double()], frozen)
    sums = [name for name, t in inputs.items() if t.dim() == 1]
    as_exact(found, pytorch, exact, 1, sums, [*dy, exact.get("x", dy[0])])


def test_linear_gives_the_dtype_of_autocast(randn, autocast):
    x, w, b = randn(4, 8), randn(8, 8), randn(8)
    with autocast():
        for one in (x, x.to(DTYPE), x.half()):
            found, expected = linear(one, w, b), F.linear(one, w, b)
            assert found.dtype == expected.dtype == DTYPE
            torch.testing.assert_close(found, expected)
            assert feed_forward(one, w, b, w).dtype == DTYPE


def test_an_activation_keeps_its_dtype(randn, autocast):
    with autocast():
        for dtype in (torch.float32, torch.float16, DTYPE):
            x = randn(4, 8, dtype=dtype)
            assert bias_activation(x, randn(8)).dtype == F.gelu(x).dtype == dtype


@pytest.mark.parametrize("few_bits", [False, True])
def test_an_activation_in_bf16_with_an_fp32_bias_is_as_without_autocast(
    few_bits, randn, autocast, differentiate
):
    inputs, dy = {"x": randn(9, 8, dtype=DTYPE), "b": randn(8)}, [randn(9, 8, dtype=DTYPE)]

    def run(x, b):
        return bias_activation(x, b, few_bits=few_bits)

    expected = differentiate(run, inputs, dy)
    with autocast():
        found = differentiate(run, inputs, dy)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layer_norm_gives_the_dtypes_of_pytorchs(randn, autocast, differentiate):
    gamma, beta, b = randn(8), randn(8), randn(8)
    for x_dtype in (torch.float32, torch.float16, DTYPE):
        for residual_dtype in (None, torch.float32, torch.float16, DTYPE):
            inputs = {"x": randn(5, 8, dtype=x_dtype), "gamma": gamma, "beta": beta, "b": b}
            if residual_dtype:
                inputs["residual"] = randn(5, 8, dtype=residual_dtype)

            def run(**leaves):
                with autocast():
                    return dropout_add_layer_norm(**leaves, returns_sum=True)

            with autocast():
                s = inputs["x"] + inputs.get("residual", inputs["x"])
                y = F.layer_norm(s, (8,), gamma.to(s.dtype), beta.to(s.dtype))
            gradients = [randn(5, 8, dtype=t.dtype) for t in (y, s)]
            found = differentiate(run, inputs, gradients)
            assert (found["y0"].dtype, found["y1"].dtype) == (y.dtype, s.dtype)
            assert all(found[name].dtype == t.dtype for name, t in inputs.items())
    with autocast():
        x = randn(5, 8, dtype=DTYPE)
        theirs = F.layer_norm(x, (8,), gamma.to(DTYPE), beta.to(DTYPE))
        assert layer_norm(x, gamma, beta).dtype == theirs.dtype


def test_a_bf16_branch_is_added_to_an_fp32_residual_in_fp32(randn, autocast):
    x, residual, gamma = randn(5, 8, dtype=DTYPE), randn(5, 8), randn(8)
    with autocast():
        y, s = dropout_add_layer_norm(x, gamma, residual=residual, returns_sum=True)
        expected = F.layer_norm(residual + x, (8,), gamma)
    assert y.dtype == expected.dtype and torch.equal(s, residual + x)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_float64_stays(randn, autocast):
    x, w, v = (randn(8, 8, dtype=torch.float64) for _ in range(3))
    with autocast():
        for found in (linear(x, w), bias_activation(x, v[0]), layer_norm(x, v[0])):
            assert found.dtype == torch.float64


def test_no_inputs_are_as_some(randn, autocast):
    inputs = layer_inputs(randn)
    inputs["x"] = inputs["x"][:, :0]
    with autocast():
        for own in (own_layer, own_block):
            found = own(**inputs)
            assert (found.shape, found.dtype) == ((3, 0, 16), torch.float32)
