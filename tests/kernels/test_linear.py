"""Products with the activation beside them, forward and backward, against PyTorch in float64."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import activation, linear
from bitfit_fast.kernels._launch import INTERPRETED, processors, product_config

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
    """Return the gradient of the activation's input, all in `dtype`."""
    z = x.to(dtype) if b is None else x.to(dtype) + b.to(dtype)
    z = z.detach().requires_grad_()
    return torch.autograd.grad(DEFINITIONS[act](z), z, dy.to(dtype) @ w.to(dtype))[0]


def activated(x, w, b, act, dtype):
    """Return the product, and its activation, all in `dtype`."""
    u = x.to(dtype) @ w.to(dtype)
    return u, DEFINITIONS[act](u if b is None else u + b.to(dtype))


def close(out, exact, pytorch, floor):
    """Assert the tolerance rule: twice PyTorch's error in the same dtype, above a floor."""
    if exact.numel():
        error = (out.double() - exact).abs()
        allowed = 2 * (pytorch.double() - exact).abs().max() + floor
        assert bool((error <= allowed).all()), (error.max(), allowed)


def once_more(launch, given):
    """Launch, and assert that this changes nothing, and gives the same again."""
    given = [t for t in given if t is not None]
    before = [t.clone() for t in given]
    found, again = launch(), launch()
    assert all(torch.equal(a, b) for a, b in zip(found, again) if a is not None)
    assert all(torch.equal(t, t_before) for t, t_before in zip(given, before))
    return found


def check_fwd(x, w, b, act):
    h, kept = once_more(lambda: linear.linear_fwd(x, w, b, act), (x, w, b))
    assert h.shape == kept.shape == (x.shape[0], w.shape[1])
    assert h.dtype == kept.dtype == x.dtype
    unit = torch.finfo(x.dtype).eps
    for out, exact, pytorch in zip(
        (kept, h), activated(x, w, b, act, torch.float64), activated(x, w, b, act, x.dtype)
    ):
        close(out, exact, pytorch, unit * exact.abs().max())
    nothing = linear.linear_fwd(x, w, b, act, keeps=False)
    assert torch.equal(nothing[0], h) and nothing[1] is None


def check_bwd(dy, w, x, b, act):
    dz, db = once_more(lambda: linear.linear_bwd(dy, w, x, b, act), (dy, w, x, b))
    assert (dz.dtype, db.dtype) == (dy.dtype, torch.float32)
    assert dz.shape == (dy.shape[0], w.shape[1]) and db.shape == dz.shape[1:]
    exact = by_pytorch(dy, w, x, b, act, torch.float64)
    unit = torch.finfo(dy.dtype).eps
    close(dz, exact, by_pytorch(dy, w, x, b, act, dy.dtype), unit * exact.abs().max())
    # a sum of what is rounded to 16 bits would miss what fp32 reaches
    single = by_pytorch(dy, w, x, b, act, torch.float32)
    size = (dy.double().abs() @ w.double().abs()).sum(0)
    close(db, exact.sum(0), single.sum(0), 2.0**-20 * size)


def check(dy, w, x, b, act):
    check_fwd(dy, w, b, act)
    check_bwd(dy, w, x, b, act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_each_activation_with_and_without_bias(act, dtype):
    dy, w, x, b = inputs(45, 70, 50, dtype)
    check(dy, w, x, b, act)
    check(dy, w, x, None, act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape, dtype):
    check(*inputs(*shape, dtype), "gelu")


# the interpreter warns where the GPU goes to infinity and back
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_the_derivative_in_8_bits_is_off_by_half_a_step_at_most(act):
    dy, w, x, b = inputs(40, 33, 30, torch.float32)
    x = x * 3
    _, d = activation.activation_fwd(x, b, act, few_bits=True)
    dz, db = linear.linear_bwd(dy, w, d, b, act)
    exact = by_pytorch(dy, w, x, b, act, torch.float64)
    product = (dy.double() @ w.double()).abs()
    low, high = activation.ACTIVATIONS[act]
    half_step = (high - low) / 510
    rounding = 2.0**-20 * (dy.double().abs() @ w.double().abs())
    bound = half_step * product + rounding
    assert bool(((dz.double() - exact).abs() <= bound).all())
    assert bool(((db.double() - exact.sum(0)).abs() <= bound.sum(0)).all())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_the_derivative_of_the_product_is_kept_in_8_bits(act):
    x, w, _, b = inputs(40, 33, 30, torch.float32)
    h, d = linear.linear_fwd(x, w * 3, b, act, few_bits=True)
    assert torch.equal(h, linear.linear_fwd(x, w * 3, b, act)[0]) and d.dtype == torch.uint8
    _, expected = activation.activation_fwd(x @ (w * 3), b, act, few_bits=True)
    # where the product is rounded otherwise, a number may be on the other side of a step
    assert (d.int() - expected.int()).abs().max() <= 1
    assert (d != expected).float().mean() < 0.01


def test_partial_rows_are_left_to_the_caller():
    dy, w, x, b = inputs(200, 130, 70, torch.bfloat16)
    dz, db = linear.linear_bwd(dy, w, x, b)
    rows = -(-200 // product_config(200, 130, 70, 2, processors(dy))["BLOCK_M"])
    partial = torch.empty(1, rows, 130, device=DEVICE)
    again, given = linear.linear_bwd(dy, w, x, b, partial=partial)
    assert given is partial and torch.equal(again, dz)
    torch.testing.assert_close(partial.sum((0, 1)), db)
    for shape in ((1, rows - 1, 130), (1, rows, 129), (rows, 130)):
        with pytest.raises(ValueError, match="the sums take"):
            linear.linear_bwd(dy, w, x, b, partial=torch.empty(shape, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_any_strides(dtype):
    dy, w, x, b = inputs(60, 60, 60, dtype)
    check(dy.t(), w.t(), x.t(), b, "gelu")
    check(dy[::2, ::3], w[1::3, ::2], x[::2, 1::2], b[:30], "silu")
    check(dy[:1].expand(50, 60), w[:, :1].expand(60, 40), x[:1, :1].expand(50, 40), b[:40], "tanh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_of_rows_and_columns(dtype):
    check(*inputs(200, 260, 70, dtype), "gelu")


def test_more_blocks_of_rows_than_run_as_a_group():
    shape = (1100, 260, 33)
    config = product_config(*shape, 2, 2)
    assert shape[0] > config["GROUP_M"] * config["BLOCK_M"]
    check(*inputs(*shape, torch.bfloat16), "relu")


@pytest.mark.parametrize("shape", [(0, 32, 16), (5, 0, 16), (5, 32, 0)], ids=str)
def test_nothing_gives_nothing(shape):
    dy, w, x, b = inputs(*shape, torch.float32)
    dz, db = linear.linear_bwd(dy, w, x, b)
    assert torch.equal(dz, torch.zeros(shape[:2], device=DEVICE))
    assert torch.equal(db, torch.zeros(shape[1], device=DEVICE))
    h, kept = linear.linear_fwd(dy, w)
    assert torch.equal(h, dz) and torch.equal(kept, dz)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("columns", [1, 30, 768, 4096])
@pytest.mark.parametrize("rows", [1, 65, 1024, 32768])
def test_tiles_are_powers_of_two_that_fit(rows, columns, itemsize):
    config = product_config(rows, columns, 768, itemsize, 132)
    assert config["BLOCK_M"] in (64, 128) and config["BLOCK_N"] == 128
    # a row of tiles in 16 bits is one line of 128 bytes
    assert config["BLOCK_K"] == (64 if itemsize == 2 else 16)
    assert config["num_warps"] == (4 if config["BLOCK_M"] == 64 and itemsize == 2 else 8)


def test_factors_that_do_not_fit_are_refused():
    dy, w, x, _ = inputs(30, 20, 10, torch.float32)
    for launch in (lambda: linear.linear_fwd(dy, w[1:]), lambda: linear.linear_bwd(dy, w[1:], x)):
        with pytest.raises(RuntimeError, match=r"\(30, 10\) and \(9, 20\) cannot be multiplied"):
            launch()


def test_tiles_are_smaller_where_there_would_be_too_few():
    def heights(columns):
        return {m: product_config(m, columns, 768, 2, 132)["BLOCK_M"] for m in (2048, 8192)}

    assert heights(768) == {2048: 64, 8192: 128}
    assert heights(3072) == {2048: 128, 8192: 128}
