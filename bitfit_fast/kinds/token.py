"""Words with a tag each: the first piece of a word carries its tag."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.batches import IGNORED, Batch, Features, in_tensors, pad
from ..data.tags import UNTAGGED
from ..data.task import Split, TaskData
from ..errors import BitFitError, BitFitWarning
from ..files import write_text
from .kind import Encoded, Kind, check_offsets

__all__ = ["TOKEN"]

#: Columns of CoNLL-U after the tag.
_UNSPECIFIED = "\t_" * 6


def _configure(labels: Sequence[str] | None) -> dict[str, Any]:
    if labels is None:
        raise BitFitError("a tagging task needs the names of its tags")
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _encode(split: Split, tokenizer: Any, options: Mapping[str, int]) -> Encoded:
    """Tokenize sentences; words are told apart by where their tokens stand in the text.

    Words are joined by spaces, so any tokenizer that says offsets will do. The place of a
    word is its first token, or None where it has none: behind the longest length, or of
    characters that the tokenizer drops. Those train nothing and count as errors.
    """
    check_offsets(tokenizer, "tagging")
    texts = [" ".join(words) for words in split.texts]
    encoded = tokenizer(
        texts, truncation=True, max_length=options["max_length"], return_offsets_mapping=True
    )
    keys = [key for key in encoded if key != "offset_mapping"]
    features: Features = []
    places: list[list[int | None]] = []
    for i, (words, text) in enumerate(zip(split.texts, texts)):
        feature = {key: encoded[key][i] for key in keys}
        found = _first_tokens(words, text, encoded["offset_mapping"][i], encoded.sequence_ids(i))
        if split.labels is not None:
            labels = [IGNORED] * len(feature["input_ids"])
            for place, label in zip(found, split.labels[i]):
                if place is not None and label >= 0:
                    labels[place] = label
            feature["labels"] = labels
        features.append(feature)
        places.append(found)
    lost = sum(place is None for found in places for place in found)
    if lost:
        total = sum(map(len, places))
        warnings.warn(
            f"{lost} of {total} words of the {split.name} set have no token within max-length "
            f"{options['max_length']}; they train nothing, and count as errors",
            BitFitWarning,
            3,
        )
    return Encoded("token", split, in_tensors(features), places, options)


def _first_tokens(
    words: tuple[str, ...],
    text: str,
    offsets: Sequence[tuple[int, int]],
    sequence: Sequence[int | None],
) -> list[int | None]:
    word_at = [w for w, word in enumerate(words) for _ in range(len(word) + 1)]
    found: list[int | None] = [None] * len(words)
    for token, (start, end) in enumerate(offsets):
        # some tokenizers count the space before a word as part of its first token
        while start < end and text[start].isspace():
            start += 1
        if sequence[token] is not None and start < end and found[word_at[start]] is None:
            found[word_at[start]] = token
    return found


def _weigh(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())


def _keep(output: Any) -> Tensor:
    return output.logits.argmax(-1).cpu()


def _decode(encoded: Encoded, kept: list[Tensor]) -> list[tuple[int, ...]]:
    """Return a tag's index for each word; -1 for words without a token."""
    found = []
    for tags, places in zip(kept, encoded.places):
        row = tags.tolist()
        found.append(tuple(-1 if place is None else row[place] for place in places))
    return found


def _score(
    metrics: Sequence[str], predictions: Sequence[tuple[int, ...]], split: Split
) -> dict[str, float]:
    from ..metrics import tag_scores

    return tag_scores(metrics, predictions, split.labels or ())


def _write(
    data: TaskData, split: Split, predictions: Sequence[tuple[int, ...]], folder: Path
) -> list[Path]:
    """Write the words with their tags, in CoNLL-U where the data is, else in two columns."""
    assert data.labels is not None
    lines: list[str] = []
    for i, (words, tags) in enumerate(zip(split.texts, predictions)):
        named = [UNTAGGED if tag < 0 else data.labels[tag] for tag in tags]
        if data.ending == ".conllu":
            if split.ids is not None:
                lines.append(f"# sent_id = {split.ids[i]}")
            pairs = enumerate(zip(words, named), 1)
            lines += [f"{n}\t{word}\t_\t{tag}{_UNSPECIFIED}" for n, (word, tag) in pairs]
        else:
            lines += [f"{word}\t{tag}" for word, tag in zip(words, named)]
        lines.append("")
    path = folder / f"{data.name}-{split.name}{data.ending}"
    write_text(path, "\n".join(lines) + "\n")
    return [path]


TOKEN = Kind(
    name="token",
    head="ForTokenClassification",
    classes=True,
    options={"max_length": 128},
    configure=_configure,
    encode=_encode,
    collate=pad,
    weigh=_weigh,
    keep=_keep,
    decode=_decode,
    score=_score,
    write=_write,
)
