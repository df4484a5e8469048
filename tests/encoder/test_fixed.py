"""Steps on packings of a fixed size: the same losses and gradients as the ordinary ones."""

import dataclasses
import gc
import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitfit_fast import patch_encoder, select
from bitfit_fast.errors import BitFitError, BitFitWarning
from bitfit_fast.packing import FixedPacking
from bitfit_fast.training.fast import FastStep
from bitfit_fast.training.fixed import CannotCapture, _Inputs, budgets
from bitfit_fast.training.settings import Plan

SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"
#: One token less than the budget of 64 and more, and few of many.
BATCHES = [(16, 7, 1, 12, 4, 16), (3, 1, 2, 1, 5, 2), (16, 16, 16, 16, 16, 16), (10, 9, 8, 7, 6, 5)]
PLAN = Plan(
    steps=100, steps_per_epoch=10, warmup_steps=0, eval_every=10, lr=1e-3, schedule="linear",
    precision="fp32", grad_clip=0.0, batch_size=6, max_length=16, device=torch.device("cpu"),
)  # fmt: skip
DROPS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


@pytest.fixture
def steps(build):
    """Make the ordinary step and the one of a fixed size, of the same model."""

    def make(family="bert", head=SEQUENCE, memory="fast", plan=PLAN, terms="all", **changes):
        made = []
        for fixed in (False, True):
            model = build(family, head, **changes)
            selection = select(model, terms)
            patch_encoder(model, selection, precision=plan.precision, memory=memory)
            step = FastStep(model, plan)
            step.steps = 1  # the first one is never of a fixed size
            if fixed:
                step.fixed = step.of_fixed_size(after=0)
            made.append(step)
        return made

    return make


def both(steps, inputs, seed=3):
    """Take a step with each; return loss and gradients of each."""
    results = []
    for step in steps:
        torch.manual_seed(seed)
        loss = step(dict(inputs))
        results.append((loss, step.arena.gradients.clone()))
    return results


def assert_same(results, tolerance=2e-6):
    (loss, gradients), (fixed_loss, fixed_gradients) = results
    torch.testing.assert_close(fixed_loss, loss, rtol=tolerance, atol=0)
    assert gradients.norm() > 0
    error = (fixed_gradients - gradients).norm() / gradients.norm()
    assert error <= tolerance, error


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_are_those_of_the_ordinary_step(steps, batch, memory, dropout):
    made = steps(memory=memory, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    for number, lengths in enumerate(BATCHES):
        # where rounding differs, a derivative in 8 bits may fall on the next level
        tolerance = 1e-3 if memory == "low" else 2e-6
        assert_same(both(made, batch(made[0].model, lengths, seed=number)), tolerance)


@pytest.mark.parametrize("head", [SEQUENCE, TOKEN])
def test_for_every_family(steps, batch, family, head):
    if family in ("vit", "deit") and head == TOKEN:
        pytest.skip("images have no tokens to label")
    made = steps(family, head)
    for number, lengths in enumerate(BATCHES[1:3]):
        assert_same(both(made, batch(made[0].model, lengths, seed=number)))
    assert len(made[1].fixed._made) == (1 if family in ("vit", "deit") else 2)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("head", [SEQUENCE, TOKEN])
def test_the_kernels_of_a_gpu_compute_the_same(steps, batch, head):
    # a head for tokens drops out padded outputs, of another width
    made = steps(head=head, num_hidden_layers=1, classifier_dropout=0.0, **DROPS)
    inputs = batch(made[0].model, (16, 7, 1, 12))
    assert_same(both(made, inputs), 1e-5)


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_in_bf16_masks_are_the_same_and_rounding_differs(steps, batch, family):
    made = steps(family, plan=dataclasses.replace(PLAN, precision="bf16"), **DROPS)
    assert_same(both(made, batch(made[0].model)), 1e-2)


@pytest.mark.parametrize("head", [SEQUENCE, TOKEN])
def test_a_batch_padded_further_than_any_sequence_of_its_budget(steps, batch, head):
    made = steps(head=head, max_position_embeddings=128)
    inputs = batch(made[0].model, BATCHES[0])
    fills = {"labels": -100}
    padded = {
        name: torch.nn.functional.pad(t, (0, 100 - t.shape[1]), value=fills.get(name, 0))
        if t.ndim == 2 else t for name, t in inputs.items()
    }  # fmt: skip
    assert padded["input_ids"].shape == (6, 100)
    assert_same(both(made, padded))
    ((inputs_of_fixed, *_),) = made[1].fixed._made.values()
    assert inputs_of_fixed.budget.longest < 100


@pytest.mark.parametrize("terms", ["embedding-layernorm", "query", "output-layernorm"])
def test_where_the_backward_pass_ends_early(steps, batch, terms):
    made = steps(terms=terms)
    assert_same(both(made, batch(made[0].model, BATCHES[1])))


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
@pytest.mark.parametrize("head", [SEQUENCE, TOKEN])
def test_rows_left_over_change_nothing_whatever_they_hold(steps, batch, head, monkeypatch):
    step = steps(head=head, **DROPS)[1]
    inputs, tokens = batch(step.model, BATCHES[1]), sum(BATCHES[1])
    values, load = step.arena.values.clone(), _Inputs.load

    def results():
        step.arena.values.copy_(values)
        torch.manual_seed(0)
        return step(dict(inputs)), step.arena.gradients.clone()

    loss, gradients = results()
    for word in (7, 89):

        def poisoned(self, batch, lengths, lr, word=word):
            load(self, batch, lengths, lr)
            assert self.own["input_ids"].shape[1] > tokens
            self.own["input_ids"][0, tokens:] = word
            self.own["position_ids"][0, tokens:] = 11

        monkeypatch.setattr(_Inputs, "load", poisoned)
        found = results()
        assert torch.equal(found[0], loss) and torch.equal(found[1], gradients)


def test_many_steps_lead_to_the_same_parameters(steps, batch):
    ordinary, fixed = steps(plan=dataclasses.replace(PLAN, grad_clip=1.0), **DROPS)
    torch.manual_seed(0)
    batches = [batch(ordinary.model, BATCHES[i % 4], seed=i) for i in range(20)]
    ends = []
    for step in (ordinary, fixed):
        torch.manual_seed(1)
        losses = torch.stack([step(dict(inputs)) for inputs in batches])
        ends.append((losses, step.arena.values, step.state()))
    torch.testing.assert_close(ends[1][0], ends[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=0, atol=1e-4)
    assert ends[0][2].keys() == ends[1][2].keys()
    assert len(fixed.fixed._made) == 2


class Waits(TorchDispatchMode):
    """Notes what would wait for a GPU."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in self.NAMES:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", [SEQUENCE, TOKEN])
def test_no_family_reads_a_tensor_on_the_way(steps, batch, family, head, monkeypatch):
    if family in ("vit", "deit") and head == TOKEN:
        pytest.skip("images have no tokens to label")
    if family != "distilbert":  # whose dropout has other names
        step = steps(family, head, **DROPS)[1]
    else:
        step = steps(family, head, dropout=0.1)[1]
    if step.encoder.stack.layers[0].dropout is not None:
        # PyTorch's attention for CPUs reads where sequences begin; the kernel does not
        from bitfit_fast.encoder import backward, forward

        monkeypatch.setattr(forward, "attention_fwd", lambda q, *_: torch.zeros_like(q))
        monkeypatch.setattr(backward, "attention_bwd", _no_gradient)
    inputs, waits = batch(step.model), Waits()
    step(dict(inputs))
    run = step.fixed.step

    def watched(given, lr):
        with waits:
            return run(given, lr)

    step.fixed.step = watched
    step(dict(inputs))
    assert waits.seen == []


def _no_gradient(do, q, k, v, packing, p, seed, bias, needs_kv=True):
    if q.shape[0] == k.shape[0]:
        joined = torch.zeros(q.shape[0], 3, *q.shape[1:])
        return joined[:, 0], joined[:, 1:] if needs_kv else None
    return torch.zeros_like(q), torch.zeros(k.shape[0], 2, *k.shape[1:]) if needs_kv else None


# ------------------------------------------------------------------- what goes another way


def test_batches_of_a_kind_go_the_ordinary_way_first(steps, batch):
    step = steps()[0]
    step.fixed = step.of_fixed_size(after=2)
    inputs = batch(step.model)
    for _ in range(2):
        assert step.fixed(dict(inputs), 1e-3) is None
    assert step.fixed(dict(inputs), 1e-3) is not None


@pytest.mark.parametrize(
    ("head", "change", "reason"),
    [
        ("ForQuestionAnswering", {}, "BertForQuestionAnswering may look at the padded batch"),
        ("ForMultipleChoice", {}, "BertForMultipleChoice may look at the padded batch"),
        (SEQUENCE, {"inputs_embeds": None}, "batches with inputs_embeds are not known"),
        (SEQUENCE, {"packed_lengths": (16,) * 7}, "do not tell how long"),
        (SEQUENCE, {"packed_lengths": (16, 16, 16, 16, 16, 0)}, "do not tell how long"),
    ],
)
def test_what_cannot_be_of_a_fixed_size_says_so_once(steps, batch, head, change, reason):
    step = steps(head=head)[1]
    inputs = {**batch(step.model), **change}
    with pytest.warns(BitFitWarning, match=reason) as warned:
        assert step.fixed(dict(inputs), 1e-3) is None
    assert len(warned) == 1
    assert step.fixed(dict(inputs), 1e-3) is None


def test_a_batch_beyond_all_budgets_goes_the_ordinary_way(steps, batch):
    step = steps()[1]
    with pytest.warns(BitFitWarning, match="a batch has 144 tokens, .* largest budget is 128"):
        step.fixed.budgets = (64, 128)
        step(batch(step.model, (16,) * 9))


def test_left_padding_goes_the_ordinary_way(steps, batch):
    step = steps()[1]
    inputs = batch(step.model)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.warns(BitFitWarning, match="do not tell how long"):
        assert step.fixed(inputs, 1e-3) is None


def test_where_nothing_can_be_captured_steps_go_the_ordinary_way(steps, batch):
    ordinary, step = steps()

    def refuse(run):
        raise CannotCapture("a step cannot be captured: it asks the time")

    step.fixed = step.of_fixed_size(refuse, after=0)
    inputs = batch(step.model)
    with pytest.warns(BitFitWarning, match="without a CUDA graph where .* it asks the time"):
        results = both((ordinary, step), inputs)
    assert torch.equal(results[0][1], results[1][1])
    step(dict(inputs))


def test_what_was_captured_goes_when_nothing_will_replay_it(steps, batch):
    _, step = steps()
    captured = []

    def refuse_the_second(run):
        if captured:
            raise CannotCapture("a step cannot be captured: out of memory")
        captured.append(weakref.ref(run))
        return run

    step.fixed = fixed = step.of_fixed_size(refuse_the_second, after=0)
    step(batch(step.model))
    step(batch(step.model))
    assert len(fixed._made) == 1 and captured[0]() is not None
    with pytest.warns(BitFitWarning, match="out of memory"):
        step(batch(step.model, BATCHES[2]))
    gc.collect()
    assert not fixed._made and captured[0]() is None
    step.close()
    assert step.fixed is None


def test_a_weight_that_changes_is_found_between_replays(steps, batch):
    step = steps()[1]
    inputs = batch(step.model)
    step(dict(inputs))
    with torch.no_grad():
        step.model.bert.encoder.layer[0].output.dense.weight.mul_(2)
    with pytest.raises(BitFitError, match="was changed after the encoder was patched"):
        step(dict(inputs))


def test_a_batch_beyond_the_token_budget_is_an_error(steps, batch):
    for step in steps(plan=dataclasses.replace(PLAN, token_budget=(32, 55))):
        with pytest.raises(BitFitError, match=r"has 56 tokens.* budget is 55; a larger token-bud"):
            step(batch(step.model))
        assert step(batch(step.model, BATCHES[1])).isfinite()


# ----------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("tokens", [1, 64, 65, 2048, 8192, 16 * 512, 100_000])
def test_budgets_hold_every_batch_and_little_more(tokens):
    made = budgets(tokens)
    assert made == tuple(sorted(set(made))) and all(n % 64 == 0 for n in made)
    assert 0 <= made[-1] - tokens < 64
    for below, above in itertools.pairwise(made):
        assert above - below == 64 or above <= 1.25 * below + 64
    assert made[0] == 64 and len(made) < 40


@pytest.mark.parametrize("lengths", [(5, 1, 9), (64, 64, 64), (1, 1, 1), (64, 1, 63)])
@pytest.mark.parametrize("tokens", [192, 256, 500])
def test_every_row_lies_in_a_sequence_that_is_short_enough(steps, lengths, tokens):
    step = steps()[1]
    step.fixed.budgets = (tokens,)
    budget = step.fixed._budget(lengths)
    filled = budget.filled(lengths)
    assert filled[:3] == lengths and sum(filled) == tokens
    assert max(filled) <= budget.longest == 64
    tables = FixedPacking.tables(budget, lengths, 64)
    assert tables["starts"].tolist() == [sum(filled[:i]) for i in range(len(filled) + 1)]
    assert FixedPacking.queries(budget, torch.device("cpu")).tolist() == [
        min(i, 3) for i in range(len(filled) + 1)
    ]
