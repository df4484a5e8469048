"""The linear layer's input gradient with the bias gradient below, against PyTorch in float64."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import activation, linear
from bitfit_fast.kernels._launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DEFINITIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# rows, columns and the inner size: M, N, K
SHAPES = ((1, 1, 1), (1, 65, 30), (30, 129, 65), (65, 30, 129), (129, 1, 64), (17, 40, 128))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let every new tensor begin as NaN or 255, so that an element that is not written shows."""
    empty = torch.empty

    def poison(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poison)


def inputs(rows, columns, inner, dtype):
    generator = torch.Generator().manual_seed(rows * 1000 + columns + inner)
    dy = torch.randn(rows, inner, generator=generator)
    w = torch.randn(inner, columns, generator=generator) / max(1, inner) ** 0.5
    x, b = (
        torch.randn(rows, columns, generator=generator),
        torch.randn(columns, generator=generator),
    )
    return dy.to(DEVICE, dtype), w.to(DEVICE, dtype), x.to(DEVICE, dtype), b.to(DEVICE)


def by_pytorch(dy, w, x, b, act, dtype):
    """Return the gradient, all in `dtype`."""
    product = dy.to(dtype) @ w.to(dtype)
    if act is None:
        return product
    z = x.to(dtype) if b is None else x.to(dtype) + b.to(dtype)
    z = z.detach().requires_grad_()
    return torch.autograd.grad(DEFINITIONS[act](z), z, product)[0]


def close(out, exact, pytorch, floor):
    """Assert the tolerance rule: twice PyTorch's error in the same dtype, above a floor."""
    if exact.numel():
        error = (out.double() - exact).abs()
        allowed = 2 * (pytorch.double() - exact).abs().max() + floor
        assert bool((error <= allowed).all()), (error.max(), allowed)


def check(dy, w, x=None, b=None, act=None):
    given = [t for t in (dy, w, x, b) if t is not None]
    before = [t.clone() for t in given]
    dx, db = linear.linear_bwd(dy, w, x, b, act)
    assert (dx.dtype, db.dtype) == (dy.dtype, torch.float32)
    assert dx.shape == (dy.shape[0], w.shape[1]) and db.shape == dx.shape[1:]
    again = linear.linear_bwd(dy, w, x, b, act)
    assert torch.equal(again[0], dx) and torch.equal(again[1], db)
    assert all(torch.equal(t, t_before) for t, t_before in zip(given, before))
    exact = by_pytorch(dy, w, x, b, act, torch.float64)
    if dx.numel():
        unit = torch.finfo(dy.dtype).eps
        close(dx, exact, by_pytorch(dy, w, x, b, act, dy.dtype), unit * exact.abs().max())
    # a sum of what is rounded to 16 bits would miss what fp32 reaches
    single = by_pytorch(dy, w, x, b, act, torch.float32)
    size = (dy.double().abs() @ w.double().abs()).sum(0)
    close(db, exact.sum(0), single.sum(0), 2.0**-20 * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_and_its_sum_are_as_exact_as_pytorchs(shape, dtype):
    check(*inputs(*shape, dtype)[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_each_activation_below_with_and_without_bias(act, dtype):
    dy, w, x, b = inputs(45, 70, 50, dtype)
    check(dy, w, x, b, act)
    check(dy, w, x, None, act)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_below_at_odd_shapes(shape):
    check(*inputs(*shape, torch.bfloat16), "gelu")


# the interpreter warns where the GPU goes to infinity and back
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_the_derivative_in_8_bits_is_off_by_half_a_step_at_most(act):
    dy, w, x, b = inputs(40, 33, 30, torch.float32)
    x = x * 3
    _, d = activation.activation_fwd(x, b, act, few_bits=True)
    dx, db = linear.linear_bwd(dy, w, d, b, act)
    exact = by_pytorch(dy, w, x, b, act, torch.float64)
    product = (dy.double() @ w.double()).abs()
    low, high = activation.ACTIVATIONS[act]
    half_step = (high - low) / 510
    rounding = 2.0**-20 * (dy.double().abs() @ w.double().abs())
    bound = half_step * product + rounding
    assert bool(((dx.double() - exact).abs() <= bound).all())
    assert bool(((db.double() - exact.sum(0)).abs() <= bound.sum(0)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_any_strides(dtype):
    dy, w, x, b = inputs(60, 60, 60, dtype)
    check(dy.t(), w.t(), x.t(), b, "gelu")
    check(dy[::2, ::3], w[1::3, ::2], x[::2, 1::2], b[:30], "silu")
    check(dy[:1].expand(50, 60), w[:, :1].expand(60, 40), x[:1, :1].expand(50, 40), b[:40], "tanh")


@pytest.mark.parametrize("act", [None, "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_of_rows_and_columns(dtype, act):
    check(*inputs(200, 260, 70, dtype), act)


def test_more_blocks_of_rows_than_run_as_a_group():
    shape = (1100, 260, 33)
    config = linear.linear_config(*shape, 2, 2)
    assert shape[0] > config["GROUP_M"] * config["BLOCK_M"]
    check(*inputs(*shape, torch.bfloat16), "relu")


@pytest.mark.parametrize("shape", [(0, 32, 16), (5, 0, 16), (5, 32, 0)], ids=str)
def test_nothing_gives_nothing(shape):
    dx, db = linear.linear_bwd(*inputs(*shape, torch.float32)[:2])
    assert torch.equal(dx, torch.zeros(shape[:2], device=DEVICE))
    assert torch.equal(db, torch.zeros(shape[1], device=DEVICE))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("columns", [1, 30, 768, 4096])
@pytest.mark.parametrize("rows", [1, 65, 1024, 32768])
def test_tiles_are_powers_of_two_that_fit(rows, columns, itemsize):
    config = linear.linear_config(rows, columns, 768, itemsize, 132)
    assert config["BLOCK_M"] in (64, 128) and config["BLOCK_N"] == 128
    # a row of both factors' tiles is one line of 128 bytes
    assert config["BLOCK_K"] * itemsize == 128
    assert 1 <= config["num_warps"] <= 8


def test_tiles_are_smaller_where_there_would_be_too_few():
    def heights(columns):
        return {m: linear.linear_config(m, columns, 768, 2, 132)["BLOCK_M"] for m in (2048, 8192)}

    assert heights(768) == {2048: 64, 8192: 128}
    assert heights(3072) == {2048: 128, 8192: 128}


def test_without_measurements_the_vendor_multiplies(monkeypatch):
    monkeypatch.setattr(linear, "MEASURED", {})
    dy, w, *_ = inputs(64, 32, 16, torch.float32)
    assert not linear.beats_vendor(dy, w)


def test_on_a_cpu_the_vendor_multiplies(monkeypatch):
    monkeypatch.setattr(linear, "MEASURED", {(9, 0): {(16, 32): 1}})
    assert not linear.beats_vendor(torch.zeros(64, 16), torch.zeros(16, 32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_measurements_of_this_device_decide(monkeypatch):
    here = torch.cuda.get_device_capability()
    dy, w = torch.zeros(64, 16, device="cuda"), torch.zeros(16, 32, device="cuda")
    for measured, wins in (
        ({here: {(16, 32): 64}}, True),
        ({here: {(16, 32): 65}}, False),
        ({here: {(32, 16): 1}}, False),
        ({(0, 0): {(16, 32): 1}}, False),
    ):
        monkeypatch.setattr(linear, "MEASURED", measured)
        assert linear.beats_vendor(dy, w) is wins
