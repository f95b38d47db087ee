"""The table [sweep] of a recipe: seeds, arms, budgets and grids, and their rules."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from samtune.config import loading
from samtune.config.run_config import RunConfig, flag_name
from samtune.errors import UsageError, did_you_mean
from samtune.sweep.budget import Budget

Arm = Literal["sam", "sam-late", "sgd", "sgd-2x"]
ARMS: tuple[Arm, ...] = get_args(Arm)
Grid = dict[str, list[Any]]

RHO = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]  # Foret et al. 2021, section 3 and appendix C
SAM_START = ["50%", "70%", "90%"]

# Settings that the sweep gives each of its runs.
OWN = {
    "output": "--output of the sweep is the folder of all runs",
    "seed": "the seeds are a sweep's own: seeds, selection_seeds",
    "val": "runs that choose validate, and the last fits train on those images, too, unless refit = false",
    "test": "runs that choose leave test alone, and the last fits score it",
    "html": "the page of a sweep shows all of its runs, and `samtune report` draws that of one",
    **dict.fromkeys(sorted(RunConfig.settings(panel="Devices")), "a run is on one device"),
}
_MOST_SEEDS = 1000


def _seeds(seeds: Any) -> Any:
    """Read a number of seeds, from 0 on, or a list of them."""
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        seeds = list(range(min(seeds, _MOST_SEEDS + 1)))
    if not isinstance(seeds, list) or not seeds or any(type(s) is not int or not 0 <= s < 2**63 for s in seeds):
        raise ValueError("must be how many (5), or a list of whole numbers from 0 on ([0, 1])")
    if len(seeds) > _MOST_SEEDS:
        raise ValueError(f"must be at most {_MOST_SEEDS}")
    if len(set(seeds)) < len(seeds):
        raise ValueError("must be different from each other")
    return seeds


def _budgets(budgets: Any) -> Any:
    if not isinstance(budgets, list):
        raise ValueError('must be a list: ["2000 passes", "600 seconds"]')
    parsed = [Budget.parse(budget) for budget in budgets]
    if len(set(parsed)) < len(parsed):
        raise ValueError("must be different from each other")
    return parsed


def _arms(arms: Any) -> Any:
    if not isinstance(arms, list) or not arms or any(arm not in ARMS for arm in arms) or len(set(arms)) < len(arms):
        raise ValueError(f"must be some of {', '.join(ARMS)}, each once")
    return arms


def _grid(grid: Any) -> Any:
    if not isinstance(grid, dict):
        raise ValueError("must be a table: settings, each with a list of values")
    for key, values in grid.items():
        if key not in RunConfig.model_fields:
            raise ValueError(f"unknown setting {key}: {did_you_mean(key, RunConfig.model_fields)}".removesuffix(": "))
        if key in OWN:
            raise ValueError(f"{key} cannot vary: {OWN[key]}")
        if key == "variant":
            raise ValueError("variant cannot vary: a sweep has one variant; put the settings into the grid or an arm")
        if RunConfig.metadata(key)["affects"] == "rows":
            raise ValueError(f"{key} cannot vary: the errors would be of different images")
        if not isinstance(values, list) or not values or any(isinstance(v, list | dict) for v in values):
            raise ValueError(f"{key} must have a list of values: {key} = [0.01, 0.02]")
        if len({json.dumps(value) for value in values}) < len(values):
            raise ValueError(f"{key} has the same value twice")
    return grid


_Seeds = Annotated[list[int], BeforeValidator(_seeds)]
_Grid = Annotated[Grid, BeforeValidator(_grid), Field(default_factory=dict)]


class SweepSpec(BaseModel):
    """The table [sweep]. Frozen; unknown keys are refused.

    seeds: of the final runs. selection_seeds: of the selection runs. budgets: empty means the recipe's length.
    refit: whether final runs also train on the validation images. With noisy training labels they should not, as the
    clean labels of validation would dilute the noise.
    grid: of all arms; settings of SAM apply to arms with SAM. sam, ...: of one arm; its keys take precedence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    seeds: _Seeds = [0, 1, 2, 3, 4]
    selection_seeds: _Seeds = [0]
    refit: bool = True
    arms: Annotated[list[Arm], BeforeValidator(_arms)] = list(ARMS)
    budgets: Annotated[list[Budget], BeforeValidator(_budgets)] = []
    grid: _Grid
    sam: _Grid
    sam_late: Annotated[_Grid, Field(alias="sam-late")]
    sgd: _Grid
    sgd_2x: Annotated[_Grid, Field(alias="sgd-2x")]

    def own_grid(self, arm: str) -> Grid:
        """The grid that only this arm has."""
        return cast(Grid, getattr(self, arm.replace("-", "_")))

    def to_toml(self) -> str:
        """The table as TOML, with defaults."""
        lists = {"seeds": self.seeds, "selection_seeds": self.selection_seeds, "arms": self.arms}
        lines = ["[sweep]", *(f"{key} = {json.dumps(values)}" for key, values in lists.items())]
        lines += [] if self.refit else ["refit = false"]
        lines += [f"budgets = {json.dumps([str(budget) for budget in self.budgets])}"] if self.budgets else []
        for name, grid in [("grid", self.grid), *((arm, self.own_grid(arm)) for arm in ARMS)]:
            if grid:
                lines += ["", f"[sweep.{name}]"]
                lines += [f"{key} = {json.dumps(values, ensure_ascii=False)}" for key, values in grid.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Sweep:
    """A sweep: the settings that all runs share, and the table.

    recipe, flags: sources of the settings. base: the settings by precedence, flag > recipe > default, as in a run.
    """

    recipe: Path
    flags: Mapping[str, Any]
    base: RunConfig
    table: SweepSpec

    @property
    def name(self) -> str:
        """The name of the recipe and of its variant, for a folder."""
        return "-".join((self.recipe.stem, *(self.base.variant or "").split()))

    def config(self, settings: Mapping[str, Any]) -> RunConfig:
        """The settings of a run: the shared ones, and those of this run. Raises UsageError."""
        over = {key: (value, f"[sweep] of recipe {self.recipe}") for key, value in settings.items()}
        config = loading.load(self.recipe, self.flags, over)
        if config.batch_size == "auto":
            raise UsageError(
                f"batch_size = auto in recipe {self.recipe}",
                "all runs of a sweep need the same batch, to be comparable",
                "give a number; on a GPU `samtune plan` finds the largest",
            )
        return config

    def to_toml(self) -> str:
        """A recipe that repeats the sweep, with defaults as comments."""
        lines = []
        for key, line in zip(RunConfig.model_fields, self.base.to_toml().splitlines(), strict=True):
            given = self.base.origins[key].partition(" ")[0] in ("flag", "recipe")
            if key not in OWN:
                lines.append(line if given or line.startswith("#") else f"# {line}")
        return "\n".join(lines) + "\n\n" + self.table.to_toml()


def load(
    recipe: Path, flags: Mapping[str, Any], *, budgets: list[str] | None = None, seeds: str | None = None
) -> Sweep:
    """Load a recipe; flags, budgets and seeds take precedence. Raises UsageError that names key, origin and rule."""
    base = loading.load(recipe, flags)
    for key, several in (("processes", (base.processes or 1) > 1), ("nnodes", base.nnodes > 1), ("shard", base.shard)):
        if several:
            raise UsageError(
                f"{key} = {getattr(base, key)} in recipe {recipe}: each run of a sweep is on one device",
                hint="leave it out; --gpus all has a run on each GPU, --jobs so many on a CPU",
            )
    given = loading.sweep_table(recipe, flags.get("variant"))
    origins = dict.fromkeys(given, f"[sweep] of recipe {recipe}")
    if budgets:
        given, origins["budgets"] = given | {"budgets": budgets}, "flag --budget"
    if seeds is not None:
        given, origins["seeds"] = given | {"seeds": _read_seeds(seeds)}, "flag --seeds"
    try:
        table = SweepSpec.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise _explain(str(first["loc"][0]), first["type"], first["msg"], given, origins) from None
    if table.budgets and table.arms == ["sgd-2x"]:
        raise UsageError("with a budget, sgd-2x alone leaves no arm", "it is sgd at that cost", "give arm sgd")
    return Sweep(recipe, flags, base, _with_flags(_with_defaults(table), flags))


def _read_seeds(seeds: str) -> int | list[int] | str:
    parts = seeds.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        return seeds  # is refused with the rule
    return int(seeds) if len(parts) == 1 else [int(part) for part in parts]


def _with_defaults(table: SweepSpec) -> SweepSpec:
    """Add the paper's rho, and the starts of late SAM, if the recipe has no others."""
    late = table.sam_late
    if "sam-late" in table.arms and not {"sam_start", "sam_schedule"} & {*late, *table.grid}:
        late = {"sam_start": SAM_START} | late
    grid = table.grid
    if {"sam", "sam-late"} & set(table.arms):
        grid = {"rho": RHO} | grid
    return table.model_copy(update={"grid": grid, "sam_late": late})


def _with_flags(table: SweepSpec, flags: Mapping[str, Any]) -> SweepSpec:
    """Replace grids by flags, which take precedence over the recipe and its grids."""
    grids = {name: getattr(table, name) for name in ("grid", "sam", "sam_late", "sgd", "sgd_2x")}
    given = {key: [value] for key, value in flags.items() if value is not None}
    stands_for = {"sam_start", "sam_end", "sam_every"}
    replaced = stands_for if "sam_schedule" in given else {"sam_schedule"} if stands_for & given.keys() else set()
    return table.model_copy(
        update={
            name: {key: given.get(key, values) for key, values in grid.items() if key not in replaced}
            for name, grid in grids.items()
        }
    )


def _explain(key: str, kind: str, message: str, given: Mapping[str, Any], origins: Mapping[str, str]) -> UsageError:
    keys = [field.alias or name for name, field in SweepSpec.model_fields.items()]
    if kind == "extra_forbidden":
        hint = did_you_mean(key, keys) or f"the keys are {', '.join(keys)}"
        return UsageError(f"unknown key {key} in {origins[key]}", hint=hint)
    rule = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return UsageError(f"{key} = {given[key]!r} in {origins[key]}: {rule}", hint="`samtune guide sweep` has an example")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two recipes, one line for each key."""
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) or isinstance(new, dict):
            lines += [f"{key}.{line}" for line in differences(old or {}, new or {})]
        elif old != new:
            lines.append(f"{key}: {_format_value(old)} before, {_format_value(new)} now")
    return lines


def _format_value(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)


def flag(key: str, value: Any) -> str:
    """A setting as a flag of `samtune run`."""
    if isinstance(value, bool):
        return flag_name(key if value else f"no_{key}")
    return f"{flag_name(key)}={value}"
