"""Sizes, time budgets and searches: which runs there are, and what each may see."""

import itertools
import random
from dataclasses import replace

import pytest
from transformers import FNetConfig

from bitfit_fast import Split, TaskData
from bitfit_fast.data.batches import subset
from bitfit_fast.errors import BitFitError
from bitfit_fast.study import expand, read_study
from bitfit_fast.study.runner import open_folder
from bitfit_fast.study.sweeps import CLOCK, FINAL, TRIAL, check_methods, hold_back, measure, settle


def plan_of(path):
    study = read_study(path)
    return expand(study, {key: found.examples for key, found in measure(study).items()})


def test_smaller_subsets_are_parts_of_larger_ones_and_hang_on_the_seed():
    draw = random.Random(0)
    for _ in range(50):
        examples, seed = draw.randint(2, 300), draw.randint(0, 9)
        small, large = sorted(draw.sample(range(1, examples + 1), 2))
        parts = [subset(examples, count, seed) for count in (small, large)]
        assert [len(set(p)) for p in parts] == [small, large]
        assert set(parts[0]) < set(parts[1]) <= set(range(examples))
    assert subset(300, 10, 1) != subset(300, 10, 2)


def test_every_size_gets_equal_steps_unless_equal_epochs_are_asked_for(study_file):
    sizes = "sizes: [0.2, 20, 1]"
    steps = plan_of(study_file(sizes))
    assert {r.settings.max_steps for r in steps.runs.values()} == {6}
    assert {c.examples: c.runs[0].settings.train_examples for c in steps.cells} == {
        8: 8, 20: 20, 40: None,
    }  # fmt: skip
    # steps that follow from the epochs are those of the whole set
    by_epochs = plan_of(study_file(sizes, "epochs: 1.0", methods="[full]"))
    assert {r.settings.max_steps for r in by_epochs.runs.values()} == {5}
    assert {r.settings.epochs for r in by_epochs.runs.values()} == {None}
    epochs = plan_of(study_file(sizes, "equal: epochs"))
    assert {(r.settings.epochs, r.settings.max_steps) for r in epochs.runs.values()} == {
        (6 / 5, None)
    }


def test_a_task_from_two_places_is_refused(tmp_path):
    word = "{}\tdog\t_\t{}\t_\t_\t0\troot\t_\t_\n"
    lines = word.format(1, "NOUN") + word.format(2, "VERB") + "\n"
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for split in ("train", "dev", "test"):
            (tmp_path / folder / f"xx-ud-{split}.conllu").write_text(lines)
    tasks = ", ".join(f"{{name: {n}, task: pos, data_dir: {tmp_path / n}}}" for n in ("one", "two"))
    file = tmp_path / "study.yaml"
    file.write_text(f"models: [m]\nmethods: [full]\ntasks: [{tasks}]\n")
    with pytest.raises(BitFitError, match=r"takes the task pos from two places: .*one, .*two"):
        measure(read_study(file))


def test_runs_that_grids_share_are_one(study_file):
    path = study_file("grids:", "  - {seeds: 2}", "  - {sizes: [8, 40]}")
    plan = plan_of(path)
    assert len([run for cell in plan.cells for run in cell.runs]) == 12
    assert len(plan.runs) == 9
    assert len({name.lower() for name in plan.runs}) == 9


def test_a_run_has_another_name_for_other_settings_and_not_for_another_label(study_file):
    def name(*lines, methods="[bitfit]"):
        return next(iter(plan_of(study_file(*lines, methods=methods)).runs))

    assert name() == name(methods="[{name: other, method: bitfit}]")
    names = [
        name(), name("precision: bf16"), name("lr: 1e-2"), name("sizes: 8"),
        name(methods="[b_q]"), name("seeds: [1]"), name(methods="[{method: bitfit, head: no}]"),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert name("sizes: 8").startswith("train-bitfit-n8-seed0-tiny-bert-")


def test_a_size_larger_than_the_set_is_refused(study_file):
    with pytest.raises(BitFitError, match="size 41 is more than the 40 training examples of toy"):
        plan_of(study_file("sizes: [8, 41]"))


def test_terms_and_layers_that_a_model_has_not_are_refused_before_anything_runs(study_file):
    for method in ("{method: bitfit, layers: '7'}", "{method: bitfit, terms: relative-layernorm}"):
        with pytest.raises(BitFitError, match=r"method 'bitfit' for .*tiny-bert"):
            check_methods(read_study(study_file(methods=f"[{method}]")))


def test_methods_that_a_model_cannot_take_are_refused_before_anything_runs(
    study_file, bert_folder, tmp_path
):
    config = FNetConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
        use_tpu_fourier_optimizations=False,
    )  # fmt: skip
    # what is looked at is the configuration alone
    config.save_pretrained(tmp_path / "fnet")
    entries = "[full, bitfit, diff-pruning, {name: narrow, method: adapters, bottleneck: 4}]"
    path = study_file(methods=entries)
    check_methods(read_study(path))
    models = f"[{bert_folder}, {tmp_path / 'fnet'}]"
    path.write_text(path.read_text().replace(str(bert_folder), models))
    said = r"^method 'narrow' for .*fnet: method 'adapters' does not know the linear layers of"
    with pytest.raises(BitFitError, match=said):
        open_folder(read_study(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_without_labels_is_refused(study_file, files, tmp_path):
    bare = tmp_path / "bare.csv"
    bare.write_text("text\nthe plot was good\n")
    path = study_file()
    path.write_text(path.read_text().replace(str(files / "validation.csv"), str(bare)))
    with pytest.raises(BitFitError, match="label"):
        plan_of(path)


def toy(count=40):
    texts = tuple((f"sentence {i}",) for i in range(count))
    labels = tuple(i % 2 for i in range(count))
    validation = Split("validation", (("unseen",),), (0,))
    splits = {"train": Split("train", texts, labels), "validation": validation}
    return TaskData("toy", ("a", "b"), ("accuracy",), splits)


@pytest.mark.parametrize(("examples", "used"), [(None, 40), (20, 20)])
def test_what_is_held_back_is_of_the_training_set_alone(examples, used):
    data = toy()
    held = hold_back(data, 0.1, examples, 3)
    train, validation = (set(held.splits[name].texts) for name in ("train", "validation"))
    assert list(held.splits) == ["train", "validation"]
    assert not train & validation
    assert len(validation) == used // 10
    wanted = subset(40, used, 3)
    assert train | validation == {data.splits["train"].texts[i] for i in wanted}
    with pytest.raises(BitFitError, match="too few to hold some back"):
        hold_back(toy(1), 0.1, None, 0)


def test_questions_that_are_held_back_are_on_texts_of_their_own():
    texts = tuple((f"question {i}", f"text {i % 7}") for i in range(35))
    labels = (((0, "x"),),) * 35
    split = Split("train", texts, labels, tuple(map(str, range(35))))
    data = TaskData("squad", None, ("f1",), {"train": split}, kind="span")
    held = hold_back(data, 0.3, None, 3)
    train, validation = ({t for _, t in held.splits[n].texts} for n in ("train", "validation"))
    assert not train & validation and len(validation) == 2 and len(train | validation) == 7
    assert sum(map(len, held.splits.values())) == 35
    alone = TaskData("squad", None, ("f1",), {"train": split.take([0, 7, 14])}, kind="span")
    with pytest.raises(BitFitError, match="all on one text"):
        hold_back(alone, 0.3, None, 0)


def test_settings_of_another_kind_of_task_are_refused_before_the_first_run(study_file):
    with pytest.raises(BitFitError, match="task toy: doc-stride is not of a sequence task"):
        measure(read_study(study_file("doc_stride: 8")))


def summary(loss, accuracy, step_ms=10.0):
    scores = {"loss": loss, "accuracy": accuracy}
    return {"metrics": ["accuracy"], "step_ms": step_ms, "final": {"validation": scores}}


def test_the_rate_of_the_lowest_loss_or_best_metric_is_taken(study_file):
    for by, best in (("loss", 2e-3), ("metric", 3e-3)):
        path = study_file("lr: [1e-3, 2e-3, 3e-3]", f"lr_search: {{by: {by}}}", "seeds: 2")
        plan = plan_of(path)
        runs = [run for run in plan.runs.values() if run.method.method == "bitfit"]
        # the seeds share their trials
        assert [run.purpose for run in runs] == [TRIAL] * 3 + [FINAL] * 2
        *trials, first, second = runs
        scores = [summary(0.5, 0.6), summary(0.3, 0.7), summary(0.4, 0.8)]
        found = dict(zip((t.name for t in trials), scores))
        assert settle(first, found) == replace(first.settings, lr=best)
        assert settle(second, found).seed == 1
        # a rate that diverged is out; without any there is nothing to choose from
        del found[trials[1].name], found[trials[2].name]
        assert settle(first, found).lr == 1e-3
        with pytest.raises(BitFitError, match="every trial failed"):
            settle(first, {})


def test_a_time_budget_becomes_the_steps_that_it_holds(study_file):
    lines = "time_budget: {shares: [0.5], seconds: [3]}"
    plan = plan_of(study_file(lines, methods="[bitfit]"))
    assert [r.purpose for r in plan.runs.values()].count(CLOCK) == 2
    by_kind = {c.budget.kind: c.runs[0] for c in plan.cells}
    own, full = by_kind["share"].clocks
    assert (own.method.method, full.method.method) == ("bitfit", "full")
    times = {own.name: summary(1, 1, step_ms=20.0), full.name: summary(1, 1, step_ms=100.0)}
    # half of six steps of 100 ms, at 20 ms a step; and 3 s
    assert settle(by_kind["share"], times).max_steps == 15
    assert settle(by_kind["seconds"], times).max_steps == 150
    with pytest.raises(BitFitError, match="time of a step is not known"):
        settle(by_kind["share"], {own.name: times[own.name]})


def test_no_two_runs_of_a_large_study_share_a_name(study_file):
    plan = plan_of(
        study_file(
            "seeds: 5", "sizes: [8, 20, 1]", "lr: [1e-3, 2e-3]", methods="[full, b_q, bitfit]"
        )
    )
    runs = [(*run.needs, run) for cell in plan.cells for run in cell.runs]
    distinct = {run for group in runs for run in group}
    assert len({run.name for run in distinct}) == len(distinct)
    for a, b in itertools.combinations(distinct, 2):
        assert a.identity != b.identity
