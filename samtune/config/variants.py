"""Variants of a recipe: one file describes a table of experiments.

    [variants.network.wrn28_10]              axis network, option wrn28_10, and the settings that it gives
    model = "wrn28_10"
    [variants.augmentation.basic]
    [variants.augmentation.cutout]
    cutout = 0.5
    [combinations."wrn28_10 cutout"]         settings where all of these options are chosen
    rho = 0.1

A cell has one option of each axis; where none is asked for, the first. A combination takes precedence over its options,
an option over the recipe, and a later axis over an earlier one. An option may also set keys of the recipe's table
[sweep].
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samtune.errors import UsageError, did_you_mean

TABLES = ("variants", "combinations")
"""The keys of a recipe that hold its variants, and are no settings."""
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Variants:
    """The variants of the recipe in a file.

    axes: axis -> option -> its settings. combinations: (options, settings), those with fewer options first.
    """

    path: Path
    axes: Mapping[str, Mapping[str, Settings]]
    combinations: tuple[tuple[tuple[str, ...], Settings], ...] = ()

    @classmethod
    def of(cls, content: Settings, path: Path) -> "Variants":
        """The variants in the content of a recipe. Raises UsageError for tables of another form."""
        axes = content.get("variants", {})
        if not _is_table_of_tables(axes) or not all(
            options and _is_table_of_tables(options) for options in axes.values()
        ):
            raise _wrong_form("variants", path, "an axis has options, which have settings", "[variants.AXIS.OPTION]")
        names = [option for options in axes.values() for option in options]
        for name in names:
            if names.count(name) > 1 or re.search(r"[\s,]", name):
                message = f"variant {name!r} in recipe {path}"
                raise UsageError(message, "a name without blanks and commas stands for one option of one axis")
        combinations = content.get("combinations", {})
        if not _is_table_of_tables(combinations):
            raise _wrong_form("combinations", path, "a combination has settings", '[combinations."OPTION OPTION"]')
        without_combinations = cls(path, axes)
        several = [
            (without_combinations._options(combination, f"[combinations] of recipe {path}: "), combination)
            for combination in combinations
        ]
        several.sort(key=lambda one: len(one[0]))
        return cls(path, axes, tuple((options, combinations[name]) for options, name in several))

    def cells(self) -> list[str]:
        """All cells, by the names of their options; [] without variants."""
        return [" ".join(options) for options in itertools.product(*self.axes.values())] if self.axes else []

    def cell(self, variant: str | None) -> tuple[str, ...]:
        """The options of the cell that a value of --variant means ("cutout,cifar100"), one of each axis.

        Raises UsageError for an option that does not exist, or a second one of an axis.
        """
        asked = self._options(variant or "", "--variant ")
        return tuple(
            next((option for option in asked if option in options), next(iter(options)))
            for options in self.axes.values()
        )

    def layers(self, cell: tuple[str, ...]) -> list[tuple[str, Settings]]:
        """What a cell adds to the recipe, as (origin, settings); a later one takes precedence."""
        options = zip(self.axes.values(), cell, strict=True)
        layers = [(f"recipe {self.path}, variant {option}", axis[option]) for axis, option in options]
        for combination, settings in self.combinations:
            if set(combination) <= set(cell):
                layers.append((f"recipe {self.path}, variant {' '.join(combination)}", settings))
        return layers

    def describe(self) -> str:
        """The axes and their options as text."""
        return "; ".join(f"{axis}: {', '.join(options)}" for axis, options in self.axes.items())

    def _options(self, text: str, where: str) -> tuple[str, ...]:
        options = tuple(filter(None, re.split(r"[\s,]+", text)))
        of_axis: dict[str, str] = {}
        for option in options:
            axis = next((axis for axis, known in self.axes.items() if option in known), None)
            if axis is None:
                near = did_you_mean(option, [name for known in self.axes.values() for name in known])
                hint = near or "give one of an axis at most, as in --variant cutout,cifar100"
                raise UsageError(f"{where}{option}: recipe {self.path} has no such variant", self.describe(), hint)
            if of_axis.setdefault(axis, option) != option:
                message = f"{where}{of_axis[axis]},{option}: both are options of {axis}"
                raise UsageError(message, self.describe(), "give one of them")
        return options


def _is_table_of_tables(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())


def _wrong_form(key: str, path: Path, rule: str, example: str) -> UsageError:
    return UsageError(f"{key} in recipe {path} has another form", rule, f"write {example}, and settings below")
