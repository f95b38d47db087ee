"""Pages and Markdown files from Jinja templates. The only user of jinja2.

A page is one HTML file that needs nothing else: no network, no script. templates/base.html is what all pages share,
macros.html and macros.md are their parts, style.css is their look.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from samtune import __version__
from samtune.files import write_atomic

_NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column of a table. form: format of its numbers, such as ".2f"; None: it holds text."""

    name: str
    form: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of which names its row; None is shown as a dash."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | float | None]]


@dataclass(frozen=True)
class Chart:
    """A drawing of `samtune.report.svg_charts`, the caption below it, and its numbers."""

    svg: str
    caption: str
    table: Table


def write(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Render a template into a file, which is replaced as a whole. Raises OSError."""
    write_atomic(path, render(template, content))


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON into a file, which is replaced as a whole. Raises OSError."""
    write_atomic(path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def render(template: str, content: Mapping[str, Any]) -> str:
    """The text of a template. Text is escaped in .html, and left as it is in .md, which ends with one newline."""
    text = _environment().get_template(template).render(content)
    return text if template.endswith(".html") else text.rstrip("\n") + "\n"


def typeset(text: str) -> str:
    """Prose with a minus sign before numbers, and no line break before a percent sign."""
    return re.sub(r"(?<![\w.)])-(?=\d)", "\N{MINUS SIGN}", text).replace(" %", "\N{NO-BREAK SPACE}%")


def cell(value: str | float | None, form: str | None = None) -> str:
    """The text of a cell in HTML."""
    if value is None:
        return _NONE
    return value if isinstance(value, str) else typeset(format(value, form or ""))


def markdown_cell(value: str | float | None) -> str:
    """The text of a cell in Markdown, with `|` escaped."""
    text = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def number(content: Mapping[str, Any], path: str, form: str, factor: float = 1) -> Markup:
    """A number of a report, named by its path ("test.top1_error"), times a factor, formatted; a dash where it is null.

    The page also keeps path and value, for programs that read it.
    """
    value: Any = content
    for key in path.split("."):
        value = value[int(key) if isinstance(value, list) else key]
    if value is None:
        return Markup(_NONE)
    shown = format(value * factor if factor != 1 else value, form)
    return Markup('<data value="{}" data-path="{}">{}</data>').format(repr(value), path, typeset(shown))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("samtune.report"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "markdown_cell": markdown_cell, "typeset": typeset}
    environment.globals |= {"number": number, "samtune_version": __version__}
    return environment
