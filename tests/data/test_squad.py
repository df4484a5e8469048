"""SQuAD's format and its kin: what is read, how one file is split, and every refusal."""

import json

import pytest

from bitfit_fast.data.hub import load_hub_split
from bitfit_fast.data.load import load_task
from bitfit_fast.data.squad import is_span_file, load_squad
from bitfit_fast.errors import BitFitError, BitFitWarning

CONTEXT = "The plot was fine but one actor was dull."


def article(title, questions=2, context=CONTEXT):
    qas = [
        {
            "id": f"{title}-{i}",
            "question": f"How many actors, {i}?",
            "answers": [{"text": "one actor", "answer_start": context.index("one actor")}],
        }
        for i in range(questions)
    ]
    return {"title": title, "paragraphs": [{"context": f"{context}", "qas": qas}]}


def squad(path, *articles, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.1", "data": list(articles)}, **options))
    return path


def row(**other):
    answers = [{"text": "one actor", "answer_start": CONTEXT.index("one actor")}]
    return {"id": "a", "context": CONTEXT, "question": "Who?", "answers": answers, **other}


def lines(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def fails(*arguments, **options):
    with pytest.raises(BitFitError) as caught:
        load_task(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("options", [{}, {"indent": 2}])
def test_a_folder_with_the_official_names(tmp_path, options):
    squad(tmp_path / "train-v1.1.json", article("A", 3), **options)
    squad(tmp_path / "dev-v1.1.json", article("B", 1), **options)
    data = load_task("SQuAD", data_dir=tmp_path)
    assert (data.name, data.kind, data.labels, data.metrics) == (
        "squad", "span", None, ("f1", "exact_match"),
    )  # fmt: skip
    assert not data.regression and data.source == {} and data.note == ""
    assert data.train.ids == ("A-0", "A-1", "A-2")
    assert data.splits["validation"].texts == (("How many actors, 0?", CONTEXT),)
    assert data.train.labels[0] == (("one actor", 22),)
    with pytest.warns(BitFitWarning, match="a file a split, so the validation share plays no part"):
        load_task("squad", data_dir=tmp_path, validation_share=0.5)


@pytest.mark.parametrize("where", ["file", "folder", "folder above"])
def test_one_file_is_split_by_article(tmp_path, where):
    path = squad(tmp_path / "squad" / "x.json", *(article(f"T{i}", i + 1) for i in range(10)))
    place = {"file": path, "folder": path.parent, "folder above": tmp_path}[where]
    data = load_task("squad", data_dir=place, validation_share=0.3, split_seed=4)
    titles = {n: {name.split("-")[0] for name in s.ids} for n, s in data.splits.items()}
    assert not titles["train"] & titles["validation"]
    assert len(titles["train"]) == 7 and len(titles["validation"]) == 3
    assert sum(map(len, data.splits.values())) == 55
    assert data.source == {"validation_share": 0.3, "split_seed": 4}
    assert "3 of its 10 articles" in data.note and "(share 0.3, split seed 4)" in data.note
    # each part alone is the same part
    for kind in ("train", "validation"):
        alone = load_squad(place, (kind,), 0.3, 4)
        assert alone.splits == {kind: data.splits[kind]}
    assert load_squad(place, seed=5).digest() != load_squad(place, seed=6).digest()
    assert load_squad(place).source["validation_share"] == 0.2


def test_json_lines_without_titles_are_split_by_their_text(tmp_path):
    rows = [row(id=str(i), context=f"{CONTEXT} {i // 3}") for i in range(12)]
    path = lines(tmp_path / "x.jsonl", *rows)
    data = load_task("squad", data_dir=path, validation_share=0.5)
    contexts = {n: {c for _, c in s.texts} for n, s in data.splits.items()}
    assert not contexts["train"] & contexts["validation"]
    assert [len(c) for c in contexts.values()] == [2, 2]


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_leaves_something_on_both_sides(tmp_path, share):
    path = squad(tmp_path / "x.json", article("A"), article("B"))
    expected = f"the validation share must be above 0 and below 1, not {share}"
    assert fails("squad", data_dir=path, validation_share=share) == expected
    data = load_task("squad", data_dir=path, validation_share=0.01)
    assert [len(s) for s in data.splits.values()] == [2, 2]


def test_one_article_cannot_be_split(tmp_path):
    path = squad(tmp_path / "x.json", article("A"))
    assert fails("squad", data_dir=path).endswith(
        "has one article, and a split by article needs two"
    )


def test_shares_are_of_squad_alone(tmp_path):
    assert fails("reviews", validation_share=0.5).endswith("not of the task 'reviews'")
    path = squad(tmp_path / "x.json", article("A"))
    assert fails(train_file=path, validation_share=0.5).endswith("not of span files")


def test_files_in_both_formats_are_known_by_how_they_begin(tmp_path):
    whole = squad(tmp_path / "x.json", article("A"), indent=1)
    listed = lines(tmp_path / "x.jsonl", row(), row(id=None))
    hub = lines(tmp_path / "y.json", row(answers={"text": ["one"], "answer_start": [22]}))
    assert all(map(is_span_file, (whole, listed, hub)))
    data = load_task(train_file=whole, validation_file=listed, test_file=hub,
                     kinds=("train", "validation", "test"))  # fmt: skip
    assert data.kind == "span"
    assert data.splits["validation"].ids == ("a", "None")
    assert data.splits["test"].labels == ((("one", 22),),)


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl", "none.json"])
def test_other_files_are_no_spans(tmp_path, name):
    if name.startswith("x"):
        (tmp_path / name).write_text('{"data": 3, "text": "x", "label": "a"}\n')
    assert not is_span_file(tmp_path / name)


def test_a_test_file_may_have_no_answers(tmp_path):
    plain = {k: v for k, v in row().items() if k != "answers"}
    path = lines(tmp_path / "x.jsonl", plain)
    data = load_task(test_file=path, kinds=("test",), task_kind="span")
    assert data.splits["test"].labels is None
    expected = "validation: the question a has no 'answers'"
    assert fails(validation_file=path, task_kind="span") == expected
    both = lines(tmp_path / "y.jsonl", row(), {**plain, "id": "b"})
    expected = "test: the question b has no 'answers'"
    assert fails(test_file=both, kinds=("test",), task_kind="span") == expected


def wrong(**answer):
    return row(answers=[{"text": "one actor", "answer_start": 22, **answer}])


@pytest.mark.parametrize(
    "bad, said",
    [
        (wrong(answer_start=23), "the answer 'one actor' is not at offset 23 of its context, "
         "where 'ne actor ' is"),
        (wrong(answer_start=-5), "the answer 'one actor' is not at offset -5"),
        (wrong(answer_start="22"), "the offset '22' is no whole number"),
        (wrong(text=""), "'text' holds no text"),
        (row(answers=[]), "has no answer; questions that cannot be answered (SQuAD v2)"),
        (row(answers=None), "'answers' holds null"),
        (row(answers={"text": ["one"], "answer_start": []}), "has 1 answers and 0 offsets"),
        (row(answers={"text": "one", "answer_start": 22}), "are no lists"),
        (row(answers="one"), "'answers' is no list"),
        (row(context=" "), "'context' holds no text"),
        (row(question=3), "'question' holds no text"),
        ({"context": CONTEXT, "answers": []}, "there is no 'question'; there are context, answers"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path, bad, said):
    path = lines(tmp_path / "x.jsonl", row(), bad)
    message = fails(train_file=path, task_kind="span")
    assert message.startswith(f"{path}, line 2") and said in message


def test_broken_files_are_named(tmp_path):
    good = article("A")
    path = squad(tmp_path / "x.json", good)
    path.write_text(path.read_text()[:-20])
    assert fails(train_file=path).startswith(f"{path}, line 1 is not JSON")
    squad(path, {"title": "A"})
    assert "article 1: there is no 'paragraphs'; there are title" in fails(train_file=path)
    squad(path)
    assert fails(train_file=path) == f"the file {path} has no questions"
    squad(path, good, good)
    assert fails(train_file=path) == f"{path} has two questions with the id 'A-0'"
    good["paragraphs"][0]["qas"][1]["answers"][0]["answer_start"] = 3
    squad(path, good)
    assert fails(train_file=path).startswith(f"{path}, question A-1: the answer 'one actor' is not")
    squad(path, [])
    assert fails(train_file=path) == f"{path}, article 1: '[]' is no JSON object"
    path.write_text('{"data": 3}')
    assert fails(train_file=path, task_kind="span") == (
        f"{path}, line 1: there is no 'context'; there are data"
    )


def test_folders_without_the_files_are_refused(tmp_path):
    assert fails("squad", data_dir=tmp_path / "no").endswith("no does not exist")
    assert "has no train-v1.1.json, and no other" in fails("squad", data_dir=tmp_path)
    squad(tmp_path / "a.json", article("A")), squad(tmp_path / "b.json", article("A"))
    assert fails("squad", data_dir=tmp_path).endswith("but a.json, b.json; name one of them")
    assert "no public test set" in fails("squad", data_dir=tmp_path, kinds=("test",))
    squad(tmp_path / "train-v1.1.json", article("A"))
    assert fails("squad", data_dir=tmp_path).endswith("dev-v1.1.json is missing")
    assert load_squad(tmp_path, ("train",)).splits.keys() == {"train"}


def test_kinds_of_files_must_agree_and_be_known(tmp_path):
    path = squad(tmp_path / "x.json", article("A"))
    other = lines(tmp_path / "x.jsonl", {"text": "a", "label": "b"})
    assert fails(train_file=path, validation_file=other).endswith(
        f"{path} (span), {other} (sequence); say which with --task-kind"
    )
    assert fails(train_file=path, task_kind="spam") == (
        "unknown task kind 'spam'; valid ones are sequence, span, token"
    )
    assert fails("squad", task_kind="span") == "a task kind is of files, not of the task 'squad'"
    assert "not of span files" in fails(train_file=path, text_columns=["a"], task_kind="span")


def test_a_dataset_of_the_hubs_layout(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "hub"
    (folder / "plain_text").mkdir(parents=True)
    text = ["---", "configs:", "- config_name: plain_text", "  data_files:"]
    for split in ("train", "validation"):
        rows = [
            row(id=f"{split}{i}", answers={"text": ["one"], "answer_start": [22]}) for i in "ab"
        ]
        path = folder / "plain_text" / f"{split}.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
        text += [f"  - split: {split}", f"    path: plain_text/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*text, "---", ""]))
    data = load_squad(repository=str(folder))
    assert load_hub_split(str(folder), "plain_text", "train").num_rows == 2
    assert data.splits["validation"].ids == ("validationa", "validationb")
    assert data.train.labels == ((("one", 22),),) * 2
    for given in ({"share": 0.5}, {"seed": 3}):
        with pytest.raises(BitFitError, match="a validation share, and its seed, are of a single"):
            load_squad(repository=str(folder), **given)


def test_the_real_file(data_dir):
    data = load_task("squad", data_dir=data_dir)
    train, validation = data.splits.values()
    assert len(train) + len(validation) == 1190
    assert not {c for _, c in train.texts} & {c for _, c in validation.texts}
    assert "10 of its 48 articles" in data.note
