"""A report as a list of blocks, and the two ways to write them: HTML and Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

__all__ = ["Block", "Heading", "Picture", "Table", "Text", "Value", "html_page", "markdown_page"]


@dataclass(frozen=True)
class Value:
    """One entry of a table: text, what follows it in small type, and whether it is the best."""

    text: str
    small: str = ""
    best: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading; level 2 is the highest below the page's own."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table whose first `names` columns are names and the others numbers.

    `wrapped` is for sentences: entries may then take several lines.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    caption: str = ""
    names: int = 1
    wrapped: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure by its files' stem."""

    stem: str
    title: str
    caption: str


Block = Heading | Text | Table | Picture

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6470; --page: #ffffff;
  --line: #d5dae0; --soft: #f4f6f8; --best: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #a3acb8; --page: #15181c;
  --line: #363c45; --soft: #1e2329; --best: #86c1ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 74rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p { max-width: 48rem; margin: .5rem 0 .9rem; overflow-wrap: anywhere; }
nav { margin: 1rem 0; font-size: .92rem; }
nav a { color: var(--best); margin-right: 1.1rem; white-space: nowrap; }
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--dim); font-size: .85rem;
  padding: .4rem 0 0; }
th, td { padding: .32rem .7rem; text-align: right; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); color: var(--dim); font-weight: 600;
  vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--soft); }
tbody tr:last-child td { border-bottom: 1px solid var(--line); }
.name { text-align: left; }
td { white-space: nowrap; }
.wrapped td { white-space: normal; overflow-wrap: anywhere; }
td b { color: var(--best); }
small { color: var(--dim); font-size: .8em; white-space: nowrap; }
figure { margin: .8rem 0 1.8rem; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
figcaption { color: var(--dim); font-size: .88rem; max-width: 48rem; margin-top: .4rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; } figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } table { font-size: 8pt; } th, td { padding: .2rem .4rem; } }
"""


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _html_table(table: Table) -> str:
    def kind(column: int) -> str:
        return ' class="name"' if column < table.names else ""

    head = "".join(f"<th{kind(i)}>{escape(text)}</th>" for i, text in enumerate(table.head))
    lines = []
    for row in table.rows:
        cells = []
        for i, value in enumerate(row):
            text = escape(value.text)
            text = f"<b>{text}</b>" if value.best else text
            small = f" <small>{escape(value.small)}</small>" if value.small else ""
            cells.append(f"<td{kind(i)}>{text}{small}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    body = "\n".join(lines)
    style = ' class="wrapped"' if table.wrapped else ""
    return (
        f'<div class="scroll"><table{style}>{caption}\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def html_page(title: str, blocks: Sequence[Block], figures: Path) -> str:
    """Return one page that needs nothing else: style and pictures are in it.

    Parameters
    ----------
    title : str
        Of the page.
    blocks : sequence of Block
        In order.
    figures : Path
        Folder of the pictures' SVG files.
    """
    parts: list[str] = []
    places: list[str] = []
    for block in blocks:
        if isinstance(block, Heading):
            text, anchor = escape(block.text), ""
            if block.level == 2:
                # grids may share a title
                name = f"{len(places) + 1}-{_anchor(block.text)}"
                places.append(f'<a href="#{name}">{text}</a>')
                anchor = f' id="{name}"'
            parts.append(f"<h{block.level}{anchor}>{text}</h{block.level}>")
        elif isinstance(block, Text):
            parts.append(f"<p>{escape(block.text)}</p>")
        elif isinstance(block, Table):
            parts.append(_html_table(block))
        else:
            data = base64.b64encode((figures / f"{block.stem}.svg").read_bytes()).decode("ascii")
            parts.append(
                f'<figure><img alt="{escape(block.title)}" '
                f'src="data:image/svg+xml;base64,{data}">'
                f"<figcaption><strong>{escape(block.title)}.</strong> {escape(block.caption)}"
                "</figcaption></figure>"
            )
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<nav>{' '.join(places)}</nav>\n{body}\n</body>\n</html>\n"
    )


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _markdown_table(table: Table) -> str:
    lines = ["| " + " | ".join(_plain(text) for text in table.head) + " |"]
    lines.append(
        "|" + "|".join("---" if i < table.names else "---:" for i in range(len(table.head))) + "|"
    )
    for row in table.rows:
        cells = []
        for value in row:
            text = f"**{_plain(value.text)}**" if value.best else _plain(value.text)
            cells.append(f"{text} {_plain(value.small)}".strip())
        lines.append("| " + " | ".join(cells) + " |")
    if table.caption:
        lines += ["", _plain(table.caption)]
    return "\n".join(lines)


def markdown_page(title: str, blocks: Sequence[Block], figures: str) -> str:
    """Return the same in Markdown, with pictures by their PNG files in the folder `figures`."""
    parts = [f"# {_plain(title)}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {_plain(block.text)}")
        elif isinstance(block, Text):
            parts.append(_plain(block.text))
        elif isinstance(block, Table):
            parts.append(_markdown_table(block))
        else:
            parts.append(f"![{_plain(block.title)}]({figures}/{block.stem}.png)")
            parts.append(
                f"**{_plain(block.title)}.** {_plain(block.caption)} "
                f"([SVG]({figures}/{block.stem}.svg))"
            )
    return "\n\n".join(parts) + "\n"
