"""What autograd asks of a Function besides gradients: a clear no to a second derivative."""

import pytest
import torch

from bitfit_fast.ops import (
    bias_activation,
    dropout_add_layer_norm,
    feed_forward,
    layer_norm,
    linear,
)

OPERATIONS = {
    "linear": lambda x, v: linear(x, torch.eye(4, device=x.device), v),
    "bias_activation": bias_activation,
    "few_bits": lambda x, v: bias_activation(x, v, few_bits=True),
    "layer_norm": lambda x, v: layer_norm(x, v),
    "sum": lambda x, v: dropout_add_layer_norm(x, v, b=v, p=0.1, returns_sum=True)[1],
    "feed_forward": lambda x, v: feed_forward(x, x.detach(), v, x.detach()),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_second_derivative_is_refused(operation, randn):
    x, v = randn(4, 4).requires_grad_(), randn(4).requires_grad_()
    out = OPERATIONS[operation](x, v)
    # the second one's incoming gradient is a constant, whose second derivative PyTorch loses
    for loss in (out.square().sum(), out.sum()):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, (x, v), create_graph=True)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_second_backward_pass_needs_the_graph_to_be_retained(operation, randn):
    x, v = randn(4, 4).requires_grad_(), randn(4).requires_grad_()
    out = OPERATIONS[operation](x, v)
    dy = randn(4, 4)
    first = torch.autograd.grad(out, (x, v), dy, retain_graph=True)
    second = torch.autograd.grad(out, (x, v), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, (x, v), dy)


@pytest.mark.parametrize("operation", ["bias_activation", "linear"])
def test_a_saved_tensor_that_was_written_to_is_noticed(operation, randn):
    w = randn(4, 4)
    x, v = randn(4, 4).requires_grad_(), randn(4)
    inner = x * 1
    out = linear(inner, w, v) if operation == "linear" else bias_activation(inner, v)
    (w if operation == "linear" else inner).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("rows", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "sum"])
def test_an_output_may_be_written_to_as_pytorchs(operation, rows, randn):
    x, v = randn(*rows, 4).requires_grad_(), randn(4).requires_grad_()
    if operation == "feed_forward":
        w = randn(4, 4)
        function = lambda x, v: feed_forward(x, w, v, w)  # noqa: E731
    else:
        function = OPERATIONS[operation]
    expected = torch.autograd.grad((function(x, v) * 2).sum(), (x, v))
    found = torch.autograd.grad(function(x, v).mul_(2).sum(), (x, v))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_without_grad_mode_nothing_is_kept(operation, randn, saved):
    x, v = randn(4, 4).requires_grad_(), randn(4).requires_grad_()
    with saved() as kept, torch.no_grad():
        out = OPERATIONS[operation](x, v)
    assert not kept and not out.requires_grad
    with torch.inference_mode():
        inside = OPERATIONS[operation](x, v)
    if operation != "sum":
        assert torch.equal(inside, out)
