"""The built-in task `reviews`: is a short review positive or negative?

The sentences come from a small grammar. A review is a sentence frame with one to three
clauses in it; a clause says that an aspect has, or has not, a quality. The label follows
from the signs in the tables below, so it depends on negation ("the plot was hardly dull"),
on which clause the connective favours ("although A, B" rests on B; "A, although B" on A)
and on whether a reported opinion is confirmed or refuted. Every frame is used equally
often for both labels, and about half of the clauses are negated, so neither the frame nor
the words alone give the label away.

What training and evaluation share:

- not shared: adjectives, aspects (training reviews films and plays, evaluation hotels and
  restaurants), clause patterns including their verbs, and sentence frames;
- shared: negators (not, hardly, anything but, far from, nothing), connectives (although,
  but, even so, never mind, it hardly matters, and), and ordinary function words.

So a model has to carry over how negators and connectives work, to words that it knows
from pretraining only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import perm, prod

from bitfit_fast.data.task import Split, TaskData
from bitfit_fast.errors import BitFitError

__all__ = ["load_reviews"]

NEGATIVE, POSITIVE = LABELS = (0, 1)


@dataclass(frozen=True)
class Pattern:
    """Text with slots, and how the polarity of what fills them bears on the whole.

    Attributes
    ----------
    text : str
        In a clause, the slots are `{aspect}`, `{adj}` and `{was}`; in a frame, `{0}`, `{1}`
        and so on are clauses.
    signs : str
        One sign a slot that has a polarity (the adjective, or each clause): `+` where the
        slot's polarity is that of the whole, `-` where it is the opposite.
    """

    text: str
    signs: str


@dataclass(frozen=True)
class Grammar:
    """The tables that one split is made from; `adjectives` is indexed by label."""

    adjectives: tuple[tuple[str, ...], tuple[str, ...]]
    singular: tuple[str, ...]
    plural: tuple[str, ...]
    clauses: tuple[Pattern, ...]
    frames: tuple[Pattern, ...]

    @property
    def aspects(self) -> tuple[str, ...]:
        """Every aspect, singular ones first."""
        return self.singular + self.plural


TRAIN = Grammar(
    adjectives=(
        (
            "dull", "boring", "disappointing", "tedious", "unpleasant", "forgettable", "clumsy",
            "uninspired", "predictable", "annoying", "awkward", "lifeless", "pretentious", "lazy",
        ),
        (
            "charming", "impressive", "enjoyable", "delightful", "memorable", "satisfying",
            "wonderful", "brilliant", "convincing", "inventive", "elegant", "likeable", "original",
            "beautiful",
        ),
    ),
    singular=(
        "plot", "acting", "dialogue", "soundtrack", "ending", "script", "camerawork", "direction",
        "opening scene", "narration", "lead actor", "humour",
    ),
    plural=("characters", "costumes", "special effects", "songs"),
    clauses=(
        Pattern("the {aspect} {was} {adj}", "+"),
        Pattern("the {aspect} {was} truly {adj}", "+"),
        Pattern("the {aspect} felt {adj}", "+"),
        Pattern("the {aspect} {was} {adj} from start to finish", "+"),
        Pattern("the {aspect} stayed {adj} throughout", "+"),
        Pattern("the {aspect} {was}, in a word, {adj}", "+"),
        Pattern("the {aspect} {was} not {adj}", "-"),
        Pattern("the {aspect} {was} hardly {adj}", "-"),
        Pattern("the {aspect} {was} anything but {adj}", "-"),
    ),
    frames=(
        Pattern("All in all, {0}.", "+"),
        Pattern("I left thinking that {0}.", "+"),
        Pattern("My verdict is that {0}.", "+"),
        Pattern("{0}, and {1}.", "++"),
        Pattern("Although {0}, {1}.", "-+"),
        Pattern("{0}, although {1}.", "+-"),
        Pattern("{0}, but {1}.", "-+"),
        Pattern("{0}; even so, {1}.", "-+"),
    ),
)

VALIDATION = Grammar(
    adjectives=(
        (
            "mediocre", "shoddy", "underwhelming", "dreary", "unremarkable", "unappealing",
            "substandard", "depressing", "tiresome", "second-rate", "disagreeable", "inferior",
        ),
        (
            "splendid", "first-rate", "commendable", "exquisite", "superb", "agreeable",
            "outstanding", "praiseworthy", "admirable", "terrific", "marvellous", "laudable",
        ),
    ),
    singular=(
        "food", "service", "breakfast", "room", "dining room", "menu", "bathroom", "wine list",
        "lobby", "dessert", "check-in", "bar",
    ),
    plural=("waiters", "starters", "cocktails", "bedrooms"),
    clauses=(
        Pattern("the {aspect} turned out {adj}", "+"),
        Pattern("the {aspect} came across as {adj}", "+"),
        Pattern("the {aspect} proved {adj}", "+"),
        Pattern("the {aspect} seemed really {adj}", "+"),
        Pattern("the {aspect} could fairly be called {adj}", "+"),
        Pattern("the {aspect} appeared {adj}", "+"),
        Pattern("the {aspect} did not seem {adj}", "-"),
        Pattern("the {aspect} seemed hardly {adj}", "-"),
        Pattern("the {aspect} came across as anything but {adj}", "-"),
    ),
    frames=(
        Pattern("After two nights here we can say that {0}.", "+"),
        Pattern("Looking back on our stay, {0}.", "+"),
        Pattern("We noticed that {0}, and also that {1}.", "++"),
        Pattern("Even though {0}, we can report that {1}.", "-+"),
        Pattern("We can report that {0}, even though {1}.", "+-"),
        Pattern("Yes, {0}, but more to the point, {1}.", "-+"),
        Pattern("We stand by our view that {0}, although it is fair to say that {1}.", "+-"),
        Pattern("We admit that {0}; even so, we would say that {1}.", "-+"),
    ),
)


def clause(pattern: Pattern, grammar: Grammar, aspect: str, adjective: str) -> tuple[str, int]:
    """Return the clause's text and polarity."""
    was = "were" if aspect in grammar.plural else "was"
    polarity = int(adjective in grammar.adjectives[POSITIVE])
    text = pattern.text.format(aspect=aspect, adj=adjective, was=was)
    return text, turned(polarity, pattern.signs)


def turned(polarity: int, sign: str) -> int:
    """Return the polarity seen through a sign."""
    return polarity if sign == "+" else 1 - polarity


def sentence(frame: Pattern, clauses: list[str]) -> str:
    """Return the frame with its clauses, as a sentence."""
    text = frame.text.format(*clauses)
    return text[0].upper() + text[1:]


def draw(rng: random.Random, grammar: Grammar, frame: Pattern, label: int) -> str:
    """Return a random sentence of that frame and label."""
    parts = []
    for aspect, sign in zip(rng.sample(grammar.aspects, len(frame.signs)), frame.signs):
        pattern = rng.choice(grammar.clauses)
        polarity = turned(turned(label, sign), pattern.signs)
        parts.append(clause(pattern, grammar, aspect, rng.choice(grammar.adjectives[polarity]))[0])
    return sentence(frame, parts)


def possible(grammar: Grammar, frame: Pattern, label: int) -> int:
    """Return how many different sentences of that frame and label there are."""
    fills = (
        sum(len(grammar.adjectives[turned(turned(label, sign), c.signs)]) for c in grammar.clauses)
        for sign in frame.signs
    )
    return perm(len(grammar.aspects), len(frame.signs)) * prod(fills)


def maximum(grammar: Grammar) -> int:
    """Return the largest split in which all frames appear equally often."""
    least = min(possible(grammar, frame, label) for frame in grammar.frames for label in LABELS)
    return least * len(grammar.frames) * len(LABELS)


def generate(rng: random.Random, grammar: Grammar, name: str, size: int) -> Split:
    """Return `size` different sentences, labels and frames taking turns, in random order."""
    if not 1 <= size <= maximum(grammar):
        raise BitFitError(
            f"reviews cannot make {size} {name} sentences; its grammar makes 1 to "
            f"{maximum(grammar)}"
        )
    labelled: dict[str, int] = {}
    while len(labelled) < size:
        turn, label = divmod(len(labelled), len(LABELS))
        frame = grammar.frames[turn % len(grammar.frames)]
        labelled.setdefault(draw(rng, grammar, frame, label), label)
    order = rng.sample(sorted(labelled.items()), size)
    return Split(name, tuple((text,) for text, _ in order), tuple(label for _, label in order))


def load_reviews(seed: int = 0, train: int = 3000, validation: int = 1000) -> TaskData:
    """Generate the task.

    Parameters
    ----------
    seed : int
        Seed of the generator; the same seed and sizes give the same sentences.
    train, validation : int
        Number of sentences in each split; labels are balanced (to within one).

    Returns
    -------
    TaskData
        The task `reviews` with the splits `train` and `validation`.

    Raises
    ------
    BitFitError
        If a size is below 1 or above what the grammar can make.
    """
    # A generator for each split, so that the size of one does not change the other.
    splits = [
        generate(random.Random(f"{name} {seed}"), grammar, name, size)
        for name, grammar, size in (
            ("train", TRAIN, train),
            ("validation", VALIDATION, validation),
        )
    ]
    return TaskData(
        name="reviews",
        labels=("negative", "positive"),
        metrics=("accuracy", "mcc"),
        splits={split.name: split for split in splits},
    )
