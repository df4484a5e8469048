"""Bias, dropout, residual and LayerNorm, against PyTorch's own in a row."""

import itertools
import re
import sys

import pytest
import torch
from torch.nn import functional as F

from bitfit_fast.errors import BitFitError
from bitfit_fast.kernels._constants import MAX_COLUMNS
from bitfit_fast.ops import dropout_add_layer_norm, layer_norm
from bitfit_fast.ops.dropout import kept

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5
PARTS = ("beta", "b", "residual")
SUBSETS = [s for n in range(4) for s in itertools.combinations(PARTS, n)]
definition_only = pytest.mark.parametrize("backend", ["torch"], indirect=True)
kernels_only = pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)


def own(p=0.0, seed=None, returns_sum=False):
    def run(x, gamma, beta=None, b=None, residual=None):
        return dropout_add_layer_norm(x, gamma, beta, b, residual, p, EPS, seed, returns_sum)

    return run


def stock(p=0.0, keep=None, returns_sum=False):
    def run(x, gamma, beta=None, b=None, residual=None):
        s = x if b is None else x + b
        if keep is not None:
            s = torch.where(keep.view(x.shape), s / (1 - p), 0)
        s = s if residual is None else residual + s
        y = F.layer_norm(s, s.shape[-1:], gamma, beta, EPS)
        return (y, s) if returns_sum else y

    return run


def part_inputs(randn, shape, dtype=torch.float32, parts=PARTS):
    """Return `x`, `gamma` and the optional parts, the one-dimensional ones in fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    columns = shape[-1]
    inputs = {"x": randn(*shape, dtype=dtype), "gamma": 1 + randn(columns, dtype=wide) / 4}
    optional = {
        "beta": randn(columns, dtype=wide),
        "b": randn(columns, dtype=wide),
        "residual": randn(*shape, dtype=dtype),
    }
    return inputs | {name: optional[name] for name in parts}


@definition_only
@pytest.mark.parametrize("returns_sum", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("parts", SUBSETS, ids=str)
def test_gradients_are_those_of_finite_differences(parts, p, returns_sum, randn, seed):
    inputs = part_inputs(randn, (3, 1, 5), torch.float64, parts)

    def run(*tensors):
        out = own(p, seed, returns_sum)(**dict(zip(inputs, tensors)))
        return out if returns_sum else out[0]

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs.values()])


@definition_only
def test_gradients_of_the_sum_alone_are_those_of_finite_differences(randn, seed):
    inputs = part_inputs(randn, (3, 6), torch.float64)
    names = ("x", "b", "residual")

    def run(*tensors):
        return own(0.3, seed, True)(**inputs | dict(zip(names, tensors)))[1]

    assert torch.autograd.gradcheck(run, [inputs[name].requires_grad_() for name in names])


@definition_only
def test_gradients_of_the_plain_layer_norm_are_those_of_finite_differences(randn):
    x, gamma, beta = part_inputs(randn, (3, 6), torch.float64, ("beta",)).values()
    for leaves in ((x, gamma), (x, gamma, beta)):
        assert torch.autograd.gradcheck(layer_norm, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("returns_sum", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_every_part_together_is_as_exact_as_pytorchs(p, returns_sum, dtype, randn, seed, compare):
    inputs = part_inputs(randn, (40, 33), dtype)
    dys = [randn(40, 33, dtype=dtype) for _ in range(1 + returns_sum)]
    keep = kept(40, 33, p, seed) if p else None
    ours, theirs = own(p, seed, returns_sum), stock(p, keep, returns_sum)
    compare(ours, theirs, inputs, *dys, roundings=2)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("parts", SUBSETS, ids=str)
def test_each_part_may_be_absent(parts, p, randn, seed, compare):
    inputs = part_inputs(randn, (20, 24), parts=parts)
    keep = kept(20, 24, p, seed) if p else None
    compare(own(p, seed), stock(p, keep), inputs, randn(20, 24), roundings=2)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (1, 1), (3, 5, 8), (2, 3, 2, 9)], ids=str)
def test_inputs_have_any_shape(shape, randn, seed, compare):
    inputs = part_inputs(randn, shape)
    rows = inputs["x"].numel() // shape[-1]
    keep = kept(rows, shape[-1], 0.25, seed)
    compare(own(0.25, seed), stock(0.25, keep), inputs, randn(*shape), roundings=2)


@pytest.mark.parametrize("returns_sum", [False, True])
def test_without_rows_the_gradients_are_zero(returns_sum, randn, seed, compare):
    inputs = part_inputs(randn, (2, 0, 9))
    dys = [randn(2, 0, 9) for _ in range(1 + returns_sum)]
    theirs = stock(returns_sum=returns_sum)
    compare(lambda **given: own(0.25, seed, returns_sum)(**given)[: len(dys)], theirs, inputs, *dys)


def test_the_sum_is_returned_only_where_asked_for(randn):
    for rows in (3, 0):
        inputs = part_inputs(randn, (rows, 8))
        assert own()(**inputs)[1] is None
        assert own(returns_sum=True)(**inputs)[1].shape == (rows, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_have_any_strides(dtype, randn, compare):
    base = part_inputs(randn, (12, 12), dtype)
    dy, dsum = randn(12, 12, dtype=dtype), randn(12, 12, dtype=dtype)
    vectors = {name: base[name] for name in ("gamma", "beta", "b")}

    def check(view, vectors=vectors):
        inputs = {"x": view(base["x"]), **vectors, "residual": view(base["residual"])}
        given = (inputs, view(dy), view(dsum))
        compare(own(returns_sum=True), stock(returns_sum=True), *given, roundings=2)

    check(lambda t: t.t())
    check(lambda t: t[:1].expand(12, 12))
    check(lambda t: t[::2, ::3], {name: t[:4] for name, t in vectors.items()})
    check(lambda t: t.view(4, 12, 3).transpose(1, 2), {n: t[:12] for n, t in vectors.items()})


def test_an_expanded_gradient_is_read_as_it_is(randn, compare):
    inputs = part_inputs(randn, (12, 16))
    for dy in (randn(1, 16).expand(12, 16), randn(12, 1).expand(12, 16)):
        compare(own(), stock(), inputs, dy, roundings=2)


def test_vectors_have_any_strides(randn, compare):
    inputs = part_inputs(randn, (5, 12))
    for name in ("gamma", "beta", "b"):
        for vector in (randn(24)[::2], randn(1).expand(12)):
            given = inputs | {name: vector}
            compare(own(), stock(), given, randn(5, 12), roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_fp32_vectors_are_summed_in_fp32(dtype, randn, differentiate):
    inputs = part_inputs(randn, (300, 16), dtype)
    dy = randn(300, 16, dtype=dtype)
    found = differentiate(own(), inputs, [dy])
    assert {found[name].dtype for name in ("gamma", "beta", "b")} == {torch.float32}
    error = (found["beta"].double() - dy.double().sum(0)).abs()
    assert bool((error <= 2.0**-20 * dy.double().abs().sum(0)).all())


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_a_wider_residual_decides_the_dtype_of_the_outputs(low, randn, differentiate):
    inputs = part_inputs(randn, (6, 16), low)
    inputs["residual"] = randn(6, 16)
    found = differentiate(own(returns_sum=True), inputs, [randn(6, 16), randn(6, 16)])
    assert found["y0"].dtype == found["y1"].dtype == torch.float32
    assert (found["x"].dtype, found["residual"].dtype) == (low, torch.float32)
    # the output comes from the sum in fp32, which bf16 would have rounded
    wide = {name: t.double() for name, t in inputs.items()}
    torch.testing.assert_close(found["y0"].double(), stock()(**wide), rtol=2.0**-20, atol=2.0**-20)


def test_every_subset_of_gradients_is_that_of_all(randn, seed, differentiate):
    inputs = part_inputs(randn, (7, 16))
    function, dys = own(0.25, seed, returns_sum=True), [randn(7, 16), randn(7, 16)]
    full = differentiate(function, inputs, dys)
    for size in range(1, len(inputs)):
        for frozen in itertools.combinations(inputs, size):
            some = differentiate(function, inputs, dys, frozen)
            assert some.keys() == full.keys() - set(frozen)
            for name, found in some.items():
                torch.testing.assert_close(found, full[name], rtol=1e-6, atol=1e-6)


# what follows from a sum in bf16 would show how the interpreter rounds it
@kernels_only
@pytest.mark.parametrize(
    ("dtype", "returns_sum"),
    [*((dtype, False) for dtype in DTYPES), (torch.float32, True), (torch.float16, True)],
    ids=str,
)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_kernels_equal_the_definition(p, dtype, returns_sum, randn, seed):
    module = sys.modules["bitfit_fast.ops.layer_norm"]
    inputs = part_inputs(randn, (21, 33), dtype)
    dy, dsum = randn(21, 33, dtype=dtype), randn(21, 33, dtype=dtype)
    keep = kept(21, 33, p, seed) if p else None
    vectors = (inputs["x"], *(inputs[name] for name in ("gamma", "beta", "b", "residual")), p)
    tail = (EPS, dtype, True, returns_sum, dtype)
    found = torch.ops.bitfit_fast.layer_norm_fwd(*vectors, seed, *tail)
    expected = module.forward_definition(*vectors, keep, *tail)
    of_sum = expected[1:] if returns_sum else (expected[1], None, expected[2])
    given = (dy, *of_sum, inputs["gamma"], dsum, p)
    tail = (dtype, dtype, True, True, True)
    found += torch.ops.bitfit_fast.layer_norm_bwd(*given, seed, *tail)
    expected += module.backward_definition(*given, keep, *tail)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        # of 16-bit numbers, the last bit may differ; sums and statistics are in fp32
        close = max(torch.finfo(one.dtype).eps, 2.0**-20)
        torch.testing.assert_close(one, other, rtol=close, atol=close)


@kernels_only
def test_the_output_may_be_wider_than_what_is_kept(randn):
    inputs = part_inputs(randn, (21, 33), torch.bfloat16)
    vectors = (inputs["x"], *(inputs[name] for name in ("gamma", "beta", "b", "residual")), 0.0)
    narrow, wide = torch.bfloat16, torch.float32
    y, xhat, rstd = torch.ops.bitfit_fast.layer_norm_fwd(
        *vectors, None, EPS, wide, True, False, narrow
    )
    expected = torch.ops.bitfit_fast.layer_norm_fwd(
        *vectors, None, EPS, narrow, True, False, narrow
    )
    assert y.dtype == wide
    torch.testing.assert_close(y.to(narrow), expected[0], rtol=2.0**-7, atol=2.0**-7)
    torch.testing.assert_close(xhat, expected[1], rtol=2.0**-7, atol=2.0**-7)
    torch.testing.assert_close(rstd, expected[2])


def names(kept_tensors, inputs):
    """Return which inputs were kept themselves, and the shapes and dtypes of what is new."""
    addresses = {t.data_ptr(): name for name, t in inputs.items()}
    return [addresses.get(t.data_ptr(), (*t.shape, t.dtype)) for t in kept_tensors]


@pytest.mark.parametrize("needs", [*itertools.product([False, True], repeat=5)], ids=str)
def test_only_normalised_rows_and_one_number_a_row_are_kept(needs, randn, saved):
    inputs = part_inputs(randn, (2, 3, 16), torch.bfloat16)
    for t, needed in zip(inputs.values(), needs):
        t.requires_grad_(needed)
    with saved() as kept_tensors:
        own()(**inputs)
    rows = [(6, 16, torch.bfloat16), (6, torch.float32), "gamma"]
    only_beta = not any(needs[i] for i in (0, 1, 3, 4))
    assert names(kept_tensors, inputs) == ([] if only_beta else rows)


def test_of_a_layer_norm_alone_its_input_is_kept_and_two_numbers_a_row(randn, saved):
    inputs = part_inputs(randn, (2, 3, 16), torch.bfloat16, ("beta",))
    for t in inputs.values():
        t.requires_grad_()
    with saved() as kept_tensors:
        own()(**inputs)
    numbers = [(6, torch.float32)] * 2
    assert names(kept_tensors, inputs) == ["x", *numbers, "gamma"]


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_sum_that_is_returned_is_kept_itself(p, randn, seed, saved):
    inputs = part_inputs(randn, (6, 16))
    for t in inputs.values():
        t.requires_grad_()
    with saved() as kept_tensors:
        _, total = own(p, seed if p else None, returns_sum=True)(**inputs)
    expected = ["sum", (6, torch.float32), (6, torch.float32), "gamma", *(["seed"] if p else [])]
    assert names(kept_tensors, inputs | {"sum": total, "seed": seed}) == expected


def test_a_sum_that_was_written_to_is_noticed(randn):
    x = randn(6, 16).requires_grad_()
    y, total = own(returns_sum=True)(x, randn(16))
    total.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dropout_adds_its_seed_to_what_is_kept(randn, seed, saved):
    inputs = part_inputs(randn, (6, 16))
    for t in inputs.values():
        t.requires_grad_()
    with saved() as kept_tensors:
        own(0.25, seed)(**inputs)
    expected = [(6, 16, torch.float32), (6, torch.float32), "gamma", "seed"]
    assert names(kept_tensors, inputs | {"seed": seed}) == expected


class Outputs(torch.utils._python_dispatch.TorchDispatchMode):
    """Count the tensors that the forward pass computes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "layer_norm_fwd" in str(function):
            self.count = len(out)
        return out


def test_nothing_is_computed_for_a_backward_pass_that_cannot_follow(randn):
    inputs = part_inputs(randn, (6, 16))
    for t in inputs.values():
        t.requires_grad_()
    with Outputs() as outputs, torch.no_grad():
        own()(**inputs)
    assert outputs.count == 1


def test_the_same_call_gives_the_same_bits(randn, seed, differentiate):
    inputs, dy = part_inputs(randn, (70, 33), torch.bfloat16), [randn(70, 33)]
    one, two = (differentiate(own(0.25, seed), inputs, dy) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@definition_only
def test_the_definition_has_no_widest_row(randn, compare):
    inputs = part_inputs(randn, (2, MAX_COLUMNS + 1))
    compare(own(), stock(), inputs, randn(2, MAX_COLUMNS + 1), roundings=2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("residual", (1, 3, 8)), ("b", (1,)), ("gamma", (3, 8)), ("beta", (9,))],
)
def test_what_kernels_would_read_beyond_is_refused(name, shape):
    given = {"x": torch.ones(2, 3, 8), "gamma": torch.ones(8), name: torch.ones(shape)}
    must = (2, 3, 8) if name == "residual" else (8,)
    with pytest.raises(
        BitFitError, match=re.escape(f"{name} has shape {shape}, and must have {must}")
    ):
        dropout_add_layer_norm(**given)
