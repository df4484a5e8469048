"""The custom operations by PyTorch's own checks: schema, fake tensors, tracing."""

import itertools

import pytest
import torch

import bitfit_fast.ops.adamw
import bitfit_fast.ops.embedding  # noqa: F401
from bitfit_fast.encoder.sums import column_rows, layer_norm_rows
from bitfit_fast.ops._backend import PRODUCTS_VARIABLE
from bitfit_fast.ops.linear import product_rows

ops = torch.ops.bitfit_fast
ROWS, COLUMNS = 6, 9


def check(operation, *arguments):
    torch.library.opcheck(operation.default, arguments)


def check_layout(operation, *arguments):
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(operation.default, arguments, test_utils=utils)


def layouts(randn):
    """Return the layouts that a gradient comes in."""
    return (
        randn(ROWS, COLUMNS),
        randn(COLUMNS, ROWS).t(),
        randn(1, COLUMNS).expand(ROWS, COLUMNS),
        randn(1, 1).expand(ROWS, COLUMNS),
    )


def test_every_operation_is_checked_here():
    checked = {name.rsplit("_on_", 1)[0][5:] for name in globals() if name.startswith("test_")}
    names = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("bitfit_fast::")
    }
    assert names and names <= checked, names - checked


def test_dropout_on_every_layout(randn, seed):
    check(ops.dropout, randn(ROWS, COLUMNS), 0.25, seed)
    for x in layouts(randn):
        check_layout(ops.dropout, x, 0.25, seed)


def test_column_sum_on_every_choice(randn, seed, device):
    dy = randn(ROWS, COLUMNS)
    offsets = torch.tensor([0, 2, 2, ROWS], device=device)
    for given, p in itertools.product((None, offsets), (0.0, 0.25)):
        check(ops.column_sum, dy, given, p, seed if p else None)


def test_column_sum_on_every_layout(randn):
    for dy in layouts(randn):
        check_layout(ops.column_sum, dy, None, 0.0, None)


@pytest.mark.parametrize("few_bits", [False, True])
def test_activation_fwd_on_every_choice(few_bits, randn):
    for b in (None, randn(COLUMNS)):
        check(ops.activation_fwd, randn(ROWS, COLUMNS), b, "gelu", few_bits)


@pytest.mark.parametrize("few_bits", [False, True])
def test_activation_fwd__on_every_choice(few_bits, randn):
    for b in (None, randn(COLUMNS)):
        x = randn(ROWS, COLUMNS)
        check(ops.activation_fwd_, x, b, "gelu", few_bits)
        h, d = ops.activation_fwd(x.clone(), b, "gelu", few_bits)
        assert torch.equal(ops.activation_fwd_(x, b, "gelu", few_bits), d)
        assert torch.equal(x, h)


@pytest.mark.parametrize("few_bits", [False, True])
def test_activation_fwd_on_every_layout(few_bits, randn):
    for x in layouts(randn):
        check_layout(ops.activation_fwd, x, randn(COLUMNS), "gelu", few_bits)


@pytest.mark.parametrize("act", ["gelu", "tanh"])
def test_activation_bwd_on_every_choice(act, randn):
    dh, x = randn(ROWS, COLUMNS), randn(ROWS, COLUMNS)
    check(ops.activation_bwd, dh, x, None, act)
    check(ops.activation_bwd, dh, x, randn(COLUMNS), act)
    check(ops.activation_bwd, dh, ops.activation_fwd(x, None, act, True)[1], None, act)


def test_activation_bwd_on_every_layout(randn):
    for dh, x in zip(layouts(randn), reversed(layouts(randn))):
        check_layout(ops.activation_bwd, dh, x, randn(COLUMNS), "gelu")
    for dh in layouts(randn):
        check_layout(ops.activation_bwd, dh, dh, None, "tanh")


@pytest.fixture(params=["vendor", "fused"])
def products(request, monkeypatch):
    """Which products run; without Triton's kernels there is one kind."""
    monkeypatch.setenv(PRODUCTS_VARIABLE, request.param)


@pytest.mark.parametrize("few_bits", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_linear_activation_fwd_on_every_choice(few_bits, keeps, products, randn):
    x, w = randn(ROWS, 5), randn(COLUMNS, 5)
    for b in (None, randn(COLUMNS)):
        check(ops.linear_activation_fwd, x, w, b, "gelu", few_bits, keeps)


def test_linear_activation_fwd_on_every_layout(products, randn):
    for x in layouts(randn):
        w = randn(COLUMNS, COLUMNS).t()
        check_layout(ops.linear_activation_fwd, x, w, randn(COLUMNS), "gelu", False, True)


def test_linear_activation_bwd_on_every_choice(products, randn):
    dy, w, x = randn(ROWS, 5), randn(5, COLUMNS), randn(ROWS, COLUMNS)
    for b in (None, randn(COLUMNS)):
        check(ops.linear_activation_bwd, dy, w, x, b, "gelu")
    d = ops.activation_fwd(x, None, "gelu", True)[1]
    check(ops.linear_activation_bwd, dy, w, d, None, "gelu")


def test_linear_activation_bwd_on_every_layout(products, randn):
    for dy, x in zip(layouts(randn), reversed(layouts(randn))):
        check_layout(ops.linear_activation_bwd, dy, randn(COLUMNS, COLUMNS).t(), x, None, "gelu")


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("returns_sum", [False, True])
def test_layer_norm_fwd_on_every_choice(keeps, returns_sum, randn, seed):
    x, gamma = randn(ROWS, COLUMNS, dtype=torch.bfloat16), randn(COLUMNS)
    tail = (1e-5, torch.float32, keeps, returns_sum, torch.bfloat16)
    check(ops.layer_norm_fwd, x, gamma, None, None, None, 0.0, None, *tail)
    parts = (randn(COLUMNS), randn(COLUMNS), randn(ROWS, COLUMNS))
    check(ops.layer_norm_fwd, x, gamma, *parts, 0.25, seed, *tail)


def test_layer_norm_fwd_on_every_layout(randn):
    for x, residual in zip(layouts(randn), reversed(layouts(randn))):
        parts = (randn(COLUMNS), None, None, residual, 0.0, None)
        check_layout(ops.layer_norm_fwd, x, *parts, 1e-5, torch.float32, True, True, torch.float32)
    for x in layouts(randn):
        parts = (randn(COLUMNS), None, None, None, 0.0, None)
        check_layout(ops.layer_norm_fwd, x, *parts, 1e-5, torch.float32, True, True, torch.float32)


def test_embedding_layer_norm_on_every_choice(randn, device, seed):
    ids = [torch.arange(ROWS, device=device) % 3, torch.arange(ROWS, device=device)]
    tables = [randn(3, COLUMNS), randn(ROWS, COLUMNS)]
    for count, beta in itertools.product((1, 2), (None, randn(COLUMNS))):
        given = (randn(COLUMNS), beta, ids[:count], tables[:count])
        for dropout in ((0.0, None), (0.25, seed)):
            check(ops.embedding_layer_norm, *given, *dropout, 1e-5, torch.bfloat16)
    given = (randn(COLUMNS), None, [ids[0][:1].expand(ROWS)], [randn(COLUMNS, 9).t()])
    check_layout(ops.embedding_layer_norm, *given, 0.0, None, 1e-5, torch.float32)


@pytest.mark.parametrize(
    ("p", "dx_dtype"),
    [(0.0, torch.float32), (0.0, torch.bfloat16), (0.25, torch.float32)],
    ids=str,
)
def test_layer_norm_bwd_on_every_choice(p, dx_dtype, randn, seed):
    dy, kept, dsum = (randn(ROWS, COLUMNS) for _ in range(3))
    mean, rstd, gamma = randn(ROWS), randn(ROWS).exp(), randn(COLUMNS)
    rest = (p, seed if p else None, torch.float32, dx_dtype)
    check(ops.layer_norm_bwd, dy, kept, None, rstd, gamma, dsum, *rest, True, True, True)
    check(ops.layer_norm_bwd, dy, kept, mean, rstd, gamma, None, *rest, False, True, False)
    check_layout(ops.layer_norm_bwd, dy, kept, mean, rstd, gamma, dsum, *rest, *[False] * 3)


def test_layer_norm_bwd_on_every_layout(randn):
    mean, rstd, gamma = randn(ROWS), randn(ROWS).exp(), randn(COLUMNS)
    rest = (0.0, None, torch.float32, torch.float32, True, True, True)
    for dy, dsum in zip(layouts(randn), reversed(layouts(randn))):
        check_layout(ops.layer_norm_bwd, dy, dsum, mean, rstd, gamma, dsum, *rest)
        kept = dsum.contiguous()
        check_layout(ops.layer_norm_bwd, dy, kept, None, rstd, gamma, dsum, *rest)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_layer_norm_bwd_partial_on_every_choice(p, randn, seed):
    dy, kept, dsum = (randn(ROWS, COLUMNS) for _ in range(3))
    mean, rstd, gamma = randn(ROWS), randn(ROWS).exp(), randn(COLUMNS)
    rest = (p, seed if p else None, torch.float32, torch.float32)
    for given, sums in (((None, dsum), (True, True)), ((mean, None), (True, False))):
        shift, above = given
        partial = randn(sum(sums), layer_norm_rows(dy), COLUMNS)
        check(
            ops.layer_norm_bwd_partial, dy, kept, shift, rstd, gamma, above, *rest, *sums, partial
        )


def test_activation_bwd_partial__on_every_choice(randn):
    dh, x = randn(ROWS, COLUMNS), randn(ROWS, COLUMNS)
    partial = randn(1, column_rows(dh), COLUMNS)
    for b in (None, randn(COLUMNS)):
        check(ops.activation_bwd_partial_, dh, x, b, "gelu", partial)


def test_linear_activation_bwd_partial_on_every_choice(randn):
    dy, w, x = randn(ROWS, 5), randn(5, COLUMNS), randn(ROWS, COLUMNS)
    partial = randn(1, product_rows(dy, w), COLUMNS)
    for b in (None, randn(COLUMNS)):
        check(ops.linear_activation_bwd_partial, dy, w, x, b, "gelu", partial)


def test_add_segments_on_every_choice(randn, device):
    # first number, rows, numbers from row to row, columns, where to
    table = torch.tensor([[0, 3, 5, 4, 2], [15, 2, 8, 8, 6]], dtype=torch.int32, device=device)
    for adds in (False, True):
        check(ops.add_segments, randn(31), table, 8, randn(14), adds)


def test_column_sum_partial_on_every_choice(randn, seed):
    dy = randn(ROWS, COLUMNS)
    for dropout in ((0.0, None), (0.25, seed)):
        check(ops.column_sum_partial, dy, *dropout, randn(1, column_rows(dy), COLUMNS))


def test_squares_on_every_choice(randn):
    check(ops.squares, randn(2000), randn(3))


def test_adamw__on_every_choice(randn, device):
    buffers = [randn(2000), randn(2000), randn(2000), randn(2000).square()]
    step, lr = torch.tensor(3.0, device=device), torch.tensor(0.1, device=device)
    given = (*buffers, step, lr, randn(2).square(), 1.0, 0.9, 0.999, 1e-8, 0.01)
    for maximize in (False, True):
        check(ops.adamw_, *given, maximize)
