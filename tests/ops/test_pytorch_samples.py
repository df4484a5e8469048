"""The inputs that PyTorch tests its own operations with, through ours."""

import sys
import types
import unittest

import pytest
import torch

from bitfit_fast.ops import bias_activation, layer_norm, linear


@pytest.fixture(scope="module")
def operations():
    """PyTorch's table of operations, by name."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import expecttest  # noqa: F401
        except ImportError:
            # only the base class of PyTorch's own test cases, of which none runs here
            stub = types.ModuleType("expecttest")
            stub.TestCase = unittest.TestCase
            patch.setitem(sys.modules, "expecttest", stub)
        from torch.testing._internal.common_methods_invocations import op_db

        return {op.name: op for op in op_db}


def tensors(*values):
    return [v for v in values if isinstance(v, torch.Tensor)]


@pytest.fixture
def check(operations, device, backend, as_exact):
    def differentiated(function, sample):
        out = function(sample.input, *sample.args, **sample.kwargs)
        if out is None:
            return None
        leaves = tensors(sample.input, *sample.args, *sample.kwargs.values())
        dy = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=device).view(out.shape)
        grads = torch.autograd.grad(out, leaves, dy)
        return dict(enumerate((out.detach(), *grads)))

    def widened(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    def run(name, ours, fewest):
        """Compare every sample that `ours` takes; it returns None for others."""
        operation = operations[name]
        for dtype in [torch.float32] + [torch.float64] * (backend == "torch"):
            compared = 0
            for sample in operation.sample_inputs(device, dtype, requires_grad=True):
                found = differentiated(ours, sample)
                if found is None:
                    continue
                expected = differentiated(operation, sample)
                if dtype == torch.float64:
                    torch.testing.assert_close(found, expected)
                else:
                    exact = differentiated(operation, sample.transform(widened))
                    as_exact(found, expected, exact, roundings=4)
                compared += 1
            assert compared >= fewest, compared

    return run


def test_linear_on_pytorchs_samples(check):
    check("nn.functional.linear", linear, 18)


def test_gelu_on_pytorchs_samples(check):
    def gelu(x, approximate="none"):
        return bias_activation(x, act={"none": "gelu", "tanh": "gelu_tanh"}[approximate])

    check("nn.functional.gelu", gelu, 6)


@pytest.mark.parametrize("name", ["nn.functional.relu", "nn.functional.silu", "tanh"])
def test_other_activations_on_pytorchs_samples(name, check):
    def activation(x):
        return bias_activation(x, act=name.rpartition(".")[2]) if x.dim() else None

    check(name, activation, 1)


def test_layer_norm_on_pytorchs_samples(check):
    def norm(x, shape, weight=None, bias=None, eps=1e-5):
        if len(shape) > 1:
            return None
        gamma = torch.ones_like(x[(0,) * (x.dim() - 1)]) if weight is None else weight
        return layer_norm(x, gamma, bias, eps)

    check("nn.functional.layer_norm", norm, 4)
