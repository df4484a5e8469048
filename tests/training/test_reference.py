"""The reference step against a training loop written out by hand."""

import copy
import dataclasses

import pytest
import torch

import bitfit_fast
from bitfit_fast.errors import BitFitError
from bitfit_fast.training.backends import BACKENDS, choose_backend
from bitfit_fast.training.checks import check_gradients
from bitfit_fast.training.reference import ReferenceStep
from bitfit_fast.training.settings import Plan


def plan(**changes) -> Plan:
    values = {
        "steps": 100, "steps_per_epoch": 10, "warmup_steps": 6, "eval_every": 10, "lr": 1e-2,
        "schedule": "linear", "precision": "fp32", "grad_clip": 1.0,
        "batch_size": 4, "max_length": 16, "device": torch.device("cpu"),
    }  # fmt: skip
    return Plan(**{**values, **changes})


@pytest.fixture
def model(bert_folder):
    model = bitfit_fast.load_model(str(bert_folder), ["no", "yes"])
    bitfit_fast.select(model)
    return model.eval()  # no dropout, so that two models can be compared


def batch(seed: int):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 20, (4, 9), generator=generator)
    labels = torch.randint(0, 2, (4,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_the_step_is_adamw_on_clipped_gradients_of_the_selected_parameters(model):
    by_hand = copy.deepcopy(model)
    the_plan = plan()
    step = ReferenceStep(model, the_plan)
    parameters = [p for p in by_hand.parameters() if p.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for t in range(5):
        step(batch(t))
        by_hand.zero_grad()
        by_hand(**batch(t)).loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
        scale = min(1.0, 1.0 / (norm.item() + 1e-6))
        with torch.no_grad():
            for p, (m, v) in zip(parameters, moments):
                g = p.grad * scale
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
                p -= the_plan.lr_at(t) * m_hat / (v_hat.sqrt() + 1e-8)
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.parameters()):
        if name.endswith("attention.self.key.bias"):
            continue  # its gradient is zero, and Adam makes steps of the rounding noise
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=name)


def test_frozen_parameters_do_not_move_and_get_no_gradient(model):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = set(bitfit_fast.Selection.of(model).names)
    step = ReferenceStep(model, plan())
    for t in range(3):
        step(batch(t))
    check_gradients(model, names)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name in names), name


def test_bf16_autocasts_and_keeps_trained_parameters_in_fp32(model):
    exact = copy.deepcopy(model)
    low, high = ReferenceStep(model, plan(precision="bf16")), ReferenceStep(exact, plan())
    loss_low, loss_high = low(batch(0)), high(batch(0))
    assert loss_low != loss_high
    assert abs(loss_low - loss_high) < 0.05
    assert {p.dtype for p in low.trained.values()} == {torch.float32}
    assert {p.grad.dtype for p in low.trained.values()} == {torch.float32}


def test_clipping_bounds_the_norm_and_zero_switches_it_off(model):
    for clip in (1e-3, 0.0):
        step = ReferenceStep(model, plan(grad_clip=clip))
        step(batch(0))
        norm = torch.sqrt(sum((p.grad**2).sum() for p in step.trained.values()))
        assert (norm <= 1.001e-3) == bool(clip)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)
def test_a_restored_step_continues_bit_by_bit(model, device):
    the_plan = plan(device=torch.device(device))
    straight, broken = model.to(device), copy.deepcopy(model).to(device)
    one, two = ReferenceStep(straight, the_plan), ReferenceStep(broken, the_plan)
    for t in range(3):
        one(batch(t))
        two(batch(t))
    resumed = ReferenceStep(broken, the_plan)
    # as read from a file
    resumed.restore({k: v.cpu().clone() for k, v in two.state().items()}, two.steps)
    for t in range(3, 6):
        one(batch(t))
        resumed(batch(t))
    for p, q in zip(straight.parameters(), broken.parameters()):
        assert torch.equal(p, q) if device == "cpu" else torch.allclose(p, q, rtol=1e-5)


def test_a_missing_or_surplus_gradient_is_named(model):
    model(**batch(0)).loss.backward()
    names = bitfit_fast.Selection.of(model).names
    check_gradients(model, names)
    with pytest.raises(BitFitError, match=r"got no gradient: bert\.embeddings\.word_emb"):
        check_gradients(model, [*names, "bert.embeddings.word_embeddings.weight"])
    with pytest.raises(BitFitError, match=r"not selected got a gradient: classifier\.weight"):
        check_gradients(model, [n for n in names if n != "classifier.weight"])


def test_auto_takes_the_first_backend_that_does_not_refuse(model, monkeypatch):
    class Picky:
        name = "picky"

        def refusal(self, model, selection, plan):
            return "it is Tuesday"

    selection = bitfit_fast.Selection.of(model)
    reference = dict(BACKENDS)
    monkeypatch.setattr(
        "bitfit_fast.training.backends.BACKENDS", {"picky": Picky(), **reference}, raising=True
    )
    backend, why = choose_backend("auto", model, selection, plan())
    assert backend.name == "fast"
    assert why == "picky cannot train this model: it is Tuesday"
    match = "'picky' cannot train this model: it is Tuesday; auto would take fast"
    with pytest.raises(BitFitError, match=match):
        choose_backend("picky", model, selection, plan())
    with pytest.raises(BitFitError, match="unknown backend 'slow'; valid ones are auto, picky"):
        choose_backend("slow", model, selection, plan())
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(True)
    backend, why = choose_backend("auto", model, bitfit_fast.Selection.of(model), plan())
    assert backend.name == "reference" and "output.dense trains" in why
    low = dataclasses.replace(plan(), memory="low")
    with pytest.raises(BitFitError, match=r"no backend can train .* memory modes, and 'low' is"):
        choose_backend("auto", model, bitfit_fast.Selection.of(model), low)


@pytest.mark.parametrize("name", ["reference", "modules"])
@pytest.mark.parametrize("able", ["avx2", "avx512_bf16", "neon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_who_trains_in_a_slow_precision_is_told(name, able, precision, model, monkeypatch):
    x86 = {} if able == "neon" else {"sse2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True, **x86}, raising=False)
    undo, said = BACKENDS[name].patch(
        model, bitfit_fast.Selection.of(model), plan(precision=precision)
    )
    undo()
    assert ("no instructions" in said) == (able == "avx2" and precision == "bf16")
