"""Tasks from the user's own files."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitfit_fast.data.files import load_files
from bitfit_fast.errors import BitFitError

ENDINGS = ("csv", "tsv", "jsonl", "json", "parquet")
ROWS = [
    {"text": "good film", "label": "pos"},
    {"text": 'a "dull" plot, twice', "label": "neg"},
    {"text": "na\u00efve \u4e2d", "label": "pos"},
]


def save(path, rows):
    """Write rows in the format of the path's ending."""
    names = list(rows[0])
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".tsv":
        lines = ["\t".join(map(str, line)) for line in (names, *(r.values() for r in rows))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def labelled(*labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def load(text_columns=("text",), label_column="label", options=None, **files):
    return load_files(files, text_columns, label_column, **(options or {}))


def fails(*args, **files):
    with pytest.raises(BitFitError) as caught:
        load(*args, **files)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_task(ending, tmp_path):
    data = load(train=save(tmp_path / f"train.{ending}", ROWS))
    assert data.labels == ("neg", "pos")
    assert data.metrics == ("accuracy", "mcc")
    assert data.columns == (("text",), "label")
    assert data.train.texts == tuple((row["text"],) for row in ROWS)
    assert data.train.labels == (1, 0, 1)


@pytest.mark.parametrize("ending", [*ENDINGS, "CSV", "JsonL"])
def test_two_text_columns_make_pairs_in_the_order_asked_for(ending, tmp_path):
    rows = [{"b": f"second {i}", "gold": i % 2, "a": f"first {i}", "extra": 0} for i in range(3)]
    path = save(tmp_path / f"rows.{ending.lower()}", rows).rename(tmp_path / f"train.{ending}")
    data = load(("a", "b"), "gold", train=path)
    assert data.train.texts == tuple((f"first {i}", f"second {i}") for i in range(3))
    assert (data.labels, data.train.labels) == (("0", "1"), (0, 1, 0))
    assert data.columns == (("a", "b"), "gold")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    for ending in ("csv", "tsv", "jsonl"):
        path = save(tmp_path / f"train.{ending}", ROWS)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert load(train=path).train.texts[0] == ("good film",)


def test_quoted_csv_fields_may_hold_commas_quotes_and_line_ends(tmp_path):
    texts = ["two\nlines", 'a "quote"', "a, comma", "\r\n", "", "a lone \r return", "\u2028\x85"]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    train = load(train=save(tmp_path / "train.csv", rows)).train
    assert train.texts == tuple((text,) for text in texts)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_column_named_twice_is_refused(ending, tmp_path):
    between = {"csv": ",", "tsv": "\t"}[ending]
    path = tmp_path / f"train.{ending}"
    path.write_text(between.join(("text", "label", "text")) + "\n" + between.join("a1b") + "\n")
    with pytest.raises(BitFitError, match=r"line 1 names the column 'text' twice"):
        load(train=path)


def test_quotes_in_tsv_are_plain_text(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('text\tlabel\n"a\tx\nb"\ty\n""\tx\n', encoding="utf-8")
    assert load(train=path).train.texts == (('"a',), ('b"',), ('""',))


def test_line_ends_of_windows_are_no_part_of_the_label(tmp_path):
    for ending, tab in (("csv", ","), ("tsv", "\t")):
        path = tmp_path / f"train.{ending}"
        path.write_bytes(f"text{tab}label\r\na{tab}x\r\n\r\nb{tab}y\r\n".encode())
        assert load(train=path).labels == ("x", "y")


def test_csv_fields_may_be_longer_than_the_modules_limit(tmp_path):
    limit = csv.field_size_limit()
    rows = [{"text": "x" * (limit + 1), "label": i} for i in range(2)]
    train = load(train=save(tmp_path / "train.csv", rows)).train
    assert [len(text) for (text,) in train.texts] == [limit + 1, limit + 1]
    assert csv.field_size_limit() == limit


def test_blank_lines_are_no_examples(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('\n{"text": "a", "label": 0}\n\n  \n{"text": "b", "label": 1}\n\n')
    assert len(load(train=path).train) == 2


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["b", "a", "c"], ("a", "b", "c")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["1", "-1", "0"], ("-1", "0", "1")),
        (["x", "10", "9", "2"], ("2", "9", "10", "x")),
        (["nan", "b", "1", "inf", "0"], ("0", "1", "b", "inf", "nan")),
        (["B", "a"], ("B", "a")),
        (["1", "01"], ("01", "1")),
    ],
)
@pytest.mark.parametrize("turn", [1, -1])
def test_labels_are_sorted_and_numbers_by_value(found, expected, turn, tmp_path):
    data = load(train=save(tmp_path / "train.csv", labelled(*found[::turn])))
    assert data.labels == expected
    assert [data.labels[i] for i in data.train.labels] == found[::turn]


@pytest.mark.parametrize(
    ("labels", "texts"), [([0, 1], ("0", "1")), ([True, False], ("False", "True"))]
)
def test_labels_of_json_and_parquet_need_not_be_text(labels, texts, tmp_path):
    for ending in ("jsonl", "parquet"):
        data = load(train=save(tmp_path / f"train.{ending}", labelled(*labels)))
        assert data.labels == texts


def test_numbers_are_taken_for_text(tmp_path):
    path = save(tmp_path / "train.jsonl", [{"text": 7, "label": 0}, {"text": 2.5, "label": 1}])
    assert load(train=path).train.texts == (("7",), ("2.5",))


@pytest.mark.parametrize(
    ("labels", "regression"),
    [
        (["0.5", "1"], True),
        (["3", "4.25", "-1e-3"], True),
        (["0", "1", "2"], False),
        (["0.0", "1.0"], False),
        (["0.5", "high"], False),
        (["inf", "high"], False),
    ],
)
def test_scores_are_told_from_classes_by_numbers_that_are_not_whole(labels, regression, tmp_path):
    data = load(train=save(tmp_path / "train.csv", labelled(*labels)))
    assert data.regression is regression
    if regression:
        assert data.labels is None
        assert data.metrics == ("pearson", "spearman")
        assert data.train.labels == tuple(map(float, labels))
        assert all(isinstance(label, float) for label in data.train.labels)


def test_the_training_file_decides_on_regression_whatever_the_order_of_files(tmp_path):
    train = save(tmp_path / "train.csv", labelled("0", "1"))
    validation = save(tmp_path / "validation.csv", labelled("0.5", "1"))
    message = fails(validation=validation, train=train)
    assert message == f"{validation}, line 2: label '0.5' is not one of 0, 1"


@pytest.mark.parametrize(
    ("options", "labels", "found"),
    [
        ({"regression": True}, None, (1.0, 0.0)),
        ({"regression": False}, ("0", "1"), (1, 0)),
        ({"labels": ["1", "0"]}, ("1", "0"), (0, 1)),
        ({"labels": ["0", "1", "2"]}, ("0", "1", "2"), (1, 0)),
    ],
)
def test_what_the_caller_says_of_the_labels_holds(options, labels, found, tmp_path):
    path = save(tmp_path / "train.csv", labelled("1", "0"))
    data = load(options=options, train=path)
    assert (data.labels, data.train.labels) == (labels, found)


def test_given_labels_need_no_training_file(tmp_path):
    path = save(tmp_path / "test.csv", labelled("b", "b"))
    data = load(options={"labels": ["a", "b"]}, test=path)
    assert data.splits["test"].labels == (1, 1)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_label_that_the_training_set_lacks_is_named_with_its_place(ending, tmp_path):
    train = save(tmp_path / f"train.{ending}", labelled("a", "b"))
    validation = save(tmp_path / f"validation.{ending}", labelled("a", "c"))
    place = {"csv": "line 3", "tsv": "line 3", "parquet": "row 2"}.get(ending, "line 2")
    assert fails(train=train, validation=validation) == (
        f"{validation}, {place}: label 'c' is not one of a, b"
    )


@pytest.mark.parametrize("text", ["high", "nan", "inf"])
def test_a_score_that_is_no_number_is_named_with_its_place(text, tmp_path):
    train = save(tmp_path / "train.csv", labelled("0.5", "1.5"))
    validation = save(tmp_path / "validation.csv", labelled("1", text))
    assert fails(train=train, validation=validation) == (
        f"{validation}, line 3: label '{text}' is not a number"
    )


def test_places_count_the_lines_within_quoted_fields(tmp_path):
    rows = [{"text": "a\nb\nc", "label": 0}, {"text": "d", "label": 1}, {"text": "e", "label": 2}]
    path = save(tmp_path / "test.csv", rows)
    with pytest.raises(BitFitError) as caught:
        load(options={"labels": ["0", "1"]}, test=path)
    # the header, three lines of the first row, one of the second
    assert str(caught.value) == f"{path}, line 6: label '2' is not one of 0, 1"


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("column", ["text", "label"])
def test_a_missing_column_names_those_there(ending, column, tmp_path):
    rows = [{"words" if k == column else k: v for k, v in row.items()} for row in ROWS]
    message = fails(train=save(tmp_path / f"train.{ending}", rows))
    assert f"'{column}'" in message
    assert message.endswith(f"; its columns are {', '.join(rows[0])}")


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "null"), (["a"], "a list"), ({"a": 1}, "a dict")]
)
@pytest.mark.parametrize(("ending", "place"), [("jsonl", "line 1"), ("parquet", "row 1")])
def test_a_cell_that_holds_no_text_is_named(value, kind, ending, place, tmp_path):
    path = save(tmp_path / f"train.{ending}", [{"text": value, "label": 0}])
    assert fails(train=path) == f"{path}, {place}: column 'text' holds {kind}, and no text"


def test_bytes_are_no_text(tmp_path):
    path = save(tmp_path / "train.parquet", [{"text": b"abc", "label": 0}])
    assert fails(train=path) == f"{path}, row 1: column 'text' holds a bytes, and no text"


@pytest.mark.parametrize(
    ("ending", "empty"), [("csv", ""), ("tsv", ""), ("jsonl", None), ("parquet", None)]
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_example_without_a_label_is_named(ending, empty, split, tmp_path):
    files = {"train": save(tmp_path / f"train.{ending}", labelled("a", "b"))}
    files[split] = save(tmp_path / f"{split}.{ending}", labelled("a", empty, "b"))
    assert "no label in column 'label'" in fails(**files)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_test_file_may_lack_labels(ending, tmp_path):
    train = save(tmp_path / f"train.{ending}", ROWS)
    test = save(tmp_path / f"test.{ending}", [{"text": "one"}, {"text": "two"}])
    data = load(train=train, test=test)
    assert data.splits["test"].labels is None
    assert data.splits["test"].texts == (("one",), ("two",))


@pytest.mark.parametrize(
    ("ending", "empty"), [("csv", ""), ("tsv", ""), ("jsonl", None), ("parquet", None)]
)
def test_a_test_file_has_labels_throughout_or_nowhere(ending, empty, tmp_path):
    train = save(tmp_path / f"train.{ending}", labelled("a", "b"))
    for labels, has in [((empty, empty), False), (("b", "a"), True)]:
        rows = labelled(*labels)
        if ending == "parquet" and not has:
            rows = [{"text": r["text"]} for r in rows]
        test = save(tmp_path / f"test.{ending}", rows)
        split = load(train=train, test=test).splits["test"]
        assert split.labels == ((1, 0) if has else None)
    for labels in [("a", empty), (empty, "a")]:
        test = save(tmp_path / f"test.{ending}", labelled(*labels))
        assert str(test) in fails(train=train, test=test)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_training_file_of_one_label_is_refused(ending, tmp_path):
    path = save(tmp_path / f"train.{ending}", labelled("a", "a"))
    assert fails(train=path) == (f"{path}: column 'label' has only the label a, and two are needed")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_missing_file_is_named(split, tmp_path):
    files = {"train": save(tmp_path / "train.csv", ROWS)}
    files[split] = tmp_path / "nowhere.csv"
    assert fails(**files) == f"the {split} file {tmp_path / 'nowhere.csv'} is missing"
    files[split] = tmp_path
    assert fails(**files) == f"the {split} file {tmp_path} is a folder"


@pytest.mark.parametrize("name", ["train.txt", "train.xlsx", "train", "train.csv.gz"])
def test_an_unknown_ending_names_the_known_ones(name, tmp_path):
    path = tmp_path / name
    path.write_text("text,label\na,0\n")
    assert fails(train=path) == (
        f"{path} has the ending '{path.suffix}'; known endings are "
        ".csv, .tsv, .jsonl, .json, .parquet"
    )


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("content", ["", "\n", "\n\n", "\ufeff"])
def test_an_empty_file_has_no_examples(ending, content, tmp_path):
    path = tmp_path / f"train.{ending}"
    path.write_text(content, encoding="utf-8")
    assert str(path) in fails(train=path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_column_without_any_text_is_refused(ending, tmp_path):
    rows = [{"a": f"text {i}", "b": " " * (i % 2), "label": i % 2} for i in range(4)]
    path = save(tmp_path / f"train.{ending}", rows)
    assert fails(("a", "b"), train=path) == f"the train file {path} has no text in column 'b'"
    rows[2]["b"] = "some"
    load(("a", "b"), train=save(path, rows))
    # one may still ask what a model says of none
    other = save(tmp_path / f"test.{ending}", rows[:2])
    assert load(("a", "b"), train=path, test=other).splits["test"].texts[1] == ("text 1", " ")


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_a_header_alone_has_no_examples(ending, tmp_path):
    path = save(tmp_path / f"train.{ending}", ROWS)
    if ending == "parquet":
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    else:
        path.write_text(path.read_text(encoding="utf-8").split("\n")[0] + "\n")
    assert fails(train=path) == f"the train file {path} has no examples"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("text,label\na,0\nb", 3),
        ("text,label\na,0\nb,1,2\n", 3),
        ('text,label\na,0\n"b\nc\nd', 3),
        ('text,label\n"a\nb",0\n"c" d,1\n', 4),
        ('text,label\na,0\nb,"1', 3),
    ],
)
def test_a_broken_csv_file_names_the_line_where_the_row_begins(text, line, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(text)
    message = fails(train=path)
    assert message.startswith(f"{path}, line {line}")
    assert message.endswith("is the file cut short?")


@pytest.mark.parametrize("row", ["b", "b\t1\t2"])
def test_a_broken_tsv_row_names_its_line(row, tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text(f"text\tlabel\na\t0\n{row}\n")
    assert fails(train=path) == (
        f"{path}, line 3 has {row.count(chr(9)) + 1} columns where the header has 2; "
        "is the file cut short?"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "b", "la', "is not JSON (Unterminated string starting at)"),
        ('{"text": "b"', "is not JSON (Expecting ',' delimiter)"),
        ("text,label", "is not JSON (Expecting value)"),
        ("[" * 100_000, "is not JSON ("),
        ('["b", 1]', "is not a JSON object"),
        ("3", "is not a JSON object"),
    ],
)
def test_a_broken_json_line_is_named(line, reason, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a", "label": 0}\n' + line)
    assert fails(train=path).startswith(f"{path}, line 2 {reason}")


@pytest.mark.parametrize("kept", [0, 1, 4, 30, 0.5, 0.9, 0.99])
def test_a_parquet_file_cut_short_is_refused(kept, tmp_path):
    path = save(tmp_path / "train.parquet", labelled(*"ab" * 100))
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    assert fails(train=path).startswith(f"{path} is not a whole Parquet file (")


def test_a_parquet_file_with_broken_pages_is_refused(tmp_path):
    path = save(tmp_path / "train.parquet", labelled(*"ab" * 100))
    whole = bytearray(path.read_bytes())
    whole[4:200] = bytes(196)
    path.write_bytes(whole)
    assert fails(train=path).startswith(f"{path} is not a whole Parquet file (")


@pytest.mark.parametrize("ending", ENDINGS)
def test_bytes_of_another_kind_are_refused(ending, tmp_path):
    path = tmp_path / f"train.{ending}"
    for garbage in (bytes(range(256)) * 8, bytes(1000), b"PK\x03\x04" + bytes(range(255, 0, -1))):
        path.write_bytes(garbage)
        assert str(path) in fails(train=path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_text_that_is_not_utf8_names_its_line(ending, tmp_path):
    path = save(tmp_path / f"train.{ending}", [*ROWS[:2], {"text": "XX", "label": "pos"}])
    path.write_bytes(path.read_bytes().replace(b"XX", b"caf\xe9"))
    line = 3 if ending == "jsonl" else 4
    assert fails(train=path).startswith(f"{path}, line {line} is not UTF-8 text (")


@pytest.mark.parametrize("columns", [(), ("a", "b", "c")])
def test_one_or_two_text_columns_are_needed(columns, tmp_path):
    message = fails(columns, train=save(tmp_path / "train.csv", ROWS))
    assert message.startswith(f"one or two text columns are needed, got {len(columns)}")


def test_one_text_column_may_be_given_as_a_string(tmp_path):
    data = load("text", train=save(tmp_path / "train.csv", ROWS))
    assert data.columns == (("text",), "label")


def test_the_names_of_folders_add_no_columns(tmp_path):
    folder = tmp_path / "label=5"
    folder.mkdir()
    assert load(train=save(folder / "train.parquet", ROWS)).labels == ("neg", "pos")
