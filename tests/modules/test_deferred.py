"""A linear layer's output whose bias is still to be added, in every place a tensor can stand."""

import copy
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitfit_fast.modules import Deferred, drop_in

ROWS, COLUMNS = 3, 6


@pytest.fixture
def parts():
    """Draw what a linear layer leaves: its product, its bias; a residual; a scale and a shift."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    return {
        "x": draw(2, ROWS, COLUMNS),
        "b": draw(COLUMNS),
        "r": draw(2, ROWS, COLUMNS),
        "gamma": draw(COLUMNS),
        "beta": draw(COLUMNS),
    }


@pytest.fixture
def judge(parts):
    """Assert that a function of a `Deferred` and of its tensor agree, and their gradients."""

    def run(function):
        results = []
        for make in (lambda x, b: x + b, Deferred):
            for t in parts.values():
                t.grad = None
            torch.manual_seed(6)
            out = function(make(parts["x"], parts["b"]), parts)
            out = out.tensor() if isinstance(out, Deferred) else out
            if isinstance(out, torch.Tensor) and out.requires_grad:
                weights = torch.linspace(-1, 2, out.numel()).view(out.shape)
                (out * weights).sum().backward()
            results.append((out, {name: t.grad for name, t in parts.items()}))
        (expected, expected_grads), (found, grads) = results
        torch.testing.assert_close(found, expected)
        for name, grad in expected_grads.items():
            if grad is None:
                assert grads[name] is None, name
            else:
                torch.testing.assert_close(grads[name], grad, msg=lambda m, n=name: f"{n}: {m}")

    return run


OPERATORS = {
    "minus a tensor": lambda d, p: d - p["r"],
    "a tensor minus": lambda d, p: p["r"] - d,
    "minus a number": lambda d, p: d - 2,
    "a number minus": lambda d, p: 2 - d,
    "times a tensor": lambda d, p: d * p["r"],
    "a tensor times": lambda d, p: p["r"] * d,
    "times a number": lambda d, p: d * 0.5,
    "a number times": lambda d, p: 0.5 * d,
    "over a number": lambda d, p: d / 3,
    "a number over": lambda d, p: 3 / (d * d + 1),
    "over a tensor": lambda d, p: d / p["r"].exp(),
    "squared": lambda d, p: d**2,
    "matrix product": lambda d, p: d @ p["r"].transpose(1, 2),
    "matrix product, reversed": lambda d, p: p["r"].transpose(1, 2) @ d,
    "negative": lambda d, p: -d,
    "absolute": lambda d, p: abs(d),
    "greater": lambda d, p: (d > 0).float(),
    "less than a tensor": lambda d, p: (d < p["r"]).float(),
    "equal": lambda d, p: (d == d).float(),
    "indexed": lambda d, p: d[:, 0],
    "indexed by a mask": lambda d, p: d[torch.ones(2, ROWS, dtype=torch.bool)],
    "last columns": lambda d, p: d[..., -2:],
    "unpacked": lambda d, p: torch.cat([*d]),
    "length": lambda d, p: len(d),
    "item": lambda d, p: d.sum().item(),
}
ADDITIONS = {
    "plus a tensor": lambda d, p: d + p["r"],
    "a tensor plus": lambda d, p: p["r"] + d,
    "plus a number": lambda d, p: d + 2,
    "a number plus": lambda d, p: 2 + d,
    "plus a row": lambda d, p: d + p["gamma"],
    "a row plus": lambda d, p: p["gamma"] + d,
    "plus a wider tensor": lambda d, p: d + p["r"][None].expand(2, 2, ROWS, COLUMNS),
    "plus itself": lambda d, p: d + d,
    "plus another": lambda d, p: d + Deferred(p["r"], p["beta"]),
    "in place": lambda d, p: operator.iadd(d, p["r"]),
    "torch.add": lambda d, p: torch.add(d, p["r"]),
    "torch.add, reversed": lambda d, p: torch.add(p["r"], d),
    "torch.add with alpha": lambda d, p: torch.add(p["r"], d, alpha=3),
    "Tensor.add": lambda d, p: p["r"].add(d),
    "add": lambda d, p: d.add(p["r"]),
    "twice": lambda d, p: (d + p["r"]) + p["gamma"],
    "twice the residual": lambda d, p: p["r"] + (p["r"] + d),
    "both": lambda d, p: (d + p["r"]) + (p["r"] + Deferred(p["r"], p["beta"])),
    "a copy into a tensor": lambda d, p: (p["r"] * 1).add_(d),
}
FUNCTIONS = {
    "gelu": lambda d, p: F.gelu(d),
    "linear": lambda d, p: F.linear(d, p["r"][0]),
    "layer_norm": lambda d, p: F.layer_norm(d, (COLUMNS,), p["gamma"], p["beta"]),
    "softmax": lambda d, p: torch.softmax(d, -1),
    "matmul": lambda d, p: torch.matmul(d, p["r"].transpose(1, 2)),
    "einsum": lambda d, p: torch.einsum("brc,brc->b", d, p["r"]),
    "cat": lambda d, p: torch.cat([p["r"], d], dim=1),
    "stack": lambda d, p: torch.stack((d, p["r"])),
    "where": lambda d, p: torch.where(p["r"] > 0, d, 0.0),
    "sum": lambda d, p: torch.sum(d, dim=-1),
    "keyword": lambda d, p: torch.mul(input=d, other=p["r"]),
    "keyword dropout": lambda d, p: F.dropout(input=d, p=0.0),
    "mse_loss": lambda d, p: F.mse_loss(d, p["r"]),
    "scaled_dot_product_attention": lambda d, p: F.scaled_dot_product_attention(d, d, p["r"]),
    "index_add": lambda d, p: p["r"].index_add(0, torch.tensor([0, 1]), d),
    "multi_head": lambda d, p: torch.chunk(d, 2, dim=-1)[1],
}
METHODS = {
    "to": lambda d, p: d.to(torch.float64),
    "float": lambda d, p: d.float(),
    "type_as": lambda d, p: d.type_as(p["r"].double()),
    "mean": lambda d, p: d.mean(-1),
    "transpose": lambda d, p: d.transpose(0, 1),
    "permute": lambda d, p: d.permute(2, 0, 1),
    "T": lambda d, p: d.mT,
    "view": lambda d, p: d.view(2 * ROWS, COLUMNS),
    "flatten": lambda d, p: d.flatten(),
    "contiguous": lambda d, p: d.contiguous(),
    "detach": lambda d, p: d.detach(),
    "clone": lambda d, p: d.clone(),
    "masked_fill": lambda d, p: d.masked_fill(p["r"] > 0, 0.0),
    "chunk": lambda d, p: d.chunk(2, -1)[1],
    "unsqueeze": lambda d, p: d.unsqueeze(1),
    "expand": lambda d, p: d.expand(4, 2, ROWS, COLUMNS),
    "tolist": lambda d, p: torch.tensor(d.tolist()),
    "dtype": lambda d, p: torch.zeros(1, dtype=d.dtype, device=d.device),
    "shape": lambda d, p: torch.tensor([*d.shape, *d.size(), d.size(-1), d.size(0), d.size(dim=1)]),
    "dim": lambda d, p: torch.tensor([d.dim(), d.ndim, d.numel()]),
    "requires_grad": lambda d, p: torch.tensor(d.requires_grad),
    "reshape": lambda d, p: d.reshape(-1, COLUMNS),
    "reshape to a size": lambda d, p: d.reshape(torch.Size((2 * ROWS, COLUMNS))),
    "reshape to a tuple": lambda d, p: d.reshape((ROWS, 2, COLUMNS)),
    "reshape to heads": lambda d, p: d.reshape(2, ROWS, 2, 3),
    "reshape to one": lambda d, p: d.reshape(-1),
    "reshape with what is left": lambda d, p: d.reshape(2, ROWS, -1),
    "reshape to another width": lambda d, p: d.reshape(2, -1, COLUMNS // 2),
    "reshape of a sum": lambda d, p: (d + p["r"]).reshape(-1, COLUMNS),
    "sum after a reshape": lambda d, p: d.reshape(-1, COLUMNS) + p["r"].view(-1, COLUMNS),
}
MODULES = {
    "LayerNorm": lambda d, p: seeded(nn.LayerNorm(COLUMNS))(d),
    "Linear": lambda d, p: seeded(nn.Linear(COLUMNS, 4))(d),
    "replaced Linear": lambda d, p: replaced(nn.Linear(COLUMNS, 4))(d),
    "replaced LayerNorm": lambda d, p: replaced(nn.LayerNorm(COLUMNS))(d),
    "replaced LayerNorm, twice": lambda d, p: again(replaced(nn.LayerNorm(COLUMNS)), d),
    "replaced LayerNorm of a sum": lambda d, p: replaced(nn.LayerNorm(COLUMNS))(p["r"] + d),
    "replaced LayerNorm of a row more": lambda d, p: replaced(nn.LayerNorm(COLUMNS))(d + p["b"]),
    "replaced GELU": lambda d, p: replaced(nn.GELU())(d),
    "replaced tanh GELU": lambda d, p: replaced(nn.GELU("tanh"))(d),
    "replaced ReLU": lambda d, p: replaced(nn.ReLU())(d),
    "replaced SiLU": lambda d, p: replaced(nn.SiLU())(d),
    "replaced Tanh": lambda d, p: replaced(nn.Tanh())(d),
    "replaced GELU of a sum": lambda d, p: replaced(nn.GELU())(d + p["r"]),
    "replaced GELU of a tensor": lambda d, p: replaced(nn.GELU())(d - p["r"]),
    "Sequential": lambda d, p: nn.Sequential(nn.Identity(), nn.Dropout(0.0), nn.ReLU())(d),
    "Dropout": lambda d, p: nn.Dropout(0.9).eval()(d),
    "Conv1d": lambda d, p: seeded(nn.Conv1d(ROWS, 4, 1))(d),
}


def seeded(module):
    torch.manual_seed(7)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def replaced(module):
    seeded(module).__class__ = drop_in(type(module))
    return module


def again(norm, d):
    norm._used_again = True
    return norm(d) + d


CASES = OPERATORS | ADDITIONS | FUNCTIONS | METHODS | MODULES


@pytest.mark.parametrize("use", CASES)
def test_it_does_what_its_tensor_does(use, judge):
    judge(CASES[use])


@pytest.mark.parametrize("use", [*ADDITIONS, *MODULES])
def test_dropout_of_zero_or_out_of_training_changes_nothing(use, judge):
    judge(lambda d, p: CASES[use](F.dropout(d, 0.0), p))
    judge(lambda d, p: CASES[use](F.dropout(d, 0.7, training=False), p))
    judge(lambda d, p: CASES[use](F.dropout(d, 0.7, False), p))
    judge(lambda d, p: CASES[use](nn.Dropout(0.7).eval()(d), p))


@pytest.mark.parametrize("use", [use for use in ADDITIONS if use != "both"])
def test_dropout_before_anything_drops_what_it_would_drop(use, judge, same_dropout):
    judge(lambda d, p: CASES[use](F.dropout(d, 0.3), p))


def test_dropout_of_everything_leaves_the_residual(judge):
    judge(lambda d, p: F.dropout(d, 1.0) + p["r"])
    judge(lambda d, p: F.dropout(d, 1.0))
    judge(lambda d, p: replaced(nn.LayerNorm(COLUMNS))(p["r"] + nn.Dropout(1.0)(d)))


def test_dropout_after_dropout_or_a_sum_is_another(judge, same_dropout):
    judge(lambda d, p: F.dropout(F.dropout(d, 0.3), 0.5))
    judge(lambda d, p: F.dropout(d + p["r"], 0.5))


def test_dropout_is_a_share_that_makes_sense():
    x, b = torch.zeros(2, 4), torch.zeros(4)
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
            F.dropout(Deferred(x, b), p)


def test_a_dropped_value_used_twice_is_the_same_value_both_times(parts):
    torch.manual_seed(0)
    dropped = F.dropout(Deferred(parts["x"], parts["b"]), 0.5)
    total = (dropped + parts["r"]) * torch.ones(1)
    once = dropped * torch.ones(1)
    torch.testing.assert_close(total - parts["r"], once)
    assert torch.equal(dropped.tensor(), once)


def test_a_dropped_value_that_is_reshaped_is_the_same_value(parts):
    torch.manual_seed(0)
    dropped = F.dropout(Deferred(parts["x"], parts["b"]), 0.5)
    flat = dropped.reshape(-1, COLUMNS) * torch.ones(1)
    assert torch.equal(flat, (dropped * torch.ones(1)).view(-1, COLUMNS))


def test_its_tensor_is_computed_once(parts):
    deferred = parts["r"] + F.dropout(Deferred(parts["x"], parts["b"]), 0.5)
    assert deferred.tensor() is deferred.tensor()


def test_additions_and_dropout_are_put_off(parts):
    deferred = Deferred(parts["x"], parts["b"])
    for put_off in (
        F.dropout(deferred, 0.1),
        nn.Dropout(0.1)(deferred),
        deferred + parts["r"],
        parts["r"] + deferred,
        torch.add(parts["r"], deferred),
        F.dropout(deferred, 0.1) + parts["r"],
        parts["r"] + F.dropout(deferred, 0.1),
        (F.dropout(deferred, 0.1) + parts["r"]).reshape(-1, COLUMNS),
    ):
        assert type(put_off) is Deferred
    for computed in (
        (deferred + parts["r"]) + parts["r"],
        deferred + 1,
        deferred + parts["gamma"],
        F.dropout(deferred + parts["r"], 0.1),
        F.dropout(deferred, 1.0),
        deferred.reshape(-1),
    ):
        assert type(computed) is torch.Tensor


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s + 1,
        lambda s: s + torch.ones(2, ROWS, COLUMNS),
        lambda s: torch.ones(2, ROWS, COLUMNS) + s,
        lambda s: s.mean(),
        lambda s: torch.relu(s),
        lambda s: s.reshape(-1, COLUMNS) * 2,
        lambda s: F.dropout(s, 0.0) * 2,
        lambda s: replaced(nn.LayerNorm(COLUMNS))(s),
        lambda s: replaced(nn.GELU())(s),
        lambda s: s[:, 0],
    ],
)
@pytest.mark.parametrize("used_again", [False, True])
def test_after_a_layer_norm_took_it_it_is_still_what_it_was(use, used_again, judge, same_dropout):
    norm = replaced(nn.LayerNorm(COLUMNS))
    norm._used_again = used_again

    def twice(d, p):
        total = p["r"] + F.dropout(d, 0.5)
        first, second = norm(total), use(total)
        second = second.tensor() if isinstance(second, Deferred) else second
        return torch.cat((first.flatten(), second.flatten()))

    judge(twice)


def test_where_the_sum_goes_on_it_is_what_was_normalised(parts, same_dropout):
    norm = replaced(nn.LayerNorm(COLUMNS))
    norm._used_again = True
    total = parts["r"] + F.dropout(Deferred(parts["x"], parts["b"]), 0.5)
    y = norm(total)
    again = total.tensor()
    plain = F.layer_norm(again, (COLUMNS,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(y, plain)
    dropped = again - parts["r"] == 0
    kept = 2 * (parts["x"] + parts["b"]) + parts["r"]
    torch.testing.assert_close(again[~dropped], kept[~dropped])
    assert 0 < dropped.sum() < dropped.numel()


def test_a_materialised_value_is_normalised_as_it_is(parts):
    norm = replaced(nn.LayerNorm(COLUMNS))
    total = parts["r"] + F.dropout(Deferred(parts["x"], parts["b"]), 0.5)
    value = total.tensor()
    y = norm(total)
    torch.testing.assert_close(y, F.layer_norm(value, (COLUMNS,), norm.weight, norm.bias))
    assert torch.equal(total * torch.ones(1), value)


def test_it_can_be_copied_and_looked_at(parts):
    deferred = Deferred(parts["x"].detach(), parts["b"].detach())
    assert torch.equal(copy.copy(deferred).tensor(), deferred.tensor())
    assert torch.equal(copy.deepcopy(deferred).tensor(), deferred.tensor())
    assert not hasattr(deferred, "no_such_thing")
    with pytest.raises(AttributeError):
        deferred._no_such_thing  # noqa: B018
    repr(deferred)


def test_a_16_bit_value_adds_a_32_bit_bias_in_16_bits():
    x, b = torch.randn(2, 4).bfloat16(), torch.randn(4)
    residual = torch.randn(2, 4)
    assert Deferred(x, b).tensor().dtype == torch.bfloat16
    assert (Deferred(x, b) + residual).tensor().dtype == torch.float32
    norm = drop_in(nn.LayerNorm)(4)
    assert norm(Deferred(x, b) + residual).dtype == torch.float32
