"""Folders of pictures: which folders are splits, which are classes, and which picture has which label.

Opens no picture. Four layouts are understood, also below folders that hold nothing else:

    train/<class>/...  val/<class>/...  test/<class>/...     splits, by any of their usual names
    <class>/train/...  <class>/test/...                      the same, with the classes first
    <class>/...  test/<class>/...                            classes, and beside them a split that has the same ones
    <class>/...                                              classes: all is train

What could be read in two ways is refused, with the tree that was seen; so is an archive that may be a class or a split
of its own. What is left out is named.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from samtune.data import listed_folder
from samtune.data.formats import (
    ARCHIVES,
    archive_ending,
    installation,
    is_picture,
    is_readable,
    is_unreadable,
    names_in_archive,
    unpacking,
)
from samtune.data.labels import some
from samtune.data.split_roles import ROLES, UNLABELLED, DataSelection, parse, role_of
from samtune.errors import DataError
from samtune.files import readable

_LEFT_BY_SYSTEMS = {
    *("thumbs.db", "desktop.ini", "lost+found", "@eadir", "__macosx", "$recycle.bin", "system volume information"),
}
# Folders that hold the pictures of a split, and are no class; and those in which pictures wait for a label.
_CONTAINERS = {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "data"}
_WAITING = {"unknown", "unlabelled", "unlabeled", "nolabel", "none", "all", *_CONTAINERS}
_PACKED = "archive"  # what an archive of the whole data set is called, if not as its folder or data, images, ...
_DRAWN = 12  # lines of a tree in an error


class NoClassFolders(DataError):
    """Pictures of train that lie right in it."""


@dataclass
class FolderSplits:
    """What a folder holds: split -> paths and names of the classes, picture by picture; notes for the user.

    Splits have the names of their folders where these tell their roles, else those of the roles.
    """

    splits: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, split: str, label: str, paths: Sequence[str]) -> None:
        """Pictures of one class of a split."""
        all_paths, labels = self.splits.setdefault(split, ([], []))
        all_paths += paths
        labels += [label] * len(paths)


@dataclass(eq=False)
class Folder:
    """A folder, or an archive. key: its name as the system has it, which flags give; name: the same, readable.

    place: its path below the data set's folder, readable. archives: names of those that are not unpacked. broken: names
    of links that lead to nothing. count: pictures in it and below.
    """

    path: str
    key: str
    name: str
    place: str
    folders: list["Folder"] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # names of files
    others: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    count: int = 0

    @property
    def children(self) -> list["Folder"]:
        """The folders in it that hold pictures."""
        return [folder for folder in self.folders if folder.count]

    @property
    def is_flat(self) -> bool:
        """Whether all its pictures lie right in it."""
        return bool(self.pictures) and not self.children

    @property
    def is_split(self) -> bool:
        """Whether its name is that of a split and says nothing else."""
        role, rest = parse(self.name)
        return role in ROLES and not rest

    def walk(self) -> Iterator["Folder"]:
        """Itself and all folders below, in order of their names."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def paths(self) -> list[str]:
        """All pictures in it and below."""
        return [os.path.join(folder.path, name) for folder in self.walk() for name in folder.pictures]


def read_folder(
    root: Path, wanted: DataSelection, classes: Collection[str] = (), archives: Mapping[str, str] = MappingProxyType({})
) -> FolderSplits:
    """The labelled pictures of a folder; no splits if it holds no pictures.

    The folder right below a split is the class, and folders in it belong to it; with wanted.class_folders "deepest"
    each folder that holds pictures is a class of its own, named by its path: bird/owl. classes: names that are known
    already, as those of a trained model. archives: path -> the folder with its content, which counts as a folder in its
    place. What begins with a dot is passed over.

    Raises DataError where it cannot be told which folders are splits, where a picture of train lies in no class folder,
    where a class would vanish because its pictures cannot be decoded here or lie in an archive that is not unpacked,
    and for a folder that cannot be read.
    """
    tree = _read_tree(str(root), root.name, "", archives, frozenset())
    if not tree.count:
        unreadable = [name for folder in tree.walk() for name in folder.others if is_unreadable(name)]
        if unreadable:
            raise _undecodable(f"folder {readable(str(root))}", unreadable)
        foreign = [name for name in _archives(tree) if not name.lower().endswith(ARCHIVES)]
        if foreign:
            what = f"archive {readable(foreign[0])} of folder {readable(str(root))} cannot be read here"
            raise DataError(what, hint=f"unpack it: `{unpacking(os.path.basename(foreign[0]))}`")
        hidden = [path for path in _others(tree)[:_DRAWN] if is_picture(path)]
        if hidden:
            raise _without_ending(f"folder {readable(str(root))}", hidden[0])
        return FolderSplits()
    reader = _Reader(root, tree, wanted, frozenset(map(readable, classes)))
    reader.read()
    reader.tell_passed_over()
    return reader.found


def is_passed_over(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems leave behind."""
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


def entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What lies in a folder, in order of the names. Raises DataError where it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        what = f"folder {readable(os.fspath(folder))} cannot be read"
        raise DataError(what, error.strerror or "", "check its permissions") from None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one that can be reached."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that may not be read
        return False


def _read_tree(path: str, key: str, place: str, archives: Mapping[str, str], above: frozenset[str]) -> Folder:
    """above: the folders on the way here, to which a link may lead back."""
    folder = Folder(path, key, readable(key), place)
    above |= {os.path.realpath(path)}
    for entry in entries(path):
        if is_passed_over(entry.name):
            continue
        below = os.path.join(place, readable(entry.name))
        if entry.path in archives:
            stem = _stem(entry.name)
            if any(other.key == stem and other.count for other in folder.folders):
                raise DataError(f"archive {below} has the name of another beside it", hint="keep one of them")
            unpacked = os.path.join(place, readable(stem))
            folder.folders.append(_read_tree(archives[entry.path], stem, unpacked, archives, above))
        elif is_folder(entry):
            if not entry.is_symlink() or os.path.realpath(entry.path) not in above:
                folder.folders.append(_read_tree(entry.path, entry.name, below, archives, above))
        elif is_readable(entry.name):
            folder.pictures.append(entry.name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            folder.broken.append(entry.name)
        else:
            (folder.archives if archive_ending(entry.name) else folder.others).append(entry.name)
    folder.count = len(folder.pictures) + sum(below.count for below in folder.folders)
    return folder


def _stem(archive: str) -> str:
    """What an archive is called: cat (1).zip, which a second download is, as cat.zip."""
    return re.sub(r"\s*\(\d+\)$", "", archive[: -len(archive_ending(archive))])


def _may_add(folder: Folder, archive: str, stem: str) -> bool:
    """Whether an archive may hold pictures that are not there: no pictures are no class, and folders like these a copy.

    What cannot be opened may hold anything.
    """
    names = names_in_archive(os.path.join(folder.path, archive))
    if names is None:
        return True
    folders = {part for name in names for part in readable(name).split("/")[:-1]}
    is_copy = parse(stem)[0] not in ROLES and {child.name for child in folder.children} <= folders
    return any(is_readable(name) or is_unreadable(name) for name in names) and not is_copy


class _Reader:
    """One reading of a tree: from its layout to splits, from these to classes."""

    def __init__(self, root: Path, tree: Folder, wanted: DataSelection, classes: frozenset[str]) -> None:
        self.root, self.tree, self.wanted, self.classes = root, tree, wanted, classes
        self.named = {name: role for role, names in wanted.splits.items() for name in names}
        self.found = FolderSplits()
        self.taken: set[Folder] = set()  # the splits, also those that are left out with a note
        self.roles: set[str] = set()  # of these
        self.holders: set[Folder] = set()  # the folders in which classes lie, and those from their split down to them
        self.classes_of: set[Folder] = set()  # the first of these alone
        self.archives: list[str] = []
        self.passed_over: list[str] = []
        self.vanished: list[DataError] = []

    def read(self) -> None:
        """Find the splits, and their classes."""
        top = self._unwrap(self.tree)
        chosen = {name: folder for name in self.named if (folder := self._find(top, name)) is not None}
        is_complete = len(chosen) == len(self.named)
        if is_complete and any(role == "train" or "/" in name for name, role in self.named.items()):
            self._read_chosen(top, chosen)
        else:
            self._read_layout(top)
        self._look_for_absent(self.tree, [self.tree.name])
        self._tell_left_out(self.tree)
        if self.vanished and self.wanted.on_bad_image == "error":
            raise self.vanished[0]
        self.found.notes += [error.message for error in self.vanished]

    # -------------------------------------------------------------------------------------------------------- layouts

    def _unwrap(self, folder: Folder) -> Folder:
        """The folder that holds splits or classes, below folders that hold one other folder and no picture."""
        while len(folder.children) == 1 and not folder.pictures:
            (child,) = folder.children
            if child.is_flat or child.is_split or child.key in self.named or child.name in self.classes:
                break
            folder = child
        return folder

    def _find(self, top: Folder, name: str) -> Folder | None:
        """The folder that a flag names: in top, or by its path from the root; "." is top itself."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        for start in (top, self.tree):
            folder: Folder | None = start
            for part in parts:
                folder = next((child for child in folder.children if child.key == part), None) if folder else None
            if folder is not None:
                return folder
        return None

    def _read_chosen(self, top: Folder, splits: dict[str, Folder]) -> None:
        """The splits that flags name, and those of other roles that lie beside them."""
        roles = dict(self.named)
        holders = {os.path.dirname(folder.path) for name, folder in splits.items() if folder is not top}
        taken = list(splits.values())
        for holder in self.tree.walk():
            if holder.path in holders and holder not in taken:
                beside = [child for child in holder.children if child not in taken]
                others = _roles_of(beside, {})
                splits |= {child.key: child for child in beside if child.key in others}
                roles |= others
        self._add_splits(splits, roles)

    def _read_layout(self, top: Folder) -> None:
        roles = _roles_of(top.children, self.named)
        beside = [child for child in top.children if child.key not in roles]
        for child in top.children:  # train/ with pictures right in it, beside others like it, is a class of that name
            if roles.get(child.key) == "train" and child.is_flat and any(other.is_flat for other in beside):
                beside += [child] if child.key not in self.named else []
        splits = {child.key: child for child in top.children if child not in beside}
        roles = {key: roles[key] for key in splits}
        if not splits:
            self._read_without_splits(top)
        elif "train" in roles.values() or not beside:
            if len(splits) == 1 and beside and self._are_alike(top.children):
                (split,) = splits.values()
                raise self._unclear(f"{split.place} may be a split or a class: {self._alike(top.children)}")
            self._add_splits(splits, roles)
        else:
            self._read_beside(top, beside, splits, roles)

    def _read_without_splits(self, top: Folder) -> None:
        inner = [self._inside(child, "", ()) for child in top.children]
        has_train = all(any(parse(split.name)[0] == "train" for split in folder.children) for folder in inner)
        splits = [split for folder in inner for split in folder.children]
        if len(inner) > 1 and has_train and all(split.is_split and self._has_no_classes(split) for split in splits):
            self.holders |= {top, *inner}
            self.taken.update(splits)
            self.roles |= {str(parse(split.name)[0]) for split in splits}
            for child, folder in zip(top.children, inner, strict=True):
                for split in folder.children:
                    self.found.add(str(parse(split.name)[0]), child.name, split.paths())
            return
        hidden = [below for child in top.children for below in child.walk() if below is not child and below.is_split]
        if hidden:
            raise self._unclear(f"{self._relative(hidden[0])} has the name of a split, and lies among other folders")
        is_told = self.wanted.class_folders == "deepest" or {child.name for child in top.children} <= self.classes
        if not is_told and self._are_alike(top.children):
            raise self._unclear(f"{self._alike(top.children)}: they may be splits, and those the classes")
        self._add_splits({"train": top}, {"train": "train"})

    def _are_alike(self, folders: Sequence[Folder]) -> bool:
        """Whether those with folders in them have two or more, whose names one of them has all: so do splits."""
        names = [{below.name for below in _fork(folder)} for folder in folders if folder.children]
        most = max(names, key=len, default=set())
        return len(names) > 1 and all(len(found) > 1 and found <= most for found in names)

    def _alike(self, folders: Sequence[Folder]) -> str:
        inner = {folder.name: _fork(folder) for folder in folders if folder.children}
        below = [child.name for child in max(inner.values(), key=len)]
        return f"{some(list(inner))} hold folders of the same names, {some(below)}"

    def _has_no_classes(self, split: Folder) -> bool:
        """Whether its pictures lie right in it, or in images/."""
        while len(split.children) == 1 and not split.pictures and split.children[0].name.casefold() in _CONTAINERS:
            split = split.children[0]
        return split.is_flat

    def _read_beside(
        self, top: Folder, beside: Sequence[Folder], splits: dict[str, Folder], roles: dict[str, str]
    ) -> None:
        """Splits, none of them train, beside folders that are its classes, or train itself under another name."""
        if len(beside) == 1 and beside[0].is_flat and all(split.is_flat for split in splits.values()):
            return self._add_splits({"train": top}, {"train": "train"})  # two classes: one alone would be none
        is_train = len(beside) == 1 and not beside[0].pictures
        classes = {child.name for child in (beside[0].children if is_train else beside)}
        for key, split in splits.items():
            inner = self._inside(split, roles[key], classes)
            names = {child.name for child in inner.children}
            may_wait = roles[key] in ("test", UNLABELLED) and self._waits_for_labels(inner, classes)
            if not (names and names <= classes) and not may_wait:
                raise self._unclear(f"{self._relative(split)} may be a split or a class")
        if is_train:
            name = self._relative(beside[0])
            self.found.notes.append(f"folder {name} is taken as train: it has the classes of the other splits")
        key = beside[0].key if is_train else "train"
        self._add_splits({key: beside[0] if is_train else top} | splits, {key: "train"} | roles)

    # --------------------------------------------------------------------------------------------- splits and classes

    def _add_splits(self, splits: dict[str, Folder], roles: dict[str, str]) -> None:
        """The classes of each split, of train first: it tells what is a class in the others."""
        known = self.classes
        names = {key: self._name(key, roles[key]) for key in splits}
        for key, name in names.items():
            others = [other for other in names if other != key and names[other] == name]
            if others:
                raise self._unclear(f"{' and '.join(sorted([key, *others]))} may both be {roles[key]}")
        by_place: dict[str, str] = {}
        for key, split in splits.items():
            same = by_place.setdefault(os.path.realpath(split.path), key)
            if same != key and {roles[key], roles[same]} <= set(ROLES):
                raise DataError(
                    f"splits {readable(same)} and {readable(key)} of {readable(str(self.root))} are the same folder",
                    f"both are {readable(os.path.realpath(split.path))}",
                    "remove the link: without a split of its own, validation is held out of train",
                )
        self.taken.update(splits.values())
        self.roles.update(roles.values())
        for key in sorted(splits, key=lambda key: roles[key] != "train"):
            split = self._inside(splits[key], roles[key], known)
            # Beside train/, train2/ is a split that nobody has asked for.
            is_spare = key not in self.named and names[key] != roles[key] and roles[key] in names.values()
            folders = [child for child in split.folders if child not in splits.values()]
            with_pictures = [child for child in folders if child.count]
            if key not in self.named and not {child.name for child in with_pictures} <= self.classes:
                self._check_copies(with_pictures)
            if roles[key] == "train" and not is_spare:
                self._check_train(split, with_pictures)
                known |= {child.name for child in with_pictures}
            elif roles[key] == UNLABELLED or self._waits_for_labels(split, known):
                where = self._relative(splits[key])
                is_beside = any(splits[key] in other.folders for other in splits.values())
                self.found.notes.append(
                    f"{where} is left out: {_pictures(split.count)} without a label"
                    + (" (--train-split . makes it a class)" if is_beside else "")
                )
                continue
            else:
                self._tell_stray(split)
            self.classes_of.add(split)
            self.holders |= {below for below in splits[key].walk() if below is split or split in below.walk()}
            for folder in folders:
                self._add_class(names[key], split, folder)

    def _name(self, key: str, role: str) -> str:
        """What a split is called: as flags call it, or as its folder where that tells its role."""
        return key if key in self.named or role_of(key) == role or role == UNLABELLED else role

    def _inside(self, split: Folder, role: str, known: Collection[str]) -> Folder:
        """Where the classes of a split lie, in train/train/<class> or test/images/<class>."""
        while len(split.children) == 1 and not split.pictures:
            (child,) = split.children
            is_repeated = parse(child.name)[0] == role
            is_container = child.name.casefold() in _CONTAINERS and not child.is_flat
            if child.name in known or not (is_repeated or is_container):
                break
            split = child
        return split

    def _waits_for_labels(self, split: Folder, known: Collection[str]) -> bool:
        """Whether the pictures of a split lie right in it, or in a folder whose name says that it is no class."""
        names = [child.name for child in split.children]
        return not names or (len(names) == 1 and names[0] not in known and names[0].casefold() in _WAITING)

    def _check_train(self, split: Folder, classes: Sequence[Folder]) -> None:
        if classes and split.pictures:
            raise NoClassFolders(
                f"picture {readable(os.path.join(split.path, split.pictures[0]))} lies in no class folder",
                "others of the train split do",
                "move it into its class, or remove it",
            )
        if not classes:
            lists = listed_folder.labelled(self.root, self.wanted)
            raise NoClassFolders(
                f"the pictures of folder {readable(split.path)} lie in no class folders",
                f"{_pictures(split.count)}, and no folder that tells their class",
                f"if {lists[0]} lists them with their labels, give it by --dataset"
                if lists
                else "sort them into folders named after their classes, or give a .csv list of path,label by --dataset",
            )

    def _check_copies(self, classes: Sequence[Folder]) -> None:
        """Raise DataError for a class whose folders have the names of the classes beside it: so has a copy of all."""
        for folder in classes:
            beside = {other.name for other in classes if other is not folder}
            below = [child.name for child in _fork(folder)]
            if len(below) > 1 and set(below) <= beside:
                raise self._unclear(
                    f"{self._relative(folder)} may be a class or a copy of those beside it: it holds {some(below)}, too"
                )

    def _add_class(self, key: str, split: Folder, folder: Folder) -> None:
        if folder.count:
            self.passed_over += _others(folder)
        elif not _archives(folder):
            self._tell_empty(folder, f"class {folder.name} of {key}")
        if self.wanted.class_folders == "deepest":
            for below in folder.walk():
                label = os.path.relpath(below.place, split.place or ".")
                if folder.count and not below.count and not below.folders:
                    self._tell_empty(below, f"class {label} of {key}")
                self.found.add(key, label, [os.path.join(below.path, name) for name in below.pictures])
            return
        if folder.children and not any("--class-folders" in note for note in self.found.notes):
            self.found.notes.append(
                f"folders in a class folder belong to the class, as {self._relative(folder.children[0])}; "
                "--class-folders deepest makes each a class of its own"
            )
        if folder.count:
            self.found.add(key, folder.name, folder.paths())

    # ------------------------------------------------------------------------------------------------- what is absent

    def _look_for_absent(self, folder: Folder, around: Sequence[str]) -> None:
        """Archives, links and folders without pictures: what may be a class or a split is named, or refused.

        An archive may be one if it lies beside classes, or has the name of a split that is not there; unless its name
        is that of a folder beside or around it, or says nothing, as data.zip: then it is what has been unpacked.
        around: the names of the folder and of those above.
        """
        is_above = any(below in self.holders for below in folder.walk())
        there = [child.name for child in folder.children]
        packed = [(name, readable(_stem(name))) for name in folder.archives]  # and what its name stands for
        for child in folder.folders:
            if child.count:
                self._look_for_absent(child, [*around, child.name])
                continue
            archives = [os.path.join(child.key, name) for name in _archives(child)]
            packed += [(name, child.name) for name in archives]
            is_told = archives or folder in self.classes_of or child.name in there
            if is_above and not is_told and self._may_be_meant(folder, child.name):
                self._tell_empty(child, f"folder {child.place}")
        for name in folder.broken:
            if is_above and self._may_be_meant(folder, readable(name)):
                self.found.notes.append(f"{_place(folder, name)} is left out: a link that leads to nothing")
        for name, stem in packed:
            place = _place(folder, name)
            is_copy = stem in there or stem in around or stem == _PACKED or parse(stem) == (None, ())
            if is_above and not is_copy and self._may_be_meant(folder, stem) and _may_add(folder, name, stem):
                raise DataError(
                    f"archive {place} lies beside folders of pictures, and may be a class or a split of its own",
                    f"beside it: {some([child.name + '/' for child in folder.children])}; archives are unpacked where "
                    "there are no such folders",
                    f"unpack it (`{unpacking(os.path.basename(name))}`), or take it away",
                )
            self.archives.append(place)

    def _may_be_meant(self, folder: Folder, name: str) -> bool:
        """Whether what is called so in a folder may be a class, or a split that is not there."""
        role, _ = parse(name)
        return folder in self.holders or (role in ROLES and role not in self.roles)

    def _tell_empty(self, folder: Folder, where: str) -> None:
        """A folder that might be a class or a split, without a picture that can be read."""
        others = _others(folder)
        unreadable = [path for path in others if is_unreadable(path)]
        hidden = [path for path in others[:_DRAWN] if is_picture(path)]
        if unreadable:
            self.passed_over += others
            self.vanished.append(_undecodable(where, unreadable))
        elif hidden:
            self.vanished.append(_without_ending(where, hidden[0]))
        else:
            why = f"no file is a picture by its ending, as {readable(others[0])}" if others else "it is empty"
            self.found.notes.append(f"{where} is left out: {why}")

    # -------------------------------------------------------------------------------------------------- what is said

    def tell_passed_over(self) -> None:
        """Count the files beside pictures that are none by their ending, or that cannot be decoded here."""
        if self.archives:
            found = f"archive{'s' if len(self.archives) > 1 else ''} {some(self.archives)}"
            self.found.notes.append(f"{found} not read: beside folders of pictures archives are not unpacked")
        if self.passed_over:
            count = (
                f"{len(self.passed_over)} file{'s' if len(self.passed_over) > 1 else ''} of {readable(str(self.root))}"
            )
            example = readable(self.passed_over[0])
            self.found.notes.append(f"{count} passed over: by the ending no picture, as {example}")
        commands = {command for path in self.passed_over if (command := installation(path))}
        self.found.notes += [f"`{command}` lets samtune read more of them" for command in sorted(commands)]

    def _tell_left_out(self, folder: Folder) -> None:
        """The folders that are in no split."""
        if folder in self.taken:
            return
        if any(below in self.taken for below in folder.walk()):
            self._tell_stray(folder)
            for child in folder.children:
                self._tell_left_out(child)
            return
        self.found.notes.append(
            f"folder {self._relative(folder)} is left out: {_pictures(folder.count)}, of no split "
            "(--train-split, --val-split and --test-split take any folder)"
        )

    def _tell_stray(self, folder: Folder) -> None:
        if folder.pictures:
            count = _pictures(len(folder.pictures))
            self.found.notes.append(f"{count} right in {self._relative(folder)} left out: in no class folder")

    def _relative(self, folder: Folder) -> str:
        return folder.place or readable(folder.path)

    def _unclear(self, why: str) -> DataError:
        return DataError(
            f"folder {readable(str(self.root))}: it cannot be told which folders are splits and which are classes",
            "\n        ".join([why, *_draw(self.tree)]),
            "name the splits by --train-split, --val-split and --test-split, as folders seen from there (a/train); "
            "--train-split . makes each folder a class; or give the folder that holds the splits by --dataset",
        )


def _roles_of(folders: Sequence[Folder], named: dict[str, str]) -> dict[str, str]:
    """Key -> role of those folders that are splits.

    flowers_train and flowers_test are, beside each other; flowers_train alone is a name like any other.
    """
    parsed = {folder.key: parse(folder.name) for folder in folders}
    roles = {}
    for key, (role, rest) in parsed.items():
        partners = {other for other, others_rest in parsed.values() if others_rest == rest and other in ROLES}
        if key in named:
            roles[key] = named[key]
        elif role is not None and (not rest or len(partners) > 1):
            roles[key] = role
    return roles


def _fork(folder: Folder) -> list[Folder]:
    """The folders in it, or in the one that it holds alone."""
    while len(folder.children) == 1 and not folder.pictures and folder.children[0].children:
        (folder,) = folder.children
    return folder.children


def _others(folder: Folder) -> list[str]:
    """The files in it and below that are no pictures by their ending."""
    return [os.path.join(below.path, name) for below in folder.walk() for name in below.others]


def _archives(folder: Folder) -> list[str]:
    """The archives in it and below, as seen from there."""
    return [*folder.archives, *(os.path.join(c.key, name) for c in folder.folders for name in _archives(c))]


def _place(folder: Folder, name: str) -> str:
    return os.path.join(folder.place, readable(name))


def _undecodable(where: str, names: Sequence[str]) -> DataError:
    """Pictures that nothing here reads, and no others."""
    ending = os.path.splitext(names[0])[1].lower()
    command = f"`{command}` reads them; or " if (command := installation(names[0])) else ""
    return DataError(
        f"{where}: none of its {_pictures(len(names))} ({ending}) can be decoded here",
        "it would be left out without a word",
        f"{command}convert them, remove the folder, or leave it out by --on-bad-image skip",
    )


def _without_ending(where: str, example: str) -> DataError:
    return DataError(
        f"{where}: its files are pictures, but not by their ending, as {readable(example)}",
        "it would be left out without a word",
        "give them the ending of their format, as .jpg, or leave it out by --on-bad-image skip",
    )


def _pictures(count: int) -> str:
    return f"{count} picture{'s' if count != 1 else ''}"


def _draw(tree: Folder) -> list[str]:
    """The first folders of a tree, three levels deep, with the number of pictures below each."""
    lines: list[str] = []

    def draw(folder: Folder, depth: int) -> None:
        for child in folder.children:
            lines.append(f"{'  ' * depth}{child.name}/  {_pictures(child.count)}")
            if depth < 2:
                draw(child, depth + 1)

    draw(tree, 0)
    return lines if len(lines) <= _DRAWN else [*lines[:_DRAWN], f"... and {len(lines) - _DRAWN} folders more"]
