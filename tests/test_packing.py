"""Batches without their padding: where each token comes from, and where it goes."""

import pytest
import torch

from bitfit_fast.packing import Packing

CPU = torch.device("cpu")
BATCHES = [(5,), (1,), (3, 1, 4), (7, 7, 7), (16, 2, 9, 1, 1, 16), tuple(range(1, 40))]


def mask_of(lengths, width=None, dtype=torch.long):
    places = torch.arange(width or max(lengths))
    return (places < torch.tensor(lengths)[:, None]).to(dtype)


@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize("extra", [0, 3])
def test_a_mask_says_where_the_tokens_are(lengths, extra):
    mask = mask_of(lengths, max(lengths) + extra)
    packing = Packing.of_mask(mask)
    assert packing.lengths == lengths
    assert packing.padded == mask.shape[1]
    assert packing.tokens == sum(lengths) and packing.longest == max(lengths)
    assert packing.starts.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packing.starts.dtype == packing.each.dtype == torch.int32
    assert packing.first.tolist() == packing.starts[:-1].tolist()
    assert packing.each.tolist() == list(range(len(lengths) + 1))
    assert packing.rows.tolist() == mask.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_packed_tokens_are_the_real_ones_and_come_back(lengths, shape):
    mask = mask_of(lengths, max(lengths) + 2)
    packing = Packing.of_mask(mask)
    padded = torch.randn(*mask.shape, *shape)
    packed = packing.pack(padded)
    assert torch.equal(packed, padded[mask.bool()])
    back = packing.pad(packed)
    assert back.shape == padded.shape
    assert torch.equal(back[mask.bool()], packed)
    assert not back[~mask.bool()].any()


def test_gradients_pass_in_both_directions():
    packing = Packing.of_mask(mask_of((3, 1, 4)))
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packing.pad(packing.pack(x) * 2), x)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8, torch.int32])
def test_masks_of_every_kind_say_the_same(dtype):
    packing = Packing.of_mask(mask_of((3, 1, 4), 5, dtype))
    assert packing == Packing.of_mask(mask_of((3, 1, 4), 5))
    assert all(type(n) is int for n in packing.lengths)
    assert packing.rows.tolist() == [0, 1, 2, 5, 10, 11, 12, 13]


def test_one_in_a_mask_may_be_any_number():
    assert Packing.of_mask(mask_of((3, 1)) * 7).lengths == (3, 1)


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 0], [0, 1, 1]],
        [[1, 0, 1], [1, 1, 1]],
        [[1, 1, 1], [0, 0, 0]],
        [[0, 0, 0]],
    ],
    ids=["padding on the left", "a hole", "an empty sequence", "nothing"],
)
def test_other_masks_are_told_apart(mask):
    assert Packing.of_mask(torch.tensor(mask)) is None


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_a_mask_without_elements_is_no_packing(shape):
    assert Packing.of_mask(torch.ones(shape)) is None


def test_a_batch_without_padding_needs_no_mask():
    packing = Packing.uniform(3, 4, CPU)
    assert packing == Packing.of_mask(torch.ones(3, 4))
    assert packing.rows.tolist() == list(range(12))


@pytest.mark.parametrize("lengths", [*BATCHES, (300, 1, 1), (64,) * 9, (200, 190, 20, 19, 18)])
def test_groups_hold_each_sequence_once_and_waste_little(lengths):
    packing = Packing(lengths, max(lengths), CPU)
    groups = packing.groups
    order = [i for group in groups for i in group.order.tolist()]
    assert sorted(order) == list(range(len(lengths)))
    sizes = [lengths[i] for i in order]
    assert sizes == sorted(sizes, reverse=True)
    for group in groups:
        members = group.order.tolist()
        assert group.lengths.tolist() == [lengths[i] for i in members]
        assert group.starts.tolist() == [packing.starts[i].item() for i in members]
        assert group.ones.tolist() == [1] * len(members)
        most = max(lengths[i] for i in members)
        assert group.longest % 16 == 0 and most <= group.longest < most + 16
        assert len(members) * most <= 1.25 * sum(lengths[i] for i in members) + 32
        for tensor in (group.starts, group.lengths, group.order, group.ones):
            assert tensor.dtype == torch.int32 and tensor.is_contiguous()


def test_sequences_of_one_length_are_one_group():
    assert len(Packing.uniform(40, 20, CPU).groups) == 1


def test_very_different_ones_are_not():
    assert len(Packing((400, 10, 9, 8), 400, CPU).groups) == 2
