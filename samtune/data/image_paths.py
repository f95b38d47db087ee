"""The files of pictures that a list or a table names. Opens no picture."""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from samtune.data.formats import is_readable
from samtune.data.split_roles import DataSelection
from samtune.errors import DataError, similar_names
from samtune.files import readable

_COMPARED = 10_000  # names of files that are compared with one that is missing


def find_files(
    names: Sequence[str], groups: Sequence[Sequence[int]], folder: Path, selection: DataSelection, dataset: str
) -> tuple[list[str], list[str]]:
    """The files of named pictures, and notes.

    Relative paths are below selection.image_root, else below `folder`. groups: the rows of each split. Where some of a
    group have a file there, the others are missing; where none has, the ends of the paths are searched among all
    pictures below, with or without their endings: /their/disk/cat/1.jpg is cat/1.jpg. Backslashes and both Unicode
    forms of a name are understood. Raises DataError for a group that is not found, by its first row or by most of
    them, and for a name that several files have.
    """
    root = image_root(selection, folder)
    paths = [image_path(root, name, selection) for name in names]
    not_in_place = [rows for rows in groups if rows and not any(os.path.isfile(paths[i]) for i in rows)]
    if not not_in_place:
        return paths, []
    missing = not_in_place[0][0]
    suffix = _suffix(selection)
    files = _pictures_by_end(root)
    matches = _match_ends([readable(name.replace("\\", "/") + suffix) for name in names], not_in_place, root, files)
    if matches is None:
        near = _nearest(readable(names[missing].replace("\\", "/") + suffix), files)
        raise DataError(
            f"picture {readable(paths[missing])} of {dataset} is not there",
            f"nor is there another picture of that name below {readable(str(root))}"
            + (f"; the nearest is {readable(os.path.relpath(near, root))}" if near else ""),
            "--image-root FOLDER names a folder that holds the pictures, --image-suffix .jpg what their names lack",
        )
    ambiguous = next((i for i, files in enumerate(matches) if len(files) > 1), None)
    if ambiguous is not None:
        raise DataError(
            f"picture {names[ambiguous]} of {dataset} may be any of {len(matches[ambiguous])} files",
            ", ".join(map(readable, matches[ambiguous][:3])),
            "--image-root FOLDER tells in which folder they lie",
        )
    shown = next((i for rows in not_in_place for i in rows if matches[i]), missing)
    note = f"pictures are found by their names: {readable(names[shown])} is {readable(matches[shown][0])}"
    return [files[0] if files else path for files, path in zip(matches, paths, strict=True)], [note]


def _match_ends(
    names: Sequence[str], groups: Sequence[Sequence[int]], root: Path, files: Mapping[str, list[str]]
) -> list[list[str]] | None:
    """The files below a folder whose paths end as the names do; None where the first and most of a group have none.

    The same number of leading folders is left out of each name, as few as possible, and only folders that all names
    share: then a file that is missing is not replaced by another. Else the longest end that has a file counts, if each
    name has a file of its own.
    """
    parts = [tuple(part for part in name.split("/") if part not in ("", ".", "..")) for name in names]

    def ending_in(end: Sequence[str]) -> list[str]:
        matches = files.get(_lower_ending("/".join(end)), [])
        if len(matches) < 2:
            return matches
        exact = [file for file in matches if os.path.relpath(file, root).count(os.sep) + 1 == len(end)]  # not below
        return exact if len(exact) == 1 else matches

    levels = zip(*(folders for *folders, _ in parts), strict=False)
    in_common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    for left_out in range(in_common + 1):
        matches = [ending_in(name[left_out:]) for name in parts]
        if all(matches[rows[0]] or 2 * sum(bool(matches[i]) for i in rows) > len(rows) for rows in groups):
            return matches
    longest = [next(filter(None, (ending_in(name[start:]) for start in range(len(name)))), []) for name in parts]
    unique = [matches[0] for matches in longest if len(matches) == 1]
    if all(longest) and (len(unique) < len(longest) or len(set(unique)) == len(set(parts))):
        return longest
    return None


def image_root(selection: DataSelection, folder: Path) -> Path:
    """The folder of relative paths: selection.image_root, else `folder`. Raises DataError where it is no folder."""
    if selection.image_root is None:
        return folder
    candidates = (Path(selection.image_root), folder / selection.image_root)
    root = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if root is None:
        raise DataError(f"--image-root {selection.image_root} is no folder", f"seen from {Path.cwd()} and {folder}")
    return root


def _suffix(selection: DataSelection) -> str:
    """What is appended to names: "jpg" means ".jpg"; "_left.jpg" is taken as it stands."""
    suffix = selection.image_suffix
    return f".{suffix}" if suffix.isalnum() and is_readable(f"a.{suffix}") else suffix


def image_path(root: Path, name: str, selection: DataSelection) -> str:
    """The path of a name with selection.image_suffix, in the form (slashes, Unicode) in which the file exists."""
    name += _suffix(selection)
    path = os.path.join(root, name)
    if name.isascii() and "\\" not in name:
        return path
    plain = name.replace("\\", "/")
    forms = (name, plain, unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain))
    return next(filter(os.path.isfile, (os.path.join(root, form) for form in forms)), path)


def _pictures_by_end(root: Path) -> dict[str, list[str]]:
    """Every picture below a folder by each end of its path (c.png, b/c.png, a/b/c.png), with and without its ending."""
    pictures: dict[str, list[str]] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parents = readable(os.path.relpath(folder, root)).split("/") if folder != str(root) else []
        for name in sorted(files):
            if is_readable(name) and not name.startswith("."):
                path = os.path.join(folder, name)
                for form in dict.fromkeys((readable(name), os.path.splitext(readable(name))[0])):
                    for start in range(len(parents) + 1):
                        pictures.setdefault(_lower_ending("/".join([*parents[start:], form])), []).append(path)
    return pictures


def _lower_ending(name: str) -> str:
    """a.JPG is a.jpg; no other part of a name is changed."""
    stem, ending = os.path.splitext(name)
    return stem + ending.lower() if is_readable(name) else name


def _nearest(name: str, files: Mapping[str, list[str]]) -> str | None:
    """A picture whose name is like another: in other case, with other zeros in front (1 and 001.png), or misspelt."""

    def plain(text: str) -> str:
        return re.sub("0+(?=[0-9])", "", os.path.splitext(os.path.basename(text))[0].casefold())

    by_name = {plain(file): file for paths in reversed(list(files.values())) for file in paths}
    if plain(name) in by_name:
        return by_name[plain(name)]
    near = similar_names(plain(name), list(by_name)[:_COMPARED])
    return by_name[near[0]] if near else None
