"""Which split of a data set plays which role: train, validation, test. Names in, names out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from samtune.errors import DataError, UsageError

_SYNONYMS = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "testing": "test",
}
_FLAGS = {"train": "--train-split", "validation": "--val-split", "test": "--test-split"}
ROLES = tuple(_FLAGS)


@dataclass(frozen=True)
class Wanted:
    """Columns and splits by their names, where they are not to be found by themselves.

    A split may be several, joined by "+": "train+validation".
    """

    image_key: str | None = None
    label_key: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    test_split: str | None = None

    @property
    def splits(self) -> dict[str, tuple[str, ...]]:
        """Role -> the splits that were asked for."""
        flags = {"train": self.train_split, "validation": self.val_split, "test": self.test_split}
        return {role: tuple(names.split("+")) for role, names in flags.items() if names is not None}


def role_of(split: str) -> str:
    """The role that a split's name stands for, in any case: Val -> validation; other names stand for themselves."""
    name = split.lower()
    if name in _FLAGS:
        return name
    return _SYNONYMS.get(name, split)


def assign(dataset: str, there: Sequence[str], wanted: Wanted, policy: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Role -> the splits that play it, train first.

    there: the splits of the data set. policy: role -> splits joined by "+", as the catalog says; {} goes by names, and
    splits of other names keep them. What is wanted goes first, and each split plays one role. A test split is never
    validation.

    Raises:
        UsageError: a wanted split is not there, has two roles, or is test and shall be validation.
        DataError: no train split; two splits that may both be meant.
    """
    chosen = wanted.splits
    _check(dataset, there, chosen, policy)
    taken = {name for names in chosen.values() for name in names}
    roles = dict(chosen)
    for role, names in _by_default(there, policy).items():
        free = tuple(name for name in names if name not in taken)
        if role in roles or not free:
            continue
        if role in _FLAGS and len(free) > 1 and not policy:
            raise DataError(
                f"data set {dataset} has {len(free)} splits for {role}: {', '.join(free)}",
                mend=f"choose one by {_FLAGS[role]}, or join them: {'+'.join(free)}",
            )
        roles[role] = free
    if "train" not in roles:
        raise DataError(
            f"data set {dataset} has no train split",
            f"it has: {', '.join(there)}",
            "name a split's files or folder train, or choose one by --train-split",
        )
    return {role: roles[role] for role in sorted(roles, key=lambda role: role != "train")}


def _by_default(there: Iterable[str], policy: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    if policy:
        roles = {role: tuple(name for name in names.split("+") if name in there) for role, names in policy.items()}
        return {role: names for role, names in roles.items() if names}
    found: dict[str, tuple[str, ...]] = {}
    for name in there:
        found[role_of(name)] = (*found.get(role_of(name), ()), name)
    return found


def _check(
    dataset: str, there: Sequence[str], chosen: Mapping[str, tuple[str, ...]], policy: Mapping[str, str]
) -> None:
    """Raise UsageError for a choice of splits that cannot be meant."""
    role_that_took: dict[str, str] = {}
    test = policy.get("test", "").split("+")
    for role, names in chosen.items():
        for name in names:
            if name not in there:
                raise UsageError(
                    f"{_FLAGS[role]} {'+'.join(names)}: data set {dataset} has no split {name!r}",
                    mend=f"it has: {', '.join(there)}",
                )
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
