"""Budgets: a cost that every arm gets, and the number of steps that it pays for."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from samtune.config.run_config import LARGEST
from samtune.errors import UsageError

_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(passes|pass|seconds?|s)\s*")
_ROUNDING = 1e-6  # sums of passes such as 1.3


@dataclass(frozen=True)
class Budget:
    """A number of forward-backward passes over a batch, or of seconds of training steps."""

    amount: float
    unit: Literal["passes", "seconds"]

    @classmethod
    def parse(cls, value: Any) -> "Budget":
        """Read "2000 passes" or "600 seconds". Raises ValueError with the accepted forms."""
        if isinstance(value, cls):
            return value
        match = _BUDGET.fullmatch(value) if isinstance(value, str) else None
        if match is None or not 0 < float(match[1]) <= LARGEST:
            raise ValueError(f'must be text like "2000 passes" or "600 seconds", at most {LARGEST:g}')
        return cls(float(match[1]), "passes" if match[2].startswith("p") else "seconds")

    def __str__(self) -> str:
        return f"{self.amount:.12g} {self.unit}"

    @property
    def tag(self) -> str:
        """The part of a run's name for its budget: b2000p, b600s."""
        return f"b{self.amount:.12g}{self.unit[0]}"


def steps_within(budget: Budget, plain: float, sam: float, sam_steps: Callable[[int], int], run: str = "a run") -> int:
    """The largest number of steps whose cost is within the budget.

    plain, sam: cost of a step of each kind, in the budget's unit. sam_steps: total steps -> steps with SAM. run: name
    for the error. Raises UsageError where the budget does not pay for one step.
    """
    steps = math.floor(budget.amount / min(plain, sam))
    while steps > 0:
        with_sam = sam_steps(steps)
        excess = (steps - with_sam) * plain + with_sam * sam - budget.amount
        if excess <= _ROUNDING:
            return steps
        # One step less may also change the number of SAM steps by 2, by rounding of start and end.
        steps -= max(1, math.ceil((excess - 2 * abs(sam - plain)) / max(plain, sam)) - 1)
    raise UsageError(
        f"--budget {budget} does not pay for one step of {run}",
        f"a step takes {max(plain, sam):.3g} {budget.unit}",
        "give more",
    )
