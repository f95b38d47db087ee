"""What reading a folder leaves out: archives, empty folders, broken links, folders of no split, files of no picture."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from samtune.data.folder_tree import Folder, archive_stem
from samtune.data.formats import installation, is_picture, is_readable, is_unreadable, names_in_archive, unpacking
from samtune.data.split_roles import ROLES, parse
from samtune.errors import DataError, plural, shorten
from samtune.files import readable

_WHOLE_ARCHIVE = "archive"  # what an archive of the whole data set is called, if not as its folder or data, images, ...
_PROBED = 12  # files without an ending of a picture whose first bytes are read


@dataclass
class Leftovers:
    """Notes and errors on what is in no class, after the splits were recorded here.

    root: the data set's folder. notes: a list that is added to. split_folders: also those without labels; roles: of
    these. class_parents: the folders right in which the classes of a split lie; above_classes: those from a split down
    to them. skipped_files: in class folders. lost_classes: errors for classes without a picture that can be decoded.
    """

    root: str
    notes: list[str]
    split_folders: set[Folder] = field(default_factory=set)
    roles: set[str] = field(default_factory=set)
    class_parents: set[Folder] = field(default_factory=set)
    above_classes: set[Folder] = field(default_factory=set)
    skipped_files: list[str] = field(default_factory=list)
    unread_archives: list[str] = field(default_factory=list)
    lost_classes: list[DataError] = field(default_factory=list)

    def check(self, folder: Folder, names_above: Sequence[str]) -> None:
        """Note archives, links and folders without pictures; raise DataError for an archive that may be needed.

        An archive may be a class or a split if it lies beside classes, or has the name of a split that is missing. It
        is the packed form of what is read if its name is that of a folder beside or around it, or tells nothing, as
        data.zip. names_above: of the folder and those around it.
        """
        is_above = any(below in self.above_classes for below in folder.walk())
        names = [child.name for child in folder.children]
        archives = [(name, readable(archive_stem(name))) for name in folder.archives]  # and the name of the content
        for child in folder.folders:
            if child.count:
                self.check(child, [*names_above, child.name])
                continue
            packed = [(os.path.join(child.key, name), child.name) for name in child.archive_paths()]
            archives += packed
            is_noted = packed or folder in self.class_parents or child.name in names
            if is_above and not is_noted and self._may_be_needed(folder, child.name):
                self.note_empty(child, f"folder {child.relative}")
        for name in folder.broken_links:
            if is_above and self._may_be_needed(folder, readable(name)):
                self.notes.append(f"{folder.shown(name)} is left out: a link that leads to nothing")
        for name, stem in archives:
            is_copy = stem in (*names, *names_above, _WHOLE_ARCHIVE) or parse(stem) == (None, ())
            if is_above and not is_copy and self._may_be_needed(folder, stem) and _may_add_pictures(folder, name, stem):
                raise DataError(
                    f"archive {folder.shown(name)} lies beside folders of pictures, and may be a class or a split of "
                    "its own",
                    f"beside it: {shorten([f'{child}/' for child in names])}; archives are unpacked where "
                    "there are no such folders",
                    f"unpack it (`{unpacking(os.path.basename(name))}`), or take it away",
                )
            self.unread_archives.append(folder.shown(name))

    def _may_be_needed(self, folder: Folder, name: str) -> bool:
        """Whether something with this name in a folder may be a class, or a split that is missing."""
        role, _ = parse(name)
        return folder in self.above_classes or (role in ROLES and role not in self.roles)

    def note_empty(self, folder: Folder, where: str) -> None:
        """Record a folder that might be a class or a split, without a picture that can be read."""
        others = folder.other_paths()
        error = unusable_files(where, others)
        if error is not None:
            self.lost_classes.append(error)
            self.skipped_files += others if any(map(is_unreadable, others)) else []
            return
        reason = f"no file is a picture by its ending, as {readable(others[0])}" if others else "it is empty"
        self.notes.append(f"{where} is left out: {reason}")

    def note_files(self, *, skip_bad: bool) -> None:
        """Note lost classes, unread archives and skipped files. Raises DataError for a lost class, unless skip_bad."""
        if self.lost_classes and not skip_bad:
            raise self.lost_classes[0]
        self.notes += [error.message for error in self.lost_classes]
        if self.unread_archives:
            which = f"archive{'s' * (len(self.unread_archives) > 1)} {shorten(self.unread_archives)}"
            self.notes.append(f"{which} not read: beside folders of pictures archives are not unpacked")
        if self.skipped_files:
            count = f"{plural(len(self.skipped_files), 'file')} of {self.root}"
            example = readable(self.skipped_files[0])
            self.notes.append(f"{count} passed over: by the ending no picture, as {example}")
        commands = {command for path in self.skipped_files if (command := installation(path))}
        self.notes += [f"`{command}` lets samtune read more of them" for command in sorted(commands)]

    def note_other_folders(self, folder: Folder) -> None:
        """Note the folders that are in no split."""
        if folder in self.split_folders:
            return
        if any(below in self.split_folders for below in folder.walk()):
            self.note_stray_pictures(folder)
            for child in folder.children:
                self.note_other_folders(child)
            return
        self.notes.append(
            f"folder {folder.shown_path} is left out: {plural(folder.count, 'picture')}, of no split "
            "(--train-split, --val-split and --test-split take any folder)"
        )

    def note_stray_pictures(self, folder: Folder) -> None:
        if folder.pictures:
            count = plural(len(folder.pictures), "picture")
            self.notes.append(f"{count} right in {folder.shown_path} left out: in no class folder")


def _may_add_pictures(folder: Folder, archive: str, stem: str) -> bool:
    """Whether an archive may hold pictures other than those of the folders beside it, or cannot be opened."""
    names = names_in_archive(os.path.join(folder.path, archive))
    if names is None:
        return True
    folders = {part for name in names for part in readable(name).split("/")[:-1]}
    is_copy = parse(stem)[0] not in ROLES and {child.name for child in folder.children} <= folders
    return any(is_readable(name) or is_unreadable(name) for name in names) and not is_copy


def unusable_files(where: str, paths: Sequence[str]) -> DataError | None:
    """The error for a folder whose pictures cannot be decoded here, or lack the ending; None if it holds no picture."""
    cause = "it would be left out without a word"
    unreadable = [path for path in paths if is_unreadable(path)]
    if unreadable:
        ending = os.path.splitext(unreadable[0])[1].lower()
        command = f"`{command}` reads them; or " if (command := installation(unreadable[0])) else ""
        return DataError(
            f"{where}: none of its {plural(len(unreadable), 'picture')} ({ending}) can be decoded here",
            cause,
            f"{command}convert them, remove the folder, or leave it out by --on-bad-image skip",
        )
    example = next(filter(is_picture, paths[:_PROBED]), None)
    if example is None:
        return None
    return DataError(
        f"{where}: its files are pictures, but not by their ending, as {readable(example)}",
        cause,
        "give them the ending of their format, as .jpg, or leave it out by --on-bad-image skip",
    )
