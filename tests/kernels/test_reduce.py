"""Many sums of partial rows at once, under Triton's interpreter or on a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import _reduce, activation, layer_norm
from bitfit_fast.kernels._launch import INTERPRETED, column_config, processors

DEVICE = "cpu" if INTERPRETED else "cuda"


def randn(*size):
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, generator=generator).to(DEVICE)


def test_each_sum_is_added_where_it_belongs_and_nothing_else_changes():
    partial, out = randn(40_000), randn(2000)
    #: rows, columns, where to; one row alone, more rows than a block, odd widths
    sizes = [(1, 48, 0), (130, 100, 64), (7, 1, 200), (256, 33, 1000), (3, 70, 1930)]
    table, first, expected = [], 5, out.clone()
    for rows, columns, to in sizes:
        table.append((first, rows, columns, columns, to))
        expected[to : to + columns] += _reduce.add_partial_rows(
            partial[first : first + rows * columns].view(1, rows, columns).clone()
        )[0]
        first += rows * columns
    segments = torch.tensor(table, dtype=torch.int32, device=DEVICE)
    _reduce.add_segments(partial, segments, 100, out)
    # the same order of additions, and so the same bits
    assert torch.equal(out, expected)
    # in the place of what is there, what is added to zero
    anew, added = torch.full_like(out, float("nan")), torch.zeros_like(out)
    _reduce.add_segments(partial, segments, 100, anew, adds=False)
    _reduce.add_segments(partial, segments, 100, added)
    for _, columns, to in sizes:
        assert torch.equal(anew[to : to + columns], added[to : to + columns])


def test_rows_may_lie_apart():
    partial, out = randn(60, 24), torch.zeros(8, device=DEVICE)
    table = torch.tensor([(8, 60, 24, 8, 0)], dtype=torch.int32, device=DEVICE)
    _reduce.add_segments(partial.view(-1), table, 8, out)
    torch.testing.assert_close(out, partial[:, 8:16].sum(0))


def test_no_sums_do_nothing():
    out = torch.ones(4, device=DEVICE)
    table = torch.empty(0, 5, dtype=torch.int32, device=DEVICE)
    _reduce.add_segments(randn(4), table, 0, out)
    assert out.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("rows", [0, 1, 70])
def test_first_stages_alone_write_what_the_second_adds(rows):
    dy, kept, gamma, rstd = randn(rows, 40), randn(rows, 40), randn(40), randn(rows)
    sizes = layer_norm.layer_norm_config(rows, 40, processors(dy))["P"]
    partial = torch.full((2, sizes, 40), float("nan"), device=DEVICE)
    *given, sums = layer_norm.layer_norm_bwd(dy, kept, None, rstd, gamma)
    *alone, same = layer_norm.layer_norm_bwd(dy, kept, None, rstd, gamma, partial=partial)
    assert same is partial and torch.equal(alone[0], given[0])
    assert torch.equal(_reduce.add_partial_rows(partial), sums)

    sizes = column_config(rows, 40, processors(dy))["P"]
    partial = torch.full((1, sizes, 40), float("nan"), device=DEVICE)
    dz, db = activation.activation_bwd(dy, kept, gamma)
    other, same = activation.activation_bwd(dy, kept, gamma, partial=partial)
    assert same is partial and torch.equal(other, dz)
    assert torch.equal(_reduce.add_partial_rows(partial)[0], db)
