"""Which split of a data set plays which role: train, validation, test. Names in, names out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from samtune.config import loading
from samtune.errors import DataError, UsageError

_FLAGS = {"train": "--train-split", "validation": "--val-split", "test": "--test-split"}
ROLES = tuple(_FLAGS)
UNLABELLED = "unlabelled"  # the role of pictures that a model shall predict, and that nobody has labelled
_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
    **dict.fromkeys(("pred", "predict", "prediction", "unlabelled", "unlabeled"), UNLABELLED),
}
# Words that say nothing of the role: training_set, seg_train, images_test, val2017.
_COMMON_WORDS = {
    *("set", "data", "dataset", "split", "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos"),
    *("seg", "folder", "dir", "part", "sample", "samples", "private"),
}
_STAND_INS = {"holdout": "test", "heldout": "test", "trainval": "train"}  # where no split is called by its role


@dataclass(frozen=True)
class DataSelection:
    """Settings of a run that tell how its data set is read; None is found out from the data.

    A split may be several, joined by "+": "train+validation".
    """

    image_key: str | None = None
    label_key: str | None = None
    split_key: str | None = None
    image_root: str | None = None
    image_suffix: str = ""
    class_folders: str = "first"
    dataset_config: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    test_split: str | None = None
    on_unlabelled: str = "error"
    on_bad_image: str = "error"

    @classmethod
    def of(cls, settings: Any) -> Self:
        """From an object with these attributes, such as a RunConfig."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Self:
        """From flags of `samtune run`. Raises UsageError for a value that cannot be meant."""
        return cls.of(loading.load(None, {"model": "", "dataset": "", **flags}))

    @property
    def splits(self) -> dict[str, tuple[str, ...]]:
        """Role -> the selected splits."""
        flags = {"train": self.train_split, "validation": self.val_split, "test": self.test_split}
        return {role: tuple(names.split("+")) for role, names in flags.items() if names is not None}


def parse(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The role that a split's name tells, and the words beside it: flowers_train2017 -> ("train", ("flowers",)).

    No role where it has no word for one, or words for several.
    """
    roles, rest = words_of(name)
    return (roles.pop() if len(roles) == 1 else None), rest


def words_of(name: str) -> tuple[set[str], tuple[str, ...]]:
    """The roles of which a name speaks, and the words beside them: is_train_or_val -> train, validation; is, or."""
    roles, rest = set(), []
    words = re.sub("(?<=[a-z])(?=[A-Z])", " ", name)  # TrainSet
    for word in re.findall("[^\\W\\d_]+", words.casefold()):
        stem = next((word.removesuffix(end) for end in _COMMON_WORDS if word.removesuffix(end) in _WORDS), word)
        if stem in _WORDS:
            roles.add(_WORDS[stem])
        elif word not in _COMMON_WORDS:
            rest.append(word)
    return roles, tuple(rest)


def role_of(split: str) -> str:
    """The role that a split's name stands for: Val, valid_set, val2017 -> validation; others stand for themselves."""
    role, rest = parse(split)
    return role if role in ROLES and not rest else split


def roles_beside(names: Iterable[str]) -> dict[str, str]:
    """Name -> the role that a split plays beside the others, itself where its name tells none.

    Of "test" and "test2" the first is meant; the other is a split that nobody has asked for. Where no split says test,
    one that is held out is, and where none says train, trainval. The public part of a test set is what one may choose
    on, beside a private one.
    """
    splits = dict.fromkeys(names)
    roles = {name: role_of(name) for name in splits}
    roles = {name: name if role != name and role in splits else role for name, role in roles.items()}
    for name in splits:
        role, rest = parse(name)
        free = [role for role in ("test", "validation") if role not in roles.values()]
        if (role, rest) == ("test", ("public",)) and free:
            roles[name] = free[0]
        stand_in = _STAND_INS.get("".join(rest), "") if role is None else ""
        if stand_in and stand_in not in roles.values():
            roles[name] = stand_in
    return roles


def roles_of_folders(names: Mapping[str, str]) -> dict[str, str]:
    """Key -> role of those folders that are splits, by their names.

    flowers_train and flowers_test are splits beside each other; one of them without the other is not.
    """
    parsed = {key: parse(name) for key, name in names.items()}
    roles = {}
    for key, (role, rest) in parsed.items():
        partners = {other for other, other_rest in parsed.values() if other_rest == rest and other in ROLES}
        if role is not None and (not rest or len(partners) > 1):
            roles[key] = role
    return roles


def assign(
    dataset: str,
    splits: Sequence[str],
    selection: DataSelection,
    policy: Mapping[str, str],
    needs_train: bool = True,
    notes: Sequence[str] = (),
) -> dict[str, tuple[str, ...]]:
    """Role -> the splits that play it, train first.

    splits: those of the data set. policy: role -> splits joined by "+", as the catalog says; {} goes by names, and
    splits of other names keep them. What is selection takes precedence, and each split plays one role. A test split is
    never validation. needs_train: whether there has to be a train split. notes: on the splits, for errors.
    Raises UsageError for a choice that cannot be meant, DataError for no train split, or two that may both be meant.
    """
    chosen = selection.splits
    _check(dataset, splits, chosen, policy)
    taken = {name for names in chosen.values() for name in names}
    roles = dict(chosen)
    for role, names in _default_roles(splits, policy).items():
        free = tuple(name for name in names if name not in taken)
        if role in roles or not free:
            continue
        if role in _FLAGS and len(free) > 1 and not policy:
            message = f"data set {dataset} has {len(free)} splits for {role}: {', '.join(free)}"
            raise DataError(message, hint=f"choose one by {_FLAGS[role]}, or join them: {'+'.join(free)}")
        roles[role] = free
    if "train" not in roles and needs_train:
        raise DataError(
            f"data set {dataset} has no train split",
            "; ".join([f"it has: {', '.join(splits)}", *notes]),
            "name a split's files or folder train, or choose one by --train-split",
        )
    return {role: roles[role] for role in sorted(roles, key=lambda role: role != "train")}


def _default_roles(splits: Iterable[str], policy: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    if policy:
        roles = {role: tuple(name for name in names.split("+") if name in splits) for role, names in policy.items()}
        return {role: names for role, names in roles.items() if names}
    by_role: dict[str, tuple[str, ...]] = {}
    for name, role in roles_beside(splits).items():
        by_role[role] = (*by_role.get(role, ()), name)
    return by_role


def _check(
    dataset: str, splits: Sequence[str], chosen: Mapping[str, tuple[str, ...]], policy: Mapping[str, str]
) -> None:
    role_that_took: dict[str, str] = {}
    test = policy.get("test", "").split("+")
    for role, names in chosen.items():
        for name in names:
            if name not in splits:
                message = f"{_FLAGS[role]} {'+'.join(names)}: data set {dataset} has no split {name!r}"
                raise UsageError(message, hint=f"it has: {', '.join(splits)}")
            if name in role_that_took:
                raise UsageError(
                    f"split {name} of data set {dataset} is chosen twice",
                    f"by {_FLAGS[role_that_took[name]]} and {_FLAGS[role]}",
                    "each split plays one role; leave --val-split out to hold a part of train out",
                )
            if role == "validation" and (name in test or (not policy and role_of(name) == "test")):
                raise UsageError(
                    f"--val-split {'+'.join(names)}: {name} is the test split of data set {dataset}",
                    "what chooses a checkpoint or a setting cannot measure it afterwards",
                    "leave --val-split out: a stratified part of train is held out",
                )
            role_that_took[name] = role
