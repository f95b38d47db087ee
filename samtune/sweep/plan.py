"""The runs of a sweep, stage by stage.

probe    with a budget in seconds: time of a plain step and of a SAM step
select   every point of an arm with several, trained on train and scored on validation; test is not read
final    the chosen point with every seed, on train and validation (without refit: on train), scored on test once
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from samtune.config.duration import Duration
from samtune.config.run_config import RunConfig
from samtune.errors import ModelError
from samtune.models.build import build_on_meta
from samtune.models.cuts import find_cut
from samtune.models.timm_format import look_up
from samtune.runs.metrics import read_metrics
from samtune.sam.gradient import sam_passes
from samtune.sweep import arms
from samtune.sweep.arms import Point
from samtune.sweep.budget import Budget, steps_within
from samtune.sweep.ledger import Run, Stage, run_folder
from samtune.sweep.spec import Sweep
from samtune.train.batch_plan import BatchPlan
from samtune.train.schedule import TrainingLength

# Probes cost the same (but have 20 steps at least): those side by side share the machine to the end, as runs do.
_PROBE_PASSES = 80
_PROBE_PART = 10  # steps; the first part warms up
_SAME_TIME = RunConfig.settings(affects="update")  # points that differ only in these share a probe


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep. rows: number of images that a run with these settings trains on."""

    sweep: Sweep
    rows: Callable[[RunConfig], int]

    def arms(self) -> Iterator[tuple[Budget | None, str]]:
        """Each budget with each arm."""
        budgets: list[Budget | None] = [*self.sweep.table.budgets]
        for budget in budgets or [None]:
            for arm in arms.arms(self.sweep):
                yield budget, arm

    def probes(self) -> list[Run]:
        """One run for each kind of step, shared by all points whose steps take the same time."""
        if not any(budget.unit == "seconds" for budget in self.sweep.table.budgets):
            return []
        probes: dict[str, Run] = {}
        for arm in arms.arms(self.sweep):
            for point in arms.points(self.sweep, arm):
                for kind in ("plain", "sam") if arms.has_sam(arm) else ("plain",):
                    run = self._probe(kind, point)
                    probes.setdefault(run.id, run)
        return list(probes.values())

    def _probe(self, kind: str, point: Point) -> Run:
        settings = _step_settings(point)
        settings |= {"rho": point.get("rho", 0.0) if kind == "sam" else 0.0}
        settings |= {"sam_start": "0%", "sam_end": "100%", "sam_every": 1, "rho_schedule": "constant"}
        config = self.sweep.config(settings)
        passes = _sam_passes(config) if kind == "sam" else 1
        steps = max(2 * _PROBE_PART, round(_PROBE_PASSES / passes))
        settings |= {"epochs": f"{steps} steps", "eval_every": f"{_PROBE_PART} steps", "max_eval": 1}
        settings |= {"bootstrap": False} if config.bootstrap else {}
        settings |= {"average_tail": "100%"} if config.average_tail is not None else {}
        return self._run(_probe_id(kind, point), "probe", None, None, point, 0, settings | {"val": True, "test": False})

    def selections(self, budget: Budget | None, arm: str, paces: Mapping[str, float]) -> list[list[Run]]:
        """The selection runs of each point of an arm, by seed; none for a single point."""
        points = arms.points(self.sweep, arm)
        if len(points) == 1:
            return []
        named = zip(points, arms.names(points), strict=True)
        return [self._runs("select", budget, arm, point, paces, f"-{name}") for point, name in named]

    def finals(self, budget: Budget | None, arm: str, point: Point, paces: Mapping[str, float]) -> list[Run]:
        """The final runs of an arm with its chosen point."""
        return self._runs("final", budget, arm, point, paces)

    def paces(self, folder: Path) -> dict[str, float]:
        """Seconds of a step, by probe. All probes must be done."""
        return {probe.id: seconds_per_step(run_folder(folder, probe.id)) for probe in self.probes()}

    def _runs(
        self, stage: Stage, budget: Budget | None, arm: str, point: Point, paces: Mapping[str, float], name: str = ""
    ) -> list[Run]:
        """A run for each seed, with the length that the budget pays for. name: of the point, for the folders."""
        table, run_id = self.sweep.table, f"{stage}-{arm}{name}"
        seeds = table.selection_seeds if stage == "select" else table.seeds
        settings = arms.settings(self.sweep, arm, point)
        # The average is not chosen on validation.
        select = "average" if self.sweep.config(settings).select == "average" else "last"
        final = {"val": not table.refit, "test": True, "select": select}
        settings |= {"val": True, "test": False} if stage == "select" else final
        if budget is not None:
            run_id = f"{budget.tag}-{run_id}"
            settings |= {"epochs": f"{self._steps(budget, arm, point, settings, paces)} steps"}
        of = str(budget) if budget else None
        return [self._run(f"{run_id}-seed{seed}", stage, of, arm, point, seed, settings) for seed in seeds]

    def _steps(
        self, budget: Budget, arm: str, point: Point, settings: Mapping[str, Any], paces: Mapping[str, float]
    ) -> int:
        config = self.sweep.config(settings)
        plain, sam = 1.0, _sam_passes(config)
        if budget.unit == "seconds":
            plain = paces[_probe_id("plain", point)]
            sam = paces[_probe_id("sam", point)] if arms.has_sam(arm) else plain
        plain, sam = config.stages * plain, config.stages * sam  # each step is taken in each training

        def sam_steps(steps: int) -> int:
            return len(self._length(config.model_copy(update={"epochs": Duration(steps, "steps")})).rho.sam_steps)

        return steps_within(budget, plain, sam, sam_steps, f"arm {arm} ({arms.label(point)})")

    def _run(
        self,
        run_id: str,
        stage: Stage,
        budget: str | None,
        arm: str | None,
        point: Point,
        seed: int,
        settings: Mapping[str, Any],
    ) -> Run:
        """Make a run, and check its settings now rather than when it starts."""
        settings = {**settings, "seed": seed, "html": False}
        config = self.sweep.config(settings)
        length = self._length(config)
        sam_steps = len(length.rho.sam_steps)
        passes = length.total_steps - sam_steps + sam_steps * _sam_passes(config)
        passes *= config.stages
        return Run(run_id, stage, budget, arm, point, seed, settings, length.total_steps, passes)

    def _length(self, config: RunConfig) -> TrainingLength:
        images = self.rows(config)
        batch = BatchPlan.of(config, 1, images)
        batch.sharing(config.m)
        return TrainingLength.of(config, batch, images)


def _sam_passes(config: RunConfig) -> float:
    share = 1.0
    recomputes = config.micro_batch is not None or config.compile or config.grad_checkpointing
    if config.perturb_from is not None and not recomputes and config.ascent_fraction == 1:
        share = _suffix_share(config.model, config.weights, config.img_size, config.perturb_from)
    return sam_passes(config.ascent_steps, config.ascent_fraction, config.ascent, config.second_order, share)


@cache
def _suffix_share(model: str, weights: Path | None, img_size: int | None, perturb_from: str) -> float:
    """The share that a run of these settings has, from the model's shapes alone."""
    source = look_up(model, weights)
    size = source.data_config(img_size)["input_size"]
    with suppress(ModelError):  # a model that needs its weights to be built: plan with the whole cost
        on_meta = build_on_meta(source, img_size if source.config.get("fixed_input_size") else None)
        return find_cut(on_meta, perturb_from, size).share
    return 1.0


def _step_settings(point: Point) -> dict[str, Any]:
    """The settings of a point that decide how long a step takes."""
    return {key: value for key, value in point.items() if key not in _SAME_TIME}


def _probe_id(kind: str, point: Point) -> str:
    return "-".join(filter(None, ("probe", kind, arms.name(_step_settings(point)))))


def seconds_per_step(folder: Path) -> float:
    """Seconds per step of a probe, without the first steps, which fill caches and allocate memory."""
    rows = [row for row in read_metrics(folder) if row["split"] == "train" and row["step"] > _PROBE_PART]
    return float(sum(row["n"] / row["images_per_second"] for row in rows) / sum(row["steps"] for row in rows))
