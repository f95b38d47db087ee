"""Lengths of training in any unit."""

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
        """The duration in optimizer steps, rounded. total_steps is needed only for "%"; minutes have no steps."""
        per_unit = {"epochs": steps_per_epoch, "steps": 1, "%": total_steps / 100}[self.unit]
        return round(self.amount * per_unit)

    def __str__(self) -> str:
        is_one = self.amount == 1 and self.unit != "%"
        return f"1 {self.unit.removesuffix('s')}" if is_one else self.to_recipe()

    def to_recipe(self) -> str:
        """The text of recipes and config.toml: with plural units, so that equal durations are equal text."""
        number = format(Decimal(repr(self.amount)).normalize(), "f")  # all digits and no exponent, as `parse` reads it
        return f"{number}%" if self.unit == "%" else f"{number} {self.unit}"
