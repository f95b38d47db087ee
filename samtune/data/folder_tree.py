"""A directory tree of pictures: its folders, pictures, archives, broken links and other files. Opens no picture."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samtune.data.formats import archive_ending, is_readable
from samtune.data.split_roles import ROLES, role_of
from samtune.errors import DataError, plural
from samtune.files import readable

_SYSTEM_FILES = {
    *("thumbs.db", "desktop.ini", "lost+found", "@eadir", "__macosx", "$recycle.bin", "system volume information"),
}
_DRAWN_LINES = 12


@dataclass(eq=False)
class Folder:
    """A folder, or an archive that was unpacked.

    key: its name as the system has it, which flags give. name: the same as readable text. relative: its readable path
    below the data set's folder. pictures, others, archives (not unpacked), broken_links: names of files right in it.
    count: pictures in it and below.
    """

    path: str
    key: str
    name: str
    relative: str
    folders: list["Folder"] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    broken_links: list[str] = field(default_factory=list)
    count: int = 0

    @property
    def children(self) -> list["Folder"]:
        """The folders in it that hold pictures."""
        return [folder for folder in self.folders if folder.count]

    @property
    def branches(self) -> list["Folder"]:
        """Its children; where it has one child and no picture, those of that child, and so on."""
        folder = self
        while len(folder.children) == 1 and not folder.pictures and folder.children[0].children:
            (folder,) = folder.children
        return folder.children

    @property
    def is_flat(self) -> bool:
        """Whether all its pictures lie right in it."""
        return bool(self.pictures) and not self.children

    @property
    def is_split(self) -> bool:
        """Whether its name is that of a split, without other words."""
        return role_of(self.name) in ROLES

    @property
    def shown_path(self) -> str:
        """Its path for messages: below the data set's folder, or that folder's own."""
        return self.relative or readable(self.path)

    def shown(self, name: str) -> str:
        """The path of a file in it for messages."""
        return os.path.join(self.relative, readable(name))

    def walk(self) -> Iterator["Folder"]:
        """Itself and all folders below, in order of their names."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def picture_paths(self) -> list[str]:
        """All pictures in it and below."""
        return [os.path.join(folder.path, name) for folder in self.walk() for name in folder.pictures]

    def other_paths(self) -> list[str]:
        """The files in it and below that are no pictures by their ending."""
        return [os.path.join(folder.path, name) for folder in self.walk() for name in folder.others]

    def archive_paths(self) -> list[str]:
        """The archives in it and below, relative to it."""
        below = [os.path.join(folder.key, name) for folder in self.folders for name in folder.archive_paths()]
        return [*self.archives, *below]

    def draw(self) -> list[str]:
        """The first folders below, three levels deep, one line each, with the number of their pictures."""
        lines: list[str] = []

        def add(folder: Folder, depth: int) -> None:
            for child in folder.children:
                lines.append(f"{'  ' * depth}{child.name}/  {plural(child.count, 'picture')}")
                if depth < 2:
                    add(child, depth + 1)

        add(self, 0)
        more = len(lines) - _DRAWN_LINES
        return [*lines[:_DRAWN_LINES], f"... and {more} more folders"] if more > 0 else lines


def read_tree(root: Path, unpacked: Mapping[str, str]) -> Folder:
    """Read a folder and all below it.

    unpacked: archive -> the folder with its content, which takes the archive's position and name. Hidden and system
    files are left out, and links to a folder around them. Raises DataError for a folder that cannot be read.
    """
    return _read_tree(str(root), root.name, "", unpacked, frozenset())


def _read_tree(path: str, key: str, relative: str, unpacked: Mapping[str, str], ancestors: frozenset[str]) -> Folder:
    folder = Folder(path, key, readable(key), relative)
    ancestors |= {os.path.realpath(path)}
    for entry in sorted_entries(path):
        if is_ignored(entry.name):
            continue
        if entry.path in unpacked:
            below = os.path.join(relative, readable(entry.name))
            stem = archive_stem(entry.name)
            if any(other.key == stem and other.count for other in folder.folders):
                raise DataError(f"archive {below} has the name of another beside it", hint="keep one of them")
            content, below = unpacked[entry.path], os.path.join(relative, readable(stem))
            folder.folders.append(_read_tree(content, stem, below, unpacked, ancestors))
        elif is_folder(entry):
            if not leads_back(entry, ancestors):
                below = os.path.join(relative, readable(entry.name))
                folder.folders.append(_read_tree(entry.path, entry.name, below, unpacked, ancestors))
        elif is_readable(entry.name):
            folder.pictures.append(entry.name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            folder.broken_links.append(entry.name)
        else:
            (folder.archives if archive_ending(entry.name) else folder.others).append(entry.name)
    folder.count = len(folder.pictures) + sum(child.count for child in folder.folders)
    return folder


def archive_stem(archive: str) -> str:
    """The name of an archive without its ending and the number of a repeated download: cat (1).zip is cat."""
    return re.sub(r"\s*\(\d+\)$", "", archive[: -len(archive_ending(archive))])


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden, or written by an operating system."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def sorted_entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """The entries of a folder by name. Raises DataError where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        message = f"folder {readable(os.fspath(folder))} cannot be read"
        raise DataError(message, error.strerror or "", "check its permissions") from None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one that can be reached."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that may not be read
        return False


def leads_back(entry: os.DirEntry[str], ancestors: frozenset[str]) -> bool:
    """Whether it is a link to one of the folders (real paths) around it."""
    return entry.is_symlink() and os.path.realpath(entry.path) in ancestors
