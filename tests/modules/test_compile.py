"""Patched models under `torch.compile`: whole graphs, with the fused operations in them."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

FAMILIES = ["bert", "vit", "gpt2", "albert"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """Return a compiler back end that runs graphs as they are, and the graphs that it got."""
    seen = []

    def keep(graph, example_inputs):
        seen.append(graph)
        return graph

    return aot_autograd(fw_compiler=keep), seen


def called(graph, name):
    return [
        n for n in graph.graph.nodes if n.target is getattr(torch.ops.bitfit_fast, name).default
    ]


def assert_near(found, expected, scale):
    assert found.keys() == expected.keys()
    largest = max(t.abs().max().item() for t in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=scale * largest)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_one_graph_each_way_with_the_fused_operations(
    family, patched, batch, measure, graphs, calls
):
    # of ALBERT two, which have the same parameters
    layers = {"albert": {}, "gpt2": {"n_layer": 1}}.get(family, {"num_hidden_layers": 1})
    model = patched(family, **layers)
    inputs = batch(model)
    expected = measure(model, inputs)
    with calls() as eager:
        measure(model, inputs)
    backend, seen = graphs
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = measure(model, inputs, compiled)
    assert_near(found, expected, 1e-6)

    forward, backward = seen
    norms = called(forward, "layer_norm_fwd")
    fused = [n for n in norms if n.args[3] is not None]
    activations = [n for n in called(forward, "activation_fwd") if n.args[1] is not None]
    residuals = [n for n in fused if n.args[4] is not None]
    sums = [n for n in fused if n.args[10]]
    assert (len(fused), len(residuals), len(sums), len(activations)) == eager.fused
    assert len(norms) == eager.count("bitfit_fast::layer_norm_fwd")
    assert len(called(backward, "layer_norm_bwd")) == eager.count("bitfit_fast::layer_norm_bwd")
    assert len(called(backward, "activation_bwd")) == len(activations)


def test_dropout_is_in_the_fused_operation_and_drawn_anew_at_each_step(
    patched, batch, measure, graphs
):
    model = patched("bert", num_hidden_layers=1, attention_probs_dropout_prob=0.0).train()
    inputs = batch(model)
    backend, seen = graphs
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = measure(model, inputs, compiled)
    assert found.keys() == measure(model, inputs).keys()
    assert all(torch.isfinite(t).all() for t in found.values())
    fused = [n for n in called(seen[0], "layer_norm_fwd") if n.args[3] is not None]
    assert [n.args[5] for n in fused] == [0.1] * 2
    assert len({n.args[6] for n in fused}) == 2
    losses = [compiled(**inputs).loss.item() for _ in range(4)]
    assert len(set(losses)) == 4


def test_inductor_compiles_a_model_once_for_all_batch_sizes(patched, batch, measure):
    problem = "single_label_classification"  # found out, it would change the configuration
    model = patched("bert", num_hidden_layers=1, problem_type=problem)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for rows, tokens in ((3, 12), (5, 9)):
        inputs = batch(model, rows=rows, tokens=tokens)
        assert_near(measure(model, inputs, compiled), measure(model, inputs), 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
