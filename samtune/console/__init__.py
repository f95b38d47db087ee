"""All terminal output: notes and progress on stderr, results on stdout. The only user of rich."""

from samtune.console.messages import configure, error, info, warn, wrapped
from samtune.console.progress import RunProgress, RunsProgress
from samtune.console.results import (
    is_watched,
    print_json,
    print_lines,
    print_markdown,
    print_prose,
    print_rows,
    print_table,
    watch_rows,
)

__all__ = [
    "RunProgress",
    "RunsProgress",
    "configure",
    "error",
    "info",
    "is_watched",
    "print_json",
    "print_lines",
    "print_markdown",
    "print_prose",
    "print_rows",
    "print_table",
    "warn",
    "watch_rows",
    "wrapped",
]
