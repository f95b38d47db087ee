"""The checkpoints of a run: when one is due, the thread that writes it beside the training, and the room for it."""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from samtune import console
from samtune.distributed import collectives
from samtune.errors import MachineError, SamtuneError, first_line
from samtune.models.timm_format import timm_config
from samtune.runs import checkpoint, run_log
from samtune.runs.run_log import RunLog
from samtune.train.host_copy import HostCopy
from samtune.train.setup import Setup
from samtune.train.state import TrainState, find_newest, state_dict


class _CutOff(Exception):
    """A save that is not to be finished."""


class CheckpointSaver:
    """Saves the state of a run, and prunes older checkpoints.

    `save` only copies the state. A thread writes the copy, reads it back, moves the links and deletes what is too old;
    one checkpoint is written at a time. The error of a write is raised by the next `check`, `wait` or `save`.

    As a context it ends with the thread. An error that leaves the context lets the write end first, and a second
    signal cuts it off.

    newest: the newest checkpoint that is known to be on the disk.
    """

    def __init__(self, setup: Setup, log: RunLog, newest: Path | None) -> None:
        """newest: the checkpoint that the run resumes from, if any."""
        self._setup, self._log = setup, log
        self.newest = newest
        self._saved_at = time.monotonic()
        every = setup.config.save_every
        self._minutes = every.amount if every.unit == "minutes" else None
        self._steps = None if self._minutes else max(1, every.steps(setup.steps_per_epoch, setup.total_steps))
        self._kept_steps = kept_steps(setup)
        self._host_copy = HostCopy()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[Path] | None = None
        self._cut_off = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
            elif issubclass(kind, Exception):
                self._warn_of_error(self.wait)
        finally:
            # Something is still being written only if a signal ends the run at once.
            self._cut_off.set()
            self._thread.shutdown()

    def due(self, step: int) -> bool:
        """Whether --save-every or --keep-at asks for a checkpoint after this step."""
        if step in self._kept_steps:
            return True
        if self._minutes is not None:
            passed = time.monotonic() - self._saved_at >= 60 * self._minutes
            # All ranks have a part in the checkpoint of a sharded model, but not the same clock.
            return collectives.any_rank_true(passed)[0] if self._setup.is_sharded else passed
        return self._steps is not None and step % self._steps == 0

    def save(self, state: TrainState) -> None:
        """Begin to write a checkpoint of this state, unless it exists, once the one before it is written.

        Then the links last and best are updated. Rank 0 writes for all; the others take part only if the model is
        sharded. Raises what writing the one before raised.
        """
        self.wait()
        exists = self.newest == self._folder(state.step)
        self._saved_at = time.monotonic()
        if collectives.rank() > 0:
            if self._setup.is_sharded and not exists:
                content(self._setup, state)
            self.newest = self._folder(state.step)
            return
        if exists:
            assert self.newest is not None
            self._set_links(self.newest, state.best_step)
            self._prune(self.newest)
            return
        state.metrics_bytes = self._log.synced_metrics_bytes()
        state.seconds = self._log.seconds()
        whole = content(self._setup, state)
        if not self._setup.is_sharded:  # what was gathered is a copy
            whole = self._host_copy(whole)
        self._written = self._thread.submit(self._write, state.step, state.best_step, whole)

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises MachineError if there is no space for it, though all older checkpoints but the newest were removed.
        """
        if self._written is not None:
            written, self._written = self._written, None
            self.newest = written.result()

    def check(self) -> None:
        """Raise the error of a write that has ended; does not wait for one that has not."""
        if self._written is not None and self._written.done():
            self.wait()

    def save_before_error(self, state: TrainState) -> None:
        """Save for an error that is about to be raised: it counts, and what goes wrong here is a warning."""
        self._warn_of_error(self.wait)  # for the one before, which must not keep this one from being written
        self._warn_of_error(self.save, state)
        self._warn_of_error(self.wait)

    def find_newest(self) -> Path | None:
        """The newest valid checkpoint on the disk; on rank 0, once nothing is being written. Raises as `wait` does."""
        self.wait()
        return find_newest(self._log.folder)

    def update_links(self, state: TrainState) -> None:
        """Point last at the newest checkpoint and best at that of the best step, when a run starts or resumes.

        If that is gone, as it was damaged, there is no best one any more, on no rank: the run will come to it again.
        """
        if collectives.rank() == 0:
            if state.best_step is not None and not self._folder(state.best_step).is_dir():
                state.best = state.best_step = None
            self._set_links(self.newest, state.best_step)
        state.best, state.best_step = collectives.broadcast_from_rank0(lambda: (state.best, state.best_step))

    def _warn_of_error(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            self._log.warn(str(error) if isinstance(error, SamtuneError) else first_line(error))

    # ---------------------------------------------------------------------------------------------------- in the thread

    def _write(self, step: int, best_step: int | None, whole: dict[str, Any]) -> Path:
        folder = self._with_room(step, whole)
        self._set_links(folder, best_step)
        self._prune(folder)
        return folder

    def _set_links(self, newest: Path | None, best_step: int | None) -> None:
        if newest is not None:
            checkpoint.update_link(self._log.checkpoints, "last", newest)
        if best_step is not None and self._folder(best_step).is_dir():
            checkpoint.update_link(self._log.checkpoints, "best", self._folder(best_step))

    def _prune(self, newest: Path) -> None:
        checkpoint.prune(self._log.checkpoints, newest, self._setup.config.keep_checkpoints, self._kept_steps)

    def _folder(self, step: int) -> Path:
        return self._log.checkpoints / f"step-{step:06d}"

    def _with_room(self, step: int, whole: dict[str, Any]) -> Path:
        def attempt() -> Path:
            return write(self._setup, self._log.checkpoints, step, whole, self._check_cut_off)

        try:
            return attempt()
        except OSError as error:
            gone = checkpoint.prune(self._log.checkpoints, self.newest, 1) if self.newest else []
            if not gone:
                raise self._no_room(step, error) from None
            names = ", ".join(sorted(path.name for path in gone))
            console.warn(f"step {step} cannot be saved ({first_line(error)}): {names} removed to make room")
        try:
            return attempt()
        except OSError as error:
            raise self._no_room(step, error) from None

    def _no_room(self, step: int, error: OSError) -> MachineError:
        rest = f"{self.newest.name} is intact: " if self.newest else ""
        return MachineError(
            f"step {step} cannot be saved in {self._log.folder}",
            error.strerror or first_line(error),
            f"{rest}make room, then go on with --resume",
        )

    def _check_cut_off(self) -> None:
        if self._cut_off.is_set():
            raise _CutOff


def content(setup: Setup, state: TrainState) -> dict[str, Any]:
    """What a checkpoint of this state holds; whole on rank 0, and not copied where the model is not sharded."""
    return {
        "weights": setup.weights(setup.model),
        "ema": setup.weights(setup.average.module) if setup.average and setup.average.has_begun else None,
        "state": state_dict(setup, state),
    }


def write(
    setup: Setup,
    checkpoints: Path,
    step: int,
    content: dict[str, Any],
    check_cut_off: Callable[[], object] = lambda: None,
) -> Path:
    """Write the checkpoint of a step as `checkpoint.save` does, and return its folder."""
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
        check_cut_off=check_cut_off,
        **content,
    )


def kept_steps(setup: Setup) -> set[int]:
    """The steps whose checkpoints --keep-at keeps."""
    every, total = setup.steps_per_epoch, setup.total_steps
    return {min(total, max(1, duration.steps(every, total))) for duration in setup.config.keep_at or ()}


def most_at_once(setup: Setup) -> int:
    """Number of checkpoints in a run's folder at once: those to keep, the newest, the best, and one being written."""
    return len(kept_steps(setup)) + setup.config.keep_checkpoints + 2


def needed_bytes(setup: Setup, folder: Path) -> tuple[int, int, Path]:
    """Bytes that the checkpoints of a run need at once, bytes that are free, and the folder whose disk has them."""
    tensors = [*setup.model.parameters(), *setup.model.buffers()] * (1 if setup.average is None else 2)
    slots = 2 if isinstance(setup.optimizer, torch.optim.AdamW) else int(setup.config.momentum > 0)
    tensors += [w for group in setup.optimizer.param_groups for w in group["params"]] * slots
    tensors += setup.update.sam.perturbed_parameters if setup.update.sam.ascent == "previous" else []
    needed = most_at_once(setup) * sum(w.numel() * w.element_size() for w in tensors)
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return needed, shutil.disk_usage(parent).free, parent


def check_disk_space(setup: Setup, folder: Path) -> None:
    """Raise MachineError if the disk of a run folder has no room for the checkpoints that will be in it at once."""
    needed, free, parent = needed_bytes(setup, folder)
    if free < needed:
        raise MachineError(
            f"{parent} has {free / 2**20:.0f} MiB free, and the run's checkpoints need {needed / 2**20:.0f} MiB",
            f"--keep-checkpoints {setup.config.keep_checkpoints}, --keep-at, the best, and one that is being written",
            "make room, lower --keep-checkpoints, or give another --output",
        )
