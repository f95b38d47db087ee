"""Content -> one html file that needs nothing else: no network, no script. The only user of jinja2.

templates/base.html is what all pages share, macros.html how their parts are set, style.css how they look. A page of
another kind is a template that extends base.html, and fills its blocks from the content that it is given.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from samtune import __version__
from samtune.files import write_atomic

_NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column of a table. form: how its numbers are written, such as ".2f"; None: it holds text."""

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
    """A drawing of `samtune.report.svg_charts`, what is said below it, and its numbers."""

    svg: str
    caption: str
    table: Table


def write(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Write the page that a template makes of its content. Raises OSError."""
    write_atomic(path, render(template, content))  # whoever looks at a page that is written again sees a whole one


def render(template: str, content: Mapping[str, Any]) -> str:
    """The same, as text."""
    return _environment().get_template(template).render(content)


def typeset(text: str) -> str:
    """Prose with the signs of print: a minus before a number, and no break before a percent sign."""
    return re.sub(r"(?<![\w.)])-(?=\d)", "\N{MINUS SIGN}", text).replace(" %", "\N{NO-BREAK SPACE}%")


def cell(value: str | float | None, form: str | None = None) -> str:
    """A cell in words."""
    if value is None:
        return _NONE
    return value if isinstance(value, str) else typeset(format(value, form or ""))


def number(content: Mapping[str, Any], path: str, form: str, factor: float = 1) -> Markup:
    """A number of a report, named by its path ("test.top1_error"), times a factor, in a form; a dash where it is null.

    The page keeps path and value beside what is shown, for programs that read it.
    """
    value: Any = content
    for key in path.split("."):
        value = value[int(key) if isinstance(value, list) else key]
    if value is None:
        return Markup(_NONE)
    shown = format(value * factor if factor != 1 else value, form)
    return Markup('<data value="{}" data-path="{}">{}</data>').format(repr(value), path, typeset(shown))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("samtune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "typeset": typeset}
    environment.globals |= {"number": number, "samtune_version": __version__}
    return environment
