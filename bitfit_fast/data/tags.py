"""Sentences whose every word has a tag: CoNLL-U, two-column files, and the hub's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import BitFitError, BitFitWarning, listed
from .files import check_file, text_lines
from .task import Split, TaskData

__all__ = ["ENDINGS", "HUB_CONFIG", "HUB_REPOSITORY", "UNTAGGED", "load_pos", "load_tag_files"]

HUB_REPOSITORY = "universal-dependencies/universal_dependencies"
HUB_CONFIG = "en_ewt"

#: How CoNLL-U writes that a word has no tag.
UNTAGGED = "_"
#: Words of Universal Dependencies' file names by split.
_PARTS = {"train": "train", "validation": "dev", "test": "test"}
#: Columns of the hub's datasets that hold tags, the first one there is.
_HUB_TAGS = ("upos", "pos_tags", "ner_tags", "tags")
_METRICS = ("accuracy",)
_CONLLU_COLUMNS = 10

# a sentence: its name, its words, and with each tag the words that name its place
Sentence = tuple[str, tuple[str, ...], list[tuple[str, str]]]


def load_pos(
    data_dir: Path | None = None,
    kinds: tuple[str, ...] = ("train", "validation"),
    labels: Sequence[str] | None = None,
    repository: str = HUB_REPOSITORY,
    config: str = HUB_CONFIG,
) -> TaskData:
    """Load part-of-speech tags of a treebank: the universal ones (UPOS).

    Parameters
    ----------
    data_dir : Path, optional
        Folder that holds a treebank's `*train.conllu`, `*dev.conllu` and `*test.conllu`,
        or the folder above a folder `pos` of them. Without it the hub is asked.
    kinds : tuple of str
        Which of `train`, `validation`, `test` to load.
    labels : sequence of str, optional
        The tags in index order; by default those of the training set, sorted.
    repository, config : str
        Dataset repository, or a local folder of its layout, and the treebank in it. Tags are
        the first of its columns `upos`, `pos_tags`, `ner_tags`, `tags`.

    Raises
    ------
    BitFitError
        If a file is missing or broken; names the line.
    """
    if data_dir is not None:
        return load_tag_files({kind: _find(data_dir, kind) for kind in kinds}, labels, name="pos")
    data = _task("pos", {kind: list(_hub(repository, config, kind)) for kind in kinds}, labels)
    return replace(data, ending=".conllu")


def load_tag_files(
    files: dict[str, Path],
    labels: Sequence[str] | None = None,
    labelled: bool = True,
    name: str = "files",
) -> TaskData:
    """Load a tagging task from files, one a split.

    Parameters
    ----------
    files : dict of str to Path
        Split name -> CoNLL-U file (`.conllu`), of which words and their UPOS tags are read,
        or a file of a word, a tab and its tag a line (`.conll`, `.tsv`, `.txt`), with blank
        lines between sentences.
    labels : sequence of str, optional
        The tags in index order; by default those of the training file, sorted.
    labelled : bool
        Whether to read the tags; without, a line may hold a word alone.
    name : str
        The task's name.

    Returns
    -------
    TaskData
        A tag that is not among `labels` becomes -1, with a warning: no prediction is right
        there.

    Raises
    ------
    BitFitError
        For a missing file, one without words, or a line with the wrong number of columns;
        names the line.
    """
    sentences = {split: _read(path, split, labelled) for split, path in files.items()}
    whole = all(path.suffix.lower() == ".conllu" for path in files.values())
    data = _task(name, sentences, labels, labelled)
    return replace(data, ending=".conllu" if whole else ".tsv")


def _find(data_dir: Path, kind: str) -> Path:
    if not data_dir.is_dir():
        raise BitFitError(f"the data folder {data_dir} does not exist")
    pattern = f"*{_PARTS[kind]}.conllu"
    for folder in (data_dir, data_dir / "pos"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise BitFitError(f"{folder} has {listed(p.name for p in found)}; keep one treebank")
    raise BitFitError(f"{data_dir} has no file {pattern}")


def _task(
    name: str,
    sentences: dict[str, list[Sentence]],
    labels: Sequence[str] | None,
    labelled: bool = True,
) -> TaskData:
    source = "train" if "train" in sentences else next(iter(sentences))
    if labels is None:
        labels = sorted({tag for *_, tags in sentences[source] for tag, _ in tags} - {UNTAGGED})
        if len(labels) < 2:
            raise BitFitError(
                f"{name}: the {source} set has only the tag {listed(labels) or '(none)'}, and two "
                "are needed"
            )
    index = {label: i for i, label in enumerate(labels)}
    splits = {}
    for split, those in sentences.items():
        tags = [tag for *_, tagged in those for tag in tagged]
        untagged = [where for tag, where in tags if tag == UNTAGGED]
        # a treebank for predictions has the sign for no tag in every line
        has = labelled and not (split.startswith("test") and len(untagged) == len(tags))
        if has and untagged:
            raise BitFitError(f"{untagged[0]}: the word has no tag")
        if has and (unknown := {tag for tag, _ in tags} - set(index)):
            count = sum(tag in unknown for tag, _ in tags)
            warnings.warn(
                f"{name}: {count} of {len(tags)} words of the {split} set have tags that training "
                f"does not know ({listed(sorted(unknown))}); they count as errors",
                BitFitWarning,
                4,
            )
        values = tuple(tuple(index.get(tag, -1) for tag, _ in tagged) for *_, tagged in those)
        splits[split] = Split(
            split,
            tuple(words for _, words, _ in those),
            values if has else None,
            tuple(name for name, *_ in those),
        )
    return TaskData(name, tuple(labels), _METRICS, splits, kind="token")


def _read(path: Path, split: str, labelled: bool) -> list[Sentence]:
    check_file(path, f"{split} file")
    words = ENDINGS.get(path.suffix.lower())
    if words is None:
        raise BitFitError(
            f"{path} has the ending '{path.suffix}'; known endings of tagged files are "
            f"{listed(ENDINGS)}"
        )
    sentences: list[Sentence] = []
    name, tokens, tags = "", [], []  # type: str, list[str], list[tuple[str, str]]

    def finish() -> None:
        if tokens:
            sentences.append((name or str(len(sentences) + 1), tuple(tokens), list(tags)))

    for where, line in text_lines(path):
        line = line.rstrip("\r\n")
        if not line.strip():
            finish()
            name, tokens, tags = "", [], []
        elif line.startswith("# ") and not tokens and "\t" not in line:
            key, _, value = line[2:].partition("=")
            name = value.strip() if key.strip() == "sent_id" else name
        elif line.startswith("#") and words is _conllu:
            continue
        elif (found := words(line.split("\t"), where, labelled)) is not None:
            tokens.append(found[0])
            tags.append((found[1], where))
    finish()
    if not sentences:
        raise BitFitError(f"the {split} file {path} has no words")
    return sentences


def _conllu(cells: list[str], where: str, labelled: bool) -> tuple[str, str] | None:
    if len(cells) != _CONLLU_COLUMNS:
        raise BitFitError(
            f"{where} has {len(cells)} columns, and CoNLL-U has {_CONLLU_COLUMNS}, parted by tabs"
        )
    number, word, _, tag, *_ = cells
    # a range of words that are written as one (3-4), or a word that is not written (3.1)
    if not number.isdigit():
        if "-" in number or "." in number:
            return None
        raise BitFitError(f"{where}: '{number}' is no number of a word")
    if not word.strip():
        raise BitFitError(f"{where}: the word is empty")
    return word, tag


def _two_columns(cells: list[str], where: str, labelled: bool) -> tuple[str, str] | None:
    if len(cells) != 2 and (labelled or len(cells) != 1):
        raise BitFitError(
            f"{where} has {len(cells)} columns, and a word and its tag, parted by a tab, are two"
        )
    word, tag = cells[0], cells[1] if len(cells) == 2 else UNTAGGED
    if not word.strip() or not tag.strip():
        raise BitFitError(f"{where}: the {'tag' if word.strip() else 'word'} is empty")
    return word, tag


#: How a line becomes a word and its tag, by the file's ending.
ENDINGS: dict[str, Callable[[list[str], str, bool], tuple[str, str] | None]] = {
    ".conllu": _conllu,
    ".conll": _two_columns,
    ".tsv": _two_columns,
    ".txt": _two_columns,
}


def _hub(repository: str, config: str, kind: str) -> Iterator[Sentence]:
    from .hub import load_hub_split

    data = load_hub_split(repository, config, kind)
    source = f"{repository} ({config})"
    column = next((name for name in _HUB_TAGS if name in data.column_names), None)
    if column is None or "tokens" not in data.column_names:
        raise BitFitError(
            f"{source} has no columns 'tokens' and one of {listed(_HUB_TAGS)}; its columns are "
            f"{listed(data.column_names)}"
        )
    # a list of classes, or of texts
    names = getattr(getattr(data.features[column], "feature", None), "names", None)
    for row, (words, tags) in enumerate(zip(data["tokens"], data[column]), 1):
        where = f"{source}, {kind} row {row}"
        if len(words) != len(tags):
            raise BitFitError(f"{where} has {len(words)} words and {len(tags)} tags")
        written = [str(tag) if names is None else names[tag] for tag in tags]
        # words that are written as one stand there, too, without a tag
        pairs = [(word, tag) for word, tag in zip(words, written) if tag != UNTAGGED]
        if pairs:
            yield str(row), tuple(word for word, _ in pairs), [(tag, where) for _, tag in pairs]
