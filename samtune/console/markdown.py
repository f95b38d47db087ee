"""Markdown -> text for a terminal. Loaded when a page is printed: it takes a fifth of a second."""

import re
from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.theme import Theme

_WIDTH = 100  # characters of a line, at most: longer ones are hard to read
_STYLES = {"h1": "bold underline", "h2": "bold", "code": "cyan", "code_block": "none"}
_THEME = Theme({f"markdown.{element}": style for element, style in _STYLES.items()})


class _LeftHeading(Heading):
    """A heading at the left margin. (rich centres headings.)"""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Page(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "heading_open": _LeftHeading}


def render(text: str) -> str:
    """A page for the width of the terminal, with colours if stdout is one."""
    console = Console(highlight=False, emoji=False, theme=_THEME)
    console.width = min(console.width, _WIDTH)
    if not console.is_terminal or console.no_color:
        text = _keep_backquotes(text)
    with console.capture() as captured:
        console.print(_Page(text, code_theme="ansi_light", hyperlinks=False))
    rendered = "".join(line.rstrip() + "\n" for line in captured.get().rstrip().split("\n"))
    return rendered if console.encoding.startswith("utf") else rendered.replace("•", "-")


def _keep_backquotes(text: str) -> str:
    """Have inline code keep its backquotes, where no colour marks it."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"`([^`]+)`", r"`` `\1` ``", prose) for prose in parts[::2]]
    return "".join(parts)
