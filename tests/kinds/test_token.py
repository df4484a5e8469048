"""Which token stands for a word, and what becomes of words without one."""

import pytest
import torch

from bitfit_fast import Split, TaskData
from bitfit_fast.data.tags import load_tag_files
from bitfit_fast.errors import BitFitError, BitFitWarning
from bitfit_fast.kinds import KINDS

TOKEN = KINDS["token"]
SENTENCES = (
    ("The", "acting", "was", "n't", "unbelievable", ",", "1 990", "Zürich's", "…"),
    ("re-acted", "東京", "🎬", "naïve"),
    ("fine",),
)
LABELS = tuple(tuple(i % 3 for i in range(len(words))) for words in SENTENCES)
SPLIT = Split("train", SENTENCES, LABELS, ("a", "b", "c"))


def encode(tokenizer, split=SPLIT, max_length=64):
    return TOKEN.encode(split, tokenizer, {"max_length": max_length})


def pieces_of(tokenizer, ids):
    """Return the tokens but those of a space alone, which stand for no word."""
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token not in ("Ġ", "▁")]


def test_the_first_piece_of_each_word_carries_its_tag(tokenizer):
    encoded = encode(tokenizer)
    for words, labels, feature, places in zip(SENTENCES, LABELS, encoded.features, encoded.places):
        assert places == sorted(places) and len(set(places)) == len(words)
        expected = [-100] * len(feature["input_ids"])
        for place, label in zip(places, labels):
            expected[place] = label
        assert feature["labels"].tolist() == expected
        # tokens from one first piece to the next are the word's own
        ends = [*places[1:], len(expected) - 1]
        for word, start, end in zip(words, places, ends):
            pieces = pieces_of(tokenizer, feature["input_ids"][start:end])
            alone = tokenizer(f"x {word}", add_special_tokens=False)["input_ids"]
            if tokenizer.unk_token not in pieces and word != words[0]:
                assert pieces_of(tokenizer, alone)[-len(pieces) :] == pieces


def test_words_are_tokenized_as_by_the_tokenizer_itself():
    from .conftest import wordpiece

    tokenizer = wordpiece()
    words = [list(sentence) for sentence in SENTENCES]
    theirs = tokenizer(words, is_split_into_words=True)
    encoded = encode(tokenizer)
    assert [f["input_ids"].tolist() for f in encoded.features] == theirs["input_ids"]
    for i, places in enumerate(encoded.places):
        assert places == [theirs.word_ids(i).index(w) for w in range(len(SENTENCES[i]))]


def test_words_that_are_cut_off_are_counted_and_wrong(tokenizer):
    split = Split("validation", (("fine",) * 10,), ((1,) * 10,))
    with pytest.warns(BitFitWarning, match=r"of 10 words of the validation set have no token"):
        encoded = encode(tokenizer, split, 8)
    (places,) = encoded.places
    seen = sum(place is not None for place in places)
    assert 0 < seen < 10 and places[seen:] == [None] * (10 - seen)
    predictions = TOKEN.decode(encoded, [torch.ones(8, dtype=torch.int64)])
    assert predictions == [(1,) * seen + (-1,) * (10 - seen)]
    assert TOKEN.score(("accuracy",), predictions, split) == {"accuracy": seen / 10}


def test_words_of_signs_that_a_tokenizer_drops_are_counted():
    from .conftest import wordpiece

    split = Split("train", (("fine", "\u200d", "good"),), ((0, 1, 2),))
    with pytest.warns(BitFitWarning, match="1 of 3 words of the train set have no token"):
        encoded = encode(wordpiece(), split)
    assert encoded.places[0][1] is None and encoded.places[0][2] is not None


def test_unknown_tags_train_nothing_and_are_never_right(tokenizer):
    split = Split("validation", (("fine", "good"),), ((-1, 2),))
    encoded = encode(tokenizer, split)
    assert [label for label in encoded.features[0]["labels"] if label != -100] == [2]
    assert TOKEN.score(("accuracy",), [(-1, 2)], split) == {"accuracy": 0.5}


def test_the_loss_is_weighed_by_words(tokenizer):
    batch = TOKEN.collate(tokenizer)(encode(tokenizer).features)
    assert batch["labels"].shape == batch["input_ids"].shape
    assert TOKEN.weigh(batch) == sum(map(len, SENTENCES))


@pytest.mark.parametrize("ending", [".conllu", ".tsv"])
def test_files_of_tags_are_of_the_datas_form(tmp_path, ending):
    names = ("A", "B", "C")
    data = TaskData("x", names, ("accuracy",), {"test": SPLIT}, kind="token", ending=ending)
    predictions = [*LABELS[:-1], (-1,)]
    (path,) = TOKEN.write(data, SPLIT, predictions, tmp_path)
    assert path.name == f"x-train{ending}"
    read = load_tag_files({"test": path}, [*names, "_"], labelled=False)
    assert read.splits["test"].texts == SENTENCES
    text = path.read_text()
    assert ("# sent_id = b\n" in text) == (ending == ".conllu")
    assert ("1\tfine\t_\t_" if ending == ".conllu" else "fine\t_\n") in text
    both = Split("train", SENTENCES[:2], LABELS[:2], ("a", "b"))
    (path,) = TOKEN.write(data, both, LABELS[:2], tmp_path)
    assert load_tag_files({"train": path}).train.labels == LABELS[:2]


def test_tags_need_names():
    with pytest.raises(BitFitError, match="a tagging task needs the names of its tags"):
        TOKEN.configure(None)
