"""Checkpointing and modules: the operations among what others wrap around them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bitfit_fast.ops import bias_activation, dropout_add_layer_norm, feed_forward, linear


class Layer(nn.Module):
    def __init__(self, randn, p=0.0):
        super().__init__()
        self.p = p
        self.w1 = nn.Parameter(randn(24, 16) / 4, requires_grad=False)
        self.w2 = nn.Parameter(randn(16, 24) / 5, requires_grad=False)
        self.b1, self.b2 = nn.Parameter(randn(24)), nn.Parameter(randn(16))
        self.gamma, self.beta = nn.Parameter(1 + randn(16) / 4), nn.Parameter(randn(16))

    def forward(self, x, fused=True):
        if fused:
            h = feed_forward(x, self.w1, self.b1, self.w2)
        else:
            h = linear(bias_activation(linear(x, self.w1), self.b1), self.w2)
        return dropout_add_layer_norm(h, self.gamma, self.beta, self.b2, x, self.p)[0]

    def stock(self, x):
        h = F.linear(F.gelu(F.linear(x, self.w1, self.b1)), self.w2, self.b2)
        return F.layer_norm(x + h, (16,), self.gamma, self.beta)


def gradients(out, module, x):
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(out.square().sum(), [x, *trained])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointed_gradients_are_equal(p, fused, randn):
    layer, x = Layer(randn, p), randn(5, 16).requires_grad_()
    torch.manual_seed(7)
    expected = gradients(layer(x, fused), layer, x)
    torch.manual_seed(7)
    found = gradients(checkpoint(layer, x, fused, use_reentrant=False), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_a_checkpoint_keeps_only_the_layers_input(randn, saved):
    layer, x = Layer(randn), randn(5, 16).requires_grad_()
    with saved() as kept:
        checkpoint(layer, x, use_reentrant=False)
    assert sum(t.nbytes for t in kept) <= x.nbytes


@pytest.mark.parametrize("fused", [False, True])
def test_functional_call_takes_other_parameters(fused, randn):
    layer, x = Layer(randn), randn(5, 16).requires_grad_()
    other = {
        name: torch.nn.Parameter(randn(*p.shape) / 3, p.requires_grad)
        for name, p in layer.named_parameters()
    }
    out = torch.func.functional_call(layer, other, (x, fused))
    trained = [x, *(p for p in other.values() if p.requires_grad)]
    found = torch.autograd.grad(out.square().sum(), trained)
    layer.load_state_dict(other)
    expected = gradients(layer.stock(x), layer, x)
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_module_trains_as_pytorchs(randn):
    layer, x, target = Layer(randn), randn(20, 16), randn(20, 16)
    start = {name: t.clone() for name, t in layer.state_dict().items()}
    losses = []
    for forward in (layer.forward, layer.stock):
        layer.load_state_dict(start)
        optimizer = torch.optim.AdamW(p for p in layer.parameters() if p.requires_grad)
        for _ in range(3):
            loss = F.mse_loss(forward(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert losses[0] > losses[2]
    assert all(torch.equal(layer.state_dict()[name], start[name]) for name in ("w1", "w2"))
