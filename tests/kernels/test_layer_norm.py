"""Bias, dropout, residual and LayerNorm, forward and backward, against PyTorch in float64."""

import itertools

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import layer_norm
from bitfit_fast.kernels._constants import keeps_sum
from bitfit_fast.kernels._launch import INTERPRETED
from bitfit_fast.ops.dropout import kept

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (1, 64), (33, 16), (64, 128), (37, 100), (150, 33), (5, 1500), (40, 1))
EPS = 1e-5


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let every new tensor begin as NaN, so that an element that is not written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **o: empty(*s, **o).fill_(float("nan")))


def seed_of(number):
    return torch.tensor([number], device=DEVICE)


def inputs(rows, columns, dtype=torch.float32):
    """Return what a post-norm block hands over."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x, residual, dy = torch.randn(3, rows, columns, generator=generator).to(DEVICE, dtype)
    gamma, beta, b = torch.randn(3, columns, generator=generator).to(DEVICE)
    return {"x": x, "residual": residual, "dy": dy, "gamma": gamma, "beta": beta, "b": b}


def pre_norm(given):
    """Add the gradient of the sum, with which a pre-norm block goes on."""
    generator = torch.Generator().manual_seed(7)
    dsum = torch.randn(given["dy"].shape, generator=generator)
    return {**given, "dsum": dsum.to(DEVICE, given["dy"].dtype)}


def forward(given, p=0.0, seed=None, **options):
    """Return y, s, and what is kept for the backward pass: rows, their mean or None, rstd."""
    parts = [given[name] for name in ("x", "gamma", "beta", "b", "residual")]
    y, s, xhat, mean, rstd = layer_norm.layer_norm_fwd(*parts, p, seed, EPS, **options)
    there = keeps_sum(given["b"], given["residual"], p, s is not None)
    keeps = options.get("keeps", True)
    assert (xhat is not None) == (keeps and not there)
    assert (mean is not None) == (keeps and there) and (rstd is not None) == keeps
    rows = xhat if xhat is not None else given["x"] if s is None else s
    return y, s, (rows, mean, rstd)


def by_pytorch(given, keep, p, normalised, inner, outer):
    """Return s and y, and the gradients ds, dx, dbeta, db, dgamma.

    Bias and dropout are computed in `inner`, the rest in `outer`; where `normalised` is given,
    it is what goes into the LayerNorm in place of s.
    """
    x, b = given["x"].detach().to(inner).requires_grad_(), given["b"]
    z = x if b is None else x + b.to(inner)
    z = (z if keep is None else torch.where(keep, z / (1 - p), 0)).to(outer)
    s = z if given["residual"] is None else z + given["residual"].to(outer)
    into = (s if normalised is None else normalised.to(outer)).detach().requires_grad_()
    gamma = given["gamma"].detach().to(outer).requires_grad_()
    beta = None if given["beta"] is None else given["beta"].to(outer)
    dy = given["dy"].to(outer)
    y = F.layer_norm(into, into.shape[-1:], gamma, beta, EPS)
    ds, dgamma = torch.autograd.grad(y, (into, gamma), dy)
    if "dsum" in given:
        ds = ds + given["dsum"].to(outer)
    (dx,) = torch.autograd.grad(s, x, ds)
    wide = torch.promote_types(outer, torch.float32)
    return s.detach(), y.detach(), ds, dx, dy.to(wide).sum(0), dx.to(wide).sum(0), dgamma


def check(given, p=0.0, dtype=None):
    """Assert the tolerance rule on every output: twice PyTorch's error, above a floor.

    `dtype` is that of everything but x and its gradient.
    """
    inner, outer = given["x"].dtype, dtype or given["x"].dtype
    rows, columns = given["x"].shape
    seed = seed_of(2**62 - 1) if p else None
    keep = kept(rows, columns, p, seed) if p else None
    before = {name: t.clone() for name, t in given.items() if t is not None}
    y, s, saved = forward(given, p, seed, dtype=dtype, returns_sum="dsum" in given)
    backward = (given["dy"], *saved, given["gamma"], given.get("dsum"), p, seed)
    ds, dx, sums = layer_norm.layer_norm_bwd(*backward, dx_dtype=inner, needs_dgamma=True)
    assert all(torch.equal(given[name], t) for name, t in before.items())
    assert (s is None) == ("dsum" not in given)
    assert (dx is ds) == (not p and inner == outer)

    exact = by_pytorch(given, keep, p, s, torch.float64, torch.float64)
    same = by_pytorch(given, keep, p, s, inner, outer)
    names = ("s", "y", "ds", "dx", "dbeta", "db", "dgamma")
    for name, ours, true, theirs in zip(names, (s, y, ds, dx, *sums), exact, same):
        if ours is None:
            continue
        summed = name in ("dbeta", "db", "dgamma")
        expected = torch.float32 if summed else inner if name == "dx" else outer
        assert ours.dtype == expected and ours.shape == true.shape, name
        # xhat is kept in 16 bits, one rounding that PyTorch's fp32 statistics lack
        unit = torch.finfo(outer if summed else expected).eps
        floor = 2 * unit * max(true.abs().max().item(), exact[2].abs().max().item())
        floor *= rows**0.5 if summed else 1
        error = (ours.double() - true).abs().max().item()
        assert error <= 2 * (theirs.double() - true).abs().max().item() + floor, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_every_part_together_is_as_exact_as_pytorch(dtype, p):
    check(inputs(40, 96, dtype), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_sum_and_its_gradient_are_as_exact_as_pytorch(dtype, p):
    check(pre_norm(inputs(40, 96, dtype)), p)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape):
    check(inputs(*shape, torch.bfloat16), 0.1)
    check(pre_norm(inputs(*shape, torch.float32)))


@pytest.mark.parametrize("absent", ["residual", "beta", "b", "all"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_each_part_may_be_absent(absent, p):
    given = inputs(20, 48)
    for name in ("residual", "beta", "b"):
        if absent in (name, "all"):
            given[name] = None
    check(given, p)
    check(pre_norm(given), p)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_inputs_of_any_strides(p):
    full = pre_norm(inputs(48, 48))
    turned = {name: full[name].t() for name in ("x", "dy")}
    check({**full, **turned, "residual": full["residual"][:1].expand(48, 48)}, p)
    spread = {name: full[name][:1, :1].expand(48, 48) for name in ("dy", "residual")}
    check({**full, **spread, "dsum": full["dsum"].t(), "x": full["x"][:1].expand(48, 48)}, p)
    check({**full, "dsum": full["dsum"][:1, :1].expand(48, 48)}, p)
    cut = {name: full[name][1::2, ::3] for name in ("x", "residual", "dy", "dsum")}
    check({**cut, "gamma": full["gamma"][:16], "beta": None, "b": full["b"][:16]}, p)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_the_linear_is_in_16_bits_and_the_rest_in_32(low, p):
    given = pre_norm(inputs(40, 96))
    given["x"] = given["x"].to(low)
    check(given, p, torch.float32)
    del given["dsum"]
    check(given, p, torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize(
    ("ds_dtype", "dx_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
    ],
)
def test_each_gradient_is_rounded_to_its_own_dtype_and_summed_before(ds_dtype, dx_dtype, p):
    given, seed = pre_norm(inputs(30, 70)), seed_of(5)
    _, _, saved = forward(given, p, seed)
    backward = (given["dy"], *saved, given["gamma"], given["dsum"], p, seed)
    wide = layer_norm.layer_norm_bwd(*backward)
    ds, dx, sums = layer_norm.layer_norm_bwd(*backward, ds_dtype, dx_dtype)
    assert torch.equal(ds, wide[0].to(ds_dtype)) and ds.dtype == ds_dtype
    assert torch.equal(dx, wide[1].to(dx_dtype)) and dx.dtype == dx_dtype
    assert torch.equal(sums, wide[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_pytorchs_own_and_is_normalised_as_rounded(dtype):
    given = {**inputs(30, 70, dtype), "b": None}
    y, s, saved = forward(given, returns_sum=True)
    # the interpreter cuts off what the GPU rounds to bf16
    if not (INTERPRETED and dtype == torch.bfloat16):
        assert torch.equal(s, given["x"] + given["residual"])
    # so it does not matter whether s was there before
    of_sum, _, again = forward({**given, "x": s, "residual": None})
    assert torch.equal(of_sum, y)
    assert all(torch.equal(*pair) for pair in zip(saved, again))


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("returns_sum", [False, True])
def test_without_a_backward_pass_nothing_is_kept(p, returns_sum):
    given, options = inputs(21, 40, torch.bfloat16), {"p": p, "seed": seed_of(5)}
    y, s, _ = forward(given, **options, returns_sum=returns_sum)
    again, total, _ = forward(given, **options, returns_sum=returns_sum, keeps=False)
    assert torch.equal(again, y)
    assert torch.equal(total, s) if returns_sum else total is s is None


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_same_inputs_give_the_same_bits(p):
    given, seed = pre_norm(inputs(150, 33)), seed_of(5)

    def both_passes():
        y, s, saved = forward(given, p, seed, returns_sum=True)
        backward = (given["dy"], *saved, given["gamma"], given["dsum"], p, seed)
        return y, s, *saved, *layer_norm.layer_norm_bwd(*backward, needs_dgamma=True)

    assert all(torch.equal(*pair) for pair in zip(both_passes(), both_passes()))


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("launches", [1, 2])
def test_only_what_is_needed_is_summed(launches, p, monkeypatch):
    given, seed = pre_norm(inputs(90, 40, torch.bfloat16)), seed_of(5)
    _, _, saved = forward(given, p, seed)
    backward = (given["dy"], *saved, given["gamma"], given["dsum"], p, seed, None, None)
    ds, dx, sums = layer_norm.layer_norm_bwd(*backward, True, True, True)
    if launches == 2:  # as for a wide row
        monkeypatch.setattr(layer_norm, "_MAX_COLUMNS_THREE_SUMS", 39)
    for needs in itertools.product((False, True), repeat=3):
        some = layer_norm.layer_norm_bwd(*backward, *needs)
        assert torch.equal(some[0], ds) and torch.equal(some[1], dx)
        assert torch.equal(some[2], sums[list(needs)])


def test_wide_rows():
    check(inputs(2, 8192, torch.bfloat16), 0.1)
    check(pre_norm(inputs(3, 5000)))


def test_a_row_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="8193 columns are more than the 8192"):
        forward(inputs(1, 8193))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_alone_keeps_its_input_and_is_as_exact_as_pytorch(dtype):
    given = {**inputs(40, 96, dtype), "b": None, "residual": None}
    assert forward(given)[-1][0] is given["x"]
    check(given)
    check(
        {
            **given,
            "x": given["x"][::2, ::3],
            "dy": given["dy"][::2, :32],
            "gamma": given["gamma"][:32],
            "beta": None,
        }
    )


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_no_rows_give_zero_gradients(p):
    given, seed = pre_norm(inputs(0, 32)), seed_of(5)
    y, s, saved = forward(given, p, seed, returns_sum=True)
    backward = (given["dy"], *saved, given["gamma"], given["dsum"], p, seed)
    ds, dx, sums = layer_norm.layer_norm_bwd(*backward, needs_dgamma=True)
    assert y.shape == s.shape == ds.shape == dx.shape == (0, 32)
    assert torch.equal(sums, torch.zeros(3, 32, device=DEVICE))


def test_no_columns_give_nothing():
    given = inputs(5, 0)
    y, _, saved = forward(given)
    found = layer_norm.layer_norm_bwd(given["dy"], *saved, given["gamma"], needs_dgamma=True)
    assert [t.shape for t in (y, *found)] == [(5, 0)] * 3 + [(3, 0)]


@pytest.mark.parametrize("shape", [(1, 1), (70, 51), (3, 1030)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_both_passes_drop_what_the_definition_drops(shape, p):
    given, seed = inputs(*shape), seed_of(99)
    given.update(residual=None, b=None)
    keep = kept(*shape, p, seed)
    _, s, saved = forward(given, p, seed, returns_sum=True)
    assert torch.equal(s != 0, keep)
    dsum = torch.full(shape, 100.0, device=DEVICE)
    dy = torch.zeros(shape, device=DEVICE)
    ds, dx, *_ = layer_norm.layer_norm_bwd(dy, *saved, given["gamma"], dsum, p, seed)
    assert torch.equal(ds, dsum)
    assert torch.equal(dx != 0, keep)


@pytest.mark.parametrize("rows", [1, 100, 8192, 32768])
@pytest.mark.parametrize("columns", [1, 768, 1500, 4096, 8192])
def test_the_configuration_fits_a_row_and_keeps_partial_rows_few(rows, columns):
    config = layer_norm.layer_norm_config(rows, columns, 132)
    assert columns <= config["BLOCK_N"] <= max(16, 2 * columns)
    for size in ("BLOCK_M", "BLOCK_N", "num_warps"):
        assert config[size] & (config[size] - 1) == 0
    assert 1 <= config["P"] <= max(1, min(4 * 132, rows // 4))
