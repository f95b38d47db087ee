"""Learning rate and rho as pure functions of the step, and how many steps a run takes."""

import math
from dataclasses import dataclass
from typing import Literal

from samtune.config.run_config import RunConfig
from samtune.data.loader import steps_per_epoch
from samtune.errors import UsageError
from samtune.train.batch_plan import BatchPlan


def cosine(step: int, total_steps: int) -> float:
    """Factor on a learning rate at a step (from 0): half a cosine from 1 down to 0 at total_steps."""
    return 0.5 * (1 + math.cos(math.pi * step / total_steps))


def warmup(step: int, warmup_steps: int) -> float:
    """Factor at a step (from 0) that rises evenly to 1 at step warmup_steps; the first step already moves."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


@dataclass(frozen=True)
class RhoSchedule:
    """The radius of SAM's perturbation at each step (from 0) of a run; 0 where the step is one of the base optimizer.

    peak, final: radius in weight units. shape: "constant"; "linear" or "cosine" from peak at step `start` to final at
    `end`; or "lr", in proportion to the learning rate. SAM is on at start, start + every, start + 2 every, ... before
    end. Over the first warmup_steps the radius rises as `warmup` does, whatever its shape.
    """

    peak: float
    total_steps: int
    final: float = 0.0
    shape: Literal["constant", "linear", "cosine", "lr"] = "constant"
    start: int = 0
    end: int | None = None
    every: int = 1
    warmup_steps: int = 0

    @property
    def sam_steps(self) -> range:
        """The steps at which the radius is not 0."""
        end = self.total_steps if self.end is None else min(self.end, self.total_steps)
        return range(self.start, end if self.peak > 0 else self.start, self.every)

    def __call__(self, step: int) -> float:
        """Radius in weight units at a step."""
        if step not in self.sam_steps:
            return 0.0
        end = self.total_steps if self.end is None else self.end
        rising = warmup(step, self.warmup_steps)
        if self.shape == "constant":
            return self.peak * rising
        if self.shape == "lr":
            return self.peak * rising * cosine(step, self.total_steps)
        passed, length = step - self.start, end - self.start
        left = cosine(passed, length) if self.shape == "cosine" else 1 - passed / length
        return (self.final + (self.peak - self.final) * left) * rising


@dataclass(frozen=True)
class TrainingLength:
    """How many steps a run takes, and at which of them SAM perturbs by which radius."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    tail_start: int  # the last step before those that --average-tail averages; all steps without it
    rho: RhoSchedule

    @classmethod
    def of(cls, config: RunConfig, batch: BatchPlan, train_images: int) -> "TrainingLength":
        """As the settings have it. Raises UsageError where they leave SAM no step, or average more than the run."""
        per_epoch = steps_per_epoch(train_images, batch.total)
        total_steps = max(1, config.epochs.steps(per_epoch))
        warmup_steps = config.warmup_epochs.steps(per_epoch, total_steps)
        tail_start = total_steps - _tail_steps(config, per_epoch, total_steps)
        rho = _rho_schedule(config, per_epoch, total_steps, warmup_steps)
        return cls(per_epoch, total_steps, warmup_steps, tail_start, rho)


def _tail_steps(config: RunConfig, per_epoch: int, total_steps: int) -> int:
    """How many steps --average-tail averages, at least one; 0 without it."""
    if config.average_tail is None:
        return 0
    steps = max(1, config.average_tail.steps(per_epoch, total_steps))
    if steps > total_steps:
        raise UsageError(
            f"--average-tail {config.average_tail} is more than the run",
            f"{steps} of {total_steps} steps",
            "give less, as 25%",
        )
    return steps


def _rho_schedule(config: RunConfig, per_epoch: int, total_steps: int, warmup_steps: int) -> RhoSchedule:
    start, end = (duration.steps(per_epoch, total_steps) for duration in (config.sam_start, config.sam_end))
    if config.rho > 0 and not start < min(end, total_steps):
        raise UsageError(
            f"--sam-start {config.sam_start} and --sam-end {config.sam_end} leave SAM no step",
            f"they are steps {start} and {end} of {total_steps}",
            "let it begin earlier, or switch it off with --rho 0",
        )
    return RhoSchedule(
        peak=config.rho,
        final=config.rho_final,
        shape=config.rho_schedule,
        start=start,
        end=min(end, total_steps),
        every=config.sam_every,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
    )
