"""Rows of tables, their sum and its LayerNorm, under the interpreter or on a GPU, in float64."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import embedding
from bitfit_fast.kernels._launch import INTERPRETED
from bitfit_fast.ops.dropout import kept

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (1, 64), (33, 16), (64, 128), (37, 100), (5, 1500))
SIZES = (50, 30, 2)
EPS = 1e-12


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let every new tensor begin as NaN, so that an element that is not written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **o: empty(*s, **o).fill_(float("nan")))


def inputs(rows, columns, count, dtype=torch.float32):
    """Return scale, shift, ids and tables."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    ids = [torch.randint(size, (rows,), generator=generator) for size in SIZES[:count]]
    tables = [torch.randn(size, columns, generator=generator) for size in SIZES[:count]]
    gamma, beta = torch.randn(2, columns, generator=generator).to(DEVICE)
    return gamma, beta, [i.to(DEVICE) for i in ids], [t.to(DEVICE, dtype) for t in tables]


def by_pytorch(gamma, beta, ids, tables, p, seed, dtype):
    total = sum(F.embedding(index, table.to(dtype)) for index, table in zip(ids, tables))
    beta = None if beta is None else beta.to(dtype)
    y = F.layer_norm(total, total.shape[-1:], gamma.to(dtype), beta, EPS)
    return y if seed is None else torch.where(kept(*y.shape, p, seed), y / (1 - p), 0)


def check(given, dtype, p=0.0, seed=None):
    """Compare with float64: twice PyTorch's error in fp32, and the rounding to the output."""
    given = (*given, p, seed)
    y = embedding.embedding_layer_norm(*given, EPS, dtype)
    exact, theirs = by_pytorch(*given, torch.float64), by_pytorch(*given, torch.float32).to(dtype)
    assert y.dtype == dtype and y.shape == exact.shape
    floor = 2 * torch.finfo(dtype).eps * exact.abs().max()
    error, allowed = (y.double() - exact).abs().max(), (theirs.double() - exact).abs().max()
    assert error <= 2 * allowed + floor
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_it_is_as_exact_as_pytorch(shape, count):
    gamma, beta, *rest = inputs(*shape, count)
    check((gamma, beta, *rest), torch.float32)
    check((gamma, None, *rest), torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_it_drops_what_the_definition_drops(shape, p):
    seed = torch.tensor([2**40 + 5], device=DEVICE)
    y = check(inputs(*shape, 2), torch.float32, p, seed)
    assert torch.equal(y != 0, kept(*shape, p, seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_tables", DTYPES, ids=str)
def test_every_dtype(dtype, of_tables):
    check(inputs(20, 48, 3, of_tables), dtype)


def test_rows_may_lie_apart():
    gamma, beta, ids, tables = inputs(20, 48, 2)
    wide = [torch.cat((table, table), dim=1)[:, :48] for table in tables]
    expected = check((gamma, beta, ids, tables), torch.float32)
    assert torch.equal(check((gamma, beta, ids, wide), torch.float32), expected)


@pytest.mark.parametrize("bad", [-1, 30, 2**40])
def test_an_id_without_a_row_shows(bad):
    given = inputs(20, 48, 2)
    expected = check(given, torch.float32)
    given[2][1][7] = bad
    y = embedding.embedding_layer_norm(*given, 0.0, None, EPS, torch.float32)
    assert y[7].isnan().all()
    others = torch.arange(20, device=DEVICE) != 7
    assert torch.equal(y[others], expected[others])


def test_no_tokens_give_nothing():
    given = (*inputs(0, 32, 3), 0.0, None, EPS, torch.float32)
    assert embedding.embedding_layer_norm(*given).shape == (0, 32)
