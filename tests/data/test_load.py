"""One call for a task by name or from files."""

from __future__ import annotations

import pytest

from bitfit_fast.data.glue import GLUE
from bitfit_fast.data.load import TASKS, load_task, task_name
from bitfit_fast.errors import BitFitError, BitFitWarning

VALID = "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, squad, pos, reviews"


@pytest.fixture
def rte(tmp_path):
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    header = "index\tsentence1\tsentence2"
    for part in ("train", "dev"):
        text = f"{header}\tlabel\n0\t{part}\tb\tentailment\n1\tc\td\tnot_entailment\n"
        (folder / f"{part}.tsv").write_text(text)
    (folder / "test.tsv").write_text(f"{header}\n0\ttest\tb\n")
    return tmp_path


@pytest.fixture
def files(tmp_path):
    paths = {}
    for kind in ("train", "validation", "test"):
        path = paths[f"{kind}_file"] = tmp_path / f"{kind}.csv"
        path.write_text(f"text,label\n{kind},a\nsecond,b\n")
    return paths


def fails(*args, **kwargs):
    with pytest.raises(BitFitError) as caught:
        load_task(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("name", GLUE)
def test_a_task_may_be_spelled_as_its_folder_is(name):
    for spelling in (name, name.upper(), GLUE[name].folder, GLUE[name].folder.lower()):
        assert task_name(spelling) == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("sst_2", "sst2"), ("SST-2", "sst2"), ("Sts-B", "stsb"), ("sts_b", "stsb"),
     ("CoLA", "cola"), ("SQuAD", "squad"), ("Reviews", "reviews")],
)  # fmt: skip
def test_case_hyphens_and_underscores_do_not_matter(spelling, name):
    assert task_name(spelling) == name


@pytest.mark.parametrize("name", ["", "rt", "rte2", "ax", "mnli-mm", "squad2", "glue"])
def test_an_unknown_task_names_the_valid_ones(name):
    expected = f"unknown task '{name}'; valid ones are {VALID}"
    with pytest.raises(BitFitError) as caught:
        task_name(name)
    assert str(caught.value) == expected
    assert fails(name) == expected


def test_the_tasks_are_the_nine_of_glue_and_the_others():
    assert ", ".join(TASKS) == VALID


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")
def test_a_glue_task_comes_from_its_folder(as_text, rte):
    data = load_task("RTE", data_dir=str(rte) if as_text else rte)
    assert (data.name, list(data.splits)) == ("rte", ["train", "validation"])
    assert data.train.texts == (("train", "b"), ("c", "d"))
    assert data.columns is None


@pytest.mark.filterwarnings("ignore::bitfit_fast.errors.BitFitWarning")
def test_only_the_kinds_asked_for_are_loaded(rte, files):
    for kind in ("train", "validation", "test"):
        assert list(load_task("rte", data_dir=rte, kinds=(kind,)).splits) == [kind]
        assert list(load_task(**files, kinds=[kind]).splits) == [kind]


def test_labels_are_those_of_the_training_set_whatever_is_loaded(tmp_path):
    train, other = tmp_path / "train.csv", tmp_path / "dev.csv"
    train.write_text("text,label\nx,a\ny,b\nz,c\n")
    other.write_text("text,label\nx,a\ny,c\n")
    data = load_task(train_file=train, validation_file=other, kinds=("validation",))
    assert data.labels == ("a", "b", "c") and data.splits["validation"].labels == (0, 2)
    assert list(data.splits) == ["validation"]
    train.write_text("text,label\nx,0.5\ny,1\n")
    other.write_text("text,label\nx,0\ny,1\n")
    data = load_task(train_file=train, validation_file=other, kinds=("validation",))
    assert data.labels is None
    for part, tags in (("train", "ABC"), ("dev", "AC")):
        lines = [f"{i}\tw\t_\t{tag}" + "\t_" * 6 for i, tag in enumerate(tags, 1)]
        (tmp_path / f"x-{part}.conllu").write_text("\n".join(lines) + "\n\n")
    data = load_task("pos", data_dir=tmp_path, kinds=("validation",))
    assert data.labels == ("A", "B", "C") and data.splits["validation"].labels == ((0, 2),)
    assert list(data.splits) == ["validation"]


def test_another_number_of_rows_is_told(rte):
    with pytest.warns(BitFitWarning, match="2 examples where the official RTE train set has 2490"):
        load_task("rte", data_dir=rte, kinds=("train",))


@pytest.mark.parametrize("as_text", [True, False])
def test_files_make_a_task(as_text, files):
    given = {key: str(path) if as_text else path for key, path in files.items()}
    data = load_task(**given, kinds=("train", "validation", "test"))
    assert data.labels == ("a", "b")
    assert {kind: split.texts[0] for kind, split in data.splits.items()} == {
        "train": ("train",),
        "validation": ("validation",),
        "test": ("test",),
    }


def test_the_options_of_files_are_passed_on(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("p\th\tgold\na\tb\t1\nc\td\t2\n")
    options = {"train_file": path, "text_columns": ["p", "h"], "label_column": "gold"}
    assert load_task(**options, kinds=("train",)).labels == ("1", "2")
    assert load_task(**options, labels=["2", "1"]).train.labels == (1, 0)
    assert load_task(**options, regression=True).train.labels == (1.0, 2.0)


@pytest.mark.parametrize("kind", ["train", "validation", "test"])
def test_a_task_and_files_do_not_go_together(kind, rte, files):
    file = {f"{kind}_file": files[f"{kind}_file"]}
    message = "give a task ('rte') or files, not both"
    assert fails("rte", data_dir=rte, **file) == message
    assert fails("rte", **file, kinds=("train",)) == message


def test_neither_a_task_nor_files_names_the_tasks(rte):
    assert fails() == f"name a task ({VALID}) or a file of examples"
    assert fails(data_dir=rte) == f"name a task ({VALID}) or a file of examples"


def test_files_of_other_sets_than_those_wanted_are_named(files):
    assert fails(test_file=files["test_file"]) == (
        "there is a test file, and train or validation examples are wanted"
    )


def test_files_take_no_data_folder(rte, files):
    assert fails(**files, data_dir=rte) == (
        "a data folder is of tasks but 'reviews', not of sequence files"
    )


def test_the_reviews_take_no_data_folder(tmp_path):
    assert fails("reviews", data_dir=tmp_path) == (
        "a data folder is of tasks but 'reviews', not of the task 'reviews'"
    )


def test_the_reviews_need_no_files():
    assert set(load_task("reviews").splits) == {"train", "validation"}


@pytest.mark.parametrize("kind", ["dev", "validation_matched", "Train", ""])
def test_an_unknown_split_names_the_valid_ones(kind, rte):
    assert fails("rte", data_dir=rte, kinds=("train", kind)) == (
        f"unknown split '{kind}'; valid ones are train, validation, test"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"labels": ["a", "b"]},
            "labels are of files of texts or tags and of the task 'pos', not of the task 'rte'",
        ),
        (
            {"regression": True},
            "regression is of files of labelled texts, not of the task 'rte'",
        ),
        (
            {"split_seed": 3},
            "a seed of the split is of the task 'squad' from one file, not of the task 'rte'",
        ),
        (
            {"validation_share": 0.5},
            "a validation share is of the task 'squad' from one file, not of the task 'rte'",
        ),
    ],
)
def test_an_option_of_other_sources_is_refused(rte, given, message):
    assert fails("rte", data_dir=rte, **given) == message


def test_options_of_texts_are_refused_for_other_files(tmp_path):
    tags, questions = tmp_path / "train.conllu", tmp_path / "train.jsonl"
    tags.write_text("1\ta\t_\tX\n\n")
    questions.write_text('{"question": "q", "context": "c"}\n')
    assert fails(train_file=tags, task_kind="token", regression=False) == (
        "regression is of files of labelled texts, not of token files"
    )
    assert fails(train_file=questions, task_kind="span", labels=["a", "b"]) == (
        "labels are of files of texts or tags and of the task 'pos', not of span files"
    )
