"""The checkpoints of a run: when one is due, writing it, and the disk space for it."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from samtune import console
from samtune.distributed import collectives
from samtune.errors import MachineError, first_line
from samtune.models.timm_format import timm_config
from samtune.runs import checkpoint, run_log
from samtune.runs.run_log import RunLog
from samtune.train.setup import Setup
from samtune.train.state import TrainState, state_dict


class CheckpointSaver:
    """Saves the state of a run, and prunes older checkpoints."""

    def __init__(self, setup: Setup, log: RunLog, newest: Path | None) -> None:
        """newest: the checkpoint that the run resumes from, if any."""
        self._setup, self._log = setup, log
        self.newest = newest
        self._saved_at = time.monotonic()
        every = setup.config.save_every
        self._minutes = every.amount if every.unit == "minutes" else None
        self._steps = None if self._minutes else max(1, every.steps(setup.steps_per_epoch, setup.total_steps))

    def due(self, step: int) -> bool:
        """Whether --save-every asks for a checkpoint after this step."""
        if self._minutes is not None:
            passed = time.monotonic() - self._saved_at >= 60 * self._minutes
            # All ranks have a part in the checkpoint of a sharded model, but not the same clock.
            return collectives.any_rank_true(passed)[0] if self._setup.is_sharded else passed
        return self._steps is not None and step % self._steps == 0

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of this state, unless it exists, and update the links last and best.

        Rank 0 writes for all; the others take part only if the model is sharded. Raises MachineError if there is no
        space, though all older checkpoints but the newest were removed.
        """
        exists = self.newest == self._folder(state.step)
        if collectives.rank() > 0:
            if self._setup.is_sharded and not exists:
                content(self._setup, state)
            self.newest = self._folder(state.step)
            self._saved_at = time.monotonic()
            return
        if not exists:
            state.metrics_bytes = self._log.synced_metrics_bytes()
            state.seconds = self._log.seconds()
            self.newest = self._with_room(state)
        assert self.newest is not None
        self._set_links(state)
        checkpoint.prune(self._log.checkpoints, self.newest, self._setup.config.keep_checkpoints)
        self._saved_at = time.monotonic()

    def update_links(self, state: TrainState) -> None:
        """Point last at the newest checkpoint and best at that of the best step, when a run starts or resumes.

        If that is gone, as it was damaged, there is no best one any more, on no rank: the run will come to it again.
        """
        if collectives.rank() == 0:
            if state.best_step is not None and not self._folder(state.best_step).is_dir():
                state.best = state.best_step = None
            self._set_links(state)
        state.best, state.best_step = collectives.broadcast_from_rank0(lambda: (state.best, state.best_step))

    def _set_links(self, state: TrainState) -> None:
        if self.newest is not None:
            checkpoint.update_link(self._log.checkpoints, "last", self.newest)
        if state.best_step is not None and self._folder(state.best_step).is_dir():
            checkpoint.update_link(self._log.checkpoints, "best", self._folder(state.best_step))

    def _folder(self, step: int) -> Path:
        return self._log.checkpoints / f"step-{step:06d}"

    def _with_room(self, state: TrainState) -> Path:
        whole = content(self._setup, state)
        try:
            return write(self._setup, self._log.checkpoints, state.step, whole)
        except OSError as error:
            gone = checkpoint.prune(self._log.checkpoints, self.newest, 1) if self.newest else []
            if not gone:
                raise self._no_room(state, error) from None
            names = ", ".join(sorted(path.name for path in gone))
            console.warn(f"step {state.step} cannot be saved ({first_line(error)}): {names} removed to make room")
        try:
            return write(self._setup, self._log.checkpoints, state.step, whole)
        except OSError as error:
            raise self._no_room(state, error) from None

    def _no_room(self, state: TrainState, error: OSError) -> MachineError:
        rest = f"{self.newest.name} is intact: " if self.newest else ""
        return MachineError(
            f"step {state.step} cannot be saved in {self._log.folder}",
            error.strerror or first_line(error),
            f"{rest}make room, then go on with --resume",
        )


def content(setup: Setup, state: TrainState) -> dict[str, Any]:
    """What a checkpoint of this state holds; whole on rank 0."""
    return {
        "weights": setup.weights(setup.model),
        "ema": None if setup.ema is None else setup.weights(setup.ema.module),
        "state": state_dict(setup, state),
    }


def write(setup: Setup, checkpoints: Path, step: int, content: dict[str, Any]) -> Path:
    """Write the checkpoint of a step, and return its folder. Raises OSError as `checkpoint.save` does."""
    return checkpoint.save(
        checkpoints,
        step=step,
        timm_config=timm_config(setup.model, setup.info, setup.data.class_names),
        about={
            "config": setup.config.model_dump(mode="json"),
            "class_names": list(setup.data.class_names),
            "dataset": setup.data.fingerprint,
            "decode": setup.rule.to_json(),
            "versions": run_log.versions(),
        },
        **content,
    )


def needed_bytes(setup: Setup, folder: Path) -> tuple[int, int, Path]:
    """Bytes that the checkpoints of a run need at once, bytes that are free, and the folder whose disk has them."""
    tensors = [*setup.model.parameters(), *setup.model.buffers()] * (1 if setup.ema is None else 2)
    slots = 2 if isinstance(setup.optimizer, torch.optim.AdamW) else int(setup.config.momentum > 0)
    tensors += [w for group in setup.optimizer.param_groups for w in group["params"]] * slots
    at_once = setup.config.keep_checkpoints + 2  # the best, and one that is being written
    needed = at_once * sum(w.numel() * w.element_size() for w in tensors)
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return needed, shutil.disk_usage(parent).free, parent


def check_disk_space(setup: Setup, folder: Path) -> None:
    """Raise MachineError if the disk of a run folder has no room for the checkpoints that will be in it at once."""
    needed, free, parent = needed_bytes(setup, folder)
    if free < needed:
        raise MachineError(
            f"{parent} has {free / 2**20:.0f} MiB free, and the run's checkpoints need {needed / 2**20:.0f} MiB",
            f"--keep-checkpoints {setup.config.keep_checkpoints}, the best, and one that is being written",
            "make room, lower --keep-checkpoints, or give another --output",
        )
