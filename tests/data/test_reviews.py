"""The generated task `reviews`."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from bitfit_fast.data import reviews
from bitfit_fast.data.reviews import TRAIN, VALIDATION, Grammar, Pattern, load_reviews
from bitfit_fast.errors import BitFitError

GRAMMARS = {"train": TRAIN, "validation": VALIDATION}


@pytest.fixture(scope="module")
def task():
    return load_reviews()


def sentences(task, name):
    return [text for (text,) in task.splits[name].texts]


def contains(text, phrase):
    return re.search(rf"\b{re.escape(phrase)}\b", text, re.IGNORECASE) is not None


def slots_to(text, pattern):
    """Turn a pattern's text into a regular expression, its slots being `pattern`."""
    return pattern.join(re.escape(piece) for piece in re.split(r"\{\w+\}", text))


def vocabulary(grammar):
    return {*grammar.adjectives[0], *grammar.adjectives[1], *grammar.aspects}


def clauses_of(grammar):
    """Return a regular expression for the grammar's clauses, whatever fills them."""
    return "(?:" + "|".join(slots_to(c.text, "(?:_|was|were)") for c in grammar.clauses) + ")"


def blanked(task, name):
    """Return the sentences with `_` for every aspect and adjective."""
    longest_first = sorted(vocabulary(GRAMMARS[name]), key=len, reverse=True)
    words = re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")
    return [words.sub("_", text) for text in sentences(task, name)]


def test_shape_and_defaults(task):
    assert task.name == "reviews"
    assert task.labels == ("negative", "positive")
    assert task.metrics == ("accuracy", "mcc")
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 3000,
        "validation": 1000,
    }
    assert all(name == split.name for name, split in task.splits.items())


def test_same_seed_same_sentences(task):
    assert load_reviews() == task
    assert load_reviews(seed=1).splits["train"] != task.splits["train"]


def test_one_size_does_not_change_the_other_split(task):
    assert load_reviews(train=7).splits["validation"] == task.splits["validation"]


@pytest.mark.parametrize("size", [1, 2, 7, 500])
def test_labels_are_balanced(size):
    for split in load_reviews(train=size, validation=size).splits.values():
        counts = Counter(split.labels)
        assert len(split) == size
        assert abs(counts[0] - counts[1]) <= 1


def test_no_sentence_twice(task):
    every = [text for name in task.splits for text in sentences(task, name)]
    assert len(set(every)) == len(every) == 4000


def test_tables_share_no_word_pattern_or_frame():
    assert not vocabulary(TRAIN) & vocabulary(VALIDATION)
    for table in ("clauses", "frames"):
        texts = [{p.text for p in getattr(g, table)} for g in GRAMMARS.values()]
        assert not texts[0] & texts[1]


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
def test_tables_are_consistent(grammar):
    words = [*grammar.adjectives[0], *grammar.adjectives[1], *grammar.aspects]
    assert len(set(words)) == len(words)
    assert len(grammar.adjectives[0]) == len(grammar.adjectives[1])
    for frame in grammar.frames:
        slots = re.findall(r"\{(\w+)\}", frame.text)
        assert slots == [str(i) for i in range(len(frame.signs))]
    for clause in grammar.clauses:
        assert {"aspect", "adj"} <= set(re.findall(r"\{(\w+)\}", clause.text))
        assert clause.signs in ("+", "-")


@pytest.mark.parametrize(("name", "other"), [("train", "validation"), ("validation", "train")])
def test_sentences_use_nothing_of_the_other_split(task, name, other):
    text = "\n".join(sentences(task, name))
    assert not [word for word in vocabulary(GRAMMARS[other]) if contains(text, word)]
    assert all(contains(text, word) for word in vocabulary(GRAMMARS[name]))
    clauses, foreign = clauses_of(GRAMMARS[name]), clauses_of(GRAMMARS[other])
    frames = "|".join(slots_to(frame.text, clauses) for frame in GRAMMARS[other].frames)
    for text in blanked(task, name):
        assert not re.search(foreign + r"(?=[,;.]| and )", text, re.IGNORECASE)
        assert not re.fullmatch(frames, text, re.IGNORECASE)


@pytest.mark.parametrize("name", GRAMMARS)
def test_every_sentence_is_one_of_its_own_frames_and_clauses(task, name):
    grammar = GRAMMARS[name]
    clauses = clauses_of(grammar)
    frames = [re.compile(slots_to(f.text, clauses), re.IGNORECASE) for f in grammar.frames]
    used = Counter()
    for text in blanked(task, name):
        matching = [i for i, frame in enumerate(frames) if frame.fullmatch(text)]
        assert len(matching) == 1, text
        used.update(matching)
    assert max(used.values()) - min(used[i] for i in range(len(frames))) <= 2


@pytest.mark.parametrize("name", GRAMMARS)
def test_sentences_are_well_formed(task, name):
    for text in sentences(task, name):
        assert text[0].isupper() and text.endswith(".") and text.count(".") == 1
        assert not re.search(r"[{}]|  | ,|, ,", text)
        for plural in GRAMMARS[name].plural:
            assert f"the {plural} was" not in text.lower()
        for singular in GRAMMARS[name].singular:
            assert f"the {singular} were" not in text.lower()


IS, HARDLY, ANYTHING_BUT = (
    "the {aspect} {was} {adj}",
    "the {aspect} {was} hardly {adj}",
    "the {aspect} {was} anything but {adj}",
)


@pytest.mark.parametrize(
    ("grammar", "frame", "parts", "text", "label"),
    [
        (TRAIN, "All in all, {0}.", [(IS, "songs", "dull")], "All in all, the songs were dull.", 0),
        (
            TRAIN,
            "Although {0}, {1}.",
            [(IS, "plot", "dull"), (HARDLY, "acting", "clumsy")],
            "Although the plot was dull, the acting was hardly clumsy.",
            1,
        ),
        (
            TRAIN,
            "{0}, although {1}.",
            [(IS, "plot", "dull"), (HARDLY, "acting", "clumsy")],
            "The plot was dull, although the acting was hardly clumsy.",
            0,
        ),
        (
            TRAIN,
            "{0}, but {1}.",
            [(HARDLY, "plot", "boring"), (ANYTHING_BUT, "songs", "charming")],
            "The plot was hardly boring, but the songs were anything but charming.",
            0,
        ),
        (
            VALIDATION,
            "We can report that {0}, even though {1}.",
            [
                ("the {aspect} did not seem {adj}", "menu", "dreary"),
                ("the {aspect} turned out {adj}", "starters", "mediocre"),
            ],
            "We can report that the menu did not seem dreary, even though the starters turned "
            "out mediocre.",
            1,
        ),
        (
            VALIDATION,
            "We noticed that {0}, and also that {1}.",
            [
                ("the {aspect} seemed hardly {adj}", "food", "superb"),
                ("the {aspect} proved {adj}", "bar", "shoddy"),
            ],
            "We noticed that the food seemed hardly superb, and also that the bar proved shoddy.",
            0,
        ),
    ],
)
def test_label_is_the_reading_of_the_sentence(grammar, frame, parts, text, label):
    def find(table, wanted):
        return next(p for p in table if p.text == wanted)

    parts = [(find(grammar.clauses, clause), *words) for clause, *words in parts]
    assert reviews.compose(grammar, find(grammar.frames, frame), parts) == (text, label)


def test_clauses_that_do_not_fit_the_frame():
    was = Pattern("the {aspect} {was} {adj}", "+")
    parts = [(was, "plot", "dull"), (was, "acting", "boring")]
    with pytest.raises(ValueError, match="do not fit"):
        reviews.compose(TRAIN, Pattern("Although {0}, {1}.", "-+"), parts)


@pytest.mark.parametrize("name", GRAMMARS)
def test_size_outside_the_grammar(name):
    most = reviews.maximum(GRAMMARS[name])
    for size in (most + 1, 0, -3):
        with pytest.raises(BitFitError, match=rf"{size} {name} sentences.* 1 to {most}$"):
            load_reviews(**{name: size})


def test_the_maximum_can_be_made():
    grammar = Grammar(
        adjectives=(("bad", "poor"), ("good", "fine")),
        singular=("tea",),
        plural=("cakes",),
        clauses=(Pattern("the {aspect} {was} {adj}", "+"), Pattern("no {aspect} {was} {adj}", "-")),
        frames=(Pattern("So {0}.", "+"), Pattern("{0}, but {1}.", "-+")),
    )
    most = reviews.maximum(grammar)
    split = reviews.generate(random.Random(0), grammar, "train", most)
    assert most == 32
    assert len(set(split.texts)) == most
    assert Counter(split.labels) == {0: 16, 1: 16}
