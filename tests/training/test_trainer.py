"""BitFit in `transformers.Trainer`: the same numbers, files and habits, and a plain model after."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import bitfit_fast
from bitfit_fast import BitFitError, BitFitTrainer, patch_encoder, select
from bitfit_fast.additions import fold
from bitfit_fast.arena import Arena, ArenaAdamW
from bitfit_fast.encoder import Encoder, encoder_of
from bitfit_fast.selection import NO_GRADIENT
from bitfit_fast.training.trainer import FILE

ROOT = Path(bitfit_fast.__file__).parents[1]
STEPS = 8


def examples(count: int, seed: int = 0):
    """Examples of unequal lengths, of which two words tell the label."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        words = torch.randint(6, 20, (3 + i % 7,), generator=generator).tolist()
        ids = [1, 4 + i % 2, *words, 2]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 2})
    return found


TRAIN, TEST = examples(32), examples(10, seed=1)


@pytest.fixture
def build(bert_folder):
    """Load the same BERT, without dropout."""

    def make(selected: bool = False, **options):
        model = AutoModelForSequenceClassification.from_pretrained(
            bert_folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options
        )
        if selected:
            select(model)
        return model

    return make


@pytest.fixture
def trainer(bert_folder, tmp_path):
    """Make a trainer of eight steps."""
    tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))

    def make(kind, model, folder="run", given=None, **changes):
        options = {
            "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1,
            "learning_rate": 1e-2, "weight_decay": 0.1, "save_strategy": "no", "use_cpu": True,
            "per_device_eval_batch_size": 4, "report_to": [], "disable_tqdm": True,
        }  # fmt: skip
        arguments = TrainingArguments(str(tmp_path / folder), **options | changes)
        return kind(
            model, arguments, train_dataset=TRAIN, eval_dataset=TEST, processing_class=tokenizer,
            **given or {},
        )  # fmt: skip

    return make


def logged(trainer, *keys):
    rows = [row for row in trainer.state.log_history if keys[0] in row]
    return torch.tensor([[row[key] for key in keys] for row in rows])


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_parameters(ours, theirs, rtol=1e-4, atol=1e-5):
    for name, value in values(ours).items():
        if not name.endswith("key.bias"):  # of the noise that is its gradient Adam makes steps
            torch.testing.assert_close(
                value, theirs.get_parameter(name), rtol=rtol, atol=atol, msg=name
            )


def assert_plain(model):
    """The model is as transformers makes it."""
    assert not hasattr(model, NO_GRADIENT) and encoder_of(model) is None
    assert all(type(m).__module__.startswith(("torch", "transformers")) for m in model.modules())
    assert not model._forward_pre_hooks
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)


def spy(monkeypatch):
    """Note at each run of an encoder as one operation its precision, mode and sinks."""
    runs, run = [], Encoder.run

    def note(self, *arguments):
        runs.append((self.stack.dtype, self.stack.memory, self.sinks is not None))
        return run(self, *arguments)

    monkeypatch.setattr(Encoder, "run", note)
    return runs


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.0])
def test_losses_and_norms_are_those_of_the_plain_trainer(
    build, trainer, max_grad_norm, monkeypatch
):
    theirs = trainer(Trainer, build(selected=True), max_grad_norm=max_grad_norm)
    theirs.train()
    runs = spy(monkeypatch)
    ours = trainer(BitFitTrainer, build(), max_grad_norm=max_grad_norm)
    result = ours.train()
    assert runs == [(torch.float32, "fast", True)] * STEPS
    assert isinstance(ours.optimizer.optimizer, ArenaAdamW)
    assert [g["weight_decay"] for g in ours.optimizer.param_groups] == [0.1, 0.0]
    keys = ("loss", "grad_norm", "learning_rate")
    torch.testing.assert_close(logged(ours, *keys), logged(theirs, *keys), rtol=1e-5, atol=1e-5)
    assert result.training_loss == pytest.approx(theirs.state.log_history[-1]["train_loss"], 1e-5)
    assert_same_parameters(ours.model, theirs.model)
    assert_plain(ours.model)


def test_gradients_lie_in_the_arena_at_every_step_and_are_zeroed_at_once(
    build, trainer, monkeypatch
):
    class Watch(TrainerCallback):
        steps = 0

        def on_pre_optimizer_step(self, args, state, control, **options):
            arena = ours._trained.arena
            for name, parameter in arena.parameters.items():
                assert parameter.grad.data_ptr() == arena.view(name, arena.gradients).data_ptr()
            Watch.steps += 1

    check, strays = Arena.check, []

    def note(self):
        strays.extend(n for n, p in self.parameters.items() if p.grad is None)
        return check(self)

    ours = trainer(BitFitTrainer, build(), given={"callbacks": [Watch]})
    monkeypatch.setattr(Arena, "check", note)
    ours.train()
    assert Watch.steps == STEPS
    assert len(strays) == len(set(strays))  # by the arena's constructor alone


def test_a_selection_that_was_made_is_kept(build, trainer):
    model = build()
    select(model, terms="query,intermediate", head=False)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    before = values(model)
    ours = trainer(BitFitTrainer, model)
    ours.train()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == names
    other = trainer(BitFitTrainer, build(), given={"terms": "value", "layers": "1", "head": False})
    assert [n for n, p in other.model.named_parameters() if p.requires_grad] == [
        "bert.encoder.layer.1.attention.self.value.bias"
    ]
    assert isinstance(other, Trainer)
    probe = build()
    select(probe, "query", head=False)
    trainer(BitFitTrainer, probe, given={"terms": "all"})  # what is said counts, be it the default
    assert len([p for p in probe.parameters() if p.requires_grad]) > 2
    plain = build()
    flags = [p.requires_grad for p in plain.parameters()]
    with pytest.raises(BitFitError, match="unknown term"):
        trainer(BitFitTrainer, plain, given={"terms": "lm-head-layernorm"})
    assert flags == [p.requires_grad for p in plain.parameters()]
    with pytest.raises(TypeError):
        trainer(BitFitTrainer, plain, given={"no_such_option": 1})
    assert flags == [p.requires_grad for p in plain.parameters()]
    with pytest.raises(BitFitError, match="memory mode 'little'"):
        trainer(BitFitTrainer, build(), given={"memory": "little"})


def test_frozen_tables_of_positions_are_no_selection(build, trainer):
    model = build()
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    trainer(BitFitTrainer, model)
    assert not model.bert.encoder.layer[0].output.dense.weight.requires_grad


def test_what_only_train_knows_is_refused(build, trainer):
    def prepared():
        model = build()
        bitfit_fast.prepare(model, "diff-pruning")
        return model

    for model, given in ((prepared(), {}), (None, {"model_init": prepared})):
        with pytest.raises(BitFitError, match="'diff-pruning', whose gates and penalty only"):
            trainer(BitFitTrainer, model, given=given)
    other = build()
    bitfit_fast.prepare(other, "random-uniform")
    trainer(BitFitTrainer, other)


def test_only_the_head(build, trainer):
    model = build()
    model.base_model.requires_grad_(False)
    other = build()
    other.base_model.requires_grad_(False)
    ours, theirs = trainer(BitFitTrainer, model), trainer(Trainer, other)
    ours.train()
    theirs.train()
    torch.testing.assert_close(logged(ours, "loss"), logged(theirs, "loss"), rtol=1e-5, atol=1e-5)


def test_a_model_outside_the_table_trains_with_modules(trainer, caplog):
    def build():
        torch.manual_seed(0)
        config = AlbertConfig(
            vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=64, num_labels=2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return AlbertForSequenceClassification(config)

    theirs = trainer(Trainer, build())
    select(theirs.model)
    theirs.train()
    with caplog.at_level(logging.INFO, "bitfit_fast.training.trainer"):
        ours = trainer(BitFitTrainer, build())
        ours.train()
        ours.evaluate()
    said = [r.getMessage() for r in caplog.records if r.name.startswith("bitfit_fast")]
    assert len(said) == 1
    assert "does not run as one operation: it is of type 'albert'" in said[0]
    assert "replaced" in said[0]
    torch.testing.assert_close(logged(ours, "loss"), logged(theirs, "loss"), rtol=1e-5, atol=1e-5)
    assert_plain(ours.model)


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize(("rate", "said"), [(5e-5, True), (1e-4, False)])
def test_a_rate_that_is_low_for_biases_is_said_once(
    rate, said, encoder, build, trainer, caplog, monkeypatch
):
    if not encoder:
        monkeypatch.setattr("bitfit_fast.training.trainer.encoder_obstacle", lambda one: "no")
    with caplog.at_level(logging.WARNING, "bitfit_fast.training.trainer"):
        ours = trainer(BitFitTrainer, build(), learning_rate=rate)
        ours.train()
        ours.train()
    assert sum("low for BitFit" in r.getMessage() for r in caplog.records) == said


def test_a_model_whose_weights_train_stays_as_it_is(build, trainer, caplog):
    models = build(), build()
    for model in models:
        model.bert.embeddings.requires_grad_(False)
    theirs, ours = trainer(Trainer, models[0]), trainer(BitFitTrainer, models[1])
    theirs.train()
    with caplog.at_level(logging.INFO, "bitfit_fast.training.trainer"):
        ours.train()
    assert [r.getMessage() for r in caplog.records if r.name.startswith("bitfit_fast")] == [
        "the model stays as it is: its weights train"
    ]
    torch.testing.assert_close(logged(ours, "loss"), logged(theirs, "loss"), rtol=1e-4, atol=1e-4)
    assert_plain(ours.model)


@pytest.mark.parametrize("changes", [{"optim": "sgd"}, {"optim": "adafactor"}, {"given": "adamax"}])
def test_other_optimisers_are_left_alone(build, trainer, changes):
    given = {}
    if "given" in changes:
        changes = {}
        given = {"optimizer_cls_and_kwargs": (torch.optim.Adamax, {"lr": 1e-2})}
    theirs = trainer(Trainer, build(selected=True), given=given, **changes)
    ours = trainer(BitFitTrainer, build(), given=given, **changes)
    theirs.train()
    ours.train()
    keys = "loss", "grad_norm"
    torch.testing.assert_close(logged(ours, *keys), logged(theirs, *keys), rtol=1e-4, atol=1e-4)
    assert_plain(ours.model)


def test_a_scheduler_and_an_optimiser_of_ones_own(build, trainer, caplog):
    def run(kind, model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.RMSprop(trained, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        one = trainer(kind, model, given={"optimizers": (optimizer, scheduler)})
        one.train()
        return logged(one, "loss", "learning_rate")

    theirs = run(Trainer, build(selected=True))
    with caplog.at_level(logging.INFO, "bitfit_fast.training.trainer"):
        ours = run(BitFitTrainer, build(selected=True))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert "RMSprop updates each parameter by itself" in caplog.messages


def test_a_resumed_run_is_the_uninterrupted_one(build, trainer, tmp_path):
    whole = trainer(BitFitTrainer, build(), save_strategy="steps", save_steps=4)
    whole.train()
    resumed = trainer(BitFitTrainer, build(), folder="other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == STEPS
    keys = ("loss", "grad_norm", "learning_rate")
    assert torch.equal(logged(resumed, *keys), logged(whole, *keys))
    assert all(
        torch.equal(v, whole.model.get_parameter(n)) for n, v in values(resumed.model).items()
    )
    again = trainer(BitFitTrainer, build(), max_steps=10)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 10


def test_the_best_model_is_there_in_the_end(build, trainer, tmp_path):
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "learning_rate": 0.1, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    ours = trainer(BitFitTrainer, build(), **options)
    ours.train()
    losses = logged(ours, "eval_loss")[:, 0]
    best = tmp_path / "run" / f"checkpoint-{2 * (losses.argmin().item() + 1)}"
    assert Path(ours.state.best_model_checkpoint) == best
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in values(ours.model).items())
    assert ours.evaluate()["eval_loss"] == pytest.approx(losses.min().item(), abs=1e-6)
    assert_plain(ours.model)


def test_what_a_user_patched_is_patched_alike_after_other_weights_came(build, trainer, tmp_path):
    whole = trainer(BitFitTrainer, build(), save_strategy="steps", save_steps=4)
    whole.train()
    model = build(selected=True)
    patch_encoder(model, precision="bf16", memory="low", reads_padding=True)
    resumed = trainer(BitFitTrainer, model, folder="other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    encoder = encoder_of(model)
    assert encoder.reads_padding and encoder.stack.memory == "low"
    assert encoder.stack.dtype == torch.bfloat16


def mean_loss(outputs, labels, num_items_in_batch=None):
    total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / num_items_in_batch


def test_accumulated_gradients_are_those_of_a_larger_batch(build, trainer):
    given = {"compute_loss_func": mean_loss}
    split = trainer(
        BitFitTrainer, build(), given=given,
        gradient_accumulation_steps=4, per_device_train_batch_size=2,
    )  # fmt: skip
    whole = trainer(BitFitTrainer, build(), given=given, per_device_train_batch_size=8)
    split.train()
    whole.train()
    keys = "loss", "grad_norm"
    torch.testing.assert_close(logged(split, *keys), logged(whole, *keys), rtol=1e-5, atol=1e-5)
    assert_same_parameters(split.model, whole.model, rtol=1e-3, atol=1e-4)


def test_files_are_those_of_a_plain_model(build, trainer, tmp_path, bert_folder):
    ours = trainer(BitFitTrainer, build(), save_strategy="steps", save_steps=STEPS)
    ours.train()
    ours.save_model()
    ours.model.save_pretrained(tmp_path / "plain")
    expected = (tmp_path / "plain" / "model.safetensors").read_bytes()
    for folder in (tmp_path / "run", tmp_path / "run" / f"checkpoint-{STEPS}"):
        assert (folder / "model.safetensors").read_bytes() == expected
        opened = AutoModelForSequenceClassification.from_pretrained(folder)
        assert all(torch.equal(v, ours.model.get_parameter(n)) for n, v in values(opened).items())
        fresh = build()
        header = bitfit_fast.load(fresh, folder / FILE)
        assert header.method == "bitfit" and header.head
        assert all(torch.equal(v, ours.model.get_parameter(n)) for n, v in values(fresh).items())
    assert (tmp_path / "run" / "tokenizer.json").exists()
    assert (tmp_path / "run" / FILE).stat().st_size < len(expected) / 4


def test_entries_of_weights_are_saved_as_they_are_trained(build, trainer, tmp_path):
    """Also those that the last update has just moved."""
    model = build()
    bitfit_fast.prepare(model, "random-uniform", parameters=500)
    ours = trainer(BitFitTrainer, model, save_strategy="steps", save_steps=STEPS)
    ours.train()
    folder, fresh = tmp_path / "run" / f"checkpoint-{STEPS}", build()
    bitfit_fast.load(fresh, folder / FILE)
    fold(fresh)
    opened = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert opened.keys() == fresh.state_dict().keys()
    assert all(torch.equal(opened[name], value) for name, value in fresh.state_dict().items())


def test_evaluation_and_prediction_are_fast_and_leave_a_plain_model(build, trainer, monkeypatch):
    def metrics(prediction):
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    given = {"compute_metrics": metrics}
    ours = trainer(BitFitTrainer, build(), given=given, eval_strategy="steps", eval_steps=4)
    theirs = trainer(
        Trainer, build(selected=True), given=given, eval_strategy="steps", eval_steps=4
    )
    runs = spy(monkeypatch)
    first = ours.evaluate()
    assert len(runs) == 3 and not hasattr(ours.model, NO_GRADIENT)
    assert first["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=1e-5)
    ours.train()
    theirs.train()
    del runs[:]
    mine, other = ours.predict(TEST), theirs.predict(TEST)
    assert runs == [(torch.float32, "fast", False)] * 3
    torch.testing.assert_close(
        torch.tensor(mine.predictions), torch.tensor(other.predictions), rtol=1e-3, atol=1e-3
    )
    assert mine.metrics["test_accuracy"] == other.metrics["test_accuracy"]
    assert_plain(ours.model)
    both = ours.evaluate({"one": TEST, "two": TEST})
    assert both["eval_one_loss"] == both["eval_two_loss"]
    keys = [sorted(row) for row in theirs.state.log_history]
    assert [sorted(row) for row in ours.state.log_history][: len(keys)] == keys
    assert_plain(ours.model)


def test_training_goes_on_as_with_the_plain_trainer(build, trainer):
    theirs, ours = trainer(Trainer, build(selected=True)), trainer(BitFitTrainer, build())
    for _ in range(2):  # Adam's moments are kept between calls
        theirs.train()
        ours.train()
        keys = "loss", "learning_rate"
        torch.testing.assert_close(logged(ours, *keys), logged(theirs, *keys), rtol=1e-4, atol=1e-4)
    assert_plain(ours.model)


def test_a_run_that_stops_with_an_error_leaves_a_plain_model(build, trainer):
    class Stop(TrainerCallback):
        on = True

        def on_step_end(self, args, state, control, **options):
            if Stop.on and state.global_step == 3:
                raise KeyboardInterrupt

    ours = trainer(BitFitTrainer, build(), given={"callbacks": [Stop]})
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    assert_plain(ours.model)
    assert ours.evaluate()["eval_loss"] > 0
    Stop.on = False
    assert ours.train().global_step == STEPS


def test_bf16_follows_the_plain_trainers(build, trainer, monkeypatch):
    theirs = trainer(Trainer, build(selected=True), bf16=True, learning_rate=1e-3)
    theirs.train()
    runs = spy(monkeypatch)
    ours = trainer(BitFitTrainer, build(), bf16=True, learning_rate=1e-3)
    ours.train()
    ours.evaluate()
    assert {run[:2] for run in runs} == {(torch.bfloat16, "fast")}
    torch.testing.assert_close(logged(ours, "loss"), logged(theirs, "loss"), rtol=0.1, atol=0.05)
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())
    assert_plain(ours.model)


def test_a_model_in_half_precision_keeps_the_trainers_optimiser(build, trainer, caplog):
    model = build(dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, "bitfit_fast.training.trainer"):
        ours = trainer(BitFitTrainer, model)
        ours.train()
    said = "\n".join(r.getMessage() for r in caplog.records)
    assert "torch.bfloat16, not torch.float32" in said
    assert type(ours.optimizer.optimizer) is torch.optim.AdamW


def test_checkpointing_asks_for_the_mode_that_keeps_least(build, trainer, monkeypatch):
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"
    runs = spy(monkeypatch)
    trainer(BitFitTrainer, build(), max_steps=2, **{name: True}).train()
    trainer(BitFitTrainer, build(), max_steps=1, given={"memory": "low"}).train()
    assert [memory for _, memory, _ in runs] == ["lowest", "lowest", "low"]


def test_neftune_keeps_the_padded_encoder(build, trainer, monkeypatch):
    runs = spy(monkeypatch)
    trainer(BitFitTrainer, build(), max_steps=2, neftune_noise_alpha=5.0).train()
    assert not runs


def test_models_that_a_function_makes_are_selected(build, trainer, monkeypatch):
    runs = spy(monkeypatch)
    ours = trainer(BitFitTrainer, None, given={"model_init": lambda: build(), "terms": "value"})
    ours.train()
    assert len(runs) == STEPS
    trained = {n for n, p in ours.model.named_parameters() if p.requires_grad}
    assert {n for n in trained if n.startswith("bert.")} == {
        f"bert.encoder.layer.{i}.attention.self.value.bias" for i in range(2)
    }
    first = values(ours.model)
    ours.train()  # with a fresh model
    assert all(torch.equal(v, first[n]) for n, v in values(ours.model).items())


def test_a_batch_size_is_found(build, trainer):
    sizes = []

    class Scarce(BitFitTrainer):
        def training_step(self, model, inputs, *rest):
            sizes.append(len(inputs["labels"]))
            loss = super().training_step(model, inputs, *rest)
            if sizes[-1] > 4:
                raise RuntimeError("CUDA out of memory.")
            return loss

    ours = trainer(
        Scarce, build(), auto_find_batch_size=True, per_device_train_batch_size=5, max_steps=3
    )
    ours.train()
    assert sizes == [5, 4, 4, 4]
    assert ours.state.global_step == 3
    assert_plain(ours.model)


def test_a_patched_model_stays_patched(build, trainer, tmp_path):
    model = build(selected=True)
    patch_encoder(model, precision="fp32", memory="low")
    ours = trainer(BitFitTrainer, model, save_strategy="steps", save_steps=4)
    ours.train()
    assert encoder_of(model).stack.memory == "low" and encoder_of(model).sinks is None
    ours.train(str(tmp_path / "run" / "checkpoint-4"))
    assert encoder_of(model).stack.memory == "low" and encoder_of(model).sinks is None
    bitfit_fast.unpatch(model)
    assert_plain(model)


def test_the_plain_trainer_takes_a_patched_model(build, trainer, tmp_path):
    theirs = trainer(Trainer, build(selected=True), eval_strategy="steps", eval_steps=4)
    theirs.train()
    model = build(selected=True)
    patch_encoder(model, precision="fp32")
    ours = trainer(
        Trainer, model, folder="patched", eval_strategy="steps", eval_steps=4,
        save_strategy="steps", save_steps=4,
    )  # fmt: skip
    ours.train()
    for key in ("loss", "eval_loss"):
        torch.testing.assert_close(logged(ours, key), logged(theirs, key), rtol=1e-5, atol=1e-5)
    saved = load_file(tmp_path / "patched" / f"checkpoint-{STEPS}" / "model.safetensors")
    assert all(torch.equal(v, saved[n]) for n, v in values(model).items())
    ours.predict(TEST)


def test_the_trainer_is_imported_only_when_asked_for():
    code = """
import sys, bitfit_fast
assert "transformers.trainer" not in sys.modules
assert "BitFitTrainer" in bitfit_fast.__all__
sys.modules["accelerate"] = None
try:
    from bitfit_fast import BitFitTrainer
except ImportError as error:
    print(error)
try:
    bitfit_fast.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.splitlines() == [
        "BitFitTrainer needs accelerate: pip install 'bitfit_fast[trainer]'",
        "module 'bitfit_fast' has no attribute 'nothing'",
    ], done.stderr


@pytest.fixture(scope="module")
def processes(bert_folder, users_environment, tmp_path_factory):
    """Train in two processes, and in one; return what a kind of training left in each."""
    if not hasattr(os, "fork") or not torch.distributed.is_available():
        pytest.skip("forks its processes, and needs the distributed part of torch")
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("two_processes.py"), bert_folder, folder],
        env=users_environment | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stdout

    def results(kind):
        names = (f"{kind}-2-0.pt", f"{kind}-2-1.pt", f"{kind}-1-0.pt")
        *both, alone = (torch.load(folder / name) for name in names)
        return both, alone

    return results


@pytest.mark.parametrize("kind", ["step", "fixed_step", "trainer", "wrapped", "fixed_trainer"])
def test_two_processes_train_as_one_on_both_batches(processes, kind):
    both, alone = processes(kind)
    assert alone["messages"] == []
    for found in both:
        assert len(found["gradients"]) == len(alone["gradients"])
        for ours, expected in zip(found["gradients"], alone["gradients"]):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        # one message of all gradients a step; DistributedDataParallel sends its own
        sent = [] if kind == "wrapped" else [found["size"]] * len(found["gradients"])
        assert found["messages"] == sent
        torch.testing.assert_close(found["loss"], both[0]["loss"])
        # the first pass goes the ordinary way
        assert (found.get("replayed", 0) > 0) == (kind == "fixed_trainer")
    assert all(torch.equal(a, b) for a, b in zip(*(f["gradients"] for f in both)))
    assert [f["wrapper"] for f in both] == [kind == "wrapped"] * 2


def test_processes_leave_out_the_same_steps(processes):
    both, alone = processes("scaled")
    finite = [[g.isfinite().all().item() for g in found["gradients"]] for found in (*both, alone)]
    assert finite == [[True, False, True, True]] * 3
    assert torch.equal(both[0]["last"], both[1]["last"])
    torch.testing.assert_close(both[0]["last"], alone["last"], rtol=1e-4, atol=1e-5)
