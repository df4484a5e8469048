"""Column sums, against PyTorch's."""

import itertools
import sys

import pytest
import torch

from bitfit_fast.ops import column_sum
from bitfit_fast.ops.dropout import kept

definition = sys.modules["bitfit_fast.ops.column_sum"].definition

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(dy, cuts=None, p=0.0, seed=None):
    """Compare with float64; the floor is 16 roundings in a row, more than any sum here has."""
    before, version = dy.clone(), dy._version
    offsets = None if cuts is None else torch.tensor(cuts, device=dy.device)
    out = column_sum(dy, offsets, p, seed)
    assert torch.equal(dy, before) and dy._version == version
    assert torch.equal(column_sum(dy, offsets, p, seed), out)
    keep = kept(*dy.shape, p, seed) if p else torch.ones_like(dy, dtype=torch.bool)

    def summed(values):
        values = torch.where(keep, values / (1 - p), 0)
        if cuts is None:
            return values.sum(0)
        return torch.stack([values[a:b].sum(0) for a, b in itertools.pairwise(cuts)])

    exact, single = summed(dy.double()), summed(dy.float())
    assert out.dtype == torch.float32 and out.shape == exact.shape
    bound = 2 * (single.double() - exact).abs() + 16 * 2.0**-24 * summed(dy.double().abs())
    assert bool(((out.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (300, 33), (40, 129)], ids=str)
def test_the_sum_is_as_exact_as_pytorchs(shape, dtype, randn):
    check(randn(*shape, dtype=dtype))


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_of_float64_the_sum_is_in_float64(randn):
    dy = randn(50, 9, dtype=torch.float64)
    torch.testing.assert_close(column_sum(dy), dy.sum(0), rtol=1e-14, atol=1e-14)


def test_gradients_have_any_strides(randn):
    dy = randn(40, 60)
    for view in (dy.t(), dy[::3, 1::2], dy[:1].expand(40, 60), dy[0, 0].expand(40, 60)):
        check(view)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_each_segment_has_its_own_sum(p, randn, seed):
    for cuts in ([0, 70], [0, 0, 33, 70], [0, 1, 64, 64, 70, 70]):
        check(randn(70, 20), cuts, p, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_dropout_the_sum_runs_over_what_is_kept(dtype, randn, seed):
    check(randn(70, 41, dtype=dtype), p=0.25, seed=seed)


def test_without_rows_or_columns_the_sum_is_empty_or_zero(randn, seed):
    for p in (0.0, 0.5):
        assert column_sum(randn(5, 0), None, p, seed).shape == (0,)
        assert not column_sum(randn(0, 5), None, p, seed).any()


@pytest.mark.parametrize("backend", ["triton", "native"], indirect=True)
def test_the_kernel_equals_the_definition(randn, seed):
    dy = randn(70, 41)
    offsets = torch.tensor([0, 9, 9, 70], device=dy.device)
    for given in (None, offsets):
        found = column_sum(dy, given, 0.25, seed)
        expected = definition(dy, given, 0.25, kept(70, 41, 0.25, seed))
        torch.testing.assert_close(found, expected, rtol=2.0**-19, atol=2.0**-17)
