"""Reading a study: what it may hold, and where an error is."""

from pathlib import Path

import pytest

from bitfit_fast.errors import BitFitError
from bitfit_fast.models.loading import DEFAULT_MODEL
from bitfit_fast.study import read_study, study_of_options
from bitfit_fast.study.grid import Budget

ROOT = Path(__file__).parents[2]


def study(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return read_study(path)


def test_a_short_file_has_defaults_for_the_rest(tmp_path):
    found = study(tmp_path, "tasks: [rte, STS-B]\nmethods: bitfit\nseeds: 2\n")
    (grid,) = found.grids
    assert (found.name, found.title, found.keep) == ("some", "some", "all")
    assert grid.models == (DEFAULT_MODEL,)
    assert [(t.label, t.name) for t in grid.tasks] == [("rte", "rte"), ("STS-B", "stsb")]
    assert [(m.label, m.method, m.terms) for m in grid.methods] == [("bitfit", "bitfit", "all")]
    assert grid.values["seeds"] == (0, 1)
    assert grid.sizes == (1.0,)


def test_methods_by_name_by_preset_and_in_full(tmp_path):
    found = study(
        tmp_path,
        "tasks: rte\n"
        "methods:\n"
        "  - b_m2+b_q\n"
        "  - {name: first layers, method: bitfit, terms: [query, m2], layers: 0-1, lr: 1e-3}\n"
        "  - {name: b_q, head: false}\n",
    )
    preset, full, short = found.grids[0].methods
    assert (preset.label, preset.method, preset.terms) == (
        "b_m2+b_q",
        "bitfit",
        "intermediate+query",
    )
    assert (full.label, full.terms, full.layers, full.values["lr"]) == (
        "first layers", "query,m2", "0-1", (1e-3,),
    )  # fmt: skip
    assert (short.method, short.terms, short.head) == ("bitfit", "query", False)


def test_the_closest_value_counts(tmp_path):
    found = study(
        tmp_path,
        "tasks: [rte, {task: mrpc, lr: 2e-3, max_steps: 7}]\n"
        "methods:\n"
        "  - bitfit\n"
        "  - {method: full, lr: 3e-5, tasks: {mrpc: {lr: 4e-5}}}\n"
        "lr: 1e-3\nmax_steps: 5\n",
    )
    (grid,) = found.grids
    rte, mrpc = grid.tasks
    bitfit, full = grid.methods
    rates = [[grid.values_of(t, m)["lr"] for m in (bitfit, full)] for t in (rte, mrpc)]
    assert rates == [[(1e-3,), (3e-5,)], [(2e-3,), (4e-5,)]]
    assert [grid.values_of(t, full)["max_steps"] for t in (rte, mrpc)] == [5, 7]


def test_grids_fall_back_on_the_top(tmp_path):
    found = study(
        tmp_path,
        "name: both\ntasks: rte\nmethods: [full, bitfit]\nseeds: 3\n"
        "grids:\n"
        "  - title: all\n"
        "  - {title: sizes, sizes: [0.1, 50, 1], seeds: [4]}\n"
        "  - {title: time, methods: bitfit, time_budget: {seconds: [5], shares: 0.5}}\n",
    )
    first, sizes, time = found.grids
    assert [g.title for g in found.grids] == ["all", "sizes", "time"]
    assert first.values["seeds"] == (0, 1, 2)
    assert sizes.values["seeds"] == (4,)
    assert sizes.sizes == (0.1, 50, 1.0)
    assert time.budgets == (Budget("seconds", 5.0), Budget("share", 0.5))
    assert len(sizes.methods) == 2
    assert len(time.methods) == 1


def test_sizes_and_a_time_budget_stand_in_for_each_other(tmp_path):
    grids = "grids: [{title: all}, {sizes: 9}, {time_budget: {seconds: 9}}]\n"
    found = study(tmp_path, f"tasks: rte\nmethods: full\nsizes: [0.5, 1]\n{grids}")
    assert [g.sizes for g in found.grids] == [(0.5, 1.0), (9,), (1.0,)]
    assert [len(g.budgets) for g in found.grids] == [0, 0, 1]
    with pytest.raises(BitFitError, match="sizes or a time budget, not both"):
        study(tmp_path, "tasks: rte\nmethods: full\ngrids: [{sizes: 9, time_budget: {shares: 1}}]")


def test_environment_variables_are_expanded_in_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_DATA", "/data")
    text = "tasks: rte\nmethods: full\ndata_dir: $SOME_DATA/glue\n"
    assert study(tmp_path, text).grids[0].values["data_dir"] == "/data/glue"
    monkeypatch.delenv("SOME_DATA")
    with pytest.raises(BitFitError, match=r"line 3, data_dir: .* SOME_DATA is not set"):
        study(tmp_path, text)


BAD = {
    "tasks: rte\nmethods: [full": "line 2: ",
    "tasks: rte\nmethods: full\nseedz: 3\n": "line 3: unknown key 'seedz'; valid ones are",
    "tasks: rte\nmethods: full\ntasks: mrpc\n": "line 3: 'tasks' is given twice",
    "tasks: rte\n": "the key methods is missing",
    "tasks: [rte,\n  rtee]\nmethods: full\n": "line 2, tasks: unknown task 'rtee'; valid ones are",
    "tasks:\n  - task: [rte]\nmethods: full\n": "line 2, task: expected text, found",
    "tasks: rte\nmethods:\n  - full\n  - half\n": "line 4, methods: unknown method 'half'; valid",
    "tasks: rte\nmethods:\n  - method: bitfit\n    termz: query\n": "line 4, methods: unknown key",
    "tasks: rte\nmethods:\n  - method: bitfit\n    terms: all,query\n": "line 4, terms: 'all'",
    "tasks: rte\nmethods:\n  - method: bitfit\n    layers: 3-1\n": "line 4, layers: layers '3-1'",
    "tasks: rte\nmethods:\n  - full\n  - {name: full, method: bitfit}\n": "line 4, methods: two",
    "tasks: rte\nmethods:\n  - {method: full, rank: 8}\n": "line 3, rank: method 'full' does not",
    "tasks: rte\nmethods:\n  - {method: lora, rank: 0}\n": "line 3, rank: rank must be at least 1",
    "tasks: rte\nmethods: full\nlr: fast\n": "line 3, lr: expected a number, found 'fast'",
    "tasks: rte\nmethods: full\nlr: [1e-3, -1]\n": "line 3, lr: lr must be above 0",
    "tasks: rte\nmethods: full\nmax_steps: 1.5\n": "line 3, max_steps: expected a whole number",
    "tasks: rte\nmethods: full\nprecision: fp8\n": "line 3, precision: precision must be one of",
    "tasks: rte\nmethods: full\nbackend: slow\n": "line 3, backend: unknown backend 'slow'; valid",
    "tasks: rte\nmethods: full\ndevice: tpu\n": "line 3, device: unknown device 'tpu'; valid",
    "tasks: rte\nmethods: full\nseeds: 0\n": "line 3, seeds: the number of seeds must be from 1",
    "tasks: rte\nmethods: full\nsizes: [0.1, 2.5]\n": "line 3, sizes: a size is a share above 0",
    "tasks: rte\nmethods: full\nsizes: []\n": "line 3, sizes: the list is empty",
    "tasks: rte\nmethods: full\nequal: time\n": "line 3, equal: 'time' is not one of steps, epochs",
    "tasks: rte\nmethods: full\nsizes: 9\ntime_budget: {seconds: 9}\n": "line 4, time_budget: a gr",
    "tasks: rte\nmethods: full\nlr_search:\n  held_back: 1\n": "line 4, held_back: the share",
    "tasks: rte\nmethods: full\nkeep: some\n": "line 3, keep: 'some' is not one of all, small",
    "tasks:\n  - name: mine\nmethods: full\n": "line 2, tasks: a task has either the key task or",
    "tasks:\n  - train_file: a.csv\nmethods: full\n": "line 2, tasks: a task of files needs a val",
    "tasks: rte\nmethods: full\ngrids: 3\n": "line 3, grids: expected keys and values, found '3'",
    "- rte\n": "line 1: expected keys and values, found a list",
    "": "is empty",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_errors_name_file_line_and_key(tmp_path, text):
    with pytest.raises(BitFitError) as caught:
        study(tmp_path, text)
    assert "some.yaml" in str(caught.value)
    assert BAD[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_bytes(b"tasks: \xff\xfe")
    with pytest.raises(BitFitError, match="no text in UTF-8"):
        read_study(path)
    with pytest.raises(BitFitError, match="cannot be read"):
        read_study(tmp_path / "none.yaml")


def test_options_make_the_study_that_a_file_would(tmp_path):
    found = study_of_options("some", tasks=["rte"], methods=["full", "b_q"], lr=[1e-3], seeds=2)
    written = study(tmp_path, "tasks: rte\nmethods: [full, b_q]\nlr: 1e-3\nseeds: 2\n")
    assert found.grids == written.grids
    with pytest.raises(BitFitError, match=r"^--task: unknown task 'rtee'"):
        study_of_options("some", tasks=["rtee"], methods=["full"])


def test_options_of_methods(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "tasks: rte\nmethods:\n  - {method: lora, rank: 4}\n  - {name: x, method: lora}\n"
    )
    first, second = read_study(path).grids[0].methods
    assert (first.options, second.options) == ((("rank", 4),), ())


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_studies_of_this_repository_are_valid(path, monkeypatch):
    monkeypatch.setenv("BITFIT_FAST_DATA", "/data")
    assert read_study(path).grids


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_choice_of_biases_for_another_method_is_refused_where_it_stands(tmp_path, method):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"models: [m]\ntasks: [rte]\nmethods:\n  - {{method: {method}, terms: query}}\n"
    )
    with pytest.raises(BitFitError, match=rf"line 4, .*method '{method}' does not take them"):
        read_study(file)


def test_windows_and_answers_are_of_the_tasks_that_have_them(tmp_path):
    task = "{task: squad, data_dir: d, max_length: 96, doc_stride: 24, max_answer_length: 9}"
    (grid,) = study(tmp_path, f"tasks: [rte, {task}]\nmethods: bitfit\n").grids
    rte, squad = grid.tasks
    assert squad.values["doc_stride"] == 24 and squad.values["max_answer_length"] == 9
    assert "doc_stride" not in rte.values
    with pytest.raises(BitFitError, match="doc-stride must be at least 0, not -1"):
        study(tmp_path, "tasks: [{task: squad, doc_stride: -1}]\nmethods: bitfit\n")
