"""Passes of `BitFitTrainer` that are captured: the numbers of those that are not."""

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("accelerate")
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import bitfit_fast
from bitfit_fast import BitFitError, BitFitTrainer
from bitfit_fast.encoder import backward, forward, product, together
from bitfit_fast.errors import BitFitWarning
from bitfit_fast.training.fixed import CannotCapture, FixedSteps

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def examples(count, seed=0, by_token=False):
    """Examples of 5 to 41 tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        words = torch.randint(6, 60, (3 + 9 * (i % 5),), generator=generator).tolist()
        ids = [1, 4 + i % 2, *words, 2]
        labels = [word % 2 for word in ids] if by_token else i % 2
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found


class Fixed(BitFitTrainer):
    """Takes passes of a fixed size on any device, and captures none of them."""

    def _captures(self):
        return self.graph

    def _record(self, arena):
        return None


#: Ours, and what it is compared with
KINDS = (Fixed, BitFitTrainer)


@pytest.fixture
def train(bert_folder, tmp_path):
    """Train, and return the trainer."""
    tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))

    def make(kind, count=22, dropout=0.0, by_token=False, given=None, before=None, **changes):
        options = {
            "num_train_epochs": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
            "learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "report_to": [],
            "disable_tqdm": True,
        }  # fmt: skip
        auto = AutoModelForTokenClassification if by_token else AutoModelForSequenceClassification
        torch.manual_seed(0)
        model = auto.from_pretrained(
            bert_folder, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            classifier_dropout=0.0 if by_token else dropout,
        )  # fmt: skip
        collate = None
        if by_token:
            from transformers import DataCollatorForTokenClassification

            collate = DataCollatorForTokenClassification(tokenizer)
        arguments = TrainingArguments(str(tmp_path / "run"), **options | changes)
        one = kind(
            model, arguments, collate, examples(count, by_token=by_token),
            processing_class=tokenizer, **given or {},
        )  # fmt: skip
        if before is not None:
            before(one)
        one.train()
        return one

    return make


@pytest.fixture
def runs(monkeypatch):
    """Note of each batch whether it was one of a fixed size."""
    seen, step = [], FixedSteps.__call__

    def note(self, batch, **rest):
        loss = step(self, batch, **rest)
        seen.append(loss is not None)
        return loss

    monkeypatch.setattr(FixedSteps, "__call__", note)
    return seen


def logged(trainer, *keys):
    rows = [row for row in trainer.state.log_history if keys[0] in row]
    return torch.tensor([[row[key] for key in keys] for row in rows])


def assert_same(ours, theirs, rtol=1e-5, atol=1e-5):
    keys = ("loss", "grad_norm", "learning_rate")
    torch.testing.assert_close(logged(ours, *keys), logged(theirs, *keys), rtol=rtol, atol=atol)
    for name, value in ours.model.named_parameters():
        other = theirs.model.get_parameter(name)
        torch.testing.assert_close(value, other, rtol=0, atol=1e-4, msg=name)
    assert ours.state.global_step == theirs.state.global_step


# 22 examples: five batches of four and one of two, so that a step has a batch less in the end
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("counts", [True, False])
def test_losses_norms_and_parameters_are_those_of_ordinary_passes(
    train, runs, accumulation, dropout, counts
):
    class Own(Fixed):
        """Whose model is told how many labels a step has, or divides by its batches."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.model_accepts_loss_kwargs = counts

    options = {"dropout": dropout, "gradient_accumulation_steps": accumulation}
    ours, theirs = train(Own, **options), train(Own, given={"graph": False}, **options)
    # batches of four come in three budgets, and the first of each goes the ordinary way
    assert len(runs) == 18 and sum(runs) >= 12
    assert_same(ours, theirs)


def test_labels_of_tokens(train, runs):
    options = {"by_token": True, "dropout": 0.1, "gradient_accumulation_steps": 2}
    assert_same(train(Fixed, **options), train(BitFitTrainer, **options))
    assert sum(runs) >= 12


def images(count):
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 3}
        for i in range(count)
    ]


class CountsInNumbers(Fixed):
    """Counts labels in a number, which transformers does in a tensor."""

    def get_batch_samples(self, *args):
        batches, labels = super().get_batch_samples(*args)
        return batches, int(labels)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("kind", [Fixed, CountsInNumbers])
def test_a_loss_that_is_divided_by_the_labels_of_a_step(tmp_path, runs, accumulation, kind):
    def run(kind):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=16, patch_size=4, num_labels=3, hidden_dropout_prob=0.1,
        )  # fmt: skip
        arguments = TrainingArguments(
            str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, logging_steps=1,
            gradient_accumulation_steps=accumulation, save_strategy="no", use_cpu=True,
            report_to=[], disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        one = kind(ViTForImageClassification(config), arguments, train_dataset=images(22))
        one.train()
        return one

    ours, theirs = run(kind), run(BitFitTrainer)
    # batches of four, and then those of two
    assert len(runs) == 18 and sum(runs) == 16
    assert_same(ours, theirs)


def test_passes_follow_what_callbacks_change(train, runs):
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **options):
            if state.global_step == 8:
                for module in model.modules():
                    if isinstance(module, nn.Dropout):
                        module.p = 0.3
            if state.global_step == 12:
                frozen = model.bert.encoder.layer[0].output.dense.bias.requires_grad_(False)
                before.append((frozen, frozen.detach().clone()))

    before: list = []
    ours, theirs = (train(k, dropout=0.1, given={"callbacks": [Change]}) for k in KINDS)
    assert sum(runs) >= 6
    assert_same(ours, theirs)
    assert len(before) == 2 and all(torch.equal(now, then) for now, then in before)


def test_evaluation_on_the_way_makes_no_other_passes(train, runs):
    made = []

    class Note(TrainerCallback):
        def on_train_end(self, args, state, control, **options):
            made.append(len(trainers[-1]._passes.steps._made))

    trainers = []
    for strategy in ("no", "epoch"):
        given = {"callbacks": [Note], "eval_dataset": examples(6)}
        options = {"given": given, "eval_strategy": strategy, "before": trainers.append}
        ours = train(Fixed, **options)
        assert_same(ours, train(BitFitTrainer, **options | {"given": {**given, "callbacks": []}}))
    assert made[0] == made[1]


def test_a_resumed_run_is_the_uninterrupted_one(train, tmp_path, runs):
    options = {"max_steps": 12, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    whole = train(Fixed, save_steps=4, **options)
    del runs[:]

    def before(one):
        one.train = lambda: BitFitTrainer.train(
            one, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4")
        )

    resumed = train(Fixed, before=before, **options)
    assert sum(runs) >= 10
    assert_same(resumed, whole)


def test_the_best_model_is_loaded_into_other_passes(train, runs):
    options = {
        "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4,
        "load_best_model_at_end": True, "given": {"eval_dataset": examples(6)}, "max_steps": 8,
    }  # fmt: skip
    ours, theirs = (train(kind, **options) for kind in KINDS)
    for name, value in ours.model.named_parameters():
        torch.testing.assert_close(value, theirs.model.get_parameter(name), rtol=0, atol=1e-4)
    assert ours._passes is None


# ------------------------------------------------------------------ with what pretends to capture


def test_what_is_captured_is_one_pass_that_adds_to_the_gradients(train):
    arenas, replays = [], []

    class Own(Fixed):
        def _record(self, arena):
            arenas.append(arena)

            def record(run):
                assert all(p.grad is not None for p in arena.parameters.values())
                before = arena.gradients.clone()
                for _ in range(2):  # trials, which a recorder undoes
                    run()
                arena.gradients.copy_(before)

                def replay():
                    replays.append(arena.gradients.norm().item())
                    run()

                return replay

            return record

    options = {"gradient_accumulation_steps": 2}
    ours, theirs = train(Own, **options), train(BitFitTrainer, **options)
    assert len(arenas) == 1
    # of a step's first batch gradients begin at zero, the second one's are added
    assert any(norm == 0 for norm in replays) and any(norm > 0 for norm in replays)
    assert_same(ours, theirs)


def test_where_nothing_can_be_captured_passes_go_the_ordinary_way(train, caplog):
    class Own(Fixed):
        def _record(self, arena):
            def refuse(run):
                raise CannotCapture("a step cannot be captured: it asks the time")

            return refuse

    with caplog.at_level(logging.INFO, "bitfit_fast.training.trainer"):
        assert_same(train(Own), train(BitFitTrainer))
    said = [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]
    assert said == [
        "steps run without a CUDA graph where a step cannot be captured: it asks the time"
    ]


def test_what_was_captured_goes_with_the_training(train):
    kept = []

    class Own(Fixed):
        def _leave_passes(self):
            if self._passes is not None:
                kept.append(self._passes.steps)
                assert self._passes.steps._made
            super()._leave_passes()

    train(Own)
    assert kept and not any(steps._made for steps in kept)


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


def _no_gradient(do, q, k, v, packing, p, seed, bias, needs_kv=True):
    if q.shape[0] == k.shape[0]:
        joined = q.new_zeros(q.shape[0], 3, *q.shape[1:])
        return joined[:, 0], joined[:, 1:] if needs_kv else None
    return torch.zeros_like(q), k.new_zeros(k.shape[0], 2, *k.shape[1:]) if needs_kv else None


@pytest.mark.parametrize("bf16", [False, True])
def test_a_pass_reads_no_tensor_on_the_way(train, bf16, monkeypatch):
    # products for CPUs read seeds, and attention where sequences begin; a GPU's kernels do not
    monkeypatch.setattr(product.Product, "packed", lambda self, rows, which: None)
    monkeypatch.setattr(together, "weights", lambda *args: [])
    monkeypatch.setattr(forward, "attention_fwd", lambda q, *_: torch.zeros_like(q))
    monkeypatch.setattr(backward, "attention_bwd", _no_gradient)
    waits = Waits()

    class Own(Fixed):
        def _record(self, arena):
            def record(run):
                def watched():
                    with waits:
                        run()

                return watched

            return record

    ours = train(Own, dropout=0.1, gradient_accumulation_steps=2, bf16=bf16)
    assert waits.seen == [] and ours.state.global_step == 9


# --------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_replayed_passes_are_the_ordinary_ones(train, runs, bf16, accumulation):
    options = {
        "use_cpu": False, "bf16": bf16, "dropout": 0.1, "learning_rate": 1e-3,
        "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", BitFitWarning)
        ours = train(BitFitTrainer, **options)
    assert sum(runs) >= 12
    theirs = train(BitFitTrainer, given={"graph": False}, **options)
    # the same masks: the losses differ by rounding, and where that leads
    keys = ("loss", "grad_norm")
    tolerance = 5e-2 if bf16 else 1e-3
    torch.testing.assert_close(
        logged(ours, *keys), logged(theirs, *keys), rtol=tolerance, atol=tolerance
    )
    for name, value in ours.model.named_parameters():
        other = theirs.model.get_parameter(name)
        torch.testing.assert_close(value, other, rtol=0, atol=1e-2 if bf16 else 1e-3, msg=name)


@pytest.mark.gpu
@needs_gpu
def test_no_replay_waits_for_the_device(train, runs):
    class Strict(BitFitTrainer):
        """To which waiting is an error once each kind of batch has been there twice."""

        def get_batch_samples(self, *args):
            watched = 12 <= self.state.global_step < 29  # the last one is followed by the end
            torch.cuda.set_sync_debug_mode("error" if watched else 0)
            return super().get_batch_samples(*args)

    try:
        train(
            Strict, use_cpu=False, count=20, num_train_epochs=6, logging_steps=1000,
            logging_nan_inf_filter=False, given={"token_budget": (168,)},
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode(0)
    assert len(runs) == 30 and all(runs[2:])


# ------------------------------------------------------------------------- what goes another way


def mean_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels)


class OtherLoss(Fixed):
    def compute_loss(self, *args, **options):
        return super().compute_loss(*args, **options)


class Wraps(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **options):
        model.classifier.register_forward_hook(lambda *_: None)


class Watches(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **options):
        model.classifier.bias.register_hook(lambda gradient: None)


CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (Fixed, {"given": {"compute_loss_func": mean_loss}}, "compute_loss_func computes the loss"),
        (Fixed, {"label_smoothing_factor": 0.1}, "labels are smoothed"),
        (Fixed, {CHECKPOINTING: True}, "gradient checkpointing is asked for"),
        (Fixed, {"neftune_noise_alpha": 5.0}, "the encoder does not run as one operation"),
        (Fixed, {"torch_empty_cache_steps": 2}, "torch_empty_cache_steps is set"),
        (Fixed, {"given": {"callbacks": [Wraps]}}, "there are hooks on classifier"),
        (Fixed, {"given": {"callbacks": [Watches]}}, "there are hooks on classifier.bias"),
        (OtherLoss, {}, "the trainer has compute_loss of its own"),
    ],
)
def test_what_cannot_be_captured_says_so_once(train, runs, caplog, kind, changes, reason):
    with caplog.at_level(logging.INFO, "bitfit_fast.training.trainer"):
        ours = train(kind, **changes)
    said = [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]
    assert said == [f"steps run without a CUDA graph where {reason}"]
    assert not runs
    assert_same(ours, train(BitFitTrainer, **changes))


def test_batches_that_are_not_known_go_the_ordinary_way(train, caplog):
    class Own(Fixed):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            collate = loader.collate_fn

            def left(features):
                batch = dict(collate(features))
                return {key: v.flip(1) if v.ndim == 2 else v for key, v in batch.items()}

            loader.collate_fn = loader.base_dataloader.collate_fn = left
            return loader

    with caplog.at_level(logging.INFO, "bitfit_fast.training.trainer"):
        assert_same(train(Own), train(Own, given={"graph": False}))
    said = [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]
    assert len(said) == 1 and said[0].endswith("batches do not tell how long their examples are")


def test_without_a_gpu_nothing_is_captured_and_nothing_is_said(train, runs, caplog):
    with caplog.at_level(logging.INFO, "bitfit_fast.training.trainer"):
        train(BitFitTrainer)
        train(Fixed, given={"graph": False})
    assert not runs
    assert not any("CUDA graph" in record.getMessage() for record in caplog.records)


def test_a_budget_that_is_asked_for(train, runs):
    with pytest.raises(BitFitError, match="token-budget must be numbers of at least 1"):
        train(Fixed, given={"token_budget": []})
    for kind in KINDS:
        with pytest.raises(BitFitError, match="tokens, and the token budget is 60; a larger"):
            train(kind, given={"token_budget": (30, 60)})
    del runs[:]
    seen = []

    class Note(TrainerCallback):
        def on_train_end(self, args, state, control, **options):
            seen.extend(budget.tokens for _, _, budget, *_ in found[0]._passes.steps._made)

    found = []
    ours = train(Fixed, given={"token_budget": [80, 115], "callbacks": [Note]}, before=found.append)
    assert set(seen) == {80, 115}
    assert_same(ours, train(BitFitTrainer))
