"""Products, attention and layers' ends against float64, by the rule of twice PyTorch's error."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from bitfit_fast.kernels import library, tiles
from bitfit_fast.kernels._constants import ACTIVATIONS, quantisation
from bitfit_fast.ops import attention as definition
from bitfit_fast.ops.dropout import kept

ROWS = (0, 1, 31, 32, 70)
SHAPES = ((32, 32), (96, 64), (64, 416))
SEED = torch.tensor([2**62 - 1])
BF16 = torch.bfloat16
of_both_dtypes = pytest.mark.parametrize("dtype", [BF16, torch.float32])


@pytest.fixture(autouse=True)
def built():
    """Skip where the kernels cannot be built, or the CPU is another."""
    if reason := library.unavailable():
        pytest.skip(reason)
    if not library.has_tiles():
        pytest.skip("this CPU has no vectors of 256 bits that multiply and add (AVX2, FMA)")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let every new tensor begin as NaN, so that an element that is not written shows."""
    new_empty = torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(77)

    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **options: poison(new_empty(*args, **options))
    )


def randn(*shape, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def judge(ours, pytorch, exact, roundings=2, label=""):
    """Assert that an error is at most twice PyTorch's, above a floor of its dtype's roundings."""
    assert ours.shape == exact.shape, label
    if not ours.numel():
        return
    error = (ours.double() - exact).abs().max().item()
    theirs = (pytorch.double() - exact).abs().max().item()
    size = exact.abs().max().item()
    assert error <= 2 * theirs + roundings * torch.finfo(ours.dtype).eps * size, (label, error)


def test_rows_of_another_length_are_refused():
    """They would be read beyond their end."""
    weight, act = tiles.pack(randn(64, 96)), "gelu"
    kept = randn(8, 96)
    for x in (randn(8, 96), randn(8, 32)):
        with pytest.raises(AssertionError):
            tiles.linear(x, weight)
        with pytest.raises(AssertionError):
            tiles.linear_activation(x, weight, None, act, False, True)
        with pytest.raises(AssertionError):
            tiles.linear_activation_bwd(x, weight, kept, None, act, False)
    with pytest.raises(AssertionError):
        tiles.linear(randn(8, 64), weight, onto=randn(8, 64))
    norms = [tiles.Norm(*[torch.ones(64)] * 3, 1e-12, 0.0, None)] * 2
    square, wide, narrow = (tiles.pack(randn(*s)) for s in ((64, 64), (64, 96), (96, 64)))
    x = randn(8, 64)
    for weights in ((square, narrow, wide), (wide, wide, narrow), (square, wide, wide)):
        with pytest.raises(AssertionError):
            tiles.layer_end(x, x, weights, norms, None, act, False, False)
    with pytest.raises(AssertionError):
        tiles.layer_end(randn(8, 96), x, (square, wide, narrow), norms, None, act, False, False)


def unpacked(packed):
    """Return `[planes, K, N]` of what was packed."""
    panels, steps = packed.columns // 32, packed.depth // 32
    data = packed.data.view(-1, panels, steps, 1024)
    lanes = library.lanes()
    if data.dtype == torch.float32:
        parts = data.view(-1, panels, steps, 32, 32)
    elif library.layout(torch.bfloat16).pairs:
        # left and right half, pair of rows, column, row of the pair
        parts = data.view(-1, panels, steps, 2, 16, 16, 2).permute(0, 1, 2, 4, 6, 3, 5)
    else:  # row, pair of vectors, lane, vector of the pair
        parts = data.view(-1, panels, steps, 32, 16 // lanes, lanes, 2).transpose(5, 6)
    return parts.reshape(-1, panels, packed.depth, 32).transpose(1, 2).flatten(2)


@of_both_dtypes
def test_packed_weights_hold_every_number_once(dtype):
    weight = (torch.arange(96 * 64).view(96, 64) % 8191 / 64).to(dtype)
    for operand in (weight, weight.t().contiguous().t()):
        assert torch.equal(unpacked(tiles.pack(operand)).float().sum(0), weight.float())


@of_both_dtypes
def test_the_parts_of_a_number_are_exactly_that(dtype):
    numbers = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-23, -(2 - 2**-23), 1 / 3, 3e38, -1e-30])
    weight = torch.cat((numbers, randn(32 * 32 - 8, dtype=torch.float32))).view(32, 32).to(dtype)
    packed = tiles.pack(weight)
    assert torch.equal(unpacked(packed).float().sum(0), weight.float())
    assert packed.data.nbytes == tiles.packed_bytes(weight)


@of_both_dtypes
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(rows, shape, dtype):
    depth, columns = shape
    x, weight = randn(rows, depth, dtype=dtype), randn(depth, columns, dtype=dtype)
    b = randn(columns, dtype=torch.float32)
    packed = tiles.pack(weight)
    exact = x.double() @ weight.double()
    judge(tiles.linear(x, packed), x @ weight, exact)
    judge(tiles.linear(x, packed, b), (x @ weight + b).to(dtype), exact + b)
    onto = randn(rows, columns, seed=1, dtype=dtype)
    sum_of = onto.double() + exact
    theirs = onto.addmm(x, weight)
    assert tiles.linear(x, packed, onto=onto) is onto
    judge(onto, theirs, sum_of)


@of_both_dtypes
def test_a_deep_product_goes_part_by_part(dtype):
    depth = 3200  # more than the cache of any kind of CPU is taken to hold rows of
    x, weight = randn(40, depth, dtype=dtype), randn(depth, 64, dtype=dtype)
    b = randn(64, dtype=torch.float32)
    exact = x.double() @ weight.double()
    ours = tiles.linear(x, tiles.pack(weight))
    judge(ours, x @ weight, exact)
    judge(tiles.linear(x, tiles.pack(weight), b), (x @ weight + b).to(dtype), exact + b)
    # each row alone takes the same parts
    assert torch.equal(tiles.linear(x[33:34], tiles.pack(weight)), ours[33:34])


@of_both_dtypes
def test_the_operands_may_be_views(dtype):
    wide, weight = randn(40, 200, dtype=dtype), randn(64, 96, dtype=dtype)
    x = wide[:, 3:67]
    expected = tiles.linear(x.contiguous(), tiles.pack(weight))
    assert torch.equal(tiles.linear(x, tiles.pack(weight)), expected)
    turned = weight.t().contiguous().t()
    assert torch.equal(tiles.linear(x, tiles.pack(turned)), expected)
    packed = tiles.pack(weight)
    assert torch.equal(tiles.linear(x, packed[:, 32:96]), expected[:, 32:96])
    lower = tiles.linear(x[:, 32:], packed[32:64, :])
    assert torch.equal(lower, tiles.linear(x[:, 32:].contiguous(), tiles.pack(weight[32:])))


@of_both_dtypes
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 70])
def test_linear_and_activation(act, rows, dtype):
    x, weight = randn(rows, 96, dtype=dtype), randn(96, 64, dtype=dtype) / 10
    back, dy = randn(32, 64, dtype=dtype) / 10, randn(rows, 32, dtype=dtype)
    b = randn(64, dtype=torch.float32)
    u = (x.double() @ weight.double() + b).requires_grad_()
    h = _act(u, act)
    (slope,) = torch.autograd.grad(h.sum(), u)
    exact_dz = (dy.double() @ back.double()) * slope
    ours, kept_slope = tiles.linear_activation(x, tiles.pack(weight), b, act, False, True)
    theirs = _act((x @ weight + b).to(dtype), act)
    judge(ours, theirs, h.detach())
    again, levels = tiles.linear_activation(x, tiles.pack(weight), b, act, True, True)
    assert torch.equal(again, ours)
    alone, nothing = tiles.linear_activation(x, tiles.pack(weight), b, act, False, False)
    assert torch.equal(alone, ours) and nothing is None
    _, step = quantisation(act)
    their_u = (x @ weight + b).to(dtype).requires_grad_()
    _act(their_u, act).backward(dy @ back)
    their_dz = their_u.grad
    eps = torch.finfo(dtype).eps
    # of 8 bits, half a level at most, on top
    error = 0.51 * step * (dy.double() @ back.double()).abs().max().item()
    for what, given, is_slope in (
        ("slope", kept_slope, True),
        ("levels", levels, True),
        ("input", (u.detach() - b).to(dtype), False),
    ):
        dz, db = tiles.linear_activation_bwd(dy, tiles.pack(back), given, b, act, is_slope)
        extra = error if what == "levels" else 0
        if act == "relu" and what == "input":  # at zero a rounded input says another thing
            continue
        worst = (dz.double() - exact_dz).abs().max().item()
        allowed = 2 * (their_dz.double() - exact_dz).abs().max().item() + extra
        assert worst <= allowed + 2 * eps * exact_dz.abs().max().item(), what
        # the sum is taken before dz is rounded
        assert (db.double() - dz.double().sum(0)).abs().max() <= rows * eps * dz.abs().max()


def _act(u, act):
    return {
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
        "tanh": torch.tanh,
    }[act](u)


# ---------------------------------------------------------------------------------- attention

LENGTHS = ((5,), (32, 1, 33), (64, 17, 70, 31))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("one_query", [False, True])
@of_both_dtypes
def test_attention(lengths, size, p, has_bias, one_query, dtype):
    heads, tokens, longest = 3, sum(lengths), max(lengths)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    q, k, v = randn(tokens, 3, heads, size, dtype=dtype).unbind(1)
    starts_q = starts
    if one_query:
        q = randn(len(lengths), heads, size, seed=1, dtype=dtype)
        starts_q = torch.arange(len(lengths) + 1, dtype=torch.int32)
    do = randn(*q.shape, seed=2, dtype=dtype)
    seed = SEED if p else None
    bias = randn(heads, longest, longest, dtype=torch.float32) if has_bias else None
    keep = kept(q.shape[0] * heads, longest, p, SEED) if p else None
    rest = (starts_q, starts, p, keep, bias)
    padded = None if bias is None else F.pad(bias, (0, -longest % 16))

    o = tiles.attention_fwd(q, k, v, starts_q, starts, p, seed, padded)
    exact = definition.forward_definition(q.double(), k.double(), v.double(), *rest)
    judge(o, definition.forward_definition(q, k, v, *rest), exact, roundings=4)

    exact_dq, exact_dkv = definition.backward_definition(
        do.double(), q.double(), k.double(), v.double(), *rest
    )
    their_dq, their_dkv = definition.backward_definition(do, q, k, v, *rest)
    dq, dkv = q.new_empty(q.shape), k.new_empty(tokens, 2, heads, size)
    tiles.attention_bwd(do, q, k, v, starts_q, starts, p, seed, padded, dq, dkv)
    judge(dq, their_dq, exact_dq, roundings=4, label="dq")
    judge(dkv, their_dkv, exact_dkv, roundings=4, label="dkv")
    alone = torch.full_like(dq, float("nan"))
    tiles.attention_bwd(do, q, k, v, starts_q, starts, p, seed, padded, alone, None)
    assert torch.equal(alone, dq)


# -------------------------------------------------------------------- the rest of a layer at once


def norm(width, p, seed):
    gamma, beta, b = (randn(width, dtype=torch.float32, seed=seed + i) for i in range(3))
    return tiles.Norm(1 + gamma / 10, beta, b, 1e-5, p, SEED + seed if p else None)


@pytest.mark.parametrize("rows", [1, 70, 300])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("few_bits", [False, True])
@pytest.mark.parametrize("inner", [96, 800])
@of_both_dtypes
def test_the_end_of_a_layer(rows, p, few_bits, inner, dtype):
    width, act = 64, "gelu"
    shapes = (width, width), (width, inner), (inner, width)
    weights = [randn(*shape, dtype=dtype) / 10 for shape in shapes]
    norms, b = (norm(width, p, 10), norm(width, p, 20)), randn(inner, dtype=torch.float32)
    o, x, dy = (randn(rows, width, seed=i, dtype=dtype) for i in range(3))

    def run(dtype):
        """Return outputs and gradients of PyTorch in a dtype."""
        tensors = [t.to(dtype).requires_grad_() for t in (o, x)]
        vectors = [t.to(dtype).requires_grad_() for t in (
            norms[1].beta, norms[1].b, b, norms[0].beta, norms[0].b)]  # fmt: skip
        out, up, down = (w.to(dtype) for w in weights)

        def junction(z, at, residual, beta, bias):
            z = z + bias
            if at.p:
                z = torch.where(kept(*z.shape, at.p, at.seed), z, 0) / (1 - at.p)
            return F.layer_norm(residual + z, z.shape[1:], at.gamma.to(dtype), beta, at.eps)

        s = junction(tensors[0] @ out, norms[0], tensors[1], vectors[3], vectors[4])
        y = junction(F.gelu(s @ up + vectors[2]) @ down, norms[1], s, vectors[0], vectors[1])
        y.backward(dy.to(dtype))
        return [y.detach(), *(t.grad for t in (*tensors, *vectors))]

    exact, theirs = run(torch.float64), run(dtype)
    floor = 2**-8 if few_bits else torch.finfo(dtype).eps
    packed = tuple(map(tiles.pack, weights))
    back = tuple(tiles.pack(w.t()) for w in weights)
    y, *kept_ = tiles.layer_end(o, x, packed, norms, b, act, few_bits, True)
    (alone,) = tiles.layer_end(o, x, packed, norms, b, act, few_bits, False)
    assert torch.equal(alone, y)
    do, dx, sums = tiles.layer_end_bwd(dy, back, norms, b, act, kept_, [True] * 5)
    for label, ours, their, true in zip(
        ("y", "do", "dx", "end beta", "end b", "up b", "middle beta", "middle b"),
        (y, do, dx, *sums), theirs, exact,
    ):  # fmt: skip
        error, size = (ours.double() - true).norm().item(), true.norm().item()
        allowed = 2 * (their.double() - true).norm().item() + floor * size
        assert error <= allowed, (label, error / size, allowed / size)
    _, _, some = tiles.layer_end_bwd(dy, back, norms, b, act, kept_, [True, False] * 2 + [True])
    assert [s is None for s in some] == [False, True, False, True, False]
    assert all(torch.equal(s, sums[i]) for i, s in enumerate(some) if s is not None)


@of_both_dtypes
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    x, weight = randn(300, 96, dtype=dtype), randn(96, 128, dtype=dtype) / 10
    q, k, v = randn(300, 3, 2, 32, dtype=dtype).unbind(1)
    b = randn(128, dtype=torch.float32)
    starts = torch.tensor([0, 100, 170, 300], dtype=torch.int32)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            h, slope = tiles.linear_activation(x, tiles.pack(weight), b, "gelu", False, True)
            dz, db = tiles.linear_activation_bwd(
                h, tiles.pack(weight.repeat(1, 2).view(128, 192)[:, :128]), slope, b, "gelu", True
            )
            o = tiles.attention_fwd(q, k, v, starts, starts, 0.1, SEED, None)
            found.append([h, slope, dz, db, o])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("shape", [(384, 1536), (768, 768), (384, 40)])
@of_both_dtypes
def test_which_weights_are_packed(lanes, units, shape, dtype, monkeypatch):
    monkeypatch.setattr(library, "lanes", lambda: lanes)
    monkeypatch.setattr(library, "has_matrix_units", lambda: units)
    narrow = lanes == 8 and min(shape) < 512
    expected = not shape[1] % 32 and (dtype == BF16 or units or narrow)
    assert tiles.beat_libraries(randn(*shape, dtype=dtype)) == expected
