"""Messages on stderr: notes, warnings, errors."""

import re

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape

_HANG = 12  # characters: a longer label does not indent the wrapped lines below it

stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def configure(*, quiet: bool) -> None:
    """Set whether notes and progress are left out, as in all ranks but the first; errors are always printed."""
    stderr.quiet = quiet


def info(text: str) -> None:
    """Print a note."""
    _print(stderr, text)


def warn(text: str, *, on_any_rank: bool = False) -> None:
    """Print a warning: the user should look at it, though the command continues."""
    _print(_never_quiet() if on_any_rank else stderr, text, "warning:", "yellow")


def error(text: str) -> None:
    """Print the error that ends the command."""
    _print(_never_quiet(), text, "error:", "red")


def _print(console: Console, text: str, label: str = "", style: str = "") -> None:
    """Wrap lines at words on a terminal; elsewhere, where programs search them, lines stay whole."""
    message = f"{label} {text}" if label else text
    if console.is_terminal:
        message = "\n".join(wrapped(line, console.width) for line in message.split("\n"))
    console.print(f"[{style}]{label}[/]{escape(message[len(label) :])}" if label else escape(message))


def _never_quiet() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def wrapped(line: str, width: int) -> str:
    """A line broken between words, indented to its label: "data    ...", "  hint:  ...".

    Words, however long, and commands in backquotes are not broken.
    """
    label = re.match(r"\s*[\w-]+(?::\s+|\s{2,})|\s+", line)
    hang = len(label[0]) if label and len(label[0]) <= _HANG and 2 * len(label[0]) <= width else 2
    lines = [""]
    for word in re.findall(r"\s*(?:[(]?`[^`]*`\S*|\S+)", line):
        if cell_len(lines[-1] + word) <= width or len(lines[-1]) <= hang:
            lines[-1] += word
        else:
            lines.append(" " * hang + word.lstrip())
    return "\n".join(lines)
