"""The state of a run between two steps, and how a checkpoint stores and restores it.

Order and augmentation of the images follow from (seed, epoch, row), mixing from (seed, step). So the step is all that
the state holds of the data.
"""

import math
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from samtune import console
from samtune.errors import CheckpointError, first_line
from samtune.runs import checkpoint
from samtune.sam.snapshot import generator_states, set_generator_states
from samtune.sam.step import StepResult
from samtune.train.setup import Setup


@dataclass
class StepStats:
    """Sums over several steps, and their means."""

    steps: int = 0
    skipped: int = 0
    n: int = 0
    seen: int = 0
    wrong: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    passes: float = 0.0
    rho: float = 0.0
    waiting: float = 0.0
    working: float = 0.0

    def add(self, result: StepResult, n: int, rho: float, waiting: float, working: float) -> None:
        """Add a step on n images. A skipped step adds nothing to loss and error."""
        self.steps += 1
        self.n += n
        self.passes += result.passes
        self.rho = rho or self.rho
        self.waiting += waiting
        self.working += working
        if not result.applied:
            self.skipped += 1
            return
        self.seen += result.n
        self.wrong += result.wrong
        self.loss += result.loss * result.n
        self.grad_norm += result.grad_norm

    @property
    def mean_grad_norm(self) -> float:
        """NaN if no step was applied."""
        return self.grad_norm / (self.steps - self.skipped) if self.seen else math.nan

    def means(self) -> dict[str, float]:
        """Loss in nats, error in percent, images per second, share of the time spent waiting for data in [0, 1].

        Loss and error are NaN if no step was applied.
        """
        seconds = self.waiting + self.working
        return {
            "loss": self.loss / self.seen if self.seen else math.nan,
            "top1_error": 100 * self.wrong / self.seen if self.seen else math.nan,
            "images_per_second": self.n / seconds,
            "data_wait": self.waiting / seconds,
        }


@dataclass
class TrainState:
    """What changes from step to step, besides weights, optimizer and random numbers.

    step: steps done. evaluated_step: the last step whose logging and validation are done. row, epoch: sums since the
    last row of metrics, and since the epoch began. best, best_step: error and loss of the best validation, and its
    step. metrics_bytes: length of metrics.jsonl. seconds: training time, without pauses.
    """

    step: int = 0
    evaluated_step: int = 0
    row: StepStats = field(default_factory=StepStats)
    epoch: StepStats = field(default_factory=StepStats)
    best: tuple[float, float] | None = None
    best_step: int | None = None
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    metrics_bytes: int = 0
    seconds: float = 0.0


def state_dict(setup: Setup, state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds besides weights: tensors, numbers and strings."""
    scaler = setup.update.scaler
    return {
        "position": asdict(state),
        "optimizer": setup.optimizer_state(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "generators": generator_states(setup.device),
        "micro_batch": setup.update.sam.micro_batch,
        "gradient_rule": None if setup.update.sam.when is None else setup.update.sam.when.state,
        "averaged_steps": 0 if setup.average is None else setup.average.count,
    }


def load_state_dict(setup: Setup, folder: Path) -> TrainState:
    """Load a valid checkpoint: weights, averages, optimizer, random numbers; returns its TrainState.

    Raises CheckpointError for state or weights that do not fit the run, or that contain code.
    """
    state = checkpoint.load_state(folder)
    checkpoint.load_weights(partial(setup.load, setup.model), folder / "model.safetensors")
    if setup.average is not None:
        setup.average.count = state.get("averaged_steps", 0)
        if setup.average.has_begun:
            checkpoint.load_weights(partial(setup.load, setup.average.module), folder / "ema" / "model.safetensors")
    try:
        setup.load_optimizer_state(state["optimizer"])
        if setup.update.scaler is not None and state["scaler"] is not None:
            setup.update.scaler.load_state_dict(state["scaler"])
        set_generator_states(state["generators"], setup.device)
        setup.update.sam.micro_batch = state["micro_batch"]
        if setup.update.sam.when is not None and state.get("gradient_rule") is not None:
            setup.update.sam.when.state = tuple(state["gradient_rule"])
        kept = state["position"]
        if "settled" in kept:  # as checkpoints called it before
            kept["evaluated_step"] = kept.pop("settled")
        return TrainState(**kept | {"row": StepStats(**kept["row"]), "epoch": StepStats(**kept["epoch"])})
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"the state in checkpoint {folder} does not fit this run",
            first_line(error),
            "go on with it by the version of samtune, and on the kind of device, that wrote it",
        ) from None


def find_newest(folder: Path) -> Path | None:
    """The newest valid checkpoint of a run folder; None if none was saved yet. Warns of damaged ones and leftovers.

    Raises CheckpointError if there are checkpoints, but none that is valid.
    """
    checkpoints = folder / "checkpoints"
    checkpoint.adopt_copies(checkpoints)
    for left in checkpoint.remove_leftovers(checkpoints):
        console.warn(f"a save was cut off: {left.name} is removed")
    newest, damage = checkpoint.newest_valid(checkpoints)
    if newest is None and damage:
        raise CheckpointError(
            f"run {folder} has no valid checkpoint left",
            "; ".join(f"{error.message.removeprefix('checkpoint ')}: {error.cause}" for error in damage),
            "start a new run with another --output",
        )
    for error in damage:
        console.warn(f"{error.message} ({error.cause}): going on from {newest.name if newest else ''}")
    return newest
