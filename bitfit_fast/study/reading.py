"""A study read from a YAML file, or from options.

Every value is read together with its place, so that an error names file, line and key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..data.load import task_name
from ..errors import BitFitError, listed
from ..methods import METHODS
from ..methods.table import option_values
from ..models.loading import DEFAULT_MODEL
from ..selection import parse_layers, parse_terms, refuse_choice
from ..training.backends import check_backend
from ..training.checks import choose_device
from ..training.settings import Settings
from .grid import Budget, Grid, MethodEntry, Search, Study, TaskEntry
from .item import Item, compose
from .terms import PRESETS

__all__ = ["option_of", "read_study", "study_of_options"]

#: Hyper-parameters that a study may give, with how each is read.
_NUMBERS = {
    "epochs": "real", "max_steps": "whole", "batch_size": "whole", "max_length": "whole",
    "warmup": "real", "grad_clip": "real", "eval_every": "whole", "schedule": "text",
    "precision": "text", "backend": "text", "device": "text", "memory": "text",
    "doc_stride": "whole", "max_answer_length": "whole",
}  # fmt: skip
#: Everything that may stand for a study, a grid, a task or a method; the closer one counts.
_TRAINING = ("lr", *_NUMBERS, "seeds")
_VALUES = (*_TRAINING, "data_dir")
_FILES = ("train_file", "validation_file", "text_columns", "label_column")
_GRID = ("title", "models", "tasks", "methods", "sizes", "equal", "time_budget", "lr_search")
_EQUAL = ("steps", "epochs")
_KEEP = ("all", "small", "none")
_JUDGES = ("loss", "metric")


def _values(entries: Mapping[str, Item]) -> dict[str, Any]:
    """Read what `_VALUES` names."""
    read: dict[str, Any] = {}
    for key, item in entries.items():
        if key == "lr":
            read[key] = tuple(dict.fromkeys(_checked(i, "lr", i.real()) for i in item.items()))
        elif key == "seeds":
            read[key] = _seeds(item)
        elif key == "data_dir":
            read[key] = _expanded(item)
        elif key in _NUMBERS:
            read[key] = _checked(item, key, getattr(item, _NUMBERS[key])())
    return read


def _checked(item: Item, key: str, value: Any) -> Any:
    with item.placing():
        Settings(**{key: value})
        if key == "device":
            choose_device(value)
        if key == "backend":
            check_backend(value)
    return value


def _seeds(item: Item) -> tuple[int, ...]:
    """Read seeds: a number of them, or a list."""
    if item.is_list:
        return tuple(dict.fromkeys(_checked(i, "seed", i.whole()) for i in item.items()))
    count = item.whole()
    if not 1 <= count <= 1000:
        raise item.fail(f"the number of seeds must be from 1 to 1000, not {count}")
    return tuple(range(count))


def _expanded(item: Item) -> str:
    text = os.path.expanduser(os.path.expandvars(item.text()))
    if unset := re.search(r"\$\{?(\w+)", text):
        raise item.fail(f"the environment variable {unset[1]} is not set")
    return text


def _sizes(item: Item) -> tuple[float | int, ...]:
    """Read sizes: shares up to 1, and counts above."""
    found: list[float | int] = []
    for part in item.items():
        size = part.real()
        if not 0 < size < 2**31 or (size > 1 and size != int(size)):
            raise part.fail(f"a size is a share above 0 and up to 1, or a count, not {size:g}")
        found.append(int(size) if size > 1 else size)
    return tuple(dict.fromkeys(found))


def _budgets(item: Item) -> tuple[Budget, ...]:
    budgets = []
    for key, values in item.mapping(("seconds", "shares")).items():
        for value in values.items():
            number = value.real()
            if not 0 < number < 1e9:
                raise value.fail(f"a time budget is above 0, not {number:g}")
            budgets.append(Budget(key.replace("shares", "share"), number))
    return tuple(dict.fromkeys(budgets))


def _search(item: Item) -> Search:
    entries = item.mapping(("max_steps", "held_back", "by"))
    read: dict[str, Any] = {}
    if "max_steps" in entries:
        read["max_steps"] = _checked(
            entries["max_steps"], "max_steps", entries["max_steps"].whole()
        )
    if "held_back" in entries:
        read["held_back"] = entries["held_back"].real()
        if not 0 < read["held_back"] < 1:
            raise entries["held_back"].fail(
                f"the share held back is between 0 and 1, not {read['held_back']:g}"
            )
    if "by" in entries:
        read["by"] = entries["by"].one_of(_JUDGES)
    return Search(**read)


def _task(item: Item) -> TaskEntry:
    if not item.is_mapping:
        return TaskEntry(item.text(), _task_name(item))
    entries = item.mapping(("name", "task", *_FILES, *_VALUES))
    values = _values(entries)
    data_dir = values.pop("data_dir", None)
    given = [key for key in _FILES if key in entries]
    if ("task" in entries) == ("train_file" in entries):
        raise item.fail("a task has either the key task or the keys train_file, validation_file")
    if "task" in entries:
        if given:
            raise entries[given[0]].fail(f"the task '{entries['task'].text()}' takes no files")
        name = _task_name(entries["task"])
        label = entries["name"].text() if "name" in entries else entries["task"].text()
        return TaskEntry(label, name, (), data_dir, values)
    if "validation_file" not in entries:
        raise item.fail("a task of files needs a validation_file")
    files: dict[str, Any] = {}
    for key in given:
        if key == "text_columns":
            files[key] = tuple(part.text() for part in entries[key].items())
        else:
            files[key] = _expanded(entries[key]) if key.endswith("file") else entries[key].text()
    label = entries["name"].text() if "name" in entries else Path(files["train_file"]).stem
    return TaskEntry(label, None, tuple(files.items()), None, values)


def _task_name(item: Item) -> str:
    name = item.text()
    with item.placing():
        return task_name(name)


def _method(item: Item, tasks: Collection[str]) -> MethodEntry:
    if not item.is_mapping:
        method, terms = _method_name(item)
        return MethodEntry(item.text(), method, terms)
    known = dict.fromkeys(name for row in METHODS.values() for name in row.options)
    keys = ("name", "method", "terms", "layers", "head", "tasks", *_TRAINING, *known)
    entries = item.mapping(keys)
    named = entries.get("method", entries.get("name"))
    if named is None:
        raise item.fail("a method needs the key method")
    method, terms = _method_name(named)
    layers = None
    if "terms" in entries:
        terms = _parsed(entries["terms"], parse_terms)
    if "layers" in entries:
        layers = _parsed(entries["layers"], parse_layers)
    if method != "bitfit":
        with entries.get("terms", entries.get("layers", item)).placing():
            refuse_choice(method, terms, layers)
    options = {}
    for name in known:
        if name in entries:
            value = entries[name].real()
            options[name] = int(value) if value.is_integer() else value
            with entries[name].placing():
                option_values(method, METHODS[method].options, {name: options[name]})
    by_task = {}
    if "tasks" in entries:
        for label, values in entries["tasks"].mapping(tasks).items():
            by_task[label] = _values(values.mapping(_TRAINING))
    return MethodEntry(
        label=(entries.get("name") or named).text(),
        method=method,
        terms=terms,
        layers=layers,
        head=entries["head"].flag() if "head" in entries else True,
        options=tuple(options.items()),
        values=_values(entries),
        by_task=by_task,
    )


def _parsed(item: Item, parse: Any) -> str:
    text = ",".join(part.text() for part in item.items())
    with item.placing():
        parse(text)
    return text


def _method_name(item: Item) -> tuple[str, str]:
    name = item.text()
    if name in PRESETS:
        return PRESETS[name]
    if name not in METHODS:
        raise item.fail(
            f"unknown method '{name}'; valid ones are {listed((*METHODS, *PRESETS), 40)}"
        )
    return name, "all"


def _distinct(entries: list[Any], items: list[Item]) -> tuple[Any, ...]:
    seen: set[str] = set()
    for entry, item in zip(entries, items):
        if entry.label in seen:
            raise item.fail(f"two entries have the name '{entry.label}'; give one another name")
        seen.add(entry.label)
    return tuple(entries)


def _grid(item: Item, above: Mapping[str, Item]) -> Grid:
    """Read a grid; what it does not say is that of the study."""
    own = item.mapping((*_GRID, *_VALUES))
    either = {"sizes", "time_budget"}
    if either & own.keys():
        # what is closest counts, of these two as of one key
        above = {key: value for key, value in above.items() if key not in either}
    entries = {**above, **own}
    for key in ("tasks", "methods"):
        if key not in entries:
            raise item.fail(f"the key {key} is missing")
    items = entries["tasks"].items()
    tasks = _distinct([_task(part) for part in items], items)
    items = entries["methods"].items()
    methods = _distinct([_method(part, [t.label for t in tasks]) for part in items], items)
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    if "models" in entries:
        models = tuple(dict.fromkeys(_expanded(part) for part in entries["models"].items()))
    if "sizes" in entries and "time_budget" in entries:
        raise entries["time_budget"].fail("a grid has sizes or a time budget, not both")
    return Grid(
        title=entries["title"].text() if "title" in own else "",
        models=models,
        tasks=tasks,
        methods=methods,
        sizes=_sizes(entries["sizes"]) if "sizes" in entries else (1.0,),
        equal=entries["equal"].one_of(_EQUAL) if "equal" in entries else "steps",
        budgets=_budgets(entries["time_budget"]) if "time_budget" in entries else (),
        search=_search(entries["lr_search"]) if "lr_search" in entries else Search(),
        values=_values(entries),
    )


def _study(root: Item, name: str) -> Study:
    top = root.mapping(("name", "description", "keep", "grids", *_GRID, *_VALUES))
    if "name" in top:
        name = top["name"].text()
    if "grids" in top:
        above = {k: v for k, v in top.items() if k in (*_GRID, *_VALUES) and k != "title"}
        grids = tuple(_grid(part, above) for part in top["grids"].items())
    else:
        grids = (_grid(root.only((*_GRID, *_VALUES)), {}),)
    return Study(
        name=name,
        title=top["title"].text() if "title" in top else name,
        description=top["description"].text() if "description" in top else "",
        grids=grids,
        keep=top["keep"].one_of(_KEEP) if "keep" in top else "all",
    )


def read_study(path: str | os.PathLike[str]) -> Study:
    """Read a study from a YAML file.

    Parameters
    ----------
    path : str or PathLike
        The file. At the top stand `name`, `title`, `description`, `keep` and either one grid
        or a list `grids`, whose entries fall back on what stands at the top. A grid has
        `models`, `tasks`, `methods`, `seeds`, `sizes` or `time_budget`, `equal`, `lr_search`
        and hyper-parameters; a list of rates as `lr` is searched.

    Raises
    ------
    BitFitError
        With file, line and key, for anything that is not known or not possible.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BitFitError(f"{path} is no text in UTF-8") from None
    except OSError as error:
        raise BitFitError(f"the study {path} cannot be read: {error.strerror}") from None
    return _study(compose(text, str(path)), path.stem)


def option_of(key: str) -> str:
    """Return the command line's option that stands for a key of a study."""
    repeated = {"models": "model", "tasks": "task", "methods": "method", "sizes": "size"}
    return f"--{repeated.get(key, key.replace('_', '-'))}"


def study_of_options(name: str, **options: Any) -> Study:
    """Make a study of one grid from options, named as the keys of a file are.

    Options that are None or empty are left out.

    Raises
    ------
    BitFitError
        As `read_study`, with the option in the place of file, line and key.
    """
    given = {key: value for key, value in options.items() if value not in (None, [], ())}
    text = yaml.safe_dump({"name": name, **given}, sort_keys=False)
    return _study(compose(text, option_of), name)
