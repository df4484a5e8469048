"""Bias, dropout, residual and LayerNorm, forward and backward, against PyTorch in float64."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import layer_norm
from bitfit_fast.kernels._launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (1, 64), (33, 16), (64, 128), (37, 100), (5, 1500))
EPS = 1e-5


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let every new tensor begin as NaN, so that an element that is not written shows."""
    empty, like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *s, **o: empty(*s, **o).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *s, **o: like(*s, **o).fill_(float("nan")))


def inputs(rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x, residual, dy = torch.randn(3, rows, columns, generator=generator).to(DEVICE, dtype)
    gamma, beta, b = torch.randn(3, columns, generator=generator).to(DEVICE)
    return x, residual, dy, gamma, beta, b


def by_pytorch(x, residual, dy, gamma, beta, b, keep, p, dtype):
    """Return y and the gradients ds, dx, dbeta, db, dgamma, computed in `dtype`."""
    x, gamma = x.to(dtype).requires_grad_(), gamma.to(dtype).requires_grad_()
    z = x if b is None else x + b.to(dtype)
    s = z if keep is None else torch.where(keep, z / (1 - p), 0)
    s = s if residual is None else s + residual.to(dtype)
    beta = None if beta is None else beta.to(dtype)
    y = F.layer_norm(s, s.shape[-1:], gamma, beta, EPS)
    ds, dx, dgamma = torch.autograd.grad(y, (s, x, gamma), dy.to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    sums = (dy.to(wide).sum(0), dx.to(wide).sum(0), dgamma)
    return (y.detach(), ds, dx, *sums)


def mask(rows, columns, p, seed):
    """Return which elements the kernels keep, by which gradients come through."""
    generator = torch.Generator().manual_seed(0)
    xhat, dy = torch.randn(2, rows, columns, generator=generator).to(DEVICE)
    ones = torch.ones(max(rows, columns), device=DEVICE)
    ds, dx, *_ = layer_norm.layer_norm_bwd(dy, xhat, ones[:rows], ones[:columns], p, seed)
    assert bool((ds != 0).all())
    return dx != 0


def check(x, residual, dy, gamma, beta, b, p=0.0):
    """Assert the tolerance rule on every output: twice PyTorch's error, above a floor."""
    seed = torch.tensor([1234], device=DEVICE)
    before = x.clone(), dy.clone()
    y, xhat, rstd = layer_norm.layer_norm_fwd(x, gamma, beta, b, residual, p, seed, EPS)
    backward = (dy, xhat, rstd, gamma, p, seed, True, True)
    found = layer_norm.layer_norm_bwd(*backward)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])
    keep = mask(*x.shape, p, seed) if p else None
    arguments = (x, residual, dy, gamma, beta, b, keep, p)
    exact, same = (by_pytorch(*arguments, dtype) for dtype in (torch.float64, x.dtype))
    unit = torch.finfo(x.dtype).eps
    for name, ours, true, theirs in zip(
        ("y", "ds", "dx", "dbeta", "db", "dgamma"), (y, *found), exact, same
    ):
        summed = name in ("dbeta", "db", "dgamma")
        assert ours.dtype == (torch.float32 if summed else x.dtype), name
        # xhat is kept in the dtype of x, one rounding that PyTorch's fp32 statistics lack
        floor = 2 * unit * max(true.abs().max().item(), exact[1].abs().max().item())
        floor *= len(x) ** 0.5 if summed else 1
        error = (ours.double() - true).abs().max().item()
        assert error <= 2 * (theirs.double() - true).abs().max().item() + floor, name
    assert all(torch.equal(a, o) for a, o in zip(layer_norm.layer_norm_bwd(*backward), found))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_every_part_together_is_as_exact_as_pytorch(dtype, p):
    check(*inputs(40, 96, dtype), p)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape):
    check(*inputs(*shape, torch.bfloat16), 0.1)


@pytest.mark.parametrize("absent", ["residual", "beta", "b", "all"])
def test_each_part_may_be_absent(absent):
    names = ("x", "residual", "dy", "gamma", "beta", "b")
    given = dict(zip(names, inputs(20, 48, torch.float32)))
    for name in ("residual", "beta", "b"):
        if absent in (name, "all"):
            given[name] = None
    check(**given)


def test_inputs_of_any_strides():
    x, residual, dy, gamma, beta, b = inputs(48, 48, torch.float32)
    check(x.t(), residual[:1].expand(48, 48), dy.t(), gamma, beta, b, 0.2)
    check(x[::2, ::3], residual[1::2, 1::3], dy[:1, :16].expand(24, 16), gamma[:16], None, b[:16])


def test_no_rows_give_zero_gradients():
    x, residual, dy, gamma, beta, b = inputs(0, 32, torch.float32)
    y, xhat, rstd = layer_norm.layer_norm_fwd(x, gamma, beta, b, residual)
    ds, _, dbeta, db, dgamma = layer_norm.layer_norm_bwd(dy, xhat, rstd, gamma)
    assert y.shape == ds.shape == (0, 32)
    assert not dbeta.any() and not db.any() and dgamma is None


@pytest.mark.parametrize("needs", [(False, False), (False, True), (True, False)], ids=str)
def test_only_what_is_needed_is_summed(needs):
    x, residual, dy, gamma, beta, b = inputs(30, 40, torch.float32)
    _, xhat, rstd = layer_norm.layer_norm_fwd(x, gamma, beta, b, residual)
    full = layer_norm.layer_norm_bwd(dy, xhat, rstd, gamma, needs_db=True, needs_dgamma=True)
    some = layer_norm.layer_norm_bwd(
        dy, xhat, rstd, gamma, needs_db=needs[0], needs_dgamma=needs[1]
    )
    for given, expected, wanted in zip(some, full, (True, True, True, *needs)):
        assert torch.equal(given, expected) if wanted else given is None


def test_dropout_is_drawn_anew_for_each_seed_and_row_and_keeps_its_share():
    seeds = [torch.tensor([s], device=DEVICE) for s in (0, 1 << 40)]
    one, two = (mask(64, 512, 0.25, seed) for seed in seeds)
    assert torch.equal(one, mask(64, 512, 0.25, seeds[0]))
    for drawn in (one, two):
        share = drawn.double().mean().item()
        assert abs(share - 0.75) < 4 * (0.25 * 0.75 / drawn.numel()) ** 0.5
    for other in (two, one.roll(1, 0)):
        agree = (one == other).double().mean().item()
        assert abs(agree - (0.75**2 + 0.25**2)) < 0.02


def test_a_row_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="5000 columns are more than the 4096"):
        layer_norm.layer_norm_config(1, 5000, 132)
