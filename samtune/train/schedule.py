"""Durations in any unit; learning rate and rho as pure functions of the step."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

_LONGEST = 1e9  # of any unit
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(epochs?|steps?|minutes?|%)?\s*")


@dataclass(frozen=True)
class Duration:
    """A length of training: "10 epochs" (or just 10), "5000 steps", "20%" of the whole run, or "10 minutes"."""

    amount: float
    unit: Literal["epochs", "steps", "%", "minutes"]

    @classmethod
    def parse(cls, value: "Duration | int | float | str") -> "Duration":
        """Read a duration; a bare number counts epochs. Raises ValueError with the accepted forms."""
        if isinstance(value, Duration):
            return value
        match = _DURATION.fullmatch(str(value))
        if match is None or isinstance(value, bool):
            raise ValueError('must be epochs (8), or text like "8 epochs", "5000 steps", "20%", "10 minutes"')
        if float(match[1]) > _LONGEST:
            raise ValueError(f"must be at most {_LONGEST:g}")
        units: dict[str, Literal["epochs", "steps", "%", "minutes"]]
        units = {"": "epochs", "e": "epochs", "s": "steps", "%": "%", "m": "minutes"}
        return cls(float(match[1]), units[(match[2] or "")[:1]])

    def steps(self, steps_per_epoch: int, total_steps: int = 0) -> int:
        """The same length in optimizer steps, rounded; total_steps is needed for "%" alone. Minutes have none."""
        per_unit = {"epochs": steps_per_epoch, "steps": 1, "%": total_steps / 100}[self.unit]
        return round(self.amount * per_unit)

    def __str__(self) -> str:
        number = format(Decimal(repr(self.amount)).normalize(), "f")  # no digit less, and no exponent: it is read again
        return f"{number}%" if self.unit == "%" else f"{number} {self.unit}"


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
