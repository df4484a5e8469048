"""Thirty-two steps of training, patched and not."""

import pytest
import torch

from bitfit_fast import patch, select

STEPS = 32


@pytest.fixture
def train(batch, device):
    """Train and return the losses and the selected parameters."""

    def run(model, selection):
        parameters = dict(model.named_parameters())
        chosen = [parameters[name] for name in selection.names]
        optimizer = torch.optim.AdamW(chosen, lr=1e-3)
        torch.manual_seed(3)
        losses = []
        for step in range(STEPS):
            loss = model(**batch(model, seed=step, tokens=8 + step % 5)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses), {name: parameters[name].detach() for name in selection.names}

    return run


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


#: How far a step in this dtype may lead from the same step: losses, biases.
NEAR = {torch.float64: (1e-12, 1e-9), torch.float32: (1e-4, 2e-4)}


@pytest.fixture
def agree(build, train):
    """Train a model of a family patched and not, and compare losses and biases."""

    def check(family, dropout, dtype):
        results = []
        for patched in (False, True):
            model = build(family).to(dtype).train()
            if not dropout:
                without_dropout(model)
            selection = select(model)
            first = {name: model.get_parameter(name).detach().clone() for name in selection.names}
            still = patch(model, selection).no_gradient if patched else ()
            losses, ends = train(model, selection)
            results.append((losses, ends))
            assert all(torch.equal(ends[name], first[name]) for name in still)
        (losses, ends), (patched_losses, patched_ends) = results
        loss_near, bias_near = NEAR[dtype]
        torch.testing.assert_close(patched_losses, losses, rtol=loss_near, atol=0)
        moved = 0.0
        for name in set(ends) - set(still):
            ours, theirs = patched_ends[name], ends[name]
            if name.endswith("c_attn.bias"):  # its middle third is the key's, which rounding moves
                ours, theirs = (torch.cat((t[:32], t[64:])) for t in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bias_near)
            moved = max(moved, (ends[name] - first[name]).abs().max().item())
        assert moved > 1e-2

    return check


@pytest.mark.parametrize("dropout", [False, True])
def test_losses_and_biases_of_every_family_agree_after_many_steps(
    family, dropout, agree, same_dropout
):
    # DeBERTa's own LayerNorm is in fp32 whatever its model is in
    agree(family, dropout, torch.float32 if family == "deberta" else torch.float64)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "albert"])
def test_losses_and_biases_agree_in_fp32(family, agree, same_dropout):
    agree(family, family == "albert", torch.float32)
