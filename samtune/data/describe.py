"""Data sets for `samtune datasets`: names, classes, splits, citation, licence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samtune.config.dataset_defaults import DATASET_DEFAULTS
from samtune.data import source, tables
from samtune.data.catalog import CATALOG, Dataset
from samtune.data.split_roles import ROLES


def names() -> list[dict[str, Any]]:
    """One object for each named data set, from the catalog alone; a count that is not known, or not there, is null."""
    return [
        {
            "name": row.name,
            "classes": row.classes,
            **{role: row.counts.get(role) for role in ROLES},
            "licence": row.licence,
            "source": row.origin,
        }
        for row in CATALOG.values()
    ]


def describe(dataset: str) -> dict[str, Any]:
    """Classes, splits, policy, citation and licence of a named data set, a path, or an id of the hub.

    What is on this machine is opened; for the rest the catalog is used. Nothing is downloaded.
    Raises DataError for what is no data set, or a damaged one.
    """
    located = source.locate(dataset)
    row = located if isinstance(located, Dataset) else Dataset(dataset, "")
    is_local = isinstance(located, Path) or row.is_installed or bool(row.hub_id and tables.repository(row).is_cached)
    about: dict[str, Any] = {
        "name": row.name,
        "source": str(located) if isinstance(located, Path) else row.origin,
        "here": is_local,
        "classes": row.classes or None,
        "splits": dict(row.counts) or None,
        "split_policy": _policy({role: names.split("+") for role, names in row.splits.items()}) if row.splits else None,
        "metric": row.metric if row.citation != "not stated" else None,
        "note": row.note or None,
        "citation": row.citation,
        "licence": row.licence,
        "defaults": dict(DATASET_DEFAULTS.get(row.name, {})),
        "class_names": None,
    }
    if not is_local:
        return about
    data = source.open_source(dataset)
    return about | {
        "name": data.name,
        "classes": len(data.class_names),
        "splits": {name: len(split) for name, split in data.splits.items()},
        "split_policy": _policy(data.parts),
        "note": " ".join(filter(None, (row.note, *data.notes))) or None,
        "class_names": list(data.class_names),
    }


def to_rows(description: Mapping[str, Any]) -> dict[str, str]:
    """The content of `describe` as rows of a table; what is unknown is left out."""
    known = {key: value for key, value in description.items() if value not in (None, {}) and key != "name"}
    rows = {key.replace("_", " "): value for key, value in known.items()}
    rows["here"] = "yes" if description["here"] else "no: a run fetches it, once"
    for key in ("splits", "defaults"):
        if key in rows:
            rows[key] = ", ".join(f"{name} {value}" for name, value in rows[key].items())
    if "class names" in rows:
        rows["class names"] = ", ".join(rows["class names"])
    return {key: str(value) for key, value in rows.items()}


def _policy(parts: Mapping[str, Any]) -> str:
    roles = [f"{role}: its split {'+'.join(names)}" for role, names in parts.items()]
    if "validation" not in parts:
        roles.append("validation: a stratified part of train (--val-fraction)")
    if "test" not in parts:
        roles.append("test: none")
    return "; ".join(roles)
