"""Whole encoders of every family and with every head against the same models unpatched."""

import pytest
import torch

import bitfit_fast
from bitfit_fast.kernels import library
from bitfit_fast.models.families import FAMILIES
from bitfit_fast.ops._backend import BACKEND_VARIABLE

BACKENDS = pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
HEADS = [
    ("bert", "ForTokenClassification"),
    ("bert", "ForQuestionAnswering"),
    ("bert", "ForMultipleChoice"),
    ("bert", "Model"),
    ("roberta", "ForTokenClassification"),
    ("roberta", "ForMultipleChoice"),
    ("electra", "ForTokenClassification"),
    ("electra", "ForMultipleChoice"),
    ("electra", "Model"),
    ("mpnet", "ForTokenClassification"),
    ("mpnet", "Model"),
    ("distilbert", "ForTokenClassification"),
    ("distilbert", "ForQuestionAnswering"),
    ("distilbert", "ForMultipleChoice"),
    ("distilbert", "Model"),
    ("vit", "Model"),
    ("deit", "Model"),
]


@pytest.fixture
def agrees(measure, as_exact):
    """Patch a case, and compare with PyTorch in the same precision."""

    def check(case, precision="fp32", memory="fast", **floor):
        done = bitfit_fast.patch_encoder(case.model, precision=precision, memory=memory)
        found = measure(case.model, case.inputs)
        assert set(found) == set(case.exact)
        assert len(done.no_gradient) == 3
        if precision == "fp32":
            torch.testing.assert_close(
                found["loss"].double(), case.exact["loss"], rtol=1e-6, atol=0
            )
            as_exact(found, case.fp32, case.exact, **floor)
            return
        as_exact(found, case.bf16, case.exact, **{"roundings": 2, "eps": 2.0**-7} | floor)
        # one bias is lucky where another is not; of all together the rule holds
        ours, theirs = (
            sum((m[n].double() - case.exact[n]).norm().item() ** 2 for n in found) ** 0.5
            for m in (found, case.bf16)
        )
        assert ours <= 2 * theirs

    return check


def test_every_row_has_a_model_here(build, every_model):
    rows = [FAMILIES[build(name).config.model_type] for name in every_model]
    assert all(any(row is r for r in rows) for row in FAMILIES.values() if row.stack)


@BACKENDS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_and_gradients_of_classifiers(family, precision, case, agrees):
    agrees(case(family), precision)


@BACKENDS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_loss_and_gradients_of_other_heads(family, head, precision, case, agrees):
    agrees(case(family, head), precision)


@BACKENDS
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 36, "intermediate_size": 50},
        {"hidden_size": 21, "intermediate_size": 17},
        {"num_attention_heads": 1, "layer_norm_eps": 1e-3},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "silu"},
    ],
    ids=str,
)
def test_other_sizes_and_activations(changes, case, agrees):
    agrees(case("bert", **changes))


DIFFERENT = (60, 40, 3, 2, 1)


@BACKENDS
@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_very_different_lengths(family, head, case, agrees):
    agrees(case(family, head, DIFFERENT, max_position_embeddings=64))


@BACKENDS
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (9,)], ids=str)
def test_few_tokens(lengths, case, agrees):
    agrees(case("bert", lengths=lengths))


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_kernels_for_cpus_drop_what_pytorch_drops(head, build, batch, measure, monkeypatch):
    if reason := library.unavailable():
        pytest.skip(reason)
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    model = build("bert", head, max_position_embeddings=64, **rates)
    bitfit_fast.select(model)
    bitfit_fast.patch_encoder(model, precision="fp32")
    found = []
    for chosen in ("torch", "native"):
        monkeypatch.setenv(BACKEND_VARIABLE, chosen)
        found.append(measure(model, batch(model, DIFFERENT)))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)
