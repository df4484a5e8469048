"""Bias and activation, forward and backward, against PyTorch in float64."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import activation
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
SHAPES = ((1, 1), (1, 64), (33, 16), (64, 128), (100, 129))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let every new tensor begin as NaN or 255, so that an element that is not written shows."""
    empty = torch.empty

    def poison(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poison)


def inputs(rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x, dh = 2 * torch.randn(2, rows, columns, generator=generator)
    b = torch.randn(columns, generator=generator)
    return x.to(DEVICE, dtype), dh.to(DEVICE, dtype), b.to(DEVICE)


def by_pytorch(x, dh, b, act, dtype):
    """Return h, dz and db of PyTorch with inputs in `dtype` and the sum in fp32 or more."""
    z = (x.to(dtype) if b is None else x.to(dtype) + b.to(dtype)).requires_grad_()
    h = DEFINITIONS[act](z)
    (dz,) = torch.autograd.grad(h, z, dh.to(dtype))
    return h.detach(), dz, dz.to(torch.promote_types(dtype, torch.float32)).sum(0)


def close(out, exact, pytorch, floor):
    """Assert the tolerance rule: twice PyTorch's error in the same dtype, above a floor."""
    error = (out.double() - exact).abs()
    allowed = 2 * (pytorch.double() - exact).abs().max() + floor
    assert bool((error <= allowed).all()), (error.max(), allowed)


def check(x, dh, b, act):
    before = (x.clone(), dh.clone())
    h, d = activation.activation_fwd(x, b, act)
    dz, db = activation.activation_bwd(dh, x, b, act)
    assert d is None
    assert (h.dtype, dz.dtype, db.dtype) == (x.dtype, dh.dtype, torch.float32)
    assert torch.equal(x, before[0]) and torch.equal(dh, before[1])
    exact = by_pytorch(x, dh, b, act, torch.float64)
    same = by_pytorch(x, dh, b, act, x.dtype)
    unit = torch.finfo(x.dtype).eps
    close(h, exact[0], same[0], unit * exact[0].abs().max())
    close(dz, exact[1], same[1], unit * exact[1].abs().max())
    close(db, exact[2], same[2], 2.0**-20 * exact[1].abs().sum(0).max())
    again = activation.activation_bwd(dh, x, b, act)
    assert torch.equal(again[0], dz) and torch.equal(again[1], db)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinity
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_of_16_bits_is_rounded_as_well_as_can_be(act, dtype):
    # where less is computed than for fp32; all but the last bit of their error is the rounding
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256).to(DEVICE)
    h, _ = activation.activation_fwd(x, None, act)
    dz, _ = activation.activation_bwd(torch.ones_like(x), x, None, act)
    exact = x.double().requires_grad_()
    value = DEFINITIONS[act](exact)
    value.sum().backward()
    wide = exact.detach().abs()
    # the interpreter cuts bf16 off
    eps, cuts = torch.finfo(dtype).eps, INTERPRETED and dtype == torch.bfloat16
    rounding, small = eps if cuts else eps / 2, torch.finfo(dtype).smallest_normal
    for found, true in ((h, value.detach()), (dz, exact.grad)):
        known = true.isfinite() & (wide < 1e4)
        error = (found.double() - true).abs()
        allowed = 1.02 * rounding * true.abs().clamp(min=small) + 1.5e-7 * (1 + wide)
        assert bool((error <= allowed)[known].all()), error[known & ~(error <= allowed)]
    assert bool(h[x.isfinite()].isfinite().all() and h[x.isnan()].isnan().all())


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_activation_is_as_exact_as_pytorchs(act, dtype):
    x, dh, b = inputs(70, 48, dtype)
    check(x, dh, b, act)
    check(x, dh, None, act)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_at_odd_shapes(shape):
    check(*inputs(*shape, torch.bfloat16), "gelu")


def test_inputs_of_any_strides():
    x, dh, b = inputs(60, 60, torch.float32)
    check(x.t(), dh[:1].expand(60, 60), b, "gelu")
    check(x[::2, ::3], dh[1::2, 2::3], b[:20], "silu")


@pytest.mark.parametrize("few_bits", [False, True])
def test_both_passes_in_place(few_bits):
    x, dh, b = inputs(70, 48, torch.bfloat16)
    h, d = activation.activation_fwd(x, b, few_bits=few_bits)
    kept = d if few_bits else x
    dz, db = activation.activation_bwd(dh, kept, b)
    u, partial = x.clone(), torch.empty(1, 2, 48, device=DEVICE)
    found, levels = activation.activation_fwd(u, b, few_bits=few_bits, in_place=True)
    assert found is u and torch.equal(u, h)
    assert levels is None if d is None else torch.equal(levels, d)
    found, rows = activation.activation_bwd(dh, kept, b, partial=partial, in_place=True)
    assert found is dh and torch.equal(dh, dz) and rows is partial
    torch.testing.assert_close(partial[0].sum(0), db)


@pytest.mark.parametrize("shape", [(0, 32), (5, 0)], ids=str)
def test_nothing_gives_nothing(shape):
    x, dh, b = inputs(*shape, torch.float32)
    h, _ = activation.activation_fwd(x, b)
    dz, db = activation.activation_bwd(dh, x, b)
    assert h.shape == dz.shape == shape
    assert torch.equal(db, torch.zeros(shape[1], device=DEVICE))


# the interpreter warns where the GPU goes to infinity and back
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_the_derivative_in_8_bits_is_off_by_half_a_step_at_most(act):
    x, dh, b = inputs(64, 40, torch.float32)
    x = x * 3
    h, d = activation.activation_fwd(x, b, act, few_bits=True)
    assert torch.equal(h, activation.activation_fwd(x, b, act)[0])
    assert d.dtype == torch.uint8
    dz, db = activation.activation_bwd(dh, d, None, act)
    _, exact, summed = by_pytorch(x, dh, b, act, torch.float64)
    low, high = activation.ACTIVATIONS[act]
    half_step = (high - low) / 510 + 1e-6
    assert bool(((dz.double() - exact).abs() <= half_step * dh.double().abs()).all())
    assert bool(((db.double() - summed).abs() <= half_step * dh.double().abs().sum(0)).all())


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_the_derivative_stays_in_the_range_that_8_bits_cover(act):
    z = torch.linspace(-30, 30, 600_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(DEFINITIONS[act](z).sum(), z)
    low, high = activation.ACTIVATIONS[act]
    assert low <= slope.min() and slope.max() <= high


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_what_is_not_a_number_stays_so(act):
    x, dh, b = inputs(3, 16, torch.float32)
    x[1, 5] = float("nan")
    h, _ = activation.activation_fwd(x, b, act)
    dz, db = activation.activation_bwd(dh, x, b, act)
    for found in (h, dz):
        assert found.isnan().sum() == found[1, 5].isnan() == (act != "relu" or found is h)
    assert db[5].isnan() == (act != "relu")
