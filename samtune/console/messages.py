"""Messages on stderr: notes, warnings, errors."""

import re
from functools import partial

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape

_HANG = 12  # characters: a longer label does not indent the wrapped lines below it

_console = partial(Console, stderr=True, highlight=False, soft_wrap=True, emoji=False)
stderr = _console()


def configure(*, quiet: bool) -> None:
    """Set whether notes and progress are left out, as in all ranks but the first; errors are always printed."""
    stderr.quiet = quiet


def info(text: str) -> None:
    """Print a note."""
    _print(text)


def warn(text: str, *, on_any_rank: bool = False) -> None:
    """Print a warning: the user should look at it, though the command continues."""
    _print(text, "warning:", "yellow", always=on_any_rank)


def error(text: str) -> None:
    """Print the error that ends the command."""
    _print(text, "error:", "red", always=True)


def _print(text: str, label: str = "", style: str = "", *, always: bool = False) -> None:
    """Wrap lines at words on a terminal; elsewhere, where programs search them, lines stay whole."""
    console = _console() if always else stderr
    message = f"{label} {text}" if label else text
    if console.is_terminal:
        message = "\n".join(wrapped(line, console.width) for line in message.split("\n"))
    console.print(f"[{style}]{label}[/]{escape(message[len(label) :])}" if label else escape(message))


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
