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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from samtune.data import listed_folder
from samtune.data.encoded import PathSplits
from samtune.data.folder_leftovers import Leftovers, unusable_files
from samtune.data.folder_tree import Folder, read_tree
from samtune.data.formats import ARCHIVES, unpacking
from samtune.data.split_roles import ROLES, UNLABELLED, DataSelection, parse, role_of, roles_of_folders
from samtune.errors import DataError, plural, shorten
from samtune.files import readable

# Folders that hold the pictures of a split, and are no class; and those in which pictures wait for a label.
_CONTAINERS = {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "data"}
_UNLABELLED = {"unknown", "unlabelled", "unlabeled", "nolabel", "none", "all", *_CONTAINERS}


class NoClassFolders(DataError):
    """Pictures of train that lie right in it."""


def read_folder(
    root: Path,
    selection: DataSelection,
    classes: Collection[str] = (),
    unpacked: Mapping[str, str] = MappingProxyType({}),
) -> PathSplits:
    """The labelled pictures of a folder; no splits if it holds no pictures.

    Splits have the names of their folders where these tell their roles, else those of the roles.
    The folder right below a split is the class, and folders in it belong to it; with selection.class_folders "deepest"
    each folder that holds pictures is a class of its own, named by its path: bird/owl. classes: names that are known
    already, as those of a trained model. unpacked: archive -> the folder with its content, which takes its position.
    Hidden files and folders are ignored.

    Raises DataError where it cannot be told which folders are splits, where a picture of train lies in no class folder,
    where a class would vanish because its pictures cannot be decoded here or lie in an archive that is not unpacked,
    and for a folder that cannot be read.
    """
    tree = read_tree(root, unpacked)
    if not tree.count:
        error = unusable_files(f"folder {readable(str(root))}", tree.other_paths())
        if error is not None:
            raise error
        foreign = [name for name in tree.archive_paths() if not name.lower().endswith(ARCHIVES)]
        if foreign:
            message = f"archive {readable(foreign[0])} of folder {readable(str(root))} cannot be read here"
            raise DataError(message, hint=f"unpack it: `{unpacking(os.path.basename(foreign[0]))}`")
        return PathSplits()
    return _FolderReader(root, tree, selection, frozenset(map(readable, classes))).read()


class _FolderReader:
    """Finds the splits in a tree, then the classes in each split, then what is left out."""

    def __init__(self, root: Path, tree: Folder, selection: DataSelection, classes: frozenset[str]) -> None:
        self.root, self.tree, self.selection, self.classes = root, tree, selection, classes
        self.chosen_roles = {name: role for role, names in selection.splits.items() for name in names}
        self.result = PathSplits()
        self.leftovers = Leftovers(readable(str(root)), self.result.notes)

    def read(self) -> PathSplits:
        """Find the splits and their classes. Raises DataError."""
        top = self._unwrap(self.tree)
        chosen = {name: folder for name in self.chosen_roles if (folder := self._find(top, name)) is not None}
        is_complete = len(chosen) == len(self.chosen_roles)
        if is_complete and any(role == "train" or "/" in name for name, role in self.chosen_roles.items()):
            self._read_chosen(top, chosen)
        else:
            self._read_layout(top)
        self.leftovers.check(self.tree, [self.tree.name])
        self.leftovers.note_other_folders(self.tree)
        self.leftovers.note_files(skip_bad=self.selection.on_bad_image == "skip")
        return self.result

    # --------------------------------------------------------------------------------------------------------- splits

    def _unwrap(self, folder: Folder) -> Folder:
        """The folder that holds splits or classes, below folders that hold one other folder and no picture."""
        while len(folder.children) == 1 and not folder.pictures:
            (child,) = folder.children
            if child.is_flat or child.is_split or child.key in self.chosen_roles or child.name in self.classes:
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
        """Read the splits that flags name, and those of other roles that lie beside them."""
        roles = dict(self.chosen_roles)
        parents = {os.path.dirname(folder.path) for folder in splits.values() if folder is not top}
        chosen = list(splits.values())
        for parent in self.tree.walk():
            if parent.path in parents and parent not in chosen:
                siblings = [child for child in parent.children if child not in chosen]
                sibling_roles = roles_of_folders({child.key: child.name for child in siblings})
                splits |= {child.key: child for child in siblings if child.key in sibling_roles}
                roles |= sibling_roles
        self._add_splits(splits, roles)

    def _read_layout(self, top: Folder) -> None:
        names = {child.key: child.name for child in top.children}
        roles = roles_of_folders(names) | {key: role for key, role in self.chosen_roles.items() if key in names}
        others = [child for child in top.children if child.key not in roles]
        for child in top.children:  # train/ with pictures right in it, beside others like it, is a class of that name
            if roles.get(child.key) == "train" and child.is_flat and any(other.is_flat for other in others):
                others += [child] if child.key not in self.chosen_roles else []
        splits = {child.key: child for child in top.children if child not in others}
        roles = {key: roles[key] for key in splits}
        if not splits:
            self._read_without_splits(top)
        elif "train" in roles.values() or not others:
            if len(splits) == 1 and others and _hold_same_names(top.children):
                (split,) = splits.values()
                raise self._unclear(f"{split.relative} may be a split or a class: {_same_names(top.children)}")
            self._add_splits(splits, roles)
        else:
            self._read_splits_beside_classes(top, others, splits, roles)

    def _read_without_splits(self, top: Folder) -> None:
        """Read <class>/<split>/..., or <class>/... of which all is train."""
        parents = [self._class_parent(child, "", ()) for child in top.children]
        has_train = all(any(parse(split.name)[0] == "train" for split in folder.children) for folder in parents)
        splits = [split for folder in parents for split in folder.children]
        if len(parents) > 1 and has_train and all(split.is_split and _has_no_classes(split) for split in splits):
            self.leftovers.above_classes |= {top, *parents}
            self.leftovers.split_folders.update(splits)
            self.leftovers.roles |= {role_of(split.name) for split in splits}
            for child, folder in zip(top.children, parents, strict=True):
                for split in folder.children:
                    self.result.add(role_of(split.name), child.name, split.picture_paths())
            return
        inner = [below for child in top.children for below in child.walk() if below is not child and below.is_split]
        if inner:
            raise self._unclear(f"{inner[0].shown_path} has the name of a split, and lies among other folders")
        are_known = {child.name for child in top.children} <= self.classes
        if not are_known and self.selection.class_folders != "deepest" and _hold_same_names(top.children):
            raise self._unclear(f"{_same_names(top.children)}: they may be splits, and those the classes")
        self._add_splits({"train": top}, {"train": "train"})

    def _read_splits_beside_classes(
        self, top: Folder, others: Sequence[Folder], splits: dict[str, Folder], roles: dict[str, str]
    ) -> None:
        """Read splits, none of them train, beside folders that are its classes, or train itself under another name."""
        if len(others) == 1 and others[0].is_flat and all(split.is_flat for split in splits.values()):
            return self._add_splits({"train": top}, {"train": "train"})  # two classes: one alone would be none
        is_train = len(others) == 1 and not others[0].pictures
        classes = {child.name for child in (others[0].children if is_train else others)}
        for key, split in splits.items():
            parent = self._class_parent(split, roles[key], classes)
            names = {child.name for child in parent.children}
            may_be_unlabelled = roles[key] in ("test", UNLABELLED) and _is_unlabelled(parent, classes)
            if not (names and names <= classes) and not may_be_unlabelled:
                raise self._unclear(f"{split.shown_path} may be a split or a class")
        if is_train:
            name = others[0].shown_path
            self.result.notes.append(f"folder {name} is taken as train: it has the classes of the other splits")
        key = others[0].key if is_train else "train"
        self._add_splits({key: others[0] if is_train else top} | splits, {key: "train"} | roles)

    # -------------------------------------------------------------------------------------------------------- classes

    def _add_splits(self, splits: dict[str, Folder], roles: dict[str, str]) -> None:
        """Add the classes of each split, of train first: it tells what is a class in the others."""
        classes = self.classes
        names = {key: self._split_name(key, roles[key]) for key in splits}
        for key, name in names.items():
            others = [other for other in names if other != key and names[other] == name]
            if others:
                raise self._unclear(f"{' and '.join(sorted([key, *others]))} may both be {roles[key]}")
        self._check_distinct(splits, roles)
        self.leftovers.split_folders.update(splits.values())
        self.leftovers.roles.update(roles.values())
        for key in sorted(splits, key=lambda key: roles[key] != "train"):
            parent = self._class_parent(splits[key], roles[key], classes)
            # Beside train/, train2/ is a split that nobody has asked for.
            is_spare = key not in self.chosen_roles and names[key] != roles[key] and roles[key] in names.values()
            folders = [child for child in parent.folders if child not in splits.values()]
            with_pictures = [child for child in folders if child.count]
            if key not in self.chosen_roles and not {child.name for child in with_pictures} <= self.classes:
                self._check_copies(with_pictures)
            if roles[key] == "train" and not is_spare:
                self._check_train(parent, with_pictures)
                classes |= {child.name for child in with_pictures}
            elif roles[key] == UNLABELLED or _is_unlabelled(parent, classes):
                is_nested = any(splits[key] in other.folders for other in splits.values())
                self.result.notes.append(
                    f"{splits[key].shown_path} is left out: {plural(parent.count, 'picture')} without a label"
                    + (" (--train-split . makes it a class)" if is_nested else "")
                )
                continue
            else:
                self.leftovers.note_stray_pictures(parent)
            self.leftovers.class_parents.add(parent)
            self.leftovers.above_classes |= {below for below in splits[key].walk() if parent in below.walk()}
            for folder in folders:
                self._add_class(names[key], parent, folder)

    def _split_name(self, key: str, role: str) -> str:
        """What a split is called: as flags call it, or as its folder where that tells its role."""
        return key if key in self.chosen_roles or role_of(key) == role or role == UNLABELLED else role

    def _class_parent(self, split: Folder, role: str, classes: Collection[str]) -> Folder:
        """The folder right in which the classes of a split lie: train/train/<class>, test/images/<class>."""
        while len(split.children) == 1 and not split.pictures:
            (child,) = split.children
            is_repeated = parse(child.name)[0] == role
            is_container = child.name.casefold() in _CONTAINERS and not child.is_flat
            if child.name in classes or not (is_repeated or is_container):
                break
            split = child
        return split

    def _check_distinct(self, splits: Mapping[str, Folder], roles: Mapping[str, str]) -> None:
        key_of: dict[str, str] = {}
        for key, split in splits.items():
            same = key_of.setdefault(os.path.realpath(split.path), key)
            if same != key and {roles[key], roles[same]} <= set(ROLES):
                raise DataError(
                    f"splits {readable(same)} and {readable(key)} of {readable(str(self.root))} are the same folder",
                    f"both are {readable(os.path.realpath(split.path))}",
                    "remove the link: without a split of its own, validation is held out of train",
                )

    def _check_train(self, parent: Folder, classes: Sequence[Folder]) -> None:
        """Raise NoClassFolders for pictures of train that lie in no class folder."""
        if classes and parent.pictures:
            raise NoClassFolders(
                f"picture {readable(os.path.join(parent.path, parent.pictures[0]))} lies in no class folder",
                "others of the train split do",
                "move it into its class, or remove it",
            )
        if not classes:
            lists = listed_folder.lists_with_labels(self.root, self.selection)
            raise NoClassFolders(
                f"the pictures of folder {readable(parent.path)} lie in no class folders",
                f"{plural(parent.count, 'picture')}, and no folder that tells their class",
                f"if {lists[0]} lists them with their labels, give it by --dataset"
                if lists
                else "sort them into folders named after their classes, or give a .csv list of path,label by --dataset",
            )

    def _check_copies(self, classes: Sequence[Folder]) -> None:
        """Raise DataError for a class whose folders have the names of the classes beside it: so has a copy of all."""
        names = [folder.name for folder in classes]
        for i, folder in enumerate(classes):
            below = [child.name for child in folder.branches]
            if len(below) > 1 and set(below) <= {*names[:i], *names[i + 1 :]}:
                copied = f"may be a class or a copy of those beside it: it holds {shorten(below)}, too"
                raise self._unclear(f"{folder.shown_path} {copied}")

    def _add_class(self, split: str, parent: Folder, folder: Folder) -> None:
        if folder.count:
            self.leftovers.skipped_files += folder.other_paths()
        elif not folder.archive_paths():
            self.leftovers.note_empty(folder, f"class {folder.name} of {split}")
        if self.selection.class_folders == "deepest":
            for below in folder.walk():
                label = os.path.relpath(below.relative, parent.relative or ".")
                if folder.count and not below.count and not below.folders:
                    self.leftovers.note_empty(below, f"class {label} of {split}")
                self.result.add(split, label, [os.path.join(below.path, name) for name in below.pictures])
            return
        if folder.children and not any("--class-folders" in note for note in self.result.notes):
            self.result.notes.append(
                f"folders in a class folder belong to the class, as {folder.children[0].shown_path}; "
                "--class-folders deepest makes each a class of its own"
            )
        if folder.count:
            self.result.add(split, folder.name, folder.picture_paths())

    def _unclear(self, reason: str) -> DataError:
        return DataError(
            f"folder {readable(str(self.root))}: it cannot be told which folders are splits and which are classes",
            "\n        ".join([reason, *self.tree.draw()]),
            "name the splits by --train-split, --val-split and --test-split, as folders seen from there (a/train); "
            "--train-split . makes each folder a class; or give the folder that holds the splits by --dataset",
        )


def _hold_same_names(folders: Sequence[Folder]) -> bool:
    """Whether those with folders in them have two or more, whose names one of them has all: so do splits."""
    names = [{below.name for below in folder.branches} for folder in folders if folder.children]
    most = max(names, key=len, default=set())
    return len(names) > 1 and all(len(of_folder) > 1 and of_folder <= most for of_folder in names)


def _same_names(folders: Sequence[Folder]) -> str:
    branches = {folder.name: folder.branches for folder in folders if folder.children}
    below = [child.name for child in max(branches.values(), key=len)]
    return f"{shorten(list(branches))} hold folders of the same names, {shorten(below)}"


def _has_no_classes(split: Folder) -> bool:
    """Whether its pictures lie right in it, or in images/."""
    while len(split.children) == 1 and not split.pictures and split.children[0].name.casefold() in _CONTAINERS:
        (split,) = split.children
    return split.is_flat


def _is_unlabelled(parent: Folder, classes: Collection[str]) -> bool:
    """Whether the pictures lie right in it, or in a folder whose name says that it is no class."""
    names = [child.name for child in parent.children]
    return not names or (len(names) == 1 and names[0] not in classes and names[0].casefold() in _UNLABELLED)
