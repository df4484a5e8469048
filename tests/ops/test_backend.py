"""`BITFIT_FAST_BACKEND`: which implementation runs, and what is said where it cannot."""

from unittest.mock import Mock

import pytest
import torch

from bitfit_fast.errors import BitFitError
from bitfit_fast.kernels import library, native
from bitfit_fast.kernels._constants import MAX_COLUMNS
from bitfit_fast.kernels._launch import INTERPRETED
from bitfit_fast.ops import _backend, bias_activation, column_sum, feed_forward, layer_norm, linear

DEVICE = "cpu" if INTERPRETED else "cuda"
OPERATIONS = {
    "column_sum": column_sum,
    "bias_activation": bias_activation,
    "layer_norm": lambda x: layer_norm(x, torch.ones_like(x[0])),
    # of these the vendor's products are the forward pass, and the kernels are in the backward
    "linear": lambda x: with_bias(lambda b: linear(x, x, b), x),
    "feed_forward": lambda x: with_bias(lambda b: feed_forward(x, x, b, x), x),
}


def with_bias(function, x):
    b = torch.zeros_like(x[0]).requires_grad_()
    return torch.autograd.grad(function(b).sum(), b)[0]


@pytest.fixture
def spy(monkeypatch):
    """Collect the names of a module's launchers that run."""

    def watch(module, launcher, names):
        original = getattr(module, launcher)

        def run(*args):
            names.append(launcher)
            return original(*args)

        monkeypatch.setattr(module, launcher, run)

    return watch


@pytest.fixture
def launched(spy):
    """Collect the Triton kernels that run."""
    pytest.importorskip("triton", reason="triton is installed on Linux only")
    from bitfit_fast.kernels import activation, layer_norm
    from bitfit_fast.kernels import column_sum as sums

    names = []
    spy(sums, "column_sum", names)
    for kernel in ("activation_fwd", "activation_bwd"):
        spy(activation, kernel, names)
    for kernel in ("layer_norm_fwd", "layer_norm_bwd"):
        spy(layer_norm, kernel, names)
    return names


@pytest.fixture
def called(spy, monkeypatch):
    """Collect the kernels for CPUs that run, where Triton's are not interpreted."""
    if reason := library.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(_backend, "INTERPRETED", False)
    names = []
    for kernel in ("activation_fwd", "activation_bwd", "layer_norm_fwd", "layer_norm_bwd"):
        spy(native, kernel, names)
    for kernel in ("column_sum", "dropout", "kept"):
        spy(native, kernel, names)
    return names


def refused(monkeypatch, run, *parts, chosen="triton"):
    """Assert that a run is refused in one sentence that holds these parts."""
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, chosen)
    with pytest.raises(BitFitError) as raised:
        run()
    message = str(raised.value)
    for part in (_backend.BACKEND_VARIABLE, f"'{chosen}'", *parts):
        assert part in message
    assert "\n" not in message and not message.endswith(".") and ". " not in message


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_variable_chooses(operation, launched, monkeypatch):
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "torch")
    expected = OPERATIONS[operation](torch.eye(4, device=DEVICE))
    assert not launched
    for chosen in ("triton", "auto", ""):
        monkeypatch.setenv(_backend.BACKEND_VARIABLE, chosen)
        found = OPERATIONS[operation](torch.eye(4, device=DEVICE))
        assert launched
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        launched.clear()
    monkeypatch.delenv(_backend.BACKEND_VARIABLE)
    OPERATIONS[operation](torch.eye(4, device=DEVICE))
    assert launched


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_unknown_value_is_named_with_the_valid_ones(operation, monkeypatch):
    x = torch.eye(4, device=DEVICE)
    valid = ("auto", "triton", "native", "torch")
    refused(monkeypatch, lambda: OPERATIONS[operation](x), *valid, chosen="cuda")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_float64_has_no_kernels(operation, launched, monkeypatch):
    x = torch.eye(4, dtype=torch.float64, device=DEVICE)
    refused(monkeypatch, lambda: OPERATIONS[operation](x), "float64", "float32")
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "auto")
    assert OPERATIONS[operation](x).dtype == torch.float64
    assert not launched


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_cpu_has_no_triton_kernels_without_the_interpreter(operation, launched, monkeypatch):
    monkeypatch.setattr(_backend, "INTERPRETED", False)
    x = torch.eye(4)
    refused(monkeypatch, lambda: OPERATIONS[operation](x), "cpu", "TRITON_INTERPRET=1")
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "auto")
    OPERATIONS[operation](x)
    assert not launched


def test_wider_rows_than_a_kernel_holds_are_the_definitions(launched, monkeypatch):
    x = torch.ones(1, MAX_COLUMNS + 1, device=DEVICE)
    run = OPERATIONS["layer_norm"]
    refused(monkeypatch, lambda: run(x), str(MAX_COLUMNS + 1), str(MAX_COLUMNS))
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "auto")
    run(x)
    assert not launched
    run(x[:, 1:])
    assert launched == ["layer_norm_fwd"]


def test_without_triton_the_definitions_run(launched, monkeypatch):
    monkeypatch.setattr(_backend, "_has_triton", lambda: False)
    x = torch.eye(4, device=DEVICE)
    refused(monkeypatch, lambda: column_sum(x), "triton is not installed")
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "auto")
    column_sum(x)
    assert not launched


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", library.DTYPES, ids=str)
def test_the_variable_chooses_the_kernels_for_cpus(operation, dtype, called, monkeypatch):
    x = torch.eye(4, dtype=dtype)
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "torch")
    expected = OPERATIONS[operation](x)
    assert not called
    for chosen in ("native", "auto", ""):
        monkeypatch.setenv(_backend.BACKEND_VARIABLE, chosen)
        found = OPERATIONS[operation](x)
        assert called
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=4 * unit, atol=4 * unit)
        called.clear()
    monkeypatch.delenv(_backend.BACKEND_VARIABLE)
    OPERATIONS[operation](x)
    assert called


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_of_other_dtypes_the_definitions_run_on_cpus(operation, dtype, called, monkeypatch):
    x = torch.eye(4, dtype=dtype)
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "torch")
    expected = OPERATIONS[operation](x)
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "native")
    found = OPERATIONS[operation](x)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert set(called) <= {"column_sum"}  # of an fp32 gradient


def test_kernels_for_cpus_take_rows_of_any_width(called, monkeypatch):
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "native")
    OPERATIONS["layer_norm"](torch.ones(1, MAX_COLUMNS + 1))
    assert called == ["layer_norm_fwd"]


def test_under_the_interpreter_auto_takes_tritons_kernels(launched, spy, monkeypatch):
    if not INTERPRETED:
        pytest.skip("Triton's kernels are compiled")
    names = []
    spy(native, "column_sum", names)
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "auto")
    column_sum(torch.eye(4))
    assert launched and not names
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "native")
    if not library.unavailable():
        column_sum(torch.eye(4))
        assert len(launched) == len(names) == 1


@pytest.fixture
def asked(monkeypatch):
    """Answer for what measures: a GPU on which fused products are faster."""
    from bitfit_fast.kernels import measured

    problems = []

    def is_faster(ours, other, device, problem):
        problems.append(problem)
        return True

    monkeypatch.setattr(measured, "is_faster", is_faster)
    monkeypatch.delenv(_backend.BACKEND_VARIABLE, raising=False)
    return problems


def fuses(rows, columns, inner=64, dtype=torch.bfloat16, cuda=True):
    options = {"dtype": dtype, "device": torch.device("cuda" if cuda else "cpu"), "is_cuda": cuda}
    a = Mock(spec=torch.Tensor, shape=(rows, inner), **options)
    a.element_size = lambda: dtype.itemsize
    return _backend.fuses_product(a, torch.empty(inner, columns), bool, bool, "linear_bwd", "gelu")


def test_a_large_product_is_fused_where_that_was_measured_to_be_faster(asked, monkeypatch):
    monkeypatch.delenv(_backend.PRODUCTS_VARIABLE, raising=False)
    monkeypatch.setattr(_backend, "is_watched", lambda tensor: False)
    monkeypatch.setattr(_backend, "processors", lambda tensor: 132)
    assert all(fuses(rows, 3072) for rows in (1024, 1000, 1025, 1281))
    one, same, more, high = asked
    assert one == same == "linear_bwd gelu bfloat16 1024x3072x64 in tiles of 64"
    assert more.endswith(" 2048x3072x64 in tiles of 64")
    assert high.endswith(" 2048x3072x64 in tiles of 128")
    asked.clear()
    for never in (
        fuses(16, 3072),
        fuses(1024, 3072, dtype=torch.float32),
        fuses(1024, 3072, cuda=False),
    ):
        assert not never and not asked
    monkeypatch.setattr(_backend, "is_watched", lambda tensor: True)
    assert not fuses(1024, 3072) and not asked


def test_the_variable_of_products_chooses(asked, monkeypatch):
    for chosen in ("fused", "vendor"):
        monkeypatch.setenv(_backend.PRODUCTS_VARIABLE, chosen)
        assert fuses(16, 32) == (chosen == "fused")
    monkeypatch.setenv(_backend.BACKEND_VARIABLE, "torch")
    assert not fuses(1024, 3072)
    assert not asked


def test_an_unknown_kind_of_product_is_named_with_the_valid_ones(asked, monkeypatch):
    monkeypatch.setenv(_backend.PRODUCTS_VARIABLE, "cublas")
    with pytest.raises(BitFitError) as raised:
        fuses(1024, 3072)
    for part in (_backend.PRODUCTS_VARIABLE, "'cublas'", "auto", "fused", "vendor"):
        assert part in str(raised.value)
