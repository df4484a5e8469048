"""The embeddings' kernel for CPUs against its definition in float64."""

import pytest
import torch

from bitfit_fast.kernels import library, native
from bitfit_fast.ops.dropout import kept
from bitfit_fast.ops.embedding import definition

SHAPES = ((0, 16), (1, 1), (1, 64), (33, 16), (64, 384), (37, 100), (5, 1500))
SIZES = (50, 30, 2)
EPS = 1e-12


@pytest.fixture(autouse=True)
def built():
    """Skip where the kernels cannot be built."""
    if reason := library.unavailable():
        pytest.skip(reason)


def inputs(rows, columns, count):
    """Return scale, shift, ids and tables."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    ids = [torch.randint(size, (rows,), generator=generator) for size in SIZES[:count]]
    tables = [torch.randn(size, columns, generator=generator) for size in SIZES[:count]]
    gamma, beta = torch.randn(2, columns, generator=generator)
    return gamma, beta, ids, tables


@pytest.mark.parametrize("dtype", library.DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_exact_as_pytorch(shape, count, p, dtype):
    gamma, beta, ids, tables = inputs(*shape, count)
    seed = torch.tensor([2**40 + 5])
    keep = kept(*shape, p, seed) if p else None
    for shift in (beta, None):
        y = native.embedding_layer_norm(gamma, shift, ids, tables, p, seed, EPS, dtype)
        theirs = definition(gamma, shift, ids, tables, p, keep, EPS, dtype)
        wide = [table.double() for table in tables]
        exact = definition(gamma, shift, ids, wide, p, keep, EPS, torch.float64)
        assert y.dtype == dtype and y.shape == shape
        if not y.numel():
            continue
        error, allowed = ((t.double() - exact).abs().max() for t in (y, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()
        if p:
            assert not y[~keep].any()


def test_ids_may_lie_apart():
    gamma, beta, ids, tables = inputs(20, 48, 2)
    expected = native.embedding_layer_norm(gamma, beta, ids, tables, 0.0, None, EPS, torch.float32)
    apart = [index[:, None].expand(20, 3).contiguous()[:, 1] for index in ids]
    found = native.embedding_layer_norm(gamma, beta, apart, tables, 0.0, None, EPS, torch.float32)
    assert not apart[0].is_contiguous() and torch.equal(found, expected)


@pytest.mark.parametrize("bad", [-1, 30, 2**40])
def test_an_id_without_a_row_is_refused(bad):
    gamma, beta, ids, tables = inputs(20, 48, 3)
    ids[1][7] = bad
    with pytest.raises(IndexError, match="out of range for a table of 30 rows"):
        native.embedding_layer_norm(gamma, beta, ids, tables, 0.0, None, EPS, torch.float32)
