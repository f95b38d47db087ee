"""Resuming an interrupted run: its settings, and which of them may differ."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samtune.config import loading
from samtune.config.run_config import RunConfig, flag_name
from samtune.errors import CheckpointError, UsageError, did_you_mean
from samtune.runs.folder import has_checkpoints, holds_run, read_report, read_settings, read_status

RUNTIME_ONLY = RunConfig.settings(affects="nothing")
"""Settings that may differ from before without --allow-change."""
_IMMUTABLE = RunConfig.settings(fixed=True)


@dataclass(frozen=True)
class Resumed:
    """A run to resume. changed: settings that affect numbers and differ, as (before, now).

    other_devices: whether the number of devices may differ.
    """

    folder: Path
    changed: Mapping[str, tuple[Any, Any]]
    other_devices: bool = False


def resolve_resume(
    recipe: Path | None, flags: Mapping[str, Any], allow_change: Collection[str]
) -> tuple[RunConfig, Resumed | None]:
    """The settings of a run to resume, which are those it was started with; (settings, None) for a new run.

    Settings that are given must equal those of the run, unless they affect no number or are in allow_change.

    Raises:
        UsageError: no --output, no run in it and no settings for one, or a name in allow_change that is no setting or
            cannot change.
        CheckpointError: settings that differ, with a table of them; a damaged config.toml.
    """
    for key in allow_change:
        if key not in RunConfig.model_fields or key in _IMMUTABLE:
            _refuse_to_allow(key)
    output = loading.given_settings(recipe, flags).get("output")
    if output is None:
        raise UsageError("--resume without --output", hint="give the folder of the run by --output")
    folder = Path(output)
    if not holds_run(folder) and has_checkpoints(folder):
        raise CheckpointError(
            f"run {folder} has lost its settings",
            "config.toml is not there",
            "write it again: manifest.json of a checkpoint has them as `config`",
        )
    if not holds_run(folder):
        if recipe is None and not {"model", "dataset"} <= flags.keys():
            raise UsageError(
                f"there is no run in {folder}", "a new run needs a model and a data set", "`samtune runs` lists runs"
            )
        return loading.load(recipe, flags), None
    try:
        stored, origins = read_settings(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the settings of run {folder} cannot be read",
            f"config.toml: {error}",
            "fix it: manifest.json of a checkpoint has them as `config`",
        ) from None
    if "sam_schedule" in allow_change:
        allow_change = {*allow_change, "sam_start", "sam_end", "sam_every"}  # what it stands for
    settings, before, keys = loading.load_over(stored, origins, recipe, flags)
    changed = {key: (getattr(before, key), getattr(settings, key)) for key in keys if key != "output"}
    if not set(changed) <= RUNTIME_ONLY | set(allow_change):
        raise CheckpointError(
            f"run {folder} was started with other settings",
            _table(changed, allow_change),
            "leave them out, or start a new run with another --output",
        )
    differ = {key: values for key, values in changed.items() if key not in RUNTIME_ONLY}
    return settings, Resumed(folder, differ, not {"gpus", "processes"}.isdisjoint(allow_change))


def _refuse_to_allow(key: str) -> None:
    if key in RunConfig.model_fields:
        raise UsageError(
            f"--allow-change {key}: {flag_name(key)} cannot change within a run",
            "weights, order or splits depend on it",
            "start a new run with another --output",
        )
    raise UsageError(
        f"--allow-change {key}: there is no such setting",
        hint=did_you_mean(key.removeprefix("--").replace("-", "_"), RunConfig.model_fields)
        or "give a setting's name, as in config.toml",
    )


def _table(changed: Mapping[str, tuple[Any, Any]], allow_change: Collection[str]) -> str:
    rows = [("setting", "before", "now", "")]
    for key in RunConfig.model_fields:
        if key in changed:
            before, now = (str(value) for value in changed[key])
            allowed = key in RUNTIME_ONLY or key in allow_change
            note = "allowed" if allowed else "cannot change" if key in _IMMUTABLE else f"--allow-change {key} lets it"
            rows.append((key, before, now, note))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])) for row in rows
    ]
    return "\n        ".join(line.rstrip() for line in lines)


def finished_report(folder: Path) -> dict[str, Any] | None:
    """The report of a run that is done; None for any other run."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # the run makes again what cannot be read
        return read_report(folder) if read_status(folder)["state"] == "done" else None
    return None
