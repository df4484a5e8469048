"""What every launch shares."""

import contextlib

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")

from bitfit_fast.kernels import _launch, activation, column_sum, layer_norm


@pytest.mark.parametrize(
    ("a", "b", "up"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (2**40 + 1, 2, 2**39 + 1)]
)
def test_division_rounds_up(a, b, up):
    assert _launch.cdiv(a, b) == up


@pytest.mark.parametrize(
    ("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (768, 1024), (1024, 1024)]
)
def test_the_next_power_of_two(n, power):
    assert _launch.next_power_of_2(n) == power


def test_a_cpu_tensor_needs_no_guard_and_counts_as_a_small_device():
    assert isinstance(_launch.device_guard(torch.empty(1)), contextlib.nullcontext)
    assert _launch.processors(torch.empty(1)) == 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_their_tensors_are():
    torch.cuda.set_device(0)
    a, v = torch.randn(100, 64, device="cuda:1"), torch.randn(64, device="cuda:1")
    torch.testing.assert_close(column_sum.column_sum(a), a.sum(0))
    h, _ = activation.activation_fwd(a, v)
    torch.testing.assert_close(h, torch.nn.functional.gelu(a + v))
    y, *_ = layer_norm.layer_norm_fwd(a, v, v, eps=1e-5)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(a, (64,), v, v))
    assert h.device == y.device == a.device and torch.cuda.current_device() == 0
