"""The arms of a comparison, and the settings of each point that they try.

sam        SAM with the grid's rho
sam-late   SAM in the last part of the run only ("SAM efficiently selects flatter minima late in training",
           arXiv 2410.10373)
sgd        the plain optimizer for as many epochs
sgd-2x     the plain optimizer for twice as many: the baseline may have SAM's cost (Foret et al. 2021, appendix C)
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from samtune.config.duration import Duration
from samtune.config.run_config import RunConfig
from samtune.errors import UsageError
from samtune.sweep.spec import Sweep

Point = Mapping[str, Any]  # settings that differ within an arm

_WITH_SAM = ("sam", "sam-late")
_LONGEST_NAME = 60


def arms(sweep: Sweep) -> list[str]:
    """The arms that are compared. With a budget, sgd-2x is the same as sgd and left out."""
    return [arm for arm in sweep.table.arms if arm != "sgd-2x" or not sweep.table.budgets]


def notes(sweep: Sweep) -> list[str]:
    """Notes about a comparison for its user, before it starts."""
    lines = []
    if sweep.table.budgets and "sgd-2x" in sweep.table.arms:
        lines.append("sgd-2x is left out: with a budget, sgd has that cost already")
    if sweep.table.budgets:
        lines.append("the budget decides the length of each run, not epochs")
    if sweep.base.select == "best":
        lines.append("final runs are scored at their end: no checkpoint of theirs is chosen on validation")
    return lines


def has_sam(arm: str) -> bool:
    """Whether an arm uses SAM."""
    return arm in _WITH_SAM


def points(sweep: Sweep, arm: str) -> list[Point]:
    """The points of an arm, in the order of its grid, the last setting fastest; one empty point without a grid.

    Raises UsageError for a grid that contradicts the arm.
    """
    common, of_arm = sweep.table.grid, sweep.table.own_grid(arm)
    if not has_sam(arm):
        common = {key: values for key, values in common.items() if RunConfig.metadata(key)["panel"] != "SAM"}
    grid = common | of_arm
    for key in grid:
        where = f"[sweep.{arm if key in of_arm else 'grid'}] {key} of recipe {sweep.recipe}"
        if not has_sam(arm) and RunConfig.metadata(key)["panel"] == "SAM":
            raise UsageError(where, f"arm {arm} has no SAM", "put it under [sweep.grid], or under an arm with SAM")
        if has_sam(arm) and key == "rho" and 0 in grid[key]:
            raise UsageError(f"{where}: 0", f"arm {arm} without a radius is SGD", "leave it out; arm sgd has rho 0")
        if key == "epochs" and sweep.table.budgets:
            raise UsageError(where, "the budget decides the length of each run", "leave one of them out")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def settings(sweep: Sweep, arm: str, point: Point) -> dict[str, Any]:
    """All settings of an arm's point that differ from what all runs share."""
    if has_sam(arm):
        return dict(point)
    plain = dict(point) | {"rho": 0.0}
    if arm == "sgd-2x":
        once = Duration.parse(point.get("epochs", sweep.base.epochs))
        plain["epochs"] = Duration(2 * once.amount, once.unit).to_recipe()
    return plain


def name(point: Point) -> str:
    """The part of a folder's name for a point: rho0.05-lr0.01; "" without settings."""
    values = {key: str(value).replace("%", "pc") for key, value in point.items()}
    return "-".join(f"{key}{re.sub('[^A-Za-z0-9.+]', '', value)}" for key, value in values.items())


def names(points: Sequence[Point]) -> list[str]:
    """Names of all points of an arm; numbers where names would be long or the same."""
    readable = [name(point) for point in points]
    if len(set(readable)) < len(readable) or max(map(len, readable)) > _LONGEST_NAME:
        return [f"point{i}" for i in range(1, len(points) + 1)]
    return readable


def label(point: Point) -> str:
    """A point for people: rho 0.05, lr 0.01."""
    return ", ".join(f"{key} {value}" for key, value in point.items()) or "as the recipe"
