"""The mask of dropout: its definition in PyTorch, and the kernels' against that."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")

import triton
import triton.language as tl

from bitfit_fast.kernels import _dropout
from bitfit_fast.kernels._launch import INTERPRETED
from bitfit_fast.ops.dropout import kept

DEVICE = "cpu" if INTERPRETED else "cuda"
# the last makes the key wrap around
SEEDS = (0, 1234, 2**32 - 3, 2**62 - 1, -7, 2**63 - 4)


def seed_of(number):
    return torch.tensor([number], device=DEVICE)


def philox(counter, key, rounds):
    """Return the four words of Philox4x32 as in Salmon et al. 2011, section 3.3."""
    a, b, c, d = counter
    for i in range(rounds):
        round_key = ((key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32)
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (second >> 32) ^ b ^ round_key[0], second % 2**32
        c, d = (first >> 32) ^ d ^ round_key[1], first % 2**32
    return a, b, c, d


def numbers(seed, row, columns):
    """Return the 16-bit numbers of a row."""
    key = (seed + row) % 2**64
    words = (
        word
        for i in range(-(-columns // 8))
        for word in philox((i, 0, 0, 0), (key % 2**32, key >> 32), 7)
    )
    return [half for word in words for half in (word % 2**16, word >> 16)][:columns]


@triton.jit
def _mask_kernel(seed_ptr, out_ptr, M, N, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    keep = _dropout.kept(seed_ptr, rows, first, threshold, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], keep.to(tl.uint8), mask=inside)


def kernel_mask(rows, columns, p, seed, block_m=32, block_n=128):
    out = torch.full((rows, columns), 7, dtype=torch.uint8, device=DEVICE)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))
    bound = round(65536 * p)
    _mask_kernel[grid](seed, out, rows, columns, bound, BLOCK_M=block_m, BLOCK_N=block_n)
    return out


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (7, "00000000" * 4, "00000000" * 2, "5f6fb7090d893f644f121f814f730a48"),
        (7, "ffffffff" * 4, "ffffffff" * 2, "5207ddc245165e594d8ee7518c52f662"),
        (10, "00000000" * 4, "00000000" * 2, "6627e8d5e169c58dbc57ac4c9b00dbd8"),
        (10, "ffffffff" * 4, "ffffffff" * 2, "408f276d41c83b0ea20bc7c66d5451fd"),
        (
            *(10, "243f6a8885a308d313198a2e03707344", "a4093822299f31d0"),
            "d16cfe0994fdcceb5001e42024126ea1",
        ),
    ],
)
def test_the_reference_here_gives_the_known_answers_of_philox(rounds, counter, key, expected):
    def words(text):
        return tuple(int(text[i : i + 8], 16) for i in range(0, len(text), 8))

    assert philox(words(counter), words(key), rounds) == words(expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("draw", [kept, kernel_mask], ids=["definition", "kernel"])
def test_each_element_has_its_number_of_the_philox_call(draw, seed):
    for row, columns in ((0, 3), (4, 19)):
        for column, number in enumerate(numbers(seed, row, columns)):
            for threshold, keeps in ((number, 1), (number + 1, 0)):
                mask = draw(row + 1, columns, threshold / 65536, seed_of(seed))
                assert mask[row, column].item() == keeps


@pytest.mark.parametrize("p", [0.0, 1 / 65536, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept_is_as_asked_for(p):
    mask = kept(300, 1001, p, seed_of(99))
    assert mask.shape == (300, 1001) and mask.dtype == torch.bool
    expected = 1 - round(65536 * p) / 65536
    spread = (expected * (1 - expected) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - expected) <= 4 * spread


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_seeds_rows_and_columns_are_independent_of_one_another(p):
    one, two = (kept(256, 1024, p, seed_of(seed)) for seed in (0, 2**40))
    agreement = p * p + (1 - p) * (1 - p)
    spread = (agreement * (1 - agreement) / one.numel()) ** 0.5
    shifted = [one.roll(by, dim) for by, dim in ((1, 0), (1, 1), (2, 1), (8, 1))]
    for other in (two, *shifted):
        assert abs((one == other).double().mean().item() - agreement) <= 4 * spread


def test_without_dropout_everything_is_kept():
    assert bool(kept(64, 515, 0.0, seed_of(5)).all())
    assert bool(kernel_mask(64, 515, 0.0, seed_of(5)).all())


def test_a_mask_does_not_depend_on_the_width_and_height_of_the_tensor():
    large = kept(40, 100, 0.3, seed_of(8))
    assert torch.equal(kept(17, 61, 0.3, seed_of(8)), large[:17, :61])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 1), (20, 7), (37, 129), (3, 1000)], ids=str)
def test_the_kernels_draw_the_mask_of_the_definition(seed, shape):
    for p in (0.1, 0.9):
        expected = kept(*shape, p, seed_of(seed)).to(torch.uint8)
        assert torch.equal(kernel_mask(*shape, p, seed_of(seed)), expected)


@pytest.mark.parametrize("block", [(1, 256), (4, 16), (8, 8)], ids=str)
def test_the_tile_does_not_change_the_mask(block):
    expected = kept(9, 200, 0.25, seed_of(3)).to(torch.uint8)
    assert torch.equal(kernel_mask(9, 200, 0.25, seed_of(3), *block), expected)
