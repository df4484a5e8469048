"""Questions whose answer is a span of a text: SQuAD (Rajpurkar et al. 2016) and its formats."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import BitFitError, BitFitWarning, listed
from .files import check_file, json_rows
from .task import Split, TaskData

__all__ = ["HUB_REPOSITORY", "SHARE", "is_span_file", "load_span_files", "load_squad"]

HUB_REPOSITORY = "rajpurkar/squad"
_CONFIG = "plain_text"

#: Share of the articles of a single file that is held back for validation.
SHARE = 0.2

#: SQuAD's own file names by split; there is no test set in public.
_FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}
_METRICS = ("f1", "exact_match")

#: How a file in SQuAD's format begins, pretty printed or not.
_BEGINNING = re.compile(r'\s*\{\s*("version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[')
_COLUMNS = ("context", "question")


@dataclass(frozen=True)
class _Question:
    """A question with its text, its answers (None: not given), and the article it is of."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None
    article: int


def load_squad(
    data_dir: Path | None = None,
    kinds: tuple[str, ...] = ("train", "validation"),
    share: float | None = None,
    seed: int | None = None,
    repository: str = HUB_REPOSITORY,
) -> TaskData:
    """Load SQuAD v1.1, or another set in its format.

    Parameters
    ----------
    data_dir : Path, optional
        Folder that holds `train-v1.1.json` and `dev-v1.1.json`, or one JSON file in that
        format, which is split by article; or the folder above a folder `squad` of these; or
        such a file. Without it the hub is asked.
    kinds : tuple of str
        Which of `train` and `validation` to load; there is no public test set.
    share : float, optional
        Of a single file: the share of its articles, by default 0.2, that is for validation.
        All questions on an article are on one side.
    seed : int, optional
        Of that choice, by default 0: articles in the order of a permutation by it, the first for
        validation.
    repository : str
        Dataset repository, or a local folder of its layout.

    Raises
    ------
    BitFitError
        If there is no such file or split, or an answer is not where it is said to be.
    """
    wanted = [kind for kind in kinds if kind in _FILES]
    if not wanted:
        raise BitFitError("the task squad has no public test set; its splits are train, validation")
    if data_dir is None:
        if share is not None or seed is not None:
            raise BitFitError(
                "a validation share, and its seed, are of a single file, and none is given"
            )
        questions = {kind: list(_hub_questions(repository, kind)) for kind in wanted}
        return _task("squad", questions)
    found = _find(data_dir)
    if isinstance(found, dict):
        if share is not None or seed is not None:
            text = f"{data_dir} holds a file a split, so the validation share plays no part"
            warnings.warn(text, BitFitWarning, 3)
        return _task("squad", {kind: _read(found[kind]) for kind in wanted})
    share, seed = SHARE if share is None else share, seed or 0
    parts, note = _by_article(_read(found), share, seed, found)
    data = _task("squad", {kind: parts[kind] for kind in wanted})
    return replace(data, source={"validation_share": share, "split_seed": seed}, note=note)


def _find(data_dir: Path) -> dict[str, Path] | Path:
    """Return SQuAD's files by split, or the single file there is."""
    if data_dir.is_file():
        return data_dir
    if not data_dir.is_dir():
        raise BitFitError(f"the data folder {data_dir} does not exist")
    for folder in (data_dir, data_dir / "squad"):
        there = sorted(folder.glob("*.json"))
        if any((folder / name).is_file() for name in _FILES.values()):
            return {kind: folder / name for kind, name in _FILES.items()}
        if len(there) == 1:
            return there[0]
        if there:
            raise BitFitError(
                f"{folder} has neither {_FILES['train']} nor a single JSON file, but "
                f"{listed(path.name for path in there)}; name one of them"
            )
    raise BitFitError(f"{data_dir} has no {_FILES['train']}, and no other JSON file")


def is_span_file(path: Path) -> bool:
    """Return whether a file holds questions on texts, by how it begins."""
    if path.suffix.lower() not in (".json", ".jsonl") or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(2000).decode("utf-8-sig", errors="replace")
        if _BEGINNING.match(head):
            return True
        file.seek(0)
        line = file.readline()
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and all(column in row for column in (*_COLUMNS, "answers"))


def load_span_files(files: dict[str, Path], labelled: bool = True) -> TaskData:
    """Load a span task from files, one a split.

    Parameters
    ----------
    files : dict of str to Path
        Split name -> file in SQuAD's JSON format, or of JSON lines with `context`,
        `question`, `answers` and, if predictions are to be told apart by it, `id`. Answers
        are as in SQuAD, a list of `{"text", "answer_start"}`, or as on the hub,
        `{"text": [...], "answer_start": [...]}`.
    labelled : bool
        Whether to read the answers.

    Raises
    ------
    BitFitError
        For a missing or broken file, an empty one, or an answer that is not where it is
        said to be; names the place.
    """
    for split, path in files.items():
        check_file(path, f"{split} file")
    questions = {split: _read(path, labelled) for split, path in files.items()}
    return _task("files", questions, labelled)


def _task(name: str, questions: dict[str, list[_Question]], labelled: bool = True) -> TaskData:
    splits = {}
    for split, those in questions.items():
        answers = tuple(q.answers for q in those)
        missing = [q.id for q in those if q.answers is None]
        if missing and labelled and (len(missing) < len(those) or not split.startswith("test")):
            raise BitFitError(f"{split}: the question {missing[0]} has no 'answers'")
        texts = tuple((q.question, q.context) for q in those)
        labels = None if missing else answers
        splits[split] = Split(split, texts, labels, tuple(q.id for q in those))
    return TaskData(name, None, _METRICS, splits, kind="span")


def _read(path: Path, labelled: bool = True) -> list[_Question]:
    check_file(path)
    with path.open("rb") as file:
        whole = _BEGINNING.match(file.read(2000).decode("utf-8-sig", errors="replace"))
    read = _squad_questions if whole else _line_questions
    found = list(read(path, labelled))
    if not found:
        raise BitFitError(f"the file {path} has no questions")
    ids: set[str] = set()
    for question in found:
        if question.id in ids:
            raise BitFitError(f"{path} has two questions with the id '{question.id}'")
        ids.add(question.id)
    return found


def _squad_questions(path: Path, labelled: bool) -> Iterator[_Question]:
    try:
        articles = json.loads(path.read_text(encoding="utf-8-sig"))["data"]
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BitFitError(f"{path}{line} is not JSON ({reason}); is the file cut short?") from None
    where = str(path)
    for number, article in enumerate(_items(articles, "data", where)):
        in_article = f"{where}, article {number + 1}"
        for paragraph in _items(_field(article, "paragraphs", in_article), "paragraphs", where):
            context = _text(paragraph, "context", in_article)
            for qa in _items(_field(paragraph, "qas", in_article), "qas", where):
                name = str(_field(qa, "id", in_article))
                at = f"{where}, question {name}"
                question = _text(qa, "question", at)
                answers = _answers(_field(qa, "answers", at), context, at) if labelled else None
                yield _Question(name, question, context, answers, number)


def _line_questions(path: Path, labelled: bool) -> Iterator[_Question]:
    articles: dict[str, int] = {}
    for number, (where, row) in enumerate(json_rows(path)):
        context, question = (_text(row, column, where) for column in _COLUMNS)
        given = row.get("answers")
        answers = None if given is None or not labelled else _answers(given, context, where)
        if labelled and answers is None and "answers" in row:
            raise BitFitError(f"{where}: 'answers' holds null")
        # without a title, questions on one text belong together
        article = articles.setdefault(str(row.get("title", context)), len(articles))
        yield _Question(str(row.get("id", number)), question, context, answers, article)


def _hub_questions(repository: str, split: str) -> Iterator[_Question]:
    from .hub import load_hub_split

    data = load_hub_split(repository, _CONFIG, split)
    for column in ("id", *_COLUMNS, "answers"):
        if column not in data.column_names:
            raise BitFitError(
                f"{repository} has no column '{column}'; its columns are "
                f"{listed(data.column_names)}"
            )
    for number, row in enumerate(data):
        where = f"{repository}, {split}, question {row['id']}"
        context, question = (_text(row, column, where) for column in _COLUMNS)
        answers = _answers(row["answers"], context, where)
        yield _Question(str(row["id"]), question, context, answers, number)


def _items(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise BitFitError(f"{where}: '{name}' is no list; is it in SQuAD's format?")
    return value


def _field(row: Any, name: str, where: str) -> Any:
    if not isinstance(row, dict):
        raise BitFitError(f"{where}: '{str(row)[:40]}' is no JSON object")
    if name not in row:
        raise BitFitError(f"{where}: there is no '{name}'; there are {listed(row) or 'none'}")
    return row[name]


def _text(row: Any, name: str, where: str) -> str:
    value = _field(row, name, where)
    if not isinstance(value, str) or not value.strip():
        raise BitFitError(f"{where}: '{name}' holds no text")
    return value


def _answers(given: Any, context: str, where: str) -> tuple[tuple[str, int], ...]:
    """Return the answers of a question, each checked to be in the context where it says."""
    if isinstance(given, dict):  # as the hub has them
        texts, starts = (_field(given, key, where) for key in ("text", "answer_start"))
        if not isinstance(texts, list) or not isinstance(starts, list):
            raise BitFitError(f"{where}: 'text' and 'answer_start' of its answers are no lists")
        if len(texts) != len(starts):
            raise BitFitError(f"{where} has {len(texts)} answers and {len(starts)} offsets")
        given = [{"text": t, "answer_start": s} for t, s in zip(texts, starts)]
    answers = []
    for answer in _items(given, "answers", where):
        text, start = _text(answer, "text", where), _field(answer, "answer_start", where)
        if not isinstance(start, int) or isinstance(start, bool):
            raise BitFitError(f"{where}: the offset {start!r} is no whole number")
        if start < 0 or context[start : start + len(text)] != text:
            there = context[max(start, 0) : max(start, 0) + len(text)]
            raise BitFitError(
                f"{where}: the answer '{text}' is not at offset {start} of its context, where "
                f"'{there}' is"
            )
        answers.append((text, start))
    if not answers:
        raise BitFitError(
            f"{where} has no answer; questions that cannot be answered (SQuAD v2) are not taken"
        )
    return tuple(answers)


def _by_article(
    questions: Sequence[_Question], share: float, seed: int, path: Path
) -> tuple[dict[str, list[_Question]], str]:
    """Split the questions of one file, those on an article to one side; and say how."""
    if not 0 < share < 1:
        raise BitFitError(f"the validation share must be above 0 and below 1, not {share}")
    articles = sorted({q.article for q in questions})
    if len(articles) < 2:
        raise BitFitError(f"{path} has one article, and a split by article needs two")
    count = min(max(1, round(share * len(articles))), len(articles) - 1)
    order = torch.randperm(len(articles), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {articles[i] for i in order[:count]}
    parts = {
        "train": [q for q in questions if q.article not in held],
        "validation": [q for q in questions if q.article in held],
    }
    note = (
        f"{path} is one file: {count} of its {len(articles)} articles, with "
        f"{len(parts['validation'])} of {len(questions)} questions, are for validation "
        f"(share {share:g}, split seed {seed})"
    )
    return parts, note
