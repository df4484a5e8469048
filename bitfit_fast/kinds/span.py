"""Answers that are a span of a text: windows over long texts, and the best span over them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batches import Batch, Features, in_tensors, pad
from ..data.task import Split, TaskData
from ..errors import BitFitError, BitFitWarning
from ..files import write_json
from .kind import Encoded, Kind, check_offsets, count_rows

__all__ = ["N_BEST", "SPAN", "Answer", "Window", "span_loss"]

#: Answers of a question that are kept, the best first.
N_BEST = 20

#: Questions that are tokenized at once: the offsets of a whole training set would fill memory.
_CHUNK = 1000


@dataclass(frozen=True)
class Window:
    """A part of a text that the model sees together with the question.

    Attributes
    ----------
    example : int
        Index of the question in its split.
    first : int
        Where in the feature the tokens of the text begin.
    starts, ends : Tensor
        `[n]` int32: where in the text each of these tokens begins and ends.
    """

    example: int
    first: int
    starts: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Answer:
    """A span of the text: the sum of its two scores, and its share among the n best."""

    text: str
    score: float
    probability: float


def _configure(labels: Sequence[str] | None) -> dict[str, Any]:
    return {"num_labels": 2}  # scores of a span's begin and of its end


def _encode(split: Split, tokenizer: Any, options: Mapping[str, int]) -> Encoded:
    """Cut each text into windows of at most `max_length` tokens, question included.

    Neighbours share `doc_stride` tokens, so an answer of no more tokens is whole in one of
    them. A window is labelled with the tokens that cover the question's first answer, or,
    where that is not whole in it, with the classification token, like transformers' own
    examples do.
    """
    check_offsets(tokenizer, "question answering")
    max_length, stride = options["max_length"], options["doc_stride"]
    room = max_length - stride - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 2:
        raise BitFitError(
            f"doc-stride {stride} leaves no room for a question within max-length {max_length}"
        )
    features: Features = []
    windows: list[Window] = []
    cut = 0
    for begin in range(0, len(split), _CHUNK):
        examples = split.texts[begin : begin + _CHUNK]
        questions, shortened = _shortened([q.strip() for q, _ in examples], tokenizer, room - 1)
        cut += shortened
        encoded = tokenizer(
            questions,
            [context for _, context in examples],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners = encoded.pop("overflow_to_sample_mapping")
        offsets = encoded.pop("offset_mapping")
        keys = list(encoded.keys())
        for i, owner in enumerate(owners):
            feature = {key: encoded[key][i] for key in keys}
            sequence = encoded.sequence_ids(i)
            if 1 not in sequence:
                name = _names(split)[begin + owner]
                raise BitFitError(f"the text of question {name} has no token")
            first = sequence.index(1)
            own = torch.tensor(offsets[i][first : first + sequence.count(1)], dtype=torch.int32)
            window = Window(begin + owner, first, own[:, 0].clone(), own[:, 1].clone())
            if split.labels is not None:
                answer = split.labels[window.example][0]
                span = _answer_tokens(window, *answer)
                if span is None:
                    span = (_classification(feature["input_ids"], tokenizer),) * 2
                feature["start_positions"], feature["end_positions"] = span
            features.append(feature)
            windows.append(window)
    if cut:
        warnings.warn(
            f"{cut} of {len(split)} questions of the {split.name} set are cut to {room - 1} "
            f"tokens, the most that max-length {max_length} and doc-stride {stride} leave",
            BitFitWarning,
            3,
        )
    return Encoded("span", split, in_tensors(features), windows, options)


def _shortened(questions: list[str], tokenizer: Any, most: int) -> tuple[list[str], int]:
    """Return the questions with at most so many tokens, and how many had to be cut."""
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
    long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > most]
    for i in long:
        whole, offsets = questions[i], encoded["offset_mapping"][i]
        for kept in range(most, 0, -1):
            questions[i] = whole[: offsets[kept - 1][1]]
            # a word that is cut may have more pieces than it had
            if len(tokenizer(questions[i], add_special_tokens=False)["input_ids"]) <= most:
                break
    return questions, len(long)


def _answer_tokens(window: Window, text: str, start: int) -> tuple[int, int] | None:
    """Return the first and the last token that an answer touches; None if it is not whole here."""
    start += len(text) - len(text.lstrip())
    end = start + len(text.strip())
    if not (int(window.starts[0]) <= start and end <= int(window.ends[-1])):
        return None
    first = int(torch.searchsorted(window.ends, start, right=True))
    last = int(torch.searchsorted(window.starts, end)) - 1
    return window.first + first, window.first + last


def _classification(ids: list[int], tokenizer: Any) -> int:
    token = tokenizer.cls_token_id
    return ids.index(token) if token in ids else 0


def span_loss(model: Any, batch: Batch) -> Any:
    """Run a question-answering model, and give its output the loss of begin and end.

    Cross-entropy over the tokens of the window. The heads of transformers let tokens of
    padding compete, too, which makes an example's loss depend on what it is batched with, and
    padding something to compute.
    """
    inputs = dict(batch)
    positions = inputs.pop("start_positions"), inputs.pop("end_positions")
    output = model(**inputs)
    mask = inputs.get("attention_mask")
    padding = output.start_logits.new_zeros(()).bool() if mask is None else mask == 0
    # in fp32 where they are less
    dtype = torch.promote_types(output.start_logits.dtype, torch.float32)
    losses = [
        F.cross_entropy(logits.to(dtype).masked_fill(padding, -math.inf), position)
        for logits, position in zip((output.start_logits, output.end_logits), positions)
    ]
    output.loss = sum(losses) / 2
    return output


def _keep(output: Any) -> Tensor:
    return torch.stack((output.start_logits, output.end_logits), 1).float().cpu()


def _decode(encoded: Encoded, kept: list[Tensor]) -> list[list[Answer]]:
    """Return the `N_BEST` best answers of each question over all its windows."""
    most = encoded.options["max_answer_length"]
    found: list[list[tuple[float, str]]] = [[] for _ in encoded.split.texts]
    for window, logits in zip(encoded.places, kept):
        context = encoded.split.texts[window.example][1]
        found[window.example] += [
            (score, context[start:end].strip())
            for score, start, end in _best_spans(window, logits, most)
        ]
    return [_distinct(answers) for answers in found]


def _best_spans(window: Window, logits: Tensor, most: int) -> Iterator[tuple[float, int, int]]:
    """Yield score and characters of the best spans of at most `most` tokens of the text.

    All of them are looked at, not only those of the best begins and ends.
    """
    count = len(window.starts)
    begin, end = logits[:, window.first : window.first + count]
    ends = F.pad(end, (0, most - 1), value=-math.inf).unfold(0, most, 1)
    scores = (begin[:, None] + ends).flatten()
    best = scores.topk(min(N_BEST, len(scores)))
    for score, index in zip(best.values.tolist(), best.indices.tolist()):
        first, more = divmod(index, most)
        if score > -math.inf:
            yield score, int(window.starts[first]), int(window.ends[first + more])


def _distinct(answers: list[tuple[float, str]]) -> list[Answer]:
    scores: dict[str, float] = {}
    for score, text in sorted(answers, key=lambda answer: -answer[0]):
        if text:
            scores.setdefault(text, score)
    best = list(scores.items())[:N_BEST]
    shares = torch.tensor([score for _, score in best], dtype=torch.float64).softmax(0).tolist()
    return [Answer(text, score, share) for (text, score), share in zip(best, shares)]


def _names(split: Split) -> tuple[str, ...]:
    return split.ids or tuple(str(i) for i in range(len(split)))


def _score(
    metrics: Sequence[str], predictions: Sequence[list[Answer]], split: Split
) -> dict[str, float]:
    from ..metrics import answer_scores

    texts = [answers[0].text if answers else "" for answers in predictions]
    references = [[text for text, _ in answers] for answers in split.labels or ()]
    return answer_scores(metrics, texts, references)


def _write(
    data: TaskData, split: Split, predictions: Sequence[list[Answer]], folder: Path
) -> list[Path]:
    """Write the answer of each question by its id, as SQuAD's script takes them; and the n best."""
    name = f"{data.name}-{split.name}"
    best = {i: found[0].text if found else "" for i, found in zip(_names(split), predictions)}
    more = {
        i: [{"text": a.text, "score": a.score, "probability": a.probability} for a in found]
        for i, found in zip(_names(split), predictions)
    }
    paths = [folder / f"{name}.json", folder / f"{name}-n-best.json"]
    for path, value in zip(paths, (best, more)):
        write_json(path, value)
    return paths


SPAN = Kind(
    name="span",
    head="ForQuestionAnswering",
    classes=False,
    options={"max_length": 384, "doc_stride": 128, "max_answer_length": 30},
    configure=_configure,
    encode=_encode,
    collate=pad,
    weigh=count_rows,
    keep=_keep,
    decode=_decode,
    score=_score,
    write=_write,
)
