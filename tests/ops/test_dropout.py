"""Dropout as the operations apply it, and where its seed comes from."""

import pytest
import torch

from bitfit_fast.ops import dropout_add_layer_norm
from bitfit_fast.ops.dropout import drawn, dropout, kept, new_seed


def dropped(x, p, seed=None):
    """Return what dropout makes of x: the sum without a residual."""
    return dropout_add_layer_norm(
        x, torch.ones(x.shape[-1], device=x.device), p=p, seed=seed, returns_sum=True
    )[1]


def test_a_seed_follows_the_default_generator():
    torch.manual_seed(3)
    first, second = (new_seed(torch.device("cpu")) for _ in range(2))
    assert (first.shape, first.dtype) == ((1,), torch.int64)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(new_seed(torch.device("cpu")), first)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_share_asked_for_is_dropped_and_the_rest_scaled(p, device, seed):
    out = dropped(torch.ones(60, 128, device=device), p, seed)
    share = (out == 0).double().mean().item()
    assert abs(share - p) < 4 * (p * (1 - p) / out.numel()) ** 0.5
    assert torch.equal(out != 0, kept(60, 128, p, seed))
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - p)))


def test_equal_seeds_drop_the_same_and_others_do_not(device, seed):
    x = torch.ones(20, 64, device=device)
    assert torch.equal(dropped(x, 0.3, seed), dropped(x, 0.3, seed))
    assert not torch.equal(dropped(x, 0.3, seed), dropped(x, 0.3, seed + 1))


def test_without_a_seed_the_default_generator_decides(device):
    x = torch.ones(20, 64, device=device)
    torch.manual_seed(5)
    first, second = dropped(x, 0.3), dropped(x, 0.3)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(dropped(x, 0.3), first)


def test_without_dropout_no_seed_is_drawn(device):
    state = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    before = state()
    dropped(torch.ones(2, 8, device=device), 0.0)
    assert torch.equal(state(), before)


def test_rows_of_one_mask_do_not_depend_on_how_the_input_is_shaped(device, seed):
    x = torch.ones(6, 32, device=device)
    assert torch.equal(dropped(x.view(2, 3, 32), 0.3, seed).view(6, 32), dropped(x, 0.3, seed))


@pytest.mark.parametrize("shape", [(1, 1), (33, 5), (20, 300)], ids=str)
def test_the_mask_is_that_of_the_definition(shape, device, seed):
    for p in (0.1, 0.9):
        assert torch.equal(drawn(*shape, p, seed), kept(*shape, p, seed))
    assert drawn(*shape, 0.0, seed) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dropout_alone_drops_the_same_in_both_passes_and_keeps_a_seed(dtype, randn, seed, saved):
    x, dy = (randn(6, 5, 33, dtype=dtype) for _ in range(2))
    leaf, keep = x.clone().requires_grad_(), kept(30, 33, 0.3, seed).view(x.shape)
    with saved() as tensors:
        y = dropout(leaf, 0.3, seed)
    assert [t.numel() for t in tensors] == [1]
    (dx,) = torch.autograd.grad(y, leaf, dy)
    unit = torch.finfo(dtype).eps
    for found, given in ((y, x), (dx, dy)):
        assert found.dtype == dtype
        expected = torch.where(keep, given.double() / 0.7, 0)
        torch.testing.assert_close(found.double(), expected, rtol=unit, atol=0)
