"""Values of a YAML file with their places, so that an error names file, line and key."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator

import yaml

from ..errors import BitFitError, listed

__all__ = ["Item", "compose"]


class Item:
    """A value of a YAML file, with its place.

    Parameters
    ----------
    node : yaml.Node
        The value.
    source : str or callable
        What errors call the file, or a key of it that stands for an option and has no line.
    key : str
        The key that it stands under; empty for a whole file.
    """

    def __init__(self, node: yaml.Node, source: str | Callable[[str], str], key: str) -> None:
        self.node, self.source, self.key = node, source, key

    def fail(self, message: str) -> BitFitError:
        """Return an error that names file, line and key, or the option."""
        if callable(self.source):
            return BitFitError(f"{self.source(self.key)}: {message}" if self.key else message)
        line = self.node.start_mark.line + 1
        key = f", {self.key}" if self.key else ""
        return BitFitError(f"{self.source}, line {line}{key}: {message}")

    @contextlib.contextmanager
    def placing(self) -> Iterator[None]:
        """Let errors of what knows nothing of files name this place."""
        try:
            yield
        except BitFitError as error:
            raise self.fail(str(error)) from None

    @property
    def is_mapping(self) -> bool:
        """Whether it has keys and values."""
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        """Whether it is a list."""
        return isinstance(self.node, yaml.SequenceNode)

    def mapping(self, known: Collection[str] | None = None) -> dict[str, Item]:
        """Return the entries of a mapping; keys that are not `known` are refused."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.fail(f"expected keys and values, found {self._shown()}")
        found: dict[str, Item] = {}
        for key_node, node in self.node.value:
            at_key = Item(key_node, self.source, self.key)
            key = at_key.text()
            if known is not None and key not in known:
                raise at_key.fail(f"unknown key '{key}'; valid ones are {listed(known, 40)}")
            if key in found:
                raise at_key.fail(f"'{key}' is given twice")
            found[key] = Item(node, self.source, key)
        return found

    def items(self) -> list[Item]:
        """Return the entries of a list; a single value counts as a list of one."""
        if not isinstance(self.node, yaml.SequenceNode):
            return [self]
        if not self.node.value:
            raise self.fail("the list is empty")
        return [Item(node, self.source, self.key) for node in self.node.value]

    def only(self, keys: Collection[str]) -> Item:
        """Return the mapping with these of its keys alone."""
        node = self.node
        rest = [(key, value) for key, value in node.value if key.value in keys]
        less = yaml.MappingNode(node.tag, rest, node.start_mark, node.end_mark)
        return Item(less, self.source, self.key)

    def _shown(self) -> str:
        if isinstance(self.node, yaml.ScalarNode):
            return f"'{self.node.value}'" if self.node.value else "nothing"
        return "a list" if isinstance(self.node, yaml.SequenceNode) else "keys and values"

    def text(self) -> str:
        """Return a text that is not empty."""
        if not isinstance(self.node, yaml.ScalarNode) or not self.node.value:
            raise self.fail(f"expected text, found {self._shown()}")
        return self.node.value

    def real(self) -> float:
        """Return a number."""
        # YAML 1.1 takes 1e-3 for text, and nobody who writes it means that
        try:
            return float(self.text())
        except ValueError:
            raise self.fail(f"expected a number, found {self._shown()}") from None

    def whole(self) -> int:
        """Return a whole number."""
        if not re.fullmatch(r"[+-]?\d+", self.text()):
            raise self.fail(f"expected a whole number, found {self._shown()}")
        return int(self.text())

    def flag(self) -> bool:
        """Return what is true or false."""
        value = {"true": True, "yes": True, "false": False, "no": False}.get(self.text().lower())
        if value is None:
            raise self.fail(f"expected true or false, found {self._shown()}")
        return value

    def one_of(self, valid: Collection[str]) -> str:
        """Return a text that is one of these."""
        if self.text() not in valid:
            raise self.fail(f"'{self.text()}' is not one of {listed(valid)}")
        return self.text()


def compose(text: str, source: str | Callable[[str], str]) -> Item:
    """Read YAML; errors name `source` as those of an `Item` do.

    Raises
    ------
    BitFitError
        For what is no YAML, or empty.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise BitFitError(f"{source}{line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise BitFitError(f"{source} is no YAML: {str(error).splitlines()[0]}") from None
    if node is None:
        raise BitFitError(f"{source} is empty")
    return Item(node, source, "")
