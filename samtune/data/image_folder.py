"""Folders of pictures: which folders are splits, which are classes, and which picture has which label.

Opens no picture. Four layouts are understood, also below folders that hold nothing else:

    train/<class>/...  val/<class>/...  test/<class>/...     splits, by any of their usual names
    <class>/train/...  <class>/test/...                      the same, with the classes first
    <class>/...  test/<class>/...                            classes, and beside them a split that has the same ones
    <class>/...                                              classes: all is train

What could be read in two ways is refused, with the tree that was seen.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from samtune.data import listed_folder
from samtune.data.formats import installation, is_readable, is_unreadable
from samtune.data.names import readable
from samtune.data.roles import ROLES, UNLABELLED, Wanted, parse, role_of
from samtune.errors import DataError

_LEFT_BY_SYSTEMS = {
    *("thumbs.db", "desktop.ini", "lost+found", "@eadir", "__macosx", "$recycle.bin", "system volume information"),
}
# Folders that hold the pictures of a split, and are no class; and those in which pictures wait for a label.
_CONTAINERS = {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "data"}
_WAITING = {"unknown", "unlabelled", "unlabeled", "nolabel", "none", "all", *_CONTAINERS}
_DRAWN = 12  # lines of a tree in an error


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

    count: pictures in it and below.
    """

    path: str
    key: str
    name: str
    folders: list["Folder"] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # names of files
    others: list[str] = field(default_factory=list)
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
    root: Path, wanted: Wanted, classes: Collection[str] = (), archives: Mapping[str, str] = MappingProxyType({})
) -> FolderSplits:
    """The labelled pictures of a folder; no splits if it holds no pictures.

    The folder right below a split is the class, and folders in it belong to it; with wanted.class_folders "deepest"
    each folder that holds pictures is a class of its own, named by its path: bird/owl. classes: names that are known
    already, as those of a trained model. archives: path -> the folder with its content, which counts as a folder in its
    place. What begins with a dot is passed over.

    Raises DataError where it cannot be told which folders are splits, where a picture of train lies in no class folder,
    where a class would vanish because its pictures cannot be decoded here, and for a folder that cannot be read.
    """
    tree = _read_tree(str(root), root.name, archives, frozenset())
    if not tree.count:
        unreadable = [name for folder in tree.walk() for name in folder.others if is_unreadable(name)]
        if unreadable:
            raise _undecodable(f"folder {readable(str(root))}", unreadable)
        return FolderSplits()
    reader = _Reader(root, tree, wanted, frozenset(map(readable, classes)))
    reader.read()
    reader.tell_passed_over()
    return reader.found


def is_passed_over(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems leave behind."""
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


def _read_tree(path: str, key: str, archives: Mapping[str, str], above: frozenset[str]) -> Folder:
    """above: the folders on the way here, to which a link may lead back."""
    folder = Folder(path, key, readable(key))
    above |= {os.path.realpath(path)}
    try:
        with os.scandir(path) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"folder {readable(path)} cannot be read", error.strerror or "", "check its permissions"
        ) from None
    for entry in entries:
        if is_passed_over(entry.name):
            continue
        if entry.path in archives:
            stem = entry.name.partition(".")[0]
            folder.folders.append(_read_tree(archives[entry.path], stem, archives, above))
        elif not entry.is_dir():
            (folder.pictures if is_readable(entry.name) else folder.others).append(entry.name)
        elif not entry.is_symlink() or os.path.realpath(entry.path) not in above:
            folder.folders.append(_read_tree(entry.path, entry.name, archives, above))
    folder.count = len(folder.pictures) + sum(below.count for below in folder.folders)
    return folder


class _Reader:
    """One reading of a tree: from its layout to splits, from these to classes."""

    def __init__(self, root: Path, tree: Folder, wanted: Wanted, classes: frozenset[str]) -> None:
        self.root, self.tree, self.wanted, self.classes = root, tree, wanted, classes
        self.named = {name: role for role, names in wanted.splits.items() for name in names}
        self.found = FolderSplits()
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
        if self.vanished and self.wanted.on_bad_image == "error":
            raise self.vanished[0]
        self.found.notes += [error.what for error in self.vanished]

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
                self._tell_left_out([child for child in beside if child.key not in others])
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
            self._add_splits(splits, roles)
            self._tell_left_out(beside)
            self._tell_stray(top)
        else:
            self._read_beside(top, beside, splits, roles)

    def _read_without_splits(self, top: Folder) -> None:
        inner = [child.children for child in top.children]
        has_train = all(any(parse(split.name)[0] == "train" for split in splits) for splits in inner)
        if len(inner) > 1 and has_train and all(s.is_split and s.is_flat for splits in inner for s in splits):
            for folder in top.children:
                for split in folder.children:
                    self.found.add(str(parse(split.name)[0]), folder.name, split.paths())
                self._tell_stray(folder)
            return
        hidden = [below for child in top.children for below in child.walk() if below is not child and below.is_split]
        if hidden:
            raise self._unclear(f"{self._relative(hidden[0])} has the name of a split, and lies among other folders")
        self._add_splits({"train": top}, {"train": "train"})

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
        for key in sorted(splits, key=lambda key: roles[key] != "train"):
            split = self._inside(splits[key], roles[key], known)
            folders = [child for child in split.folders if child not in splits.values()]
            with_pictures = [child for child in folders if child.count]
            if roles[key] == "train":
                self._check_train(split, with_pictures)
                known |= {child.name for child in with_pictures}
            elif roles[key] == UNLABELLED or self._waits_for_labels(split, known):
                where = self._relative(splits[key])
                self.found.notes.append(f"{where} is left out: {_pictures(split.count)} without a label")
                continue
            else:
                self._tell_stray(split)
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
            raise DataError(
                f"picture {readable(os.path.join(split.path, split.pictures[0]))} lies in no class folder",
                "others of the train split do",
                "move it into its class, or remove it",
            )
        if not classes:
            lists = listed_folder.labelled(self.root, self.wanted)
            raise DataError(
                f"the pictures of folder {readable(split.path)} lie in no class folders",
                f"{_pictures(split.count)}, and no folder that tells their class",
                f"if {lists[0]} lists them with their labels, give it by --dataset"
                if lists
                else "sort them into folders named after their classes, or give a .csv list of path,label by --dataset",
            )

    def _add_class(self, key: str, split: Folder, folder: Folder) -> None:
        others = [os.path.join(below.path, name) for below in folder.walk() for name in below.others]
        self.passed_over += others
        unreadable = [path for path in others if is_unreadable(path)]
        if unreadable and not folder.count:
            self.vanished.append(_undecodable(f"class {folder.name} of {key}", unreadable))
        if self.wanted.class_folders == "deepest":
            for below in folder.walk():
                label = readable(os.path.relpath(below.path, split.path))
                self.found.add(key, label, [os.path.join(below.path, name) for name in below.pictures])
            return
        if folder.children and not any("--class-folders" in note for note in self.found.notes):
            self.found.notes.append(
                f"folders in a class folder belong to the class, as {self._relative(folder.children[0])}; "
                "--class-folders deepest makes each a class of its own"
            )
        if folder.count:
            self.found.add(key, folder.name, folder.paths())

    # -------------------------------------------------------------------------------------------------- what is said

    def tell_passed_over(self) -> None:
        """Count the files beside pictures that are none by their ending, or that cannot be decoded here."""
        if self.passed_over:
            count = (
                f"{len(self.passed_over)} file{'s' if len(self.passed_over) > 1 else ''} of {readable(str(self.root))}"
            )
            example = readable(self.passed_over[0])
            self.found.notes.append(f"{count} passed over: by the ending no picture, as {example}")
        commands = {command for path in self.passed_over if (command := installation(path))}
        self.found.notes += [f"`{command}` lets samtune read more of them" for command in sorted(commands)]

    def _tell_left_out(self, folders: Sequence[Folder]) -> None:
        self.found.notes += [
            f"folder {self._relative(folder)} is left out: {_pictures(folder.count)}, and its name is that of no split "
            "(--train-split, --val-split and --test-split take any folder)"
            for folder in folders
        ]

    def _tell_stray(self, folder: Folder) -> None:
        if folder.pictures:
            count = _pictures(len(folder.pictures))
            self.found.notes.append(f"{count} right in {self._relative(folder)} left out: in no class folder")

    def _relative(self, folder: Folder) -> str:
        path = os.path.relpath(folder.path, self.root)
        return readable(folder.path if path == "." else path)

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


def _undecodable(where: str, names: Sequence[str]) -> DataError:
    """Pictures that nothing here reads, and no others."""
    ending = os.path.splitext(names[0])[1].lower()
    command = f"`{command}` reads them; or " if (command := installation(names[0])) else ""
    return DataError(
        f"{where}: none of its {_pictures(len(names))} ({ending}) can be decoded here",
        "it would be left out without a word",
        f"{command}convert them, remove the folder, or leave it out by --on-bad-image skip",
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
