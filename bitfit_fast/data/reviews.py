"""The built-in task `reviews`: tell positive from negative short reviews.

The sentences come from a small grammar. A clause says that an aspect has, or has not, a
quality ("the plot was hardly dull"); a sentence frame holds one clause, two that agree, or
two that disagree, of which the connective favours one: "although A, B", "A, but B" and
"A; even so, B" rest on B, "A, although B" rests on A. The label is the polarity of the
favoured clause and follows from the signs in the tables below; no label is random. Every
frame is used equally often for both labels, half of the frames or more hold clauses that
disagree, and a third of the clauses are negated: single words say little about the label.

What the training and the validation split share:

- not shared: the adjectives, the aspects (training reviews films and plays, validation
  hotels and restaurants), the clause patterns with their verbs, and the sentence frames;
- shared: the negators ("not", "hardly", "anything but"), the connectives ("although", also
  as "even though" in validation, "but", "even so", "and") and function words ("the", "that",
  "we", "in", ...). An "although" clause comes first or second in both splits.

So what is learned about negators and connectives has to carry over to qualities, things
and phrasings that are known from pretraining only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import perm

from bitfit_fast.data.task import Split, TaskData
from bitfit_fast.errors import BitFitError

__all__ = ["load_reviews"]

LABELS = ("negative", "positive")


@dataclass(frozen=True)
class Pattern:
    """Text with slots, and how the polarity of what fills them bears on the whole.

    Attributes
    ----------
    text : str
        A clause has the slots `{aspect}`, `{adj}` and perhaps `{was}`; the slots of a frame,
        `{0}` and so on, are clauses.
    signs : str
        One sign for the adjective, or for each clause in turn: `+` where its polarity is
        that of the whole, `-` where it is the opposite.
    """

    text: str
    signs: str


@dataclass(frozen=True)
class Grammar:
    """The tables one split is made from; `adjectives` are indexed by polarity."""

    adjectives: tuple[tuple[str, ...], tuple[str, ...]]
    singular: tuple[str, ...]
    plural: tuple[str, ...]
    clauses: tuple[Pattern, ...]
    frames: tuple[Pattern, ...]

    @property
    def aspects(self) -> tuple[str, ...]:
        """Every aspect, the singular ones first."""
        return self.singular + self.plural


# fmt: off
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
            "mediocre", "shoddy", "appalling", "dreary", "miserable", "unattractive",
            "substandard", "depressing", "tiresome", "inadequate", "horrid", "inferior",
        ),
        (
            "splendid", "first-rate", "magnificent", "exquisite", "superb", "fantastic",
            "outstanding", "praiseworthy", "admirable", "terrific", "marvellous", "lovely",
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
# fmt: on


def through(sign: str, polarity: int) -> int:
    """Return the polarity of the whole from that of a slot, or the other way round."""
    return polarity if sign == "+" else 1 - polarity


def compose(
    grammar: Grammar, frame: Pattern, parts: list[tuple[Pattern, str, str]]
) -> tuple[str, int]:
    """Return the sentence and its label, from a (clause, aspect, adjective) for each slot."""
    clauses, readings = [], set()
    for sign, (clause, aspect, adjective) in zip(frame.signs, parts, strict=True):
        was = "were" if aspect in grammar.plural else "was"
        clauses.append(clause.text.format(aspect=aspect, adj=adjective, was=was))
        polarity = int(adjective in grammar.adjectives[1])
        readings.add(through(sign, through(clause.signs, polarity)))
    if len(readings) > 1:
        raise ValueError(f"the clauses do not fit the frame {frame.text!r}")
    text = frame.text.format(*clauses)
    return text[0].upper() + text[1:], readings.pop()


def draw(rng: random.Random, grammar: Grammar, frame: Pattern, label: int) -> tuple[str, int]:
    """Return a random sentence of that frame and label, with the label."""
    parts = []
    for aspect, sign in zip(rng.sample(grammar.aspects, len(frame.signs)), frame.signs):
        clause = rng.choice(grammar.clauses)
        polarity = through(clause.signs, through(sign, label))
        parts.append((clause, aspect, rng.choice(grammar.adjectives[polarity])))
    return compose(grammar, frame, parts)


def possible(grammar: Grammar, frame: Pattern, label: int) -> int:
    """Return how many different sentences of that frame and label there are."""
    count = 1
    for polarity in (through(sign, label) for sign in frame.signs):
        fitting = (grammar.adjectives[through(c.signs, polarity)] for c in grammar.clauses)
        count *= sum(map(len, fitting))
    return count * perm(len(grammar.aspects), len(frame.signs))


def maximum(grammar: Grammar) -> int:
    """Return the largest size at which every frame can appear equally often."""
    labels = range(len(LABELS))
    least = min(possible(grammar, frame, label) for frame in grammar.frames for label in labels)
    return least * len(grammar.frames) * len(labels)


def generate(rng: random.Random, grammar: Grammar, name: str, size: int) -> Split:
    """Return `size` different sentences in random order; labels and frames take turns."""
    if not 1 <= size <= maximum(grammar):
        raise BitFitError(
            f"the reviews task cannot have {size} {name} sentences; "
            f"its grammar makes 1 to {maximum(grammar)}"
        )
    examples: dict[str, int] = {}
    while len(examples) < size:
        turn, label = divmod(len(examples), len(LABELS))
        frame = grammar.frames[turn % len(grammar.frames)]
        # A sentence that is there already changes nothing, so the same turn comes again.
        examples.update([draw(rng, grammar, frame, label)])
    texts, labels = zip(*rng.sample(sorted(examples.items()), size))
    return Split(name, tuple((text,) for text in texts), labels)


def load_reviews(seed: int = 0, train: int = 3000, validation: int = 1000) -> TaskData:
    """Generate the task.

    Parameters
    ----------
    seed : int
        Seed of the generator; the same seed and sizes give the same sentences.
    train, validation : int
        Number of sentences in each split; the labels are balanced, to within one.

    Returns
    -------
    TaskData
        The task `reviews` with the splits `train` and `validation`.

    Raises
    ------
    BitFitError
        If a size is below 1 or above what the grammar can make.
    """
    sources = (("train", TRAIN, train), ("validation", VALIDATION, validation))
    # A generator for each split, so that the size of one does not change the other.
    splits = {
        name: generate(random.Random(f"{name} {seed}"), grammar, name, size)
        for name, grammar, size in sources
    }
    return TaskData(name="reviews", labels=LABELS, metrics=("accuracy", "mcc"), splits=splits)
