"""What is wrong with a data set, before a run finds out: unreadable images, duplicates, classes, odd labels."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data import depth
from samtune.data.cache import Progress
from samtune.data.check import duplicates, scan
from samtune.data.decode import DecodeRule
from samtune.data.source import LabelledDataset, open_source
from samtune.data.split_roles import DataSelection
from samtune.distributed import device
from samtune.errors import DataError, plural, shorten

_IMBALANCE = 10.0  # largest class over smallest, from which on it is reported
_MIN_SIDE = 256  # pixels of a picture's shorter side that are enough to see what it is
_SHOWN = 20  # findings of a kind that are printed; --json has all


def check(config: RunConfig, *, workers: int | None, progress: Progress) -> dict[str, Any]:
    """Look at every image of every split of a config's data set.

    Returns what --json prints: splits (images, classes, modes, sizes in pixels), unreadable images with their reason,
    images of one colour, groups of duplicates (kind exact or near, across_splits, labels_differ), oddities in words.
    near_duplicates is False if they could not be looked for.
    Raises DataError where training could open no data set, ModelError where the hub cannot be reached.
    """
    console.info(f"reading data set {config.dataset} ...")
    data = open_source(config.dataset, DataSelection.of(config))
    train = data.splits["train"]
    ranges = depth.value_ranges(train, train.labelled)
    rule = DecodeRule(_MIN_SIDE, config.max_megapixels, ranges)
    total = sum(map(len, data.splits.values()))
    console.info(f"checking {total} images ...")
    if not scan.can_see_likeness():
        console.warn(
            "only equal files are found as duplicates: what looks alike needs the package imagehash\n"
            "  hint:  pip install imagehash (extra: check)"
        )
    if workers is None:
        workers = device.available_cpus() if device.available_cpus() > 1 else 0
    pictures: list[scan.Picture] = []
    for split in data.splits.values():
        pictures += scan.scan(split, rule, workers=workers, progress=progress)
    groups = [("exact", group) for group in duplicates.exact(pictures)]
    groups += [("near", group) for group in duplicates.near(pictures)]
    of_duplicates = [_group(kind, group, data.class_names) for kind, group in groups]
    splits = {name: _split(data, [p for p in pictures if p.split == name]) for name in data.splits}
    return {
        "dataset": data.name,
        "source": data.origin,
        "classes": len(data.class_names),
        "splits": splits,
        "unreadable": [_location(p, data.class_names) | {"reason": p.unreadable} for p in pictures if p.unreadable],
        "one_colour": [_location(p, data.class_names) for p in pictures if p.one_colour],
        "near_duplicates": scan.can_see_likeness(),
        "duplicates": sorted(of_duplicates, key=lambda group: (not group["labels_differ"], not group["across_splits"])),
        "oddities": [
            *_oddities(data.class_names, splits),
            *data.notes,
            *depth.range_notes(ranges),
            *depth.range_warnings(rule, data.splits),
        ],
    }


def _location(picture: scan.Picture, class_names: Sequence[str]) -> dict[str, Any]:
    return {
        "split": picture.split,
        "row": picture.row,
        "path": picture.path,
        "label": class_names[picture.label] if picture.label >= 0 else None,
    }


def _group(kind: str, group: Sequence[scan.Picture], class_names: Sequence[str]) -> dict[str, Any]:
    return {
        "kind": kind,
        "across_splits": len({picture.split for picture in group}) > 1,
        "labels_differ": len({picture.label for picture in group}) > 1,
        "images": [_location(picture, class_names) for picture in group],
    }


def _split(data: LabelledDataset, pictures: Sequence[scan.Picture]) -> dict[str, Any]:
    """Counts of one split; images that cannot be read count for their class, not for modes and sizes."""
    labels = [picture.label for picture in pictures if picture.label >= 0]
    counts = np.bincount(labels, minlength=len(data.class_names)).tolist()
    readable = [picture for picture in pictures if not picture.unreadable]
    modes = Counter(picture.mode for picture in readable)
    return {
        "images": len(pictures),
        "unlabelled": len(pictures) - len(labels),
        "class_counts": dict(zip(data.class_names, counts, strict=True)),
        "smallest_class": min(counts),
        "median_class": float(np.median(counts)),
        "largest_class": max(counts),
        "missing_classes": [name for name, count in zip(data.class_names, counts, strict=True) if count == 0],
        "modes": dict(modes.most_common()),
        "animated": sum(picture.animated for picture in readable),
        "exif_turned": sum(picture.turned for picture in readable),
        "width": _spread([picture.width for picture in readable]),
        "height": _spread([picture.height for picture in readable]),
    }


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def _oddities(class_names: Sequence[str], splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    oddities = []
    alike: dict[str, list[str]] = {}
    for name in class_names:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            oddities.append(f"classes differ by case or blanks alone: {', '.join(map(repr, names))}")
    train = splits["train"]
    single = [name for name, count in train["class_counts"].items() if count == 1]
    if single:
        oddities.append(f"train has only one image of {shorten(single)}")
    smallest = min(count for count in train["class_counts"].values() if count > 0)
    if train["largest_class"] >= _IMBALANCE * smallest:
        oddities.append(f"train is imbalanced: {smallest} to {train['largest_class']} images a class")
    for name, split in splits.items():
        if split["missing_classes"]:
            oddities.append(f"{name} has no image of {shorten(split['missing_classes'])}")
        if split["animated"]:
            oddities.append(f"{name} has {split['animated']} animated images, of which the first frame is used")
    return oddities


def summary(result: Mapping[str, Any]) -> dict[str, str]:
    """The rows of the table: each split, and the number of findings of each kind."""
    sizes = ", ".join(f"{name} {split['images']}" for name, split in result["splits"].items())
    rows = {"images": f"{sizes}; {result['classes']} classes ({result['source']})"}
    for name, split in result["splits"].items():
        rows[name] = _describe_split(split)
    rows["unreadable"] = str(len(result["unreadable"]) or "none")
    rows["of one colour"] = str(len(result["one_colour"]) or "none")
    for kind in ("exact", "near"):
        groups = [group for group in result["duplicates"] if group["kind"] == kind]
        rows[f"{kind} duplicates"] = _describe_duplicates(groups)
    if not result["near_duplicates"]:
        rows["near duplicates"] = "not looked for: the package imagehash is not installed"
    rows["oddities"] = str(len(result["oddities"]) or "none")
    return rows


def _describe_split(split: Mapping[str, Any]) -> str:
    counts = {"min": split["smallest_class"], "median": split["median_class"], "max": split["largest_class"]}
    lines = [f"images a class {_describe_spread(counts)}"]
    if split["width"]:
        lines.append(f"width {_describe_spread(split['width'])}, height {_describe_spread(split['height'])} px")
    lines.append(", ".join(f"{mode} {count}" for mode, count in split["modes"].items()))
    lines.append(f"{split['animated']} animated, {split['exif_turned']} turned by EXIF")
    return "\n".join(filter(None, lines))


def _describe_spread(spread: Mapping[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['min']}"
    return f"{spread['min']} to {spread['max']} (median {spread['median']:g})"


def _describe_duplicates(groups: Sequence[Mapping[str, Any]]) -> str:
    if not groups:
        return "none"
    images = sum(len(group["images"]) for group in groups)
    across = sum(group["across_splits"] for group in groups)
    differ = sum(group["labels_differ"] for group in groups)
    return f"{plural(len(groups), 'group')}, {images} images; {across} across splits, {differ} with different labels"


def findings(result: Mapping[str, Any]) -> list[str]:
    """One line for each finding; of each kind the first few."""
    lines = _first([f"unreadable: {_where(image)}: {image['reason']}" for image in result["unreadable"]])
    lines += _first([f"of one colour all over: {_where(image)}" for image in result["one_colour"]])
    for kind in ("exact", "near"):
        lines += _first([_describe_group(group) for group in result["duplicates"] if group["kind"] == kind])
    return lines + _first([f"odd: {oddity}" for oddity in result["oddities"]])


def _first(lines: list[str]) -> list[str]:
    rest = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"... and {rest} more such (--json lists all)"] if rest > 0 else [])


def _describe_group(group: Mapping[str, Any]) -> str:
    across = " across splits" if group["across_splits"] else ""
    differ = " WITH DIFFERENT LABELS" if group["labels_differ"] else ""
    sign = " = " if group["kind"] == "exact" else " ~ "
    title = f"{group['kind']} duplicates{across}{differ}"
    return f"{title}: " + sign.join(f"{_where(image)} [{image['label']}]" for image in group["images"])


def _where(image: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (image["split"], str(image["row"]), image["path"])))


def raise_if_unreadable(result: Mapping[str, Any]) -> None:
    """Raise DataError if there are images at which a run would stop."""
    images = result["unreadable"]
    if images:
        total = sum(split["images"] for split in result["splits"].values())
        raise DataError(
            f"{len(images)} of {total} images cannot be read",
            f"the first: {_where(images[0])}: {images[0]['reason']}",
            "fix or remove them; a run stops at the first",
        )
