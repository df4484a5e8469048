"""The loop: what it writes, when it stops, and how it goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bitfit_fast
from bitfit_fast import Settings, Split, TaskData
from bitfit_fast.data.batches import subset
from bitfit_fast.errors import BitFitError
from bitfit_fast.methods import METHODS
from bitfit_fast.tensorfile import read_tensors
from bitfit_fast.training import loop
from bitfit_fast.training.measure import mean_step_ms

SETTINGS = Settings(max_steps=12, eval_every=4, batch_size=8, max_length=16, lr=1e-2)
pytestmark = pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")


def examples(count: int, start: int = 0):
    texts = [
        ("the plot was good" if i % 2 else "the acting was dull", "it is one") for i in
        range(start, start + count)
    ]  # fmt: skip
    return tuple(texts), tuple(i % 2 for i in range(start, start + count))


def task(**splits: int) -> TaskData:
    made = {name: Split(name, *examples(n)) for name, n in splits.items()}
    return TaskData("toy", ("bad", "good"), ("accuracy", "mcc"), made)


DATA = task(train=40, validation=12)


def fresh(folder: Path, method: str = "bitfit", seed: int = 0):
    model = bitfit_fast.load_model(str(folder), ["bad", "good"], seed)
    METHODS[method].select(model, "all", None, True)
    return model, bitfit_fast.load_tokenizer(str(folder))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_metrics_summary_checkpoint_and_picture(bert_folder, tmp_path):
    model, tokenizer = fresh(bert_folder)
    summary = bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run")
    rows = lines(tmp_path / "run")
    assert [(r["step"], r["split"]) for r in rows] == [
        (step, split) for step in (4, 8, 12) for split in ("train", "validation")
    ]
    keys = [
        "step", "epoch", "split", "loss", "accuracy", "mcc",
        "examples_per_second", "step_ms", "peak_memory_bytes",
    ]  # fmt: skip
    assert all(list(row) == keys for row in rows)
    assert rows[-1]["epoch"] == 12 / 5
    assert rows[0]["step_ms"] > 0
    assert rows[0]["peak_memory_bytes"] > 2**20
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(
        json.dumps(summary)
    )
    assert summary["final"]["validation"] == rows[-1]
    assert summary["best"]["validation"]["accuracy"] == max(
        r["accuracy"] for r in rows if r["split"] == "validation"
    )
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["lr"] == 1e-2
    assert (tmp_path / "run" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    again, _ = fresh(bert_folder)
    header = bitfit_fast.load(again, tmp_path / "run")
    assert header.task == {"name": "toy", "metrics": ["accuracy", "mcc"], "max_length": 16}


def test_training_learns_what_can_be_learned(bert_folder):
    model, tokenizer = fresh(bert_folder)
    settings = Settings(max_steps=60, eval_every=60, batch_size=8, max_length=16, lr=1e-2)
    summary = bitfit_fast.train(model, tokenizer, DATA, settings)
    assert summary["final"]["validation"]["accuracy"] == 1.0
    assert summary["final"]["validation"]["mcc"] == 1.0


def test_the_checkpoint_is_the_best_evaluation_and_the_model_the_last(
    bert_folder, tmp_path, monkeypatch
):
    scores = iter([0.0, 0.2, 0.0, 0.9, 0.0, 0.4])  # training and validation by turns

    def evaluate(*arguments):
        value = next(scores)
        return {"loss": 1.0, "accuracy": value, "mcc": value}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    model, tokenizer = fresh(bert_folder)
    states = {}
    keep = loop.RunFolder.keep

    def spy(self, rows, model, optimizer, progress, base, device):
        states[progress.step] = model.classifier.weight.detach().clone()
        keep(self, rows, model, optimizer, progress, base, device)

    monkeypatch.setattr(loop.RunFolder, "keep", spy)
    summary = bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run")
    assert summary["best"]["step"] == 8
    saved = bitfit_fast.read(tmp_path / "run").tensors["classifier.weight"]
    assert torch.equal(saved, states[8])
    assert torch.equal(model.classifier.weight, states[12])


def test_patience_ends_a_run_that_gets_no_better(bert_folder, tmp_path, monkeypatch):
    scores = {"loss": 1.0, "accuracy": 0.5, "mcc": 0.0}
    monkeypatch.setattr(loop, "evaluate", lambda *a: dict(scores))
    model, tokenizer = fresh(bert_folder)
    settings = Settings(max_steps=100, eval_every=2, patience=3, max_length=16)
    summary = bitfit_fast.train(model, tokenizer, DATA, settings, tmp_path / "run")
    assert summary["steps"] == 8  # the first evaluation is the best, three more are no better


def test_the_same_seed_gives_the_same_bits_and_another_does_not(bert_folder):
    def trained(seed):
        model, tokenizer = fresh(bert_folder, seed=seed)
        settings = Settings(max_steps=6, batch_size=8, max_length=16, seed=seed)
        bitfit_fast.train(model, tokenizer, DATA, settings)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = trained(0)
    assert torch.equal(first, trained(0))
    assert not torch.equal(first, trained(1))


@pytest.mark.parametrize("method", ["bitfit", "full", "frozen"])
def test_a_resumed_run_ends_with_the_same_bits_as_an_unbroken_one(
    bert_folder, tmp_path, monkeypatch, method
):
    model, tokenizer = fresh(bert_folder, method)
    straight = bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "straight")

    broken, tokenizer = fresh(bert_folder, method)
    real = loop.RunFolder.keep

    def killed(self, rows, model, optimizer, progress, base, device):
        if progress.step == 8:  # after the lines are written, before the state is
            for row in rows:
                with self.metrics.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            raise KeyboardInterrupt
        real(self, rows, model, optimizer, progress, base, device)

    monkeypatch.setattr(loop.RunFolder, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        bitfit_fast.train(broken, tokenizer, DATA, SETTINGS, tmp_path / "broken")
    monkeypatch.setattr(loop.RunFolder, "keep", real)
    assert len(lines(tmp_path / "broken")) == 4

    again, tokenizer = fresh(bert_folder, method)
    resumed = bitfit_fast.train(again, tokenizer, DATA, SETTINGS, tmp_path / "broken", resume=True)
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name
    kept = ("step", "split", "loss", "accuracy", "mcc")
    one, two = lines(tmp_path / "straight"), lines(tmp_path / "broken")
    assert [{k: r[k] for k in kept} for r in one] == [{k: r[k] for k in kept} for r in two]
    assert resumed["best"]["step"] == straight["best"]["step"]


def test_a_finished_run_resumes_to_its_summary(bert_folder, tmp_path):
    model, tokenizer = fresh(bert_folder)
    first = bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run")
    model, tokenizer = fresh(bert_folder)
    second = bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run", resume=True)
    assert second["final"] == first["final"]
    with pytest.raises(BitFitError, match="resume goes on with the run in an output folder"):
        bitfit_fast.train(model, tokenizer, DATA, SETTINGS, resume=True)


def test_resuming_under_other_settings_or_on_another_base_is_refused(bert_folder, tmp_path):
    model, tokenizer = fresh(bert_folder)
    bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run")
    other = Settings(max_steps=12, eval_every=4, batch_size=8, max_length=16, lr=2e-2)
    with pytest.raises(BitFitError, match=r"its lr was 0\.01, and now it is 0\.02"):
        bitfit_fast.train(*fresh(bert_folder), DATA, other, tmp_path / "run", resume=True)
    model, tokenizer = fresh(bert_folder)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    with pytest.raises(BitFitError, match="base model's weights have changed"):
        bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run", resume=True)


def test_a_folder_that_holds_a_run_is_left_alone(bert_folder, tmp_path):
    model, tokenizer = fresh(bert_folder)
    bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(BitFitError, match="--overwrite to replace it or --resume"):
        bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run")
    with pytest.raises(BitFitError, match="max-length 5000 is more than the 128"):
        bitfit_fast.train(
            model, tokenizer, DATA, Settings(max_length=5000), tmp_path / "run", overwrite=True
        )
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    bitfit_fast.train(*fresh(bert_folder), DATA, SETTINGS, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    with pytest.raises(BitFitError, match="holds no run to resume"):
        bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "none", resume=True)


def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_checkpoint(
    bert_folder, tmp_path, monkeypatch
):
    model, tokenizer = fresh(bert_folder)
    from bitfit_fast.training.fast import FastStep

    call = FastStep.__call__

    def poisoned(self, batch):
        if self.steps == 9:
            with torch.no_grad():
                self.model.classifier.bias.fill_(float("nan"))
        return call(self, batch)

    monkeypatch.setattr(FastStep, "__call__", poisoned)
    with pytest.raises(BitFitError, match=r"loss is nan at step 10, .* checkpoint of step \d+"):
        bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run")
    kept = bitfit_fast.read(tmp_path / "run").tensors
    assert all(torch.isfinite(t).all() for t in kept.values())
    _, state = read_tensors(tmp_path / "run" / "state.safetensors", "training state")
    assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())


def test_an_update_that_breaks_the_model_right_before_an_evaluation_is_not_saved(
    bert_folder, tmp_path, monkeypatch
):
    model, tokenizer = fresh(bert_folder)
    from bitfit_fast.training.fast import FastStep

    call = FastStep.__call__

    def poisoned(self, batch):
        loss = call(self, batch)
        if self.steps == 8:
            with torch.no_grad():
                self.model.classifier.bias.fill_(float("inf"))
        return loss

    monkeypatch.setattr(FastStep, "__call__", poisoned)
    with pytest.raises(BitFitError, match="at step 8"):
        bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run")
    assert {row["step"] for row in lines(tmp_path / "run")} == {4}
    kept = bitfit_fast.read(tmp_path / "run").tensors
    assert all(torch.isfinite(t).all() for t in kept.values())


def test_a_selected_parameter_without_gradient_stops_the_run(bert_folder, tmp_path):
    model, tokenizer = fresh(bert_folder)
    model.register_parameter("idle", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(BitFitError, match="1 selected parameters got no gradient: idle"):
        bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run")


def test_a_train_fraction_uses_nested_subsets(bert_folder):
    small, large = (set(subset(100, count, 3)) for count in (10, 50))
    assert len(small) == 10 and small < large
    model, tokenizer = fresh(bert_folder)
    settings = Settings(max_steps=2, max_length=16, train_fraction=0.25)
    assert bitfit_fast.train(model, tokenizer, DATA, settings)["examples"] == 10


def test_both_evaluation_sets_of_a_task_are_measured_and_the_first_one_judges(bert_folder):
    data = task(train=40, validation_matched=12, validation_mismatched=6)
    summary = bitfit_fast.train(*fresh(bert_folder), data, SETTINGS)
    assert set(summary["final"]) == {
        "step", "train", "validation_matched", "validation_mismatched"
    }  # fmt: skip


def test_regression_trains_on_scores(bert_folder):
    texts, labels = examples(24)
    splits = {n: Split(n, texts, tuple(2.0 * x for x in labels)) for n in ("train", "validation")}
    data = TaskData("scores", None, ("pearson", "spearman"), splits)
    model = bitfit_fast.load_model(str(bert_folder), None)
    bitfit_fast.select(model)
    tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))
    settings = Settings(max_steps=60, batch_size=8, max_length=16, lr=1e-2)
    assert bitfit_fast.train(model, tokenizer, data, settings)["final"]["validation"][
        "pearson"
    ] == pytest.approx(1.0, abs=0.05)


def test_without_a_validation_set_the_last_evaluation_is_kept(bert_folder, tmp_path):
    model, tokenizer = fresh(bert_folder)
    summary = bitfit_fast.train(model, tokenizer, task(train=40), SETTINGS, tmp_path / "run")
    assert summary["best"]["step"] == 12
    saved = bitfit_fast.read(tmp_path / "run").tensors["classifier.bias"]
    assert torch.equal(saved, model.classifier.bias.detach())


def test_a_device_that_is_not_there_is_refused(bert_folder):
    with pytest.raises(BitFitError, match="unknown device 'gpu0x'"):
        bitfit_fast.train(*fresh(bert_folder), DATA, Settings(device="gpu0x", max_length=16))
    if not torch.cuda.is_available():
        with pytest.raises(BitFitError, match="PyTorch sees 0 of them"):
            bitfit_fast.train(*fresh(bert_folder), DATA, Settings(device="cuda", max_length=16))


def test_the_step_of_a_nan_is_named_where_losses_are_read_in_windows(
    bert_folder, tmp_path, monkeypatch
):
    from bitfit_fast.training.fast import FastStep

    monkeypatch.setitem(loop._LOG_EVERY, "cpu", 10)
    call = FastStep.__call__

    def nan_from_step_2(self, batch):
        return call(self, batch) * (float("nan") if self.steps >= 2 else 1.0)

    monkeypatch.setattr(FastStep, "__call__", nan_from_step_2)
    with pytest.raises(BitFitError, match="loss is nan at step 2,"):
        bitfit_fast.train(*fresh(bert_folder), DATA, SETTINGS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_old_run_goes_only_when_the_new_one_has_something_to_show(
    bert_folder, tmp_path, monkeypatch
):
    from bitfit_fast.training.fast import FastStep

    bitfit_fast.train(*fresh(bert_folder), DATA, SETTINGS, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(FastStep, "__call__", lambda self, batch: torch.tensor(float("nan")))
    monkeypatch.setattr(loop._Run, "_check_gradients", lambda self: None)
    with pytest.raises(BitFitError, match="loss is nan"):
        bitfit_fast.train(*fresh(bert_folder), DATA, SETTINGS, tmp_path / "run", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_model_that_transformers_loaded_gets_the_tasks_labels(bert_folder, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bert_folder)
    bitfit_fast.select(model)
    tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))
    bitfit_fast.train(model, tokenizer, DATA, SETTINGS, tmp_path / "run")
    assert not model.training
    assert bitfit_fast.read(tmp_path / "run").header.labels == ["bad", "good"]
    opened, _, _ = bitfit_fast.open_model(tmp_path / "run")
    assert opened.config.id2label == {0: "bad", 1: "good"}


def test_a_model_that_does_not_fit_the_task_is_refused(bert_folder):
    tokenizer = bitfit_fast.load_tokenizer(str(bert_folder))

    def refused(labels, data, dtype=torch.float32):
        model = bitfit_fast.load_model(str(bert_folder), labels).to(dtype)
        bitfit_fast.select(model)
        with pytest.raises(BitFitError) as info:
            bitfit_fast.train(model, tokenizer, data, SETTINGS)
        return str(info.value)

    scores = TaskData("scores", None, ("pearson",), {"train": Split("train", *examples(4))})
    assert "has 3 outputs and the task toy needs 2" in refused(["a", "b", "c"], DATA)
    assert "has 2 outputs and the task scores needs 1" in refused(["a", "b"], scores)
    assert "is torch.float16" in refused(["a", "b"], DATA, torch.float16)


def test_patience_without_a_validation_set_is_refused(bert_folder):
    settings = Settings(max_steps=4, max_length=16, patience=1)
    with pytest.raises(BitFitError, match="patience 1 needs a validation set"):
        bitfit_fast.train(*fresh(bert_folder), task(train=8), settings)


def test_resuming_on_other_data_is_refused(bert_folder, tmp_path):
    bitfit_fast.train(*fresh(bert_folder), DATA, SETTINGS, tmp_path / "run")
    with pytest.raises(BitFitError, match="its data was"):
        bitfit_fast.train(
            *fresh(bert_folder), task(train=41, validation=12), SETTINGS, tmp_path / "run",
            resume=True,
        )  # fmt: skip


def test_full_fine_tuning_leaves_out_what_the_task_does_not_use_and_says_so(bert_folder):
    model, tokenizer = fresh(bert_folder, "full")
    model.register_parameter("idle", torch.nn.Parameter(torch.zeros(1)))
    with pytest.warns(bitfit_fast.BitFitWarning, match="1 parameters get no gradient .* idle"):
        bitfit_fast.train(model, tokenizer, DATA, SETTINGS)


def test_a_backend_is_asked_patched_and_undone_however_training_ends(bert_folder, monkeypatch):
    from bitfit_fast.training.reference import ReferenceBackend

    calls = []

    class Spy(ReferenceBackend):
        name = "spy"

        def refusal(self, model, selection, plan):
            calls.append(("refusal", plan.device.type, plan.batch_size))

        def patch(self, model, selection, plan):
            calls.append("patch")
            return lambda: calls.append("undo"), ""

        def step(self, model, plan):
            raise KeyboardInterrupt

    monkeypatch.setattr("bitfit_fast.training.backends.BACKENDS", {"spy": Spy()})
    with pytest.raises(KeyboardInterrupt):
        bitfit_fast.train(*fresh(bert_folder), DATA, SETTINGS)
    assert calls == [("refusal", "cpu", 8), "patch", "undo"]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_bias_only_modules_train_to_the_same_model(bert_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BITFIT_FAST_BACKEND", "torch")
    ends = {}
    for backend in ("reference", "modules"):
        model, tokenizer = fresh(bert_folder)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        kinds = [type(module) for module in model.modules()]
        settings = dataclasses.replace(SETTINGS, backend=backend)
        summary = bitfit_fast.train(model, tokenizer, DATA, settings, tmp_path / backend)
        assert [type(module) for module in model.modules()] == kinds
        read = bitfit_fast.read(tmp_path / backend / "model.safetensors")
        ends[backend] = summary["final"]["validation"], read
    (scores, one), (others, two) = ends.values()
    assert others["loss"] == pytest.approx(scores["loss"], rel=1e-4)
    assert one.header.terms == two.header.terms and set(one.tensors) == set(two.tensors)
    for name in one.tensors:
        if ".key." not in name:
            torch.testing.assert_close(two.tensors[name], one.tensors[name], rtol=1e-3, atol=1e-4)


KILLED = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
import test_loop as t, bitfit_fast
from pathlib import Path
settings = bitfit_fast.Settings(
    max_steps=40, eval_every=1, batch_size=8, max_length=16, lr=1e-2
)
bitfit_fast.train(*t.fresh(Path(sys.argv[1])), t.DATA, settings, sys.argv[2], resume=%r)
"""


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(bert_folder, tmp_path):
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}

    def start(folder, resume):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED % resume, str(bert_folder), str(folder), here],
            env=environment,
        )

    straight = tmp_path / "straight"
    assert start(straight, False).wait() == 0
    killed = tmp_path / "killed"
    process = start(killed, False)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (killed / "metrics.jsonl").exists() and len(lines_whole(killed)) >= 10:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    bitfit_fast.read(killed)  # whole
    assert start(killed, True).wait() == 0
    one, two = bitfit_fast.read(straight), bitfit_fast.read(killed)
    assert all(torch.equal(t, two.tensors[name]) for name, t in one.tensors.items())
    kept = ("step", "split", "loss", "accuracy")
    assert [[r[k] for k in kept] for r in lines(straight)] == [
        [r[k] for k in kept] for r in lines(killed)
    ]


def lines_whole(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_several_processes_are_told_who_trains_in_them(bert_folder, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(BitFitError, match=r"one process, and there are 2; BitFitTrainer trains"):
        bitfit_fast.train(*fresh(bert_folder), DATA, SETTINGS)


def test_a_number_of_examples_is_the_same_subset_as_the_share_that_it_is(bert_folder, tmp_path):
    def trained(**given):
        model, tokenizer = fresh(bert_folder)
        settings = dataclasses.replace(SETTINGS, max_steps=4, **given)
        summary = bitfit_fast.train(model, tokenizer, DATA, settings)
        return summary["examples"], summary["final"]["validation"]["loss"]

    assert trained(train_examples=10) == trained(train_fraction=0.25)
    assert trained(train_examples=10)[0] == 10
    with pytest.raises(BitFitError, match="train-examples 41 is more than the 40 examples"):
        trained(train_examples=41)


def test_the_validation_set_can_wait_for_the_last_step(bert_folder, tmp_path):
    settings = dataclasses.replace(SETTINGS, validate_once=True)
    model, tokenizer = fresh(bert_folder)
    summary = bitfit_fast.train(model, tokenizer, DATA, settings, tmp_path / "run")
    assert [(r["step"], r["split"]) for r in lines(tmp_path / "run")] == [
        (4, "train"), (8, "train"), (12, "train"), (12, "validation"),
    ]  # fmt: skip
    assert summary["best"]["step"] == 12
    saved = bitfit_fast.read(tmp_path / "run").tensors["classifier.weight"]
    assert torch.equal(saved, model.classifier.weight)
    # how often one looks changes nothing
    model, tokenizer = fresh(bert_folder)
    other = bitfit_fast.train(model, tokenizer, DATA, SETTINGS)
    assert summary["final"]["validation"]["loss"] == other["final"]["validation"]["loss"]


def test_the_time_of_a_step_counts_every_phase_as_long_as_it_is():
    rows = [{"step": 2, "step_ms": 30.0}, *[{"step": 8, "step_ms": 10.0}] * 2]
    assert mean_step_ms(rows) == (2 * 30 + 6 * 10) / 8
