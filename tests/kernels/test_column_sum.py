"""The column sum under Triton's interpreter, or natively on a GPU, against PyTorch."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import _reduce, column_sum
from bitfit_fast.kernels._launch import INTERPRETED, column_config
from bitfit_fast.ops.dropout import kept

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (1, 64), (7, 16), (64, 128), (129, 100), (300, 33), (128, 257))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let every new tensor begin as NaN, so that an element that is not written shows."""
    empty = torch.empty

    def nan(*size, **options):
        return empty(*size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", nan)


def gradient(rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randn(rows, columns, generator=generator).to(DEVICE, dtype)


def check(dy, offsets=None, p=0.0):
    """Compare with float64: at most twice PyTorch's own fp32 error, above a floor.

    The floor is the worst case of 16 roundings in a row, more than any sum here goes through.
    """
    before = dy.clone()
    seed = torch.tensor([2**62 - 1], device=DEVICE) if p else None
    out = column_sum.column_sum(dy, offsets, p, seed)
    assert out.dtype == torch.float32
    assert torch.equal(dy, before)
    assert torch.equal(column_sum.column_sum(dy, offsets, p, seed), out)  # the same bits again
    keep = kept(*dy.shape, p, seed) if p else torch.ones_like(dy, dtype=torch.bool)
    cuts = [0, dy.shape[0]] if offsets is None else offsets.tolist()

    def summed(values):
        values = torch.where(keep, values / (1 - p), 0)
        return torch.stack([values[a:b].sum(0) for a, b in itertools.pairwise(cuts)])

    exact = summed(dy.double())
    error = (out.reshape(exact.shape).double() - exact).abs()
    torch_same = (summed(dy.float()).double() - exact).abs()
    bound = 2 * torch_same + 16 * 2.0**-24 * summed(dy.double().abs())
    assert bool((error <= bound).all()), (error - bound).max()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_is_as_exact_as_pytorchs(shape, dtype):
    assert check(gradient(*shape, dtype)).shape == (shape[1],)


@pytest.mark.parametrize("columns", [1, 768])
def test_no_rows_sum_to_zero(columns):
    out = column_sum.column_sum(gradient(0, columns, torch.float32))
    assert torch.equal(out, torch.zeros(columns, device=DEVICE))


def test_no_columns_give_nothing():
    assert column_sum.column_sum(gradient(5, 0, torch.float32)).shape == (0,)


@pytest.mark.parametrize("kind", ["transposed", "strided", "expanded rows", "expanded scalar"])
def test_gradients_of_any_strides(kind):
    base = gradient(70, 90, torch.float32)
    check(
        {
            "transposed": base.t(),
            "strided": base[::3, 1::2],
            "expanded rows": base[:1].expand(70, 90),
            "expanded scalar": base[0, 0].expand(70, 90),
        }[kind]
    )


@pytest.mark.parametrize(
    "cuts", [[0, 130], [0, 1, 130], [0, 0, 64, 64, 130], [0, 33, 70, 129, 130]], ids=str
)
def test_each_segment_has_its_own_sum(cuts):
    offsets = torch.tensor(cuts, device=DEVICE)
    assert check(gradient(130, 48, torch.bfloat16), offsets).shape == (len(cuts) - 1, 48)


@pytest.mark.parametrize("p", [0.1, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (7, 16), (129, 100), (300, 33), (40, 257)], ids=str)
def test_with_dropout_the_sum_runs_over_what_is_kept(shape, p):
    check(gradient(*shape, torch.bfloat16), p=p)


@pytest.mark.parametrize("p", [0.1, 0.9])
@pytest.mark.parametrize("cuts", [[0, 1, 130], [0, 0, 33, 33, 70, 129, 130]], ids=str)
def test_with_dropout_each_segment_goes_on_in_the_same_mask(cuts, p):
    offsets = torch.tensor(cuts, device=DEVICE)
    check(gradient(130, 50, torch.float32), offsets, p)


def test_with_dropout_gradients_have_any_strides():
    base = gradient(70, 90, torch.float32)
    check(base.t(), p=0.3)
    check(base[0, 0].expand(70, 90), p=0.3)


def test_with_dropout_no_rows_sum_to_zero():
    seed = torch.tensor([3], device=DEVICE)
    out = column_sum.column_sum(gradient(0, 40, torch.float32), None, 0.5, seed)
    assert torch.equal(out, torch.zeros(40, device=DEVICE))


def test_partial_rows_are_added_in_full():
    partial = gradient(3 * 37, 70, torch.float32).reshape(3, 37, 70)
    out = _reduce.add_partial_rows(partial)
    torch.testing.assert_close(out, partial.sum(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 100, 8192, 32768])
@pytest.mark.parametrize("columns", [1, 768, 4096])
def test_the_configuration_keeps_the_device_busy_and_partial_rows_few(rows, columns):
    config = column_config(rows, columns, 132)
    tiles = -(-rows // config["BLOCK_M"]) * -(-columns // config["BLOCK_N"])
    programs = config["P"] * -(-columns // config["BLOCK_N"])
    assert programs <= max(tiles, 1)
    # what the two stages move besides dy, in bytes, against bf16 dy itself
    assert config["P"] * columns * 8 <= max(rows * columns * 2 * 0.25, columns * 8)
