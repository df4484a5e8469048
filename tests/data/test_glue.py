"""GLUE tasks from TSV files in GLUE's own layout."""

from __future__ import annotations

import warnings

import pytest

from bitfit_fast.data.glue import GLUE, load_glue
from bitfit_fast.errors import BitFitError, BitFitWarning

ALL = ("train", "validation", "test")
PARSES = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
MNLI = f"index promptID pairID genre {PARSES} sentence1 sentence2"
MNLI_DEV = f"{MNLI} label1 label2 label3 label4 label5 gold_label"
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
MRPC_ROW = "#1 ID,#2 ID,#1 String,#2 String"
PAIR = "index sentence1 sentence2"

#: The official header of each file; None where there is none. MRPC's columns hold spaces.
HEADERS = {
    "cola": {"train": None, "dev": None, "test": "index sentence"},
    "sst2": {"train": "sentence label", "dev": "sentence label", "test": "index sentence"},
    "mrpc": {"train": f"Quality,{MRPC_ROW}", "dev": f"Quality,{MRPC_ROW}",
             "test": f"index,{MRPC_ROW}"},
    "stsb": {"train": f"{STSB} score", "dev": f"{STSB} score", "test": STSB},
    "qqp": {"train": "id qid1 qid2 question1 question2 is_duplicate",
            "dev": "id qid1 qid2 question1 question2 is_duplicate",
            "test": "id question1 question2"},
    "mnli": {"train": f"{MNLI} label1 gold_label", "dev_matched": MNLI_DEV,
             "dev_mismatched": MNLI_DEV, "test_matched": MNLI, "test_mismatched": MNLI},
    "qnli": {"train": "index question sentence label", "dev": "index question sentence label",
             "test": "index question sentence"},
    "rte": {"train": f"{PAIR} label", "dev": f"{PAIR} label", "test": PAIR},
    "wnli": {"train": f"{PAIR} label", "dev": f"{PAIR} label", "test": PAIR},
}  # fmt: skip

#: What the files write for the labels, in the order of the classes' indices.
WRITTEN = {
    "cola": ["0", "1"],
    "sst2": ["0", "1"],
    "mrpc": ["0", "1"],
    "stsb": ["0", "3.800"],
    "qqp": ["0", "1"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["0", "1"],
}


def columns_of(name, part):
    header = HEADERS[name][part]
    if header is None:
        return ["source", "label", "mark", "sentence"]
    return header.split("," if "," in header else " ")


def row_of(name, part, number):
    """Return cells that name their column, so that a wrong column shows."""
    task = GLUE[name]
    cells = [f'"{column} {number}' for column in columns_of(name, part)]
    if task.label in columns_of(name, part):
        written = WRITTEN[name]
        cells[columns_of(name, part).index(task.label)] = written[number % len(written)]
    return cells


def write(path, *rows, mark=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(row) + "\n" for row in rows)
    path.write_text(mark + text, encoding="utf-8", newline="")
    return path


def write_task(root, name, rows=4):
    """Write the folder of a task as GLUE lays it out."""
    for part, header in HEADERS[name].items():
        head = [] if header is None else [columns_of(name, part)]
        body = [row_of(name, part, i) for i in range(rows)]
        mark = "\ufeff" if name == "mrpc" else ""
        write(root / GLUE[name].folder / f"{part}.tsv", *head, *body, mark=mark)
    return root


def load(name, root, kinds=ALL):
    """Load without the warnings that a handful of rows calls for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BitFitWarning)
        return load_glue(name, root, kinds)


def fails(root, name="rte", kinds=("train",)):
    with pytest.raises(BitFitError) as caught:
        load(name, root, kinds)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", GLUE)
def test_every_task_reads_its_official_layout(name, tmp_path):
    data = load(name, write_task(tmp_path, name))
    task = GLUE[name]
    assert (data.name, data.labels, data.metrics) == (name, task.labels, task.metrics)
    assert list(data.splits) == list(task.rows)
    for kind, split in data.splits.items():
        expected = [tuple(f'"{column} {i}' for column in task.text) for i in range(4)]
        assert split.name == kind
        assert list(split.texts) == expected
        if kind.startswith("test"):
            assert split.labels is None
        elif name == "stsb":
            assert split.labels == (0.0, 3.8, 0.0, 3.8)
        else:
            assert split.labels == tuple(i % len(task.labels) for i in range(4))


@pytest.mark.parametrize("name", GLUE)
def test_the_tables_of_labels_agree(name):
    task = GLUE[name]
    if task.labels is not None:
        assert list(task.written_labels) == WRITTEN[name]
        assert len(task.labels) == len(task.written_labels)


def test_mnli_has_two_evaluation_sets(tmp_path):
    root = write_task(tmp_path, "mnli")
    assert list(load("mnli", root, ("validation",)).splits) == [
        "validation_matched",
        "validation_mismatched",
    ]
    assert list(load("mnli", root, ("test",)).splits) == ["test_matched", "test_mismatched"]


@pytest.mark.parametrize("kinds", [("train",), ("validation",), ("test",), ("train", "test"), ALL])
def test_only_the_kinds_asked_for_are_read(kinds, tmp_path):
    write_task(tmp_path, "rte")
    for kind, part in (("train", "train"), ("validation", "dev"), ("test", "test")):
        if kind not in kinds:
            (tmp_path / "RTE" / f"{part}.tsv").unlink()
    assert tuple(load("rte", tmp_path, kinds).splits) == kinds


@pytest.mark.parametrize(
    "text",
    ['"begins with a quote', 'all "quoted" "', '""', "", " spaces ", "it's", "a\u2028b\x85c\x0bd"],
)
def test_fields_follow_no_quoting_rules(text, tmp_path):
    header = ["index", "sentence1", "sentence2", "label"]
    rows = [["0", text, "one", "entailment"], ["1", "two", text, "not_entailment"]]
    write(tmp_path / "RTE" / "train.tsv", header, *rows)
    train = load("rte", tmp_path, ("train",)).train
    assert train.texts == ((text, "one"), ("two", text))
    assert train.labels == (0, 1)


def test_line_ends_of_windows_and_blank_lines_are_no_part_of_a_row(tmp_path):
    path = tmp_path / "RTE" / "train.tsv"
    path.parent.mkdir()
    path.write_bytes(
        b"index\tsentence1\tsentence2\tlabel\r\n0\ta\tb\tentailment\r\n\r\n"
        b"1\tc\td\tnot_entailment\r\n\n"
    )
    train = load("rte", tmp_path, ("train",)).train
    assert (train.texts, train.labels) == ((("a", "b"), ("c", "d")), (0, 1))


def test_the_last_line_needs_no_end(tmp_path):
    path = tmp_path / "CoLA" / "dev.tsv"
    path.parent.mkdir()
    path.write_text("gj04\t1\t\tOne.\ngj04\t0\t*\tTwo a.", encoding="utf-8")
    validation = load("cola", tmp_path, ("validation",)).splits["validation"]
    assert (validation.texts, validation.labels) == ((("One.",), ("Two a.",)), (1, 0))


def test_a_test_file_with_labels_keeps_them(tmp_path):
    header = [*columns_of("mrpc", "test"), "Quality"]
    write(tmp_path / "MRPC" / "test.tsv", header, ["0", "1", "2", "a", "b", "1"])
    assert load("mrpc", tmp_path, ("test",)).splits["test"].labels == (1,)


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize("above", [True, False])
def test_the_data_folder_may_be_that_above_glue(name, above, tmp_path):
    write_task(tmp_path / "glue", name, rows=2)
    data = load(name, tmp_path if above else tmp_path / "glue", ("train",))
    assert len(data.train) == 2


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_another_number_of_rows_than_the_official_one_is_told(split, tmp_path):
    write_task(tmp_path, "rte", rows=3)
    official = GLUE["rte"].rows[split]
    with pytest.warns(BitFitWarning) as caught:
        load_glue("rte", tmp_path, (split,))
    (warning,) = caught
    part = split.replace("validation", "dev")
    assert str(warning.message) == (
        f"{tmp_path / 'RTE' / part}.tsv: 3 examples where the official RTE {split} set "
        f"has {official}"
    )


def test_the_official_number_of_rows_needs_no_word(tmp_path):
    write_task(tmp_path, "rte", rows=GLUE["rte"].rows["validation"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_glue("rte", tmp_path, ("validation",))


def test_broken_rows_of_qqp_are_skipped_and_counted(tmp_path):
    rows = [columns_of("qqp", "train"), *(row_of("qqp", "train", i) for i in range(4))]
    rows[2] = rows[2][:4]
    rows[3] = rows[3][:1]
    path = write(tmp_path / "QQP" / "train.tsv", *rows)
    with pytest.warns(BitFitWarning) as caught:
        train = load_glue("qqp", tmp_path, ("train",)).train
    assert train.texts == (('"question1 0', '"question2 0'), ('"question1 3', '"question2 3'))
    assert train.labels == (0, 1)
    assert str(caught[0].message) == f"{path}: skipped 2 rows with missing columns"
    assert "2 examples where the official QQP train set has 363846" in str(caught[1].message)


def test_a_missing_data_folder_is_named(tmp_path):
    assert fails(tmp_path / "nowhere") == f"the data folder {tmp_path / 'nowhere'} does not exist"


@pytest.mark.parametrize("parent", ["", "glue"])
def test_a_missing_task_folder_names_those_there(parent, tmp_path):
    for name in ("cola", "stsb"):
        write_task(tmp_path / parent, name)
    assert fails(tmp_path) == (f"{tmp_path} has no folder RTE; GLUE tasks in it: CoLA, STS-B")


def test_a_missing_task_folder_of_an_empty_data_folder(tmp_path):
    assert fails(tmp_path).endswith("has no folder RTE; GLUE tasks in it: none")


@pytest.mark.parametrize(
    ("name", "kind", "file"),
    [
        ("rte", "train", "RTE/train.tsv"),
        ("rte", "validation", "RTE/dev.tsv"),
        ("rte", "test", "RTE/test.tsv"),
        ("mnli", "validation", "MNLI/dev_mismatched.tsv"),
        ("mnli", "test", "MNLI/test_matched.tsv"),
    ],
)
def test_a_missing_file_is_named(name, kind, file, tmp_path):
    (write_task(tmp_path, name) / file).unlink()
    assert fails(tmp_path, name, (kind,)) == f"the file {tmp_path / file} is missing"


@pytest.mark.parametrize(
    ("name", "part", "kind", "kept", "of"),
    [
        ("rte", "train", "train", 2, 4),
        ("rte", "dev", "validation", 3, 4),
        ("rte", "test", "test", 2, 3),
        ("cola", "train", "train", 3, 4),
        ("mrpc", "train", "train", 4, 5),
        ("stsb", "dev", "validation", 9, 10),
        ("mnli", "dev_matched", "validation", 15, 16),
    ],
)
def test_a_file_cut_short_names_the_line(name, part, kind, kept, of, tmp_path):
    path = write_task(tmp_path, name) / GLUE[name].folder / f"{part}.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[-1] = "\t".join(lines[-1].split("\t")[:kept])
    path.write_text("\n".join(lines), encoding="utf-8")
    assert fails(tmp_path, name, (kind,)) == (
        f"{path}, line {len(lines)} has {kept} of {of} columns; is the file cut short?"
    )


@pytest.mark.parametrize(
    ("name", "label", "valid"),
    [
        ("rte", "entail", "entailment, not_entailment"),
        ("rte", "", "entailment, not_entailment"),
        ("rte", "0", "entailment, not_entailment"),
        ("rte", "Entailment", "entailment, not_entailment"),
        ("mnli", "-", "entailment, neutral, contradiction"),
        ("sst2", "2", "0, 1"),
        ("sst2", "positive", "0, 1"),
        ("cola", "-1", "0, 1"),
        ("wnli", "entailment", "0, 1"),
    ],
)
def test_a_label_outside_the_set_names_the_line_and_the_set(name, label, valid, tmp_path):
    row = row_of(name, "train", 1)
    row[columns_of(name, "train").index(GLUE[name].label)] = label
    headless = HEADERS[name]["train"] is None
    rows = [row_of(name, "train", 0), row]
    rows = rows if headless else [columns_of(name, "train"), *rows]
    path = write(tmp_path / GLUE[name].folder / "train.tsv", *rows)
    assert fails(tmp_path, name) == (
        f"{path}, line {len(rows)}: label '{label}' is not one of {valid}"
    )


@pytest.mark.parametrize("text", ["", "high", "nan", "inf", "-inf", "3,8"])
def test_a_score_that_is_no_number_names_the_line(text, tmp_path):
    row = row_of("stsb", "train", 0)
    row[-1] = text
    path = write(tmp_path / "STS-B" / "train.tsv", columns_of("stsb", "train"), row)
    assert fails(tmp_path, "stsb") == f"{path}, line 2: label '{text}' is not a number"


def test_a_header_without_examples_is_an_empty_split(tmp_path):
    path = write(tmp_path / "RTE" / "train.tsv", columns_of("rte", "train"))
    assert fails(tmp_path) == f"{path} has no examples for the split train"


@pytest.mark.parametrize(("name", "content"), [("rte", ""), ("rte", "\n"), ("cola", "")])
def test_an_empty_file_is_named(name, content, tmp_path):
    path = tmp_path / GLUE[name].folder / "train.tsv"
    path.parent.mkdir()
    path.write_text(content)
    assert str(path) in fails(tmp_path, name)


@pytest.mark.parametrize("column", ["sentence1", "sentence2", "label"])
def test_a_missing_column_names_those_there(column, tmp_path):
    header = [f"my {c}" if c == column else c for c in columns_of("rte", "train")]
    path = write(tmp_path / "RTE" / "train.tsv", header, row_of("rte", "train", 0))
    assert fails(tmp_path) == (
        f"{path}, line 1: there is no column '{column}'; its columns are {', '.join(header)}"
    )


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ("caf\u00e9".encode("latin-1"), 3),
        (b"\x80\x81\xfe\xff", 3),
        ("na\u00efve \u4e2d".encode("utf-8")[:-1], 3),
    ],
)
def test_text_that_is_not_utf8_names_the_line(broken, line, tmp_path):
    path = write(tmp_path / "RTE" / "train.tsv", columns_of("rte", "train"), ["0", "a", "b", "x"])
    good = path.read_bytes().replace(b"\tx\n", b"\tentailment\n")
    path.write_bytes(good + b"1\t" + broken + b"\tb\tentailment\n")
    assert fails(tmp_path).startswith(f"{path}, line {line} is not UTF-8 text (")


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(range(256)) * 4,
        b"\x00" * 1000,
        b"\x1f\x8b\x08" + bytes(range(255, 0, -1)),
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("name", ["rte", "cola", "qqp", "stsb"])
def test_bytes_that_are_no_table_are_refused(garbage, name, tmp_path):
    path = tmp_path / GLUE[name].folder / "train.tsv"
    path.parent.mkdir()
    path.write_bytes(garbage)
    assert str(path) in fails(tmp_path, name)


def test_text_in_utf16_is_refused_at_its_first_line(tmp_path):
    path = write(tmp_path / "RTE" / "train.tsv", columns_of("rte", "train"))
    path.write_bytes(path.read_text().encode("utf-16"))
    assert fails(tmp_path).startswith(f"{path}, line 1 is not UTF-8 text (")


@pytest.mark.parametrize("name", ["rte", "cola", "stsb"])
@pytest.mark.parametrize("below", [False, True])
def test_the_real_data_has_the_official_numbers_of_rows(name, below, data_dir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_glue(name, data_dir / "glue" if below else data_dir, ALL)
    official = {"rte": (2490, 277, 3000), "cola": (8551, 1043, 1063), "stsb": (5749, 1500, 1379)}
    assert tuple(map(len, data.splits.values())) == official[name]
    assert [split.labels is None for split in data.splits.values()] == [False, False, True]


def test_the_real_mrpc_lacks_one_row_and_says_so(data_dir):
    with pytest.warns(BitFitWarning) as caught:
        data = load_glue("mrpc", data_dir, ALL)
    assert tuple(map(len, data.splits.values())) == (3667, 408, 1725)
    (warning,) = caught
    assert str(warning.message).endswith(
        "MRPC/train.tsv: 3667 examples where the official MRPC train set has 3668"
    )


@pytest.mark.parametrize(
    ("name", "first", "label"),
    [
        ("rte", ("No Weapons of Mass Destruction Found in Iraq Yet.",
                 "Weapons of Mass Destruction Found in Iraq."), 1),
        ("cola", ("Our friends won't buy this analysis, let alone the next one we propose.",), 1),
        ("stsb", ("A plane is taking off.", "An air plane is taking off."), 5.0),
    ],
)  # fmt: skip
def test_the_real_data_begins_as_published(name, first, label, data_dir):
    train = load_glue(name, data_dir, ("train",)).train
    assert (train.texts[0], train.labels[0]) == (first, label)


def test_the_real_scores_and_classes_cover_their_range(data_dir):
    scores = load_glue("stsb", data_dir, ("train",)).train.labels
    assert (min(scores), max(scores)) == (0.0, 5.0)
    # the shares of acceptable sentences and of entailed hypotheses
    assert sum(load_glue("cola", data_dir, ("train",)).train.labels) == 6023
    assert load_glue("rte", data_dir, ("train",)).train.labels.count(0) == 1249
