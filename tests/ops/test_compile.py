"""The operations inside `torch.compile`: whole graphs, equal to eager."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bitfit_fast.ops import bias_activation, dropout_add_layer_norm, feed_forward, linear

# PyTorch's own, when it loads its compiler
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
definition_only = pytest.mark.parametrize("backend", ["torch"], indirect=True)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def compiled():
    def build(function, backend="aot_eager", **options):
        return torch.compile(function, fullgraph=True, backend=backend, **options)

    return build


def block_inputs(randn, rows=6):
    return {
        "x": randn(2, rows, 16),
        "w": randn(24, 16) / 4,
        "b1": randn(24),
        "gamma": 1 + randn(24) / 4,
        "beta": randn(24),
        "b2": randn(24),
        "residual": randn(2, rows, 24),
    }


def block(x, w, b1, gamma, beta, b2, residual, seed=None, p=0.25, few_bits=False):
    h = bias_activation(linear(x, w), b1, few_bits=few_bits)
    return dropout_add_layer_norm(h, gamma, beta, b2, residual, p, seed=seed, returns_sum=True)


def assert_equal(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, t in found.items():
        torch.testing.assert_close(t, expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("few_bits", "frozen"), [(False, ("w",)), (False, ("x", "w", "residual")), (True, ())], ids=str
)
def test_a_block_is_one_graph_and_equals_eager(
    few_bits, frozen, randn, seed, compiled, differentiate
):
    inputs, dys = block_inputs(randn), [randn(2, 6, 24), randn(2, 6, 24)]
    run = compiled(block)

    def call(function):
        return lambda **leaves: function(**leaves, seed=seed, few_bits=few_bits)

    expected = differentiate(call(block), inputs, dys, frozen)
    assert_equal(differentiate(call(run), inputs, dys, frozen), expected)


def test_autocast_may_be_inside(randn, seed, device, compiled, differentiate):
    inputs, dys = block_inputs(randn), [randn(2, 6, 24), randn(2, 6, 24)]

    def inside(**leaves):
        with torch.autocast(device, torch.bfloat16):
            return block(**leaves, seed=seed)

    expected = differentiate(inside, inputs, dys, "w")
    assert_equal(differentiate(compiled(inside), inputs, dys, "w"), expected)


def test_the_feed_forward_block_is_one_graph_and_equals_eager(randn, compiled, differentiate):
    inputs = {"x": randn(2, 6, 16), "w1": randn(24, 16), "b1": randn(24), "w2": randn(8, 24)}
    dys, frozen = [randn(2, 6, 8)], ("w1", "w2")
    expected = differentiate(feed_forward, inputs, dys, frozen)
    assert_equal(differentiate(compiled(feed_forward), inputs, dys, frozen), expected)


def test_a_seed_is_drawn_anew_at_each_call(randn, compiled):
    inputs = block_inputs(randn)
    run = compiled(block)
    torch.manual_seed(3)
    first, second = run(**inputs)[1], run(**inputs)[1]
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(run(**inputs)[1], first)
    torch.manual_seed(3)
    assert torch.equal(block(**inputs)[1], first)


def test_other_numbers_of_rows_do_not_compile_again(randn, seed, compiled, differentiate):
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(block, counter)
    counts = []
    for rows in (6, 3, 11, 40):
        inputs, dys = block_inputs(randn, rows), [randn(2, rows, 24), randn(2, rows, 24)]
        expected = differentiate(lambda **t: block(**t, seed=seed), inputs, dys, "w")
        assert_equal(differentiate(lambda **t: run(**t, seed=seed), inputs, dys, "w"), expected)
        counts.append(counter.frame_count)
    # the second number shows that it changes, which the first cannot
    assert counts[1] == counts[2] == counts[3]


@definition_only
def test_with_dynamic_shapes_the_first_graph_is_the_only_one(randn, seed, compiled):
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(block, counter, dynamic=True)
    counts = []
    for rows in (6, 3, 11, 40):
        run(**block_inputs(randn, rows), seed=seed)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@definition_only
def test_inductor_compiles_a_block(randn, seed, compiled, differentiate):
    run = compiled(block, "inductor", dynamic=True)
    for rows in (6, 11):
        inputs, dys = block_inputs(randn, rows), [randn(2, rows, 24), randn(2, rows, 24)]
        expected = differentiate(lambda **t: block(**t, seed=seed), inputs, dys, "w")
        found = differentiate(lambda **t: run(**t, seed=seed), inputs, dys, "w")
        assert_equal(found, expected, 1e-5)


@definition_only
def test_inductor_takes_transposed_inputs(randn, compiled, differentiate):
    inputs = {"x": randn(24, 6).t(), "gamma": randn(24), "residual": randn(24, 6).t()}
    dys = [randn(24, 6).t(), randn(24, 6).t()]

    def norm(x, gamma, residual):
        h = bias_activation(x)
        y, s = dropout_add_layer_norm(h, gamma, residual=residual, returns_sum=True)
        return y * 2, s + 1

    expected = differentiate(norm, inputs, dys)
    assert_equal(differentiate(compiled(norm, "inductor"), inputs, dys), expected, 1e-5)
