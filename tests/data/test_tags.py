"""Tagged words: CoNLL-U, two columns, the hub's; unknown tags, and every refusal."""

import pytest

from bitfit_fast.data.load import load_task
from bitfit_fast.data.tags import load_pos
from bitfit_fast.errors import BitFitError, BitFitWarning

SENTENCES = (
    (("the", "DET"), ("plot", "NOUN"), ("was", "AUX"), ("good", "ADJ")),
    (("it", "PRON"), ("is", "AUX"), ("1 000", "NUM")),
)
TAGS = ("ADJ", "AUX", "DET", "NOUN", "NUM", "PRON")


def conllu_line(number, word, tag, more="_"):
    return f"{number}\t{word}\t{word}\t{tag}\tX\t_\t0\troot\t_\t{more}\n"


def conllu(path, sentences=SENTENCES):
    text = ""
    for i, sentence in enumerate(sentences):
        text += f"# sent_id = s{i}\n# text = # not read\n"
        for n, (word, tag) in enumerate(sentence, 1):
            text += conllu_line(n, word, tag)
        text += "\n"
    path.write_text(text)
    return path


def columns(path, sentences=SENTENCES):
    path.write_text("\n".join("".join(f"{w}\t{t}\n" for w, t in s) for s in sentences))
    return path


def fails(*arguments, **options):
    with pytest.raises(BitFitError) as caught:
        load_task(*arguments, **options)
    return str(caught.value)


def words(sentences=SENTENCES):
    return tuple(tuple(word for word, _ in sentence) for sentence in sentences)


@pytest.mark.parametrize("above", [False, True])
def test_a_treebanks_folder(tmp_path, above):
    folder = tmp_path / "pos" if above else tmp_path
    folder.mkdir(exist_ok=True)
    for name in ("train", "dev", "test"):
        conllu(folder / f"xx_some-ud-{name}.conllu")
    data = load_task("POS", data_dir=tmp_path, kinds=("train", "validation", "test"))
    assert (data.name, data.kind, data.metrics, data.ending) == (
        "pos", "token", ("accuracy",), ".conllu",
    )  # fmt: skip
    assert data.labels == TAGS
    for split in data.splits.values():
        assert split.texts == words() and split.ids == ("s0", "s1")
        assert [[TAGS[t] for t in tags] for tags in split.labels] == [
            [tag for _, tag in sentence] for sentence in SENTENCES
        ]
    assert data.train.take([1]).texts == (words()[1],)


def test_ranges_of_words_empty_words_and_comments_are_left_out(tmp_path):
    text = (
        "# newdoc\n# sent_id = here\n"
        + conllu_line("1-2", "don't", "_")
        + conllu_line(1, "do", "AUX")
        + "# in between\n"
        + conllu_line(2, "n't", "PART")
        + conllu_line("2.1", "elided", "VERB")
        + conllu_line(3, "#", "SYM")
        + "\n\n\n"
        + conllu_line(1, "stop", "VERB").rstrip("\n")  # the last line may lack its end
    )
    path = tmp_path / "x.conllu"
    path.write_text(text)
    data = load_task(train_file=path)
    assert data.train.texts == (("do", "n't", "#"), ("stop",))
    assert data.labels == ("AUX", "PART", "SYM", "VERB")
    assert data.train.ids == ("here", "2")


@pytest.mark.parametrize("name, kind", [("x.conll", None), ("x.tsv", "token"), ("x.txt", "token")])
def test_two_columns(tmp_path, name, kind):
    data = load_task(train_file=columns(tmp_path / name), task_kind=kind)
    assert (data.kind, data.ending, data.name) == ("token", ".tsv", "files")
    assert data.train.texts == words() and data.labels == TAGS


def test_without_its_tags_a_file_may_have_words_alone(tmp_path):
    path = tmp_path / "x.conll"
    path.write_text("the\nplot\n\nit\tPRON\n")
    options = {"test_file": path, "kinds": ("test",), "labels": TAGS}
    data = load_task(**options, labelled=False)
    assert data.splits["test"].texts == (("the", "plot"), ("it",))
    assert data.splits["test"].labels is None
    assert fails(**options).startswith(f"{path}, line 1 has 1 columns, and a word and its tag")
    bare = conllu(tmp_path / "x.conllu", [[("the", "_"), ("plot", "_")]])
    options["test_file"] = bare
    assert load_task(**options).splits["test"].labels is None
    del options["labels"]
    assert fails(**options) == "files: the test set has only the tag (none), and two are needed"


def test_tags_that_training_lacks_count_as_errors(tmp_path):
    train = conllu(tmp_path / "train.conllu")
    validation = conllu(tmp_path / "dev.conllu", [[("wow", "INTJ"), ("it", "PRON")]])
    with pytest.warns(BitFitWarning, match=r"1 of 2 words of the validation set have tags that "):
        data = load_task(train_file=train, validation_file=validation)
    assert data.labels == TAGS
    assert data.splits["validation"].labels == ((-1, TAGS.index("PRON")),)
    # what was trained says which tags there are
    data = load_task(validation_file=train, kinds=("validation",), labels=[*TAGS, "INTJ"])
    assert data.labels == (*TAGS, "INTJ")


@pytest.mark.parametrize(
    "name, line, said",
    [
        ("x.conllu", "1\tthe\tDET", "line 8 has 3 columns, and CoNLL-U has 10, parted by tabs"),
        ("x.conllu", conllu_line("one", "the", "DET"), "line 8: 'one' is no number of a word"),
        ("x.conllu", conllu_line(1, " ", "DET"), "line 8: the word is empty"),
        ("x.conllu", conllu_line(1, "the", "_"), "line 8: the word has no tag"),
        ("x.conll", "the\tDET\tX", "line 6 has 3 columns, and a word and its tag"),
        ("x.conll", "the DET", "line 6 has 1 columns, and a word and its tag"),
        ("x.conll", "the\t", "line 6: the tag is empty"),
        ("x.conll", "\tDET", "line 6: the word is empty"),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, line, said):
    path = tmp_path / name
    (conllu if name == "x.conllu" else columns)(path, SENTENCES[:1])
    path.write_text(
        path.read_text() + ("\n" if name == "x.conll" else "") + line.strip("\n") + "\n"
    )
    assert fails(train_file=path).startswith(f"{path}, {said}")


def test_files_that_are_missing_empty_or_of_another_form_are_refused(tmp_path):
    path = tmp_path / "x.conllu"
    assert fails(train_file=path) == f"the train file {path} is missing"
    path.write_text("# only this\n\n")
    assert fails(train_file=path) == f"the train file {path} has no words"
    conllu(path, [[("the", "DET")]])
    assert "has only the tag DET, and two are needed" in fails(train_file=path)
    table = tmp_path / "x.csv"
    table.write_text("text,label\n")
    assert "known endings of tagged files are .conllu, .conll" in fails(
        train_file=table, task_kind="token"
    )
    assert fails("pos", data_dir=tmp_path / "no").endswith("no does not exist")
    assert fails("pos", data_dir=tmp_path) == f"{tmp_path} has no file *train.conllu"
    conllu(tmp_path / "a-train.conllu"), conllu(tmp_path / "b-train.conllu")
    assert fails("pos", data_dir=tmp_path).endswith("keep one treebank")


def test_a_dataset_of_the_hubs_layout(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    classes = [*TAGS, "_"]
    tags = [[classes.index(tag) for _, tag in sentence] for sentence in SENTENCES]
    rows = {
        "tokens": [[*words()[0], "don't"], list(words()[1])],
        "upos": [[*tags[0], len(TAGS)], tags[1]],
    }
    kinds = {"tokens": datasets.Value("string"), "upos": datasets.ClassLabel(names=classes)}
    features = datasets.Features({k: datasets.List(v) for k, v in kinds.items()})
    folder = tmp_path / "hub"
    folder.mkdir()
    made = datasets.Dataset.from_dict(rows, features=features)
    text = "---\nconfigs:\n"
    for name, data in (("xx", made), ("yy", made.remove_columns("upos"))):
        data.to_parquet(folder / f"{name}.parquet")
        text += (
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.parquet\n"
        )
    (folder / "README.md").write_text(f"{text}---\n")
    data = load_pos(None, ("train",), repository=str(folder), config="xx")
    assert data.train.texts == words() and data.labels == TAGS and data.ending == ".conllu"
    with pytest.raises(BitFitError, match="has no columns 'tokens' and one of upos, pos_tags"):
        load_pos(None, ("train",), repository=str(folder), config="yy")


def test_the_real_treebank(data_dir):
    data = load_task("pos", data_dir=data_dir, kinds=("train", "validation", "test"))
    assert [len(split) for split in data.splits.values()] == [3457, 1118, 1121]
    assert len(data.labels) == 17
    assert data.splits["validation"].texts[0][:4] == ("When", "a", "user", "connects")
    first = [data.labels[tag] for tag in data.splits["validation"].labels[0]]
    assert first[:4] == ["SCONJ", "DET", "NOUN", "VERB"]
