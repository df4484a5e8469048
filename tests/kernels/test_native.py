"""The kernels for CPUs against PyTorch in float64, by the rule of twice PyTorch's own error."""

import itertools
import platform

import pytest
import torch
from torch.nn import functional as F

from bitfit_fast.kernels import library, native
from bitfit_fast.kernels._constants import ACTIVATIONS, keeps_sum, quantisation, sum_dtype
from bitfit_fast.ops import activation as activations
from bitfit_fast.ops.dropout import kept

DTYPES = tuple(library.DTYPES)
SHAPES = ((0, 32), (1, 1), (1, 64), (33, 5), (40, 17), (64, 384), (70, 16), (5, 1000))
SEED = torch.tensor([2**62 - 1])
EPS = 1e-5
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def built():
    """Skip where the kernels cannot be built."""
    if reason := library.unavailable():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let every new tensor begin as NaN, so that an element that is not written shows."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def poison(tensor):
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor.fill_(77)

    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **options: poison(new_empty(*args, **options))
    )
    monkeypatch.setattr(torch, "empty", lambda *args, **options: poison(empty(*args, **options)))


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def judge(ours, pytorch, exact, roundings=1, terms=None, label=""):
    """Assert that an error is at most twice PyTorch's in the same dtype, above a floor.

    The floor is some roundings of the largest element, and for a sum over tokens what the
    roundings to fp32 of its `terms` add up to if they are at random.
    """
    assert ours.shape == exact.shape, label
    if not ours.numel():
        return
    error = (ours.double() - exact).abs().max().item()
    floor = roundings * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    if terms is not None and terms.numel():
        floor += 2.0**-23 * len(terms) ** 0.5 * terms.abs().max().item()
    allowed = 2 * (pytorch.double() - exact).abs().max().item() + floor
    assert error <= allowed, (label, error, allowed)


# ------------------------------------------------------------------------------------ LayerNorm


def norm_inputs(rows, columns, dtype=torch.float32, residual_dtype=None):
    """Return what a pre-norm block hands over; the gradients are of the sum's dtype."""
    residual_dtype = residual_dtype or dtype
    wide = torch.promote_types(dtype, residual_dtype)
    return {
        "x": randn(rows, columns, dtype=dtype, seed=1),
        "residual": randn(rows, columns, dtype=residual_dtype, seed=2),
        "dy": randn(rows, columns, dtype=wide, seed=3),
        "dsum": randn(rows, columns, dtype=wide, seed=4),
        "gamma": randn(columns, seed=5),
        "beta": randn(columns, seed=6),
        "b": randn(columns, seed=7),
    }


def norm_forward(given, p=0.0, seed=None, keeps=True, returns_sum=True):
    """Return y, s or None, and what the backward pass takes: rows, their mean or None, rstd."""
    parts = [given[name] for name in ("x", "gamma", "beta", "b", "residual")]
    outputs = native.layer_norm_fwd(*parts, p, seed, EPS, keeps, returns_sum)
    y, s = outputs[0], outputs[1] if returns_sum else None
    if not keeps:
        assert len(outputs) == 1 + returns_sum
        return y, s, None
    first, rstd = outputs[1 + returns_sum :]
    if keeps_sum(given["b"], given["residual"], p, returns_sum):
        return y, s, (given["x"] if s is None else s, first, rstd)
    return y, s, (first, None, rstd)


def norm_backward(given, saved, p, seed, needs=(True, True, True)):
    residual = given["x"] if given["residual"] is None else given["residual"]
    dtypes = (residual.dtype, given["x"].dtype)
    return native.layer_norm_bwd(
        given["dy"], *saved, given["gamma"], given["dsum"], p, seed, *dtypes, *needs
    )


def norm_by_pytorch(given, keep, p, exact):
    """Return s, y and the gradients, by autograd in the dtypes given or in float64."""
    given = {n: t if t is None or not exact else t.double() for n, t in given.items()}
    x = given["x"].detach().requires_grad_()
    z = x if given["b"] is None else x + given["b"].to(x.dtype)
    z = z if keep is None else torch.where(keep, z / (1 - p), 0)
    residual = given["residual"]
    if residual is not None:
        residual = residual.detach().requires_grad_()
    s = z if residual is None else residual + z
    gamma = given["gamma"].detach().to(s.dtype).requires_grad_()
    beta = None if given["beta"] is None else given["beta"].to(s.dtype)
    y = F.layer_norm(s, s.shape[-1:], gamma, beta, EPS)
    outs, dys = [y], [given["dy"]]
    if given["dsum"] is not None:
        outs, dys = [y, s], [given["dy"], given["dsum"]]
    wanted = [x, gamma] + ([residual] if residual is not None else [])
    dx, dgamma, *ds = torch.autograd.grad(outs, wanted, dys)
    wide = torch.promote_types(s.dtype, torch.float32)
    found = {"s": s, "y": y, "dx": dx, "dgamma": dgamma}
    found |= {"dbeta": given["dy"].to(wide).sum(0), "db": dx.to(wide).sum(0)}
    found |= {"ds": ds[0]} if ds else {}
    return {name: t.detach() for name, t in found.items()}


def check_norm(given, p=0.0, returns_sum=True):
    if not returns_sum:
        given = {**given, "dsum": None}
    rows, columns = given["x"].shape
    seed = SEED if p else None
    keep = kept(rows, columns, p, seed) if p else None
    before = {name: t.clone() for name, t in given.items() if t is not None}
    y, s, saved = norm_forward(given, p, seed, returns_sum=returns_sum)
    ds, dx, sums = norm_backward(given, saved, p, seed)
    assert all(torch.equal(given[name], t) for name, t in before.items())
    ours = {"y": y, "ds": ds, "dx": dx} | dict(zip(("dbeta", "db", "dgamma"), sums))
    ours |= {"s": s} if returns_sum else {}
    wide = sum_dtype(given["x"], given["residual"])
    residual_dtype = wide if given["residual"] is None else given["residual"].dtype
    dtypes = {"y": wide, "s": wide, "ds": residual_dtype, "dx": given["x"].dtype}
    exact, same = (norm_by_pytorch(given, keep, p, of) for of in (True, False))
    for name, out in ours.items():
        assert out.dtype == dtypes.get(name, torch.float32), name
        if name not in exact:  # without a residual nothing but x asks for a gradient
            continue
        terms = {"dbeta": given["dy"], "db": dx, "dgamma": given["dy"] * saved[0]}.get(name)
        if terms is not None and rows:
            # PyTorch keeps its statistics in fp32, where the rows are kept in bf16
            unit = torch.finfo(wide).eps * rows**0.5
            floor = 2 * unit * max(terms.abs().max().item(), exact[name].abs().max().item())
            error = (out.double() - exact[name]).abs().max().item()
            assert error <= 2 * (same[name].double() - exact[name]).abs().max() + floor, name
        else:
            judge(out, same[name], exact[name], 2, label=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("returns_sum", [False, True])
def test_layer_norm_is_as_exact_as_pytorch(shape, dtype, p, returns_sum):
    check_norm(norm_inputs(*shape, dtype), p, returns_sum)


@pytest.mark.parametrize("absent", ["residual", "beta", "b", "dsum", "all"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_each_part_of_layer_norm_may_be_absent(absent, p):
    given = norm_inputs(35, 50)
    for name in ("residual", "beta", "b", "dsum"):
        if absent in (name, "all"):
            given[name] = None
    check_norm(given, p)
    check_norm(given, p, returns_sum=False)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES)), ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("returns_sum", [False, True])
def test_x_and_residual_of_two_dtypes(dtypes, p, returns_sum):
    check_norm(norm_inputs(40, 37, *dtypes), p, returns_sum)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_layer_norm_takes_any_strides(p):
    given = norm_inputs(48, 48)
    turned = {name: given[name].t() for name in ("x", "dy", "dsum", "residual")}
    check_norm({**given, **turned}, p)
    check_norm({**given, "residual": given["residual"][:1].expand(48, 48)}, p)
    cut = {name: given[name][1::2, 3:36] for name in ("x", "dy", "dsum", "residual")}
    vectors = {name: given[name][:33] for name in ("gamma", "b")}
    check_norm({**given, **cut, **vectors, "beta": given["beta"][3:36]}, p)
    check_norm({**given, "gamma": given["gamma"].bfloat16(), "b": given["b"].bfloat16()}, p)


def test_without_a_backward_pass_nothing_is_kept():
    given = norm_inputs(21, 40, torch.bfloat16)
    for returns_sum in (False, True):
        y, s, _ = norm_forward(given, returns_sum=returns_sum)
        again, total, _ = norm_forward(given, keeps=False, returns_sum=returns_sum)
        assert torch.equal(again, y)
        assert total is s is None if not returns_sum else torch.equal(total, s)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_only_the_sums_asked_for_are_computed(p):
    given = norm_inputs(70, 33, torch.bfloat16)
    _, _, saved = norm_forward(given, p, SEED)
    ds, dx, sums = norm_backward(given, saved, p, SEED)
    assert (dx is ds) == (not p)
    for needs in itertools.product((False, True), repeat=3):
        some = norm_backward(given, saved, p, SEED, needs)
        assert torch.equal(some[0], ds) and torch.equal(some[1], dx)
        assert torch.equal(some[2], sums[list(needs)])


# ----------------------------------------------------------------------------------- activation


def activation_by_pytorch(x, dh, b, act):
    if x.dtype == torch.float64:
        b = None if b is None else b.double()
        h, _ = activations.forward_definition(x, b, act, False)
        return h, *activations.backward_definition(dh, x, b, act)
    # one step after the other in the dtype given, as a model without these kernels does
    leaves = [x.detach().requires_grad_()]
    leaves += [b.detach().requires_grad_()] if b is not None else []
    h = activations.composed(leaves[0], leaves[1] if b is not None else None, act)
    dz = torch.autograd.grad(h, leaves[0], dh)[0]
    return h.detach(), dz, dz.float().sum(0)


def check_activation(act, x, dh, b=None):
    h, levels = native.activation_fwd(x, b, act, False)
    dz, db = native.activation_bwd(dh, x, b, act)
    assert levels is None and db.dtype == torch.float32
    exact = activation_by_pytorch(x.double(), dh.double(), b, act)
    same = activation_by_pytorch(x, dh, b, act)
    for name, *three in zip(("h", "dz"), (h, dz), same, exact):
        assert three[0].dtype == x.dtype
        judge(*three, roundings=2, label=name)
    judge(db, same[2], exact[2], terms=exact[1], label="db")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_activations_are_as_exact_as_pytorch(act, dtype, bias):
    for shape in SHAPES:
        b = randn(shape[1], seed=9) if bias else None
        check_activation(act, randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=8), b)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    ("scale", "shift"), [(1e-3, 0), (0.01, 0), (0.2, 0), (30, 0), (1, -5), (1, 5), (0.3, -8)]
)
def test_small_large_and_one_sided_inputs(act, scale, shift):
    check_activation(act, scale * randn(200, 100) + shift, randn(200, 100, seed=8))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_take_any_strides(act, dtype):
    x, dh = 2 * randn(40, 40, dtype=dtype), randn(40, 40, dtype=dtype, seed=8)
    check_activation(act, x.t(), dh[:1].expand(40, 40), randn(40))
    check_activation(act, x[::2, 3:36], dh[1::2, 7:40], randn(80)[::2][:33])


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_slope_that_is_kept_gives_the_same_gradients(act, dtype, bias):
    x, dh = 2 * randn(50, 33, dtype=dtype), randn(50, 33, dtype=dtype, seed=8)
    b = randn(33, seed=9) if bias else None
    h, _ = native.activation_fwd(x, b, act, False)
    expected = native.activation_bwd(torch.ones_like(x), x, b, act)[0]
    slope = torch.empty_like(x)
    assert torch.equal(native.activation_fwd(x, b, act, False, slope)[0], h)
    assert torch.equal(slope, expected)
    own = x.clone()  # which the slope replaces
    assert torch.equal(native.activation_fwd(own, b, act, False, own)[0], h)
    assert torch.equal(own, slope)

    dz, db = native.activation_bwd(dh, slope, None, act, is_slope=True)
    judge(dz, dh * slope, dh.double() * slope.double())
    exact = dh.double() * slope.double()
    judge(db, (dh * slope).float().sum(0), exact.sum(0), terms=exact)
    given = dh.clone()
    again, sums = native.activation_bwd(given, slope, None, act, is_slope=True, in_place=True)
    assert again is given and torch.equal(again, dz) and torch.equal(sums, db)
    # rows that are not one behind the other are left alone
    given = torch.cat((dh, dh), 1)
    again, _ = native.activation_bwd(given[:, :33], slope, None, act, is_slope=True, in_place=True)
    assert torch.equal(again, dz) and torch.equal(given, torch.cat((dh, dh), 1))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_bits_are_those_of_the_definition(act, dtype):
    x, dh = 3 * randn(50, 33, dtype=dtype), randn(50, 33, dtype=dtype, seed=8)
    b = randn(33, seed=9)
    h, levels = native.activation_fwd(x, b, act, True)
    assert torch.equal(h, native.activation_fwd(x, b, act, False)[0])
    _, expected = activations.forward_definition(x, b, act, True)
    apart = (levels.int() - expected.int()).abs()
    assert apart.max() <= 1 and (apart > 0).double().mean() < 0.01
    dz, db = native.activation_bwd(dh, levels, None, act)
    low, step = quantisation(act)
    exact = dh.double() * (levels.double() * step + low)
    judge(dz, (dh.float() * (levels * step + low)).to(dtype), exact)
    judge(db, dz.float().sum(0), exact.sum(0), terms=exact)


# ----------------------------------------------------------------------- sums over rows, dropout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 40)], ids=str)
def test_column_sum_is_as_exact_as_pytorch(dtype, p, shape):
    wide = randn(2 * shape[0], shape[1] + 7, dtype=dtype)
    for dy in (
        wide[: shape[0], 7:].contiguous(),
        wide[::2, 7:],
        wide.t().contiguous().t()[::2, 7:],
    ):
        keep = kept(*shape, p, SEED) if p else torch.ones(shape, dtype=torch.bool)
        exact = torch.where(keep, dy.double() / (1 - p), 0)
        out = native.column_sum(dy, p, SEED if p else None)
        same = torch.where(keep, dy.float() / (1 - p), 0).sum(0)
        assert out.dtype == torch.float32
        judge(out, same, exact.sum(0), terms=exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_drops_what_the_definition_drops(dtype, p, shape):
    wide = randn(2 * shape[0], shape[1] + 7, dtype=dtype)
    for seed in (torch.tensor([0]), torch.tensor([2**32 - 3]), SEED):
        keep = kept(*shape, p, seed)
        assert torch.equal(native.kept(*shape, p, seed), keep)
        for x in (wide[::2, 7:], wide.t().contiguous().t()[::2, 7:]):
            exact = torch.where(keep, x.double() / (1 - p), 0)
            y = native.dropout(x, p, seed)
            assert y.dtype == dtype and torch.equal(y != 0, exact.to(dtype) != 0)
            judge(y, torch.where(keep, x / (1 - p), 0), exact)


@pytest.mark.parametrize("p", [0.0, 1e-7])
def test_so_rare_a_dropout_that_nothing_is_dropped(p):
    x = randn(40, 300)
    assert bool(native.kept(40, 300, p, SEED).all())
    judge(native.dropout(x, p, SEED), x, x.double())
    judge(native.column_sum(x, p, SEED), x.sum(0), x.double().sum(0), terms=x)
    check_norm(norm_inputs(40, 300), p)


# -------------------------------------------------------------------------------------- softmax


def attention_inputs(dtype, heads=3, lengths_q=(5, 1, 0, 7), lengths_k=(37, 1, 4, 16), bias=False):
    """Return scores and gradients with garbage behind each length, and where sequences begin."""
    queries, keys = max(lengths_q) + 2, -(-max(lengths_k) // 16) * 16
    scores, gradients = (
        randn(len(lengths_q), heads, queries, keys, dtype=dtype, seed=s) for s in (1, 2)
    )
    for n, (q, k) in enumerate(zip(lengths_q, lengths_k)):
        for t in (scores, gradients):
            t[n, :, q:] = NAN
            t[n, :, :, k:] = NAN
    q, k = (torch.tensor(lengths, dtype=torch.int32) for lengths in (lengths_q, lengths_k))
    starts = (q.cumsum(0) - q).int() + 3  # other sequences come before
    found = {"scores": scores, "gradients": gradients, "q": q, "k": k, "starts": starts}
    # wider than the scores, as one for the longest sequence of all is
    return found | {"bias": randn(heads, queries + 1, keys + 16, seed=3) if bias else None}


def softmax_by_pytorch(given, scale, p, dtype):
    """Return probabilities and the scores' gradients, with zeros behind each length."""
    found = [torch.zeros_like(given["scores"], dtype=dtype) for _ in range(2)]
    heads, keys = given["scores"].shape[1], given["scores"].shape[3]
    tokens = int(given["starts"][-1] + given["q"][-1])
    keep = kept(tokens * heads, keys, p, SEED).view(tokens, heads, keys) if p else None
    for n, (start, q, k) in enumerate(zip(*(given[x].tolist() for x in ("starts", "q", "k")))):
        s = given["scores"][n, :, :q, :k].to(dtype).requires_grad_()
        z = s * scale
        if given["bias"] is not None:
            z = z + given["bias"][:, :q, :k].to(dtype)
        probabilities = torch.softmax(z, -1)
        if p:
            at = keep[start : start + q].transpose(0, 1)[..., :k]
            probabilities = torch.where(at, probabilities / (1 - p), 0)
        found[0][n, :, :q, :k] = probabilities.detach()
        dp = given["gradients"][n, :, :q, :k].to(dtype)
        found[1][n, :, :q, :k] = torch.autograd.grad(probabilities, s, dp)[0]
    return found


def check_softmax(given, scale=0.3, p=0.0, roundings=1):
    scores, gradients = given["scores"].clone(), given["gradients"].clone()
    bias, dtype = given["bias"], scores.dtype
    rest = (given["starts"], given["q"], given["k"], scale, p, SEED if p else None, bias)
    native.softmax_fwd(scores, *rest)
    again = given["scores"].clone()
    native.softmax_bwd(again, gradients, *rest)
    assert torch.equal(again, scores)
    exact, same = (softmax_by_pytorch(given, scale, p, d) for d in (torch.float64, dtype))
    for ours, theirs, true in zip((scores, gradients), same, exact):
        for n, (q, k) in enumerate(zip(given["q"].tolist(), given["k"].tolist())):
            assert not ours[n, :, q:].any() and not ours[n, :, :, k:].any()
        if p:
            assert torch.equal(scores != 0, exact[0].to(dtype) != 0)
        judge(ours, theirs, true, roundings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("bias", [False, True])
def test_softmax_of_sequences_of_any_lengths(dtype, p, bias):
    check_softmax(attention_inputs(dtype, bias=bias), 0.3, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 31, 300])
def test_softmax_of_each_number_of_keys(dtype, p, keys):
    given = attention_inputs(dtype, 2, (4, keys), (keys, max(1, keys - 1)), bias=True)
    check_softmax(given, 0.125, p)


def test_the_only_key_has_all_the_weight_and_no_gradient():
    given = attention_inputs(torch.float32, 2, (3,), (1,))
    rest = (given["starts"], given["q"], given["k"], 0.5, 0.0, None, None)
    native.softmax_bwd(given["scores"], given["gradients"], *rest)
    assert torch.equal(given["scores"][0, :, :3, 0], torch.ones(2, 3))
    assert not given["gradients"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_very_negative_scores(dtype, p):
    given = attention_inputs(dtype)
    given["scores"] -= 1e4
    check_softmax(given, p=p)
    given = attention_inputs(dtype)
    given["scores"][..., 1::3] = -3e38
    check_softmax(given, p=p)
    given["scores"][..., 1::3] = -INF
    check_softmax(given, p=p)
    given["scores"].fill_(-3e38)  # as where every key is masked
    check_softmax(given, p=p)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_bias_may_mask_keys(p):
    given = attention_inputs(torch.float32, bias=True)
    for masked in (-1e9, torch.finfo(torch.float32).min, -INF):
        given["bias"][:, :, 2::4] = masked
        check_softmax(given, p=p)


def test_a_query_without_keys_gets_zeros():
    given = attention_inputs(torch.float32, 2, (3, 2), (0, 5))
    rest = (given["starts"], given["q"], given["k"], 0.5, 0.0, None, None)
    native.softmax_bwd(given["scores"], given["gradients"], *rest)
    assert not given["scores"][0].any() and not given["gradients"][0].any()


def test_a_score_that_is_no_number_makes_its_row_none_and_no_other():
    for wrong in (NAN, INF):
        given = attention_inputs(torch.float32, 1, (3,), (21,))
        given["scores"][0, 0, 1, 18] = wrong
        rest = (given["starts"], given["q"], given["k"], 0.5, 0.0, None, None)
        native.softmax_bwd(given["scores"], given["gradients"], *rest)
        for t in (given["scores"], given["gradients"]):
            assert bool(t[0, 0, 1, 18].isnan()) and bool(t[0, 0, [0, 2], :21].isfinite().all())
        if wrong != wrong:
            assert bool(given["scores"][0, 0, 1, :21].isnan().all())


# ------------------------------------------------------------------------------ packed to padded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 8, 19])
@pytest.mark.parametrize("lengths", [(5, 1, 0, 7), (4,), (3, 3)])
def test_rows_are_spread_to_padded_sequences_and_gathered_again(dtype, size, lengths):
    heads, longest = 3, max(lengths) + 2
    lengths = torch.tensor(lengths, dtype=torch.int32)
    starts = (lengths.cumsum(0) - lengths).int()
    full = randn(int(lengths.sum()), 3, heads, size, dtype=dtype)
    for part in range(3):
        packed = full[:, part]  # as of one product for q, k and v
        padded = native.spread(packed, starts, lengths, longest)
        assert padded.shape == (len(lengths), heads, longest, size) and padded.dtype == dtype
        for n, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist())):
            rows = packed[start : start + length].transpose(0, 1)
            assert torch.equal(padded[n, :, :length], rows)
            assert not padded[n, :, length:].any()
            padded[n, :, length:] = NAN  # which nobody reads
        found = torch.full_like(full, -1)
        native.gather(padded, starts, lengths, found[:, part])
        assert torch.equal(found[:, part], packed)
        others = [i for i in range(3) if i != part]
        assert bool((found[:, others] == -1).all())


# ------------------------------------------------------------------------------- not-a-number


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("column", [0, 15, 16, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_in_its_row_or_column(wrong, column, dtype):
    others = [i for i in range(21) if i != column]
    for name in ("x", "residual", "b", "dy", "dsum", "gamma"):
        given = norm_inputs(40, 21, dtype)
        given[name][(column,) if given[name].dim() == 1 else (33, column)] = wrong
        y, s, saved = norm_forward(given)
        ds, dx, sums = norm_backward(given, saved, 0.0, None)
        if name in ("x", "residual"):
            assert bool(y[33].isnan().all()) and bool(y[:33].isfinite().all())
            assert bool(dx[33].isnan().all()) and bool(ds[:33].isfinite().all())
            assert not bool(s[33, column].isfinite()) and bool(s[33, others].isfinite().all())
        if name == "b":
            assert bool(y.isnan().all())
        if name == "gamma":
            assert not bool(y[:, column].isfinite().any())
            assert bool(y[:, others].isfinite().all())
        if name in ("dy", "dsum"):
            assert not bool(dx[33, column].isfinite()) and bool(dx[:33].isfinite().all())
            assert not bool(sums[1, column].isfinite())
        if name == "dy":
            assert not bool(sums[0, column].isfinite()) and bool(sums[0, others].isfinite().all())
    x = randn(40, 21, dtype=dtype)
    x[33, column] = wrong
    for out in (native.column_sum(x), native.column_sum(x, 1e-7, SEED)):
        assert not bool(out[column].isfinite()) and bool(out[others].isfinite().all())
    assert not bool(native.dropout(x, 1e-7, SEED)[33, column].isfinite())


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_what_is_no_number_are_pytorchs(act, dtype):
    x = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 3e38, -3e38, 1e5, -1e5, 1e-30], dtype=dtype)
    x = x.repeat(3, 2)
    ones = torch.ones_like(x)
    h, _ = native.activation_fwd(x, None, act, False)
    dz, db = native.activation_bwd(ones, x, None, act)
    exact = activation_by_pytorch(x.double(), ones.double(), None, act)
    numbers = x.isfinite()
    for out, true in ((h, exact[0]), (dz, exact[1])):
        # float64 does not overflow where fp32 may, in factors that are then 0
        sane = numbers & (x.abs() < 1e18)
        torch.testing.assert_close(out[sane], true[sane].to(dtype), rtol=1e-2, atol=1e-6)
    assert bool(h[x.isnan()].isnan().all())
    if act != "relu":
        assert bool(dz[x.isnan()].isnan().all()) and bool(db[[0, 10]].isnan().all())
    assert torch.equal(h[x == INF], exact[0][x == INF].to(dtype))
    dh = ones.clone()
    dh[1, 3] = NAN
    dz, db = native.activation_bwd(dh, torch.ones_like(x), None, act)
    assert bool(dz[1, 3].isnan()) and dz.isnan().sum() == 1
    assert bool(db[3].isnan()) and db.isnan().sum() == 1


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, 0x7FFF8000])
@pytest.mark.parametrize("act", ["relu", "gelu", "silu"])
def test_no_kind_of_not_a_number_is_rounded_to_one(act, bits):
    """Not those of other devices, either, whose bits would carry into the sign."""
    b = torch.tensor(bits, dtype=torch.int32).view(torch.float32).repeat(40)
    assert bool(b.isnan().all())
    h, _ = native.activation_fwd(randn(3, 40, dtype=torch.bfloat16), b, act, False)
    assert bool(h.isnan().all())


# ---------------------------------------------------------------------------------- determinism


def everything(dtype):
    """Return the results of every kernel on shapes of several blocks of rows."""
    given = norm_inputs(150, 70, dtype)
    found = []
    for p in (0.0, 0.2):
        y, s, saved = norm_forward(given, p, SEED)
        found += [y, s, *saved, *norm_backward(given, saved, p, SEED)]
        found.append(native.column_sum(given["x"], p, SEED))
        sequences = attention_inputs(dtype, 4, (40, 3, 60), (40, 70, 1), bias=True)
        rest = (sequences["starts"], sequences["q"], sequences["k"], 0.2, p, SEED)
        native.softmax_bwd(sequences["scores"], sequences["gradients"], *rest, sequences["bias"])
        found += [sequences["scores"], sequences["gradients"]]
    found += [native.dropout(given["x"], 0.3, SEED), native.kept(150, 70, 0.3, SEED)]
    for act in ACTIVATIONS:
        found += native.activation_fwd(given["x"], given["b"], act, True)
        found += native.activation_bwd(given["dy"], given["x"], given["b"], act)
    starts, lengths = (torch.tensor(t, dtype=torch.int32) for t in ((0, 90), (90, 60)))
    packed = given["x"].view(150, 7, 10)
    found.append(native.spread(packed, starts, lengths, 91))
    back = torch.zeros_like(packed)
    native.gather(found[-1], starts, lengths, back)
    return [*found, back]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_repetition_nor_threads_change_a_bit(dtype):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, again = everything(dtype), everything(dtype)
        torch.set_num_threads(2)
        two = everything(dtype)
        torch.set_num_threads(5)
        five = everything(dtype)
    finally:
        torch.set_num_threads(threads)
    for expected, *others in zip(one, again, two, five):
        assert all(torch.equal(expected, t) for t in others)


# ------------------------------------------------------------------------------- other machines


def test_a_cpu_with_vectors_of_128_bits_gets_right_results_too(monkeypatch):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("this CPU is no x86-64")
    wide = {dtype: everything(dtype) for dtype in DTYPES}
    flags = ["-march=x86-64" if f == "-march=native" else f for f in library._FLAGS]
    monkeypatch.setattr(library, "_FLAGS", tuple(flags))
    library._loaded.cache_clear()
    try:
        assert library.unavailable() is None and library.lanes() == 4
        for dtype, p in itertools.product(DTYPES, (0.0, 0.2)):
            check_norm(norm_inputs(40, 37, dtype), p)
            check_softmax(attention_inputs(dtype, bias=True), 0.3, p)
            assert torch.equal(native.kept(9, 300, p, SEED), kept(9, 300, p, SEED))
        for dtype, act in itertools.product(DTYPES, ACTIVATIONS):
            x, dh = randn(40, 37, dtype=dtype), randn(40, 37, dtype=dtype, seed=8)
            check_activation(act, x, dh, randn(37))
        for dtype, expected in wide.items():
            within = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
            for found, theirs in zip(everything(dtype), expected, strict=True):
                if found.dtype == torch.uint8:  # a level, which may be the next one
                    assert (found.int() - theirs.int()).abs().max() <= 1
                else:
                    torch.testing.assert_close(found, theirs, rtol=within, atol=within)
    finally:
        library._loaded.cache_clear()
