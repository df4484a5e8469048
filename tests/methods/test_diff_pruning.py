"""Diff pruning: gates, penalty, pruning to the target, and the second phase."""

from __future__ import annotations

import copy

import pytest
import torch

from bitfit_fast import BitFitError
from bitfit_fast.additions import addition, own_state
from bitfit_fast.methods import diff_pruning, prepare
from bitfit_fast.methods.diff_pruning import HIGH, LOW, RATE, gated

IDS = torch.tensor([[1, 5, 9, 12, 2], [1, 7, 2, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long(), "labels": torch.tensor([0, 1])}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(difference, gates, noise):
    """Equations 4 and 5 of the paper, after Louizos et al. 2018."""
    s = torch.sigmoid(gates * RATE + noise)
    return difference * (s * (HIGH - LOW) + LOW).clamp(0, 1)


@pytest.mark.parametrize("drawn", [True, False])
def test_gates_and_their_gradients(drawn):
    difference = numbers(300).requires_grad_()
    gates = (2 * numbers(300, seed=1) / RATE).requires_grad_()
    torch.manual_seed(7)
    found = gated(difference, gates, drawn)
    noise = torch.zeros(300, dtype=torch.float64)
    if drawn:
        torch.manual_seed(7)
        u = torch.empty(300, dtype=torch.float64).uniform_(1e-6, 1 - 1e-6)
        noise = u.log() - (1 - u).log()
    expected = definition(difference, gates, noise)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert (found == 0).any() and (found == difference).any()
    direction = numbers(300, seed=2)
    ours = torch.autograd.grad(found, (difference, gates), direction)
    theirs = torch.autograd.grad(expected, (difference, gates), direction)
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_the_penalty_is_the_probability_that_gates_are_open(build):
    model = build()
    prepare(model, "diff-pruning", l0=0.25)
    extra = addition(model)
    gates = [p for n, p in model.named_parameters() if n.endswith("pruning_gates")]
    with torch.no_grad():
        for i, gate in enumerate(gates):
            gate.copy_(numbers(*gate.shape, seed=i) / RATE)
    draws = 300
    open_share = torch.zeros(())
    with torch.no_grad():
        for i in range(draws):
            torch.manual_seed(i)
            open_share += (gated(torch.ones_like(gates[0]), gates[0], True) > 0).float().mean()
    probability = torch.sigmoid(gates[0] * RATE - torch.tensor(-LOW / HIGH).log()).mean()
    assert open_share / draws == pytest.approx(probability.item(), abs=0.01)
    total = sum(torch.sigmoid(g * RATE).sum() for g in gates)
    assert extra.penalty(model).item() == pytest.approx(0.25 * total.item(), rel=1e-5)


def ready_to_prune(model, share):
    prepare(model, "diff-pruning", share=share)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("pruning_difference"):
                parameter.copy_(0.1 * numbers(*parameter.shape, seed=i))
            elif name.endswith("pruning_gates"):
                parameter.copy_(2 * numbers(*parameter.shape, seed=i) / RATE)
    return addition(model)


@pytest.mark.parametrize("share", [0.005, 0.1])
def test_pruning_keeps_the_largest_and_reaches_the_target(build, share):
    model = build()
    base = sum(p.numel() for n, p in model.named_parameters() if n.startswith("bert."))
    extra = ready_to_prune(model, share)
    changes = {
        name: gated(m.pruning_difference, m.pruning_gates, False).detach()
        for name, m in extra.gated.items()
    }
    assert not extra.advance(model, 4, 10) and extra.rate == 1
    assert extra.advance(model, 5, 10)
    assert not extra.advance(model, 6, 10)
    assert extra.settled and extra.penalty(model) is None
    assert extra.rate == extra.options["sparse_rate"] == 10
    count = round(share * base)
    kept = {n: t for n, t in own_state(model).items() if n.endswith("sparse_values")}
    assert sum(map(len, kept.values())) == count
    assert not any("pruning" in name for name in model.state_dict())
    # the same by dense masks
    threshold = torch.cat([c.abs().flatten() for c in changes.values()]).sort().values[-count]
    plain = build()
    model(**BATCH)
    for name, change in changes.items():
        mask = change.abs() >= threshold
        dense = plain.get_submodule(name).weight + mask * change
        assert torch.equal(model.get_submodule(name).weight, dense)


def test_the_second_phase_is_that_of_dense_masks(build):
    model, dense = build(), build()
    extra = ready_to_prune(model, 0.02)
    extra.advance(model, 5, 10)
    model(**BATCH)
    masks = {}
    for name, module in extra.hosts.items():
        weight = dense.get_submodule(name).weight
        masks[weight] = torch.zeros_like(weight).flatten()
        masks[weight][module.sparse_indices.long()] = 1
        masks[weight] = masks[weight].view_as(weight)
        weight.data.copy_(module.weight)
    heads = list(dense.classifier.parameters())
    for parameter in dense.parameters():
        parameter.requires_grad_(parameter in masks or any(parameter is h for h in heads))
    ours = [p for p in model.parameters() if p.requires_grad]
    theirs = [p for p in dense.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0) for p in (ours, theirs)]
    for _ in range(3):
        for network, optimizer in zip((model, dense), optimizers):
            optimizer.zero_grad()
            network(**BATCH).loss.backward()
            for weight, mask in masks.items() if network is dense else ():
                weight.grad.mul_(mask)
            optimizer.step()
    extra.apply(model)
    for name in extra.hosts:
        one, two = (m.get_submodule(name).weight for m in (model, dense))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        assert torch.equal(one == build().get_submodule(name).weight, masks[two] == 0)


def test_gates_that_all_closed_are_told_in_a_sentence(build):
    model = build()
    prepare(model, "diff-pruning")
    with pytest.raises(BitFitError, match=r"every difference is zero .* more steps before"):
        addition(model).prune()  # no step was taken


def test_the_first_phase_draws_in_training_and_not_in_evaluation(build):
    model = build()
    ready_to_prune(model, 0.1)
    with torch.no_grad():
        one, two = model(**BATCH).logits, model(**BATCH).logits
        assert torch.equal(one, two)
        model.train()
        assert not torch.equal(model(**BATCH).logits, model(**BATCH).logits)
    assert not any("weight" in vars(module) for module in model.modules())
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert torch.equal(twin(**BATCH).logits, one)


def test_a_forward_pass_that_fails_leaves_the_weights_in_place(build, monkeypatch):
    model = build()
    prepare(model, "diff-pruning")
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**BATCH)
    assert not any("weight" in vars(module) for module in model.modules())


def test_the_constants_are_the_papers():
    assert (LOW, HIGH, diff_pruning.ALPHA) == (-1.5, 1.5, 5.0)
