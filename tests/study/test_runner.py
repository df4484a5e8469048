"""Doing a study: side by side, after a kill, with runs that fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from bitfit_fast import read
from bitfit_fast.errors import BitFitError
from bitfit_fast.study import read_study, run_study, runner
from bitfit_fast.study.runner import open_folder, run_folder
from bitfit_fast.study.sweeps import FINAL, TRIAL, load_source
from bitfit_fast.study.worker import DONE, FAILED, OPEN, perform, state
from bitfit_fast.tensorfile import read_tensors


def start(path, output, *more):
    command = [sys.executable, "-m", "bitfit_fast", "study", path, "--output", output, *more]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def lines_of_runs(out):
    return [line.partition(": ")[0] for line in out.splitlines() if " s" in line and ": " in line]


def do(path, output, **options):
    plan = open_folder(read_study(path), output)
    return plan, run_study(plan, output, **options)


def outcome(folder):
    """Return what must not hang on the way that a run was done: scores and tensors."""
    summary = json.loads((folder / "summary.json").read_text())
    scores = {
        split: {k: v for k, v in summary["final"][split].items() if k in ("loss", "accuracy")}
        for split in ("train", "validation")
    }
    tensors = {k: v.tolist() for k, v in read(folder).tensors.items() if v.numel() < 100}
    return scores, tensors


def test_two_processes_share_a_study_and_a_killed_one_goes_on_to_the_same_end(study_file, tmp_path):
    path = study_file("seeds: 2", methods="[bitfit, frozen]")
    # so long that the kill comes in the middle of it
    path.write_text(path.read_text().replace("max_steps: 6", "max_steps: 60"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pair = [start(path, whole) for _ in range(2)]
    killed = start(path, broken)

    plan = open_folder(read_study(path), tmp_path / "plan")
    folders = [run_folder(broken, run) for run in plan.runs.values()]
    deadline = time.monotonic() + 240
    # one run done, and another one begun
    while not any(state(f) == OPEN and (f / "state.safetensors").exists() for f in folders[1:]):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = {f.name: (f / "summary.json").stat().st_mtime_ns for f in folders if state(f) == DONE}
    assert before
    assert len(before) < len(folders)
    begun = next(f for f in folders if (f / "state.safetensors").exists())

    printed = [lines_of_runs(finish(process)) for process in pair]
    assert not set(printed[0]) & set(printed[1])
    assert len(printed[0] + printed[1]) == len(plan.runs)

    # the run that was under way ends with its process, and goes on where it was
    steps = read_tensors(begun / "state.safetensors", "training state")[0]["progress"]["step"]
    assert steps >= 2
    _, counts = do(path, broken)
    assert counts == {DONE: len(folders)}
    after = {f.name: (f / "summary.json").stat().st_mtime_ns for f in folders}
    assert all(after[name] == at for name, at in before.items())
    for folder in folders:
        assert outcome(folder) == outcome(whole / "runs" / folder.name)
    assert not list((broken / "claims").glob("*.json"))


@pytest.fixture
def broken_model(bert_folder, tmp_path):
    """A model folder whose weights are cut short."""
    folder = tmp_path / "broken-model"
    shutil.copytree(bert_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


def test_a_failed_run_stops_no_other_and_is_tried_again_on_request(
    study_file, bert_folder, broken_model, tmp_path
):
    path = study_file(methods="[bitfit]")
    text = path.read_text().replace(str(bert_folder), f"[{broken_model}, {bert_folder}]")
    path.write_text(text)
    console = Console(file=(tmp_path / "log").open("w"))
    plan, counts = do(path, tmp_path / "out", console=console)
    assert counts == {FAILED: 1, DONE: 1}
    failed, done = (run_folder(tmp_path / "out", run) for run in plan.runs.values())
    assert (state(failed), state(done)) == (FAILED, DONE)
    told = json.loads((failed / "failure.json").read_text())["error"]
    assert f"the weights of {broken_model} are broken" in told
    assert "Traceback" in (failed / "traceback.txt").read_text()
    # not again without a request
    assert do(path, tmp_path / "out")[1] == {FAILED: 1, DONE: 1}
    shutil.copy(bert_folder / "model.safetensors", broken_model)
    finished = (done / "summary.json").stat().st_mtime_ns
    assert do(path, tmp_path / "out", retry=True)[1] == {DONE: 2}
    assert not (failed / "failure.json").exists()
    assert (done / "summary.json").stat().st_mtime_ns == finished


def test_a_search_and_a_time_budget_are_done_before_the_runs_that_need_them(study_file, tmp_path):
    path = study_file(
        "lr: [1e-4, 3e-2]", "lr_search: {max_steps: 20}", "time_budget: {shares: [0.5]}",
        methods="[bitfit]",
    )  # fmt: skip
    plan, counts = do(path, tmp_path / "out", jobs=2)
    assert counts == {DONE: len(plan.runs)}
    (final,) = (run for run in plan.runs.values() if run.purpose == "final")
    summary = json.loads((run_folder(tmp_path / "out", final) / "summary.json").read_text())
    losses = {}
    for trial in final.trials:
        trialled = json.loads((run_folder(tmp_path / "out", trial) / "summary.json").read_text())
        losses[trial.settings.lr] = trialled["final"]["validation"]["loss"]
        assert trialled["examples"] == 36
    assert summary["lr"] == min(losses, key=losses.get)
    assert summary["steps"] >= 1


def test_neither_search_nor_training_on_the_way_sees_the_validation_set(
    study_file, files, tmp_path, monkeypatch
):
    path = study_file("lr: [1e-3, 1e-2]", "lr_search: {max_steps: 2}", methods="[bitfit]")
    plan = open_folder(read_study(path), tmp_path / "plan")
    (final,) = (run for run in plan.runs.values() if run.purpose == "final")
    trial = final.trials[0]

    def metrics(name, run):
        folder = tmp_path / name
        perform(run, run.settings, folder, "all")
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def scores(rows):
        return [(r["step"], r["split"], r["loss"]) for r in rows]

    first = scores(metrics("first", trial))
    # only after the last step
    rows = metrics("final", final)
    assert [r["step"] for r in rows if r["split"] == "validation"] == [6]
    assert [r["step"] for r in rows if r["split"] == "train"] == [2, 4, 6]
    poisoned = tmp_path / "poisoned"
    shutil.copytree(files, poisoned)
    (poisoned / "validation.csv").write_text("text,label\nwas was was,good\nnot it,bad\n")
    path.write_text(path.read_text().replace(str(files / "val"), str(poisoned / "val")))
    load_source.cache_clear()
    other = open_folder(read_study(path), tmp_path / "other")
    (other_trial, *_) = (run for run in other.runs.values() if run.purpose == TRIAL)
    assert other_trial.task != trial.task
    assert scores(metrics("second", other_trial)) == first


def test_finished_runs_keep_only_what_is_asked_for(study_file, tmp_path):
    plan = open_folder(read_study(study_file(methods="[frozen]")), tmp_path / "plan")
    (run,) = plan.runs.values()
    for keep, kept in (("all", True), ("small", True), ("none", False)):
        folder = tmp_path / keep
        perform(run, run.settings, folder, keep)
        assert (folder / "model.safetensors").exists() is kept
        assert not (folder / "state.safetensors").exists()
        assert state(folder) == DONE


def test_a_study_folder_belongs_to_one_study(study_file, tmp_path):
    path, output = study_file(), tmp_path / "out"
    open_folder(read_study(path), output)
    # one that has grown is the same
    open_folder(read_study(study_file("seeds: 3")), output)
    with pytest.raises(BitFitError, match="is the folder of the study 'tiny', not 'other'"):
        open_folder(read_study(study_file(name="other.yaml")), output)
    with pytest.raises(BitFitError, match=r"is no study folder: it holds .*tiny\.yaml"):
        open_folder(read_study(path), tmp_path)
    with pytest.raises(BitFitError, match="holds no study to report on"):
        open_folder(read_study(path), tmp_path / "none", report_only=True)
    with pytest.raises(BitFitError, match="is a file"):
        open_folder(read_study(path), path)
    (output / "study.json").write_text("{")
    with pytest.raises(BitFitError, match="is altered"):
        open_folder(read_study(path), output)


@pytest.mark.parametrize("purpose", [FINAL, TRIAL])
def test_runs_on_other_data_are_not_mixed_with_old_ones(study_file, files, tmp_path, purpose):
    more = () if purpose == FINAL else ("lr: [1e-3, 1e-2]", "lr_search: {max_steps: 2}")
    path, output = study_file(*more), tmp_path / "out"
    plan = open_folder(read_study(path), output)
    train = files / "train.csv"
    before = train.read_text()
    train.write_text(before + before.splitlines()[-1] + "\n")
    load_source.cache_clear()
    # nothing has run on it
    open_folder(read_study(path), output)
    run = next(run for run in plan.runs.values() if run.purpose == purpose)
    perform(run, run.settings, run_folder(output, run), "none")
    open_folder(read_study(path), output)
    train.write_text(before)
    load_source.cache_clear()
    with pytest.raises(
        BitFitError, match=r"the data of .*train\.csv has changed since .* was done"
    ):
        open_folder(read_study(path), output)
    assert open_folder(read_study(path), output, report_only=True).runs.keys() == plan.runs.keys()
    # nor is one that was killed when it had been trained, but not noted
    (run_folder(output, run) / "run.json").unlink()
    with pytest.raises(BitFitError, match=r"the data of .*train\.csv has changed since"):
        if purpose == FINAL:
            open_folder(read_study(path), output)
        perform(run, run.settings, run_folder(output, run), "none")


def test_a_report_needs_no_data(study_file, files, tmp_path):
    path, output = study_file(), tmp_path / "out"
    plan = open_folder(read_study(path), output)
    path.write_text(path.read_text().replace(str(files), "/gone"))
    path.write_text(path.read_text().replace("/gone/train", str(files / "train")))
    load_source.cache_clear()
    again = open_folder(read_study(path), output, report_only=True)
    assert len(again.runs) == len(plan.runs)


def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_a_failed_run(study_file, tmp_path, monkeypatch):
    path = study_file(methods="[bitfit]")
    monkeypatch.setattr(runner, "work", die)
    plan, counts = do(path, tmp_path / "out")
    assert counts == {FAILED: 1}
    (run,) = plan.runs.values()
    told = json.loads((run_folder(tmp_path / "out", run) / "failure.json").read_text())
    assert told["error"] == "its process ended with signal SIGKILL, perhaps for want of memory"
