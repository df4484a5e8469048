"""Sparse additions: the gradients of chosen entries, where they are written, what is chosen."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.func import functional_call

from bitfit_fast.additions import addition
from bitfit_fast.methods import prepare, remove
from bitfit_fast.methods.places import matrices
from bitfit_fast.methods.random_entries import RandomLines, RandomUniform, distinct
from bitfit_fast.methods.sparse import Entries
from bitfit_fast.selection import select

IDS = torch.tensor([[1, 5, 9, 12, 2], [1, 7, 2, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long(), "labels": torch.tensor([0, 1])}


def hosts(model):
    return addition(model).hosts


def random_entries(rows, columns, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return distinct(rows * columns, count, generator)


#: Entries of a 200 x 300 weight for which other products are the least work.
SHAPE = (200, 300)
KINDS = {
    "single": torch.arange(40) * 305 + 17,
    "rows": torch.cat([torch.arange(300) + 300 * row for row in (3, 150)]),
    "columns": torch.cat([torch.arange(200) * 300 + column for column in (0, 299)]),
    "all three": torch.cat(
        [torch.arange(300), torch.arange(1, 200) * 300 + 7, torch.tensor([1501, 45_678])]
    ),
    "dense": random_entries(*SHAPE, 20_000),
    "one": torch.tensor([59_999]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 37, 5000])
def test_chosen_entries_of_a_product(kind, tokens):
    entries = Entries(KINDS[kind].int(), SHAPE)
    plan = entries.plan()
    used = {
        "rows": len(plan.rows) > 0,
        "columns": len(plan.columns) > 0,
        "single": len(plan.single) > 0,
        "dense": plan.dense,
    }
    expected = {"all three": {"rows", "columns", "single"}, "one": {"single"}}.get(kind, {kind})
    if not plan.dense:
        assert {name for name, is_used in used.items() if is_used} == expected
    assert plan.dense == (kind == "dense")
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(tokens, SHAPE[0], generator=generator, dtype=torch.float64)
    b = torch.randn(tokens, SHAPE[1], generator=generator, dtype=torch.float64)
    expected_values = (a.t() @ b).flatten()[KINDS[kind]]
    torch.testing.assert_close(entries.gradient(a, b), expected_values, rtol=1e-12, atol=1e-11)
    narrow = entries.gradient(a.bfloat16(), b.bfloat16()).double()
    scale = 1 + expected_values.abs().max() if tokens else 1.0
    assert ((narrow - expected_values).abs() <= 0.02 * scale).all()


@pytest.mark.parametrize("method", ["random-uniform", "random-row-col"])
@pytest.mark.parametrize("prefix", ["Bert", "GPT2", "Albert"])
def test_gradients_are_those_of_dense_autograd(build, move, prefix, method):
    model = build(prefix).double()
    plain = build(prefix).double()
    prepare(model, method, parameters=900, seed=3)
    move(model)
    loss = model(**BATCH).loss
    loss.backward()

    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "sparse" not in n}
    base = dict(plain.named_parameters())
    for name, module in hosts(model).items():
        # the definition: the base's weight with the values scattered over it
        dense = base[f"{name}.weight"].detach().clone().flatten()
        dense[module.sparse_indices.long()] += module.sparse_values.detach()
        weights[f"{name}.weight"] = dense.view_as(base[f"{name}.weight"])
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    expected = functional_call(plain, weights, (), BATCH).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    expected.backward()
    for name, module in hosts(model).items():
        gathered = weights[f"{name}.weight"].grad.flatten()[module.sparse_indices.long()]
        torch.testing.assert_close(module.sparse_values.grad, gathered, rtol=1e-9, atol=1e-12)
        assert module.weight.grad is None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "sparse" not in name:
            torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-12)


def test_autocast_gives_nearly_the_same(build, move):
    model = build()
    prepare(model, "random-uniform", parameters=900)
    move(model)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled):
            model(**BATCH).loss.backward()
        gradients.append(torch.cat([m.sparse_values.grad for m in hosts(model).values()]))
    assert gradients[1].dtype == torch.float32
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 0 < error < 0.05


def test_nothing_of_the_size_of_the_weights_is_kept(build):
    model = build()
    prepare(model, "random-uniform", parameters=50)
    sizes = {p.numel() for n, p in model.named_parameters() if p.requires_grad and "sparse" in n}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    own = {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**BATCH).loss
    # besides the weights themselves, nothing has the shape of one
    shapes = {tuple(m.weight.shape) for m in hosts(model).values()}
    assert not [t for t in kept if t.data_ptr() not in own and tuple(t.shape) in shapes]
    loss.backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert sum(t.numel() for t in states) == 2 * (50 + 66)
    assert max(sizes) <= 50


def test_two_passes_before_one_backward_add_up(build, move):
    model = build()
    prepare(model, "random-row-col", parameters=300)
    move(model)
    once = torch.autograd.grad(
        model(**BATCH).loss, [m.sparse_values for m in hosts(model).values()]
    )
    (model(**BATCH).loss + model(**BATCH).loss).backward()
    for module, gradient in zip(hosts(model).values(), once):
        torch.testing.assert_close(module.sparse_values.grad, 2 * gradient)


@pytest.mark.parametrize("method", ["random-uniform", "random-row-col"])
def test_the_choice_is_of_the_right_size_distinct_and_by_seed(build, method):
    def chosen(seed, **options):
        model = build()
        selection = prepare(model, method, seed=seed, **options)
        places = {
            (name, int(i)) for name, module in hosts(model).items() for i in module.sparse_indices
        }
        for module in hosts(model).values():
            indices = module.sparse_indices
            assert indices.dtype == torch.int32 and (indices.diff() > 0).all()
        return selection, places, addition(model).options

    selection, places, options = chosen(0)
    biases = select(build()).biases
    assert options == {"parameters": biases, "seed": 0}
    assert selection.counts[method] == len(places) == biases
    assert chosen(0)[1] == places
    assert chosen(1)[1] != places
    assert all("encoder.layer" in name for name, _ in places)
    for count in (1, 777, 16_384):
        selection, places, options = chosen(5, parameters=count)
        assert selection.counts[method] == len(places) == options["parameters"] == count


def test_bert_base_gets_as_many_as_bitfit_trains():
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    shapes = {n: tuple(m.weight.shape) for n, m in matrices(model, set()).items()}
    assert len(shapes) == 72
    count = select(model).biases
    assert count == 102_912
    total = sum(rows * columns for rows, columns in shapes.values())
    for kind in (RandomUniform, RandomLines):
        found = kind("", {"parameters": None, "seed": 0}).draw(shapes, total, count)
        assert sum(map(len, found.values())) == count
        assert all(len(part.unique()) == len(part) for part in found.values())


def test_single_entries_are_spread_evenly():
    shapes = {"small": (100, 100), "large": (100, 300), "last": (1, 1)}
    kind = RandomUniform("", {"parameters": None, "seed": 0})
    found = kind.draw(shapes, 40_001, 8_000)
    # six standard deviations of the hypergeometric distribution
    assert abs(len(found["small"]) - 2000) < 6 * 35
    assert abs((found["large"] < 15_000).sum() - 3000) < 6 * 39
    for (rows, columns), part in zip(shapes.values(), found.values()):
        assert not len(part) or 0 <= part.min() <= part.max() < rows * columns


def test_lines_are_whole_but_the_last():
    shapes = {"one": (40, 30), "two": (20, 50)}
    count = 500
    found = RandomLines("", {"parameters": None, "seed": 4}).draw(shapes, 2200, count)
    left = 0
    for name, indices in found.items():
        rows, columns = shapes[name]
        by_row = Counter((indices // columns).tolist())
        full = {row for row, n in by_row.items() if n == columns}
        rest = [i for i in indices.tolist() if i // columns not in full]
        by_column = Counter(i % columns for i in rest)
        # a column has every row that is not chosen as a whole, unless it is the last line
        left += sum(n for n in by_column.values() if n != rows - len(full))
        assert full or by_column
    assert sum(map(len, found.values())) == count
    assert left < 50


def test_draws_without_replacement_are_even():
    generator = torch.Generator().manual_seed(0)
    for total, count in ((10, 2), (3, 3), (1000, 1)):
        for _ in range(20):
            drawn = distinct(total, count, generator)
            assert len(drawn.unique()) == count and drawn.max() < total
    counts = torch.zeros(40)
    for _ in range(2000):
        counts[distinct(40, 4, generator)] += 1
    assert (counts - 200).abs().max() < 6 * 13.5


def test_the_weights_hold_the_values_and_give_them_back(build, move):
    model, plain = build(), build()
    prepare(model, "random-uniform", parameters=400, head=False)
    move(model)
    model(**BATCH)
    moved = 0
    for name, module in hosts(model).items():
        before = plain.get_submodule(name).weight
        changed = (module.weight != before).flatten().nonzero().squeeze(1)
        assert set(changed.tolist()) <= set(module.sparse_indices.tolist())
        moved += len(changed)
    assert moved > 390
    extra = addition(model)
    with extra.aside(model):
        state = plain.state_dict()
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in state.items())
    remove(model)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_without_biases_says_that_a_number_is_needed():
    from transformers import T5Config, T5ForSequenceClassification

    from bitfit_fast import BitFitError

    config = T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2)
    model = T5ForSequenceClassification(config)
    with pytest.raises(BitFitError, match=r"no biases to train as many weights as; say how many"):
        prepare(model, "random-uniform")
    assert prepare(model, "random-uniform", parameters=10).counts["random-uniform"] == 10
