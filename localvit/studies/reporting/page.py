"""Sections of text, tables and pictures: as Markdown, as a page that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import groupby
from string import Template

from rich import table as rich_table
from rich.text import Text as RichText


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    small: bool = False
    verdict: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A table; `words` if its cells are words, that may be broken over lines."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=list)
    words: bool = False


@dataclass(frozen=True)
class Code:
    """Lines as they are, behind a title that opens them if there is one."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """SVG with what a reader sees and what a listener hears. It is left out of Markdown."""

    svg: str
    label: str
    caption: str


Block = Text | Bullets | Table | Code | Picture


@dataclass(frozen=True)
class Section:
    """A heading, or none, and what follows."""

    title: str
    blocks: Sequence[Block]


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The sections without their pictures; one with nothing else is left out."""
    parts = [f"# {title}"]
    for section in sections:
        blocks = [_markdown(block) for block in section.blocks if not isinstance(block, Picture)]
        if blocks and section.title:
            parts.append(f"## {section.title}")
        parts += blocks
    return "\n\n".join(parts) + "\n"


def as_html(title: str, sections: Sequence[Section]) -> str:
    """One page with everything in it; it loads nothing."""
    body = []
    for section in sections:
        if section.title:
            body.append(f"<h2>{html.escape(section.title)}</h2>")
        for drawn, blocks in groupby(section.blocks, lambda block: isinstance(block, Picture)):
            inner = "\n".join(_html(block) for block in blocks)
            body.append(f'<div class="figures">{inner}</div>' if drawn else inner)
    page = Template(
        resources.files("localvit.studies.reporting").joinpath("report.html").read_text(encoding="utf-8")
    )
    return page.substitute(title=html.escape(title), body="\n".join(body))


def as_rich(title: str, table: Table) -> rich_table.Table:
    """A table for a terminal."""
    made = rich_table.Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(table.head):
        made.add_column(name, justify="right" if i and not table.words else "left")
    for row in table.rows:
        made.add_row(*map(RichText, row))  # Text: brackets are no markup here
    return made


def markdown_table(table: Table) -> str:
    """As GitHub reads it."""
    lines = (table.head, ["---"] * len(table.head), *table.rows)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def _markdown(block: Block) -> str:
    match block:
        case Text(text, verdict=verdict):
            return f"**{text}**" if verdict else text
        case Bullets(items, warning):
            return "\n".join(f"- {'**Warning:** ' if warning else ''}{item}" for item in items)
        case Table():
            return markdown_table(block)
        case Code(text, title):
            lines = "\n".join(f"    {line}" for line in text.rstrip().splitlines())
            return f"{title}:\n\n{lines}" if title else lines
        case Picture():
            return ""


def _html(block: Block) -> str:
    match block:
        case Text(text, small, verdict):
            style = ' class="verdict"' if verdict else ' class="small"' if small else ""
            return f"<p{style}>{html.escape(text)}</p>"
        case Bullets(items, warning):
            kind = ' class="warning"' if warning else ""
            return f"<ul{kind}>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Table(head, rows, words):
            lines = _row(head, "th") + "".join(_row(row, "td") for row in rows)
            return f'<div class="wide{" words" if words else ""}"><table>{lines}</table></div>'
        case Code(text, title):
            code = f"<pre>{html.escape(text)}</pre>"
            return f"<details><summary>{html.escape(title)}</summary>{code}</details>" if title else code
        case Picture(svg, label, caption):
            caption_line = f"<figcaption>{html.escape(caption)}</figcaption>"
            return f'<figure role="img" aria-label="{html.escape(label)}">{svg}{caption_line}</figure>'


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
