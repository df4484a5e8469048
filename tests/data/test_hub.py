"""GLUE from a dataset repository of the hub's layout, and what is said where there is none."""

from __future__ import annotations

import shutil
import sys
import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitfit_fast.data.glue import GLUE, HUB_REPOSITORY, load_glue
from bitfit_fast.data.hub import load_hub_split
from bitfit_fast.errors import BitFitError, BitFitWarning

ALL = ("train", "validation", "test")
ROWS = 5


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    return folder


def table(name, split, rows=ROWS, **replaced):
    """Make a split as the hub has it: labels are numbers, and -1 where there are none."""
    task = GLUE[name]
    columns = {column: [f"{column} {split} {i}" for i in range(rows)] for column in task.hub_text}
    if name == "stsb":
        label = pa.array([i * 1.25 for i in range(rows)], pa.float32())
    else:
        label = pa.array([i % len(task.labels) for i in range(rows)], pa.int64())
    # MRPC's are the only public ones
    if split.startswith("test") and name != "mrpc":
        label = pa.array([-1] * rows, label.type)
    return pa.table({**columns, "label": label, "idx": list(range(rows)), **replaced})


def write(folder, name, **tables):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split in GLUE[name].rows:
        pq.write_table(
            tables.get(split, table(name, split)), folder / name / f"{split}-00000-of-00001.parquet"
        )


@pytest.fixture(scope="session")
def glue_repository(tmp_path_factory):
    """A folder laid out as the hub's dataset repository of all nine tasks."""
    folder = tmp_path_factory.mktemp("hub") / "glue"
    lines = ["---", "configs:"]
    for name, task in GLUE.items():
        write(folder, name)
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in task.rows:
            lines += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# GLUE", ""]))
    return folder


@pytest.fixture
def repository(glue_repository, tmp_path):
    return shutil.copytree(glue_repository, tmp_path / "glue")


def load(name, repository, kinds=ALL):
    """Load without the warnings that a handful of rows calls for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BitFitWarning)
        return load_glue(name, None, kinds, str(repository))


def fails(name, repository, kinds=("train",)):
    with pytest.raises(BitFitError) as caught:
        load(name, repository, kinds)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", GLUE)
def test_every_task_reads_the_hubs_layout(name, glue_repository):
    data = load(name, glue_repository)
    task = GLUE[name]
    assert (data.name, data.labels, data.metrics) == (name, task.labels, task.metrics)
    assert list(data.splits) == list(task.rows)
    for kind, split in data.splits.items():
        expected = [tuple(f"{column} {kind} {i}" for column in task.hub_text) for i in range(ROWS)]
        assert split.name == kind
        assert list(split.texts) == expected
        if kind.startswith("test") and name != "mrpc":
            assert split.labels is None
        elif name == "stsb":
            assert split.labels == (0.0, 1.25, 2.5, 3.75, 5.0)
        else:
            assert split.labels == tuple(i % len(task.labels) for i in range(ROWS))


def test_labels_are_of_the_types_that_training_needs(glue_repository):
    assert {type(x) for x in load("rte", glue_repository).train.labels} == {int}
    assert {type(x) for x in load("stsb", glue_repository).train.labels} == {float}


def test_only_the_kinds_asked_for_are_read(glue_repository):
    assert list(load("mnli", glue_repository, ("validation",)).splits) == [
        "validation_matched",
        "validation_mismatched",
    ]


def test_another_number_of_rows_than_the_official_one_is_told(glue_repository):
    with pytest.warns(BitFitWarning, match="5 examples where the official RTE train set has 2490"):
        load_glue("rte", None, ("train",), str(glue_repository))


@pytest.mark.parametrize(
    ("name", "kind", "labels", "said"),
    [
        ("rte", "train", [0, 1, 2], "train row 3: label '2' is not one of 0, 1"),
        ("rte", "validation", [0, -1], "validation row 2: label '-1' is not one of 0, 1"),
        ("rte", "train", [-1, -1], "train row 1: label '-1' is not one of 0, 1"),
        ("rte", "test", [-1, 0], "test row 1: label '-1' is not one of 0, 1"),
        ("rte", "train", [0, None], "train row 2: label 'None' is not one of 0, 1"),
        ("stsb", "train", [1.5, None], "train row 2: label 'None' is not a number"),
        ("stsb", "train", [float("nan")], "train row 1: label 'nan' is not a number"),
    ],
)
def test_a_label_outside_the_set_names_its_row(name, kind, labels, said, repository):
    broken = table(name, kind, len(labels), label=pa.array(labels))
    write(repository, name, **{kind: broken})
    assert fails(name, repository, (kind,)) == f"{repository} ({name}), {said}"


@pytest.mark.parametrize("column", ["sentence1", "label"])
def test_a_missing_column_names_those_there(column, repository):
    tables = {split: table("rte", split).drop_columns([column]) for split in ALL}
    write(repository, "rte", **tables)
    rest = ", ".join(c for c in ("sentence1", "sentence2", "label", "idx") if c != column)
    assert fails("rte", repository) == (
        f"{repository} (rte) has no column '{column}'; its columns are {rest}"
    )


def test_a_null_text_names_its_row(repository):
    broken = table("rte", "train", 2, sentence2=pa.array(["a", None]))
    write(repository, "rte", train=broken)
    assert fails("rte", repository) == (
        f"{repository} (rte), train row 2: a column of sentence1, sentence2 holds no text"
    )


@pytest.mark.parametrize("damage", ["cut", "garbage", "split", "task", "folder"])
def test_a_repository_that_is_not_whole_is_refused(damage, repository):
    path = next((repository / "rte").glob("train-*"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "garbage":
        path.write_bytes(bytes(range(256)))
    elif damage == "split":
        path.unlink()
    elif damage == "task":
        readme = repository / "README.md"
        readme.write_text(readme.read_text().replace("config_name: rte", "config_name: other"))
    else:
        shutil.rmtree(repository)
    message = fails("rte", repository)
    assert message.startswith(f"the dataset {repository} (rte) ")
    assert "--data-dir" in message


def test_offline_and_uncached_says_how_to_go_on():
    message = fails("rte", HUB_REPOSITORY)
    assert message.startswith(
        "the dataset nyu-mll/glue (rte) is neither in the local cache nor to be had from the hub ("
    )
    assert message.endswith("); pass a local folder with --data-dir")


def test_a_cache_of_other_tasks_alone_says_how_to_go_on(cache):
    folder = cache / "nyu-mll___glue" / "mrpc" / "0.0.0" / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    message = fails("rte", HUB_REPOSITORY)
    assert "nyu-mll/glue (rte)" in message
    assert "--data-dir" in message


def test_datasets_is_needed_for_the_hub_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BitFitError, match=r"needs the package 'datasets'; .*--data-dir"):
        load_hub_split(HUB_REPOSITORY, "rte", "train")
