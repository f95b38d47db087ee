"""Trackers of a run: its settings, metrics and result for TensorBoard and Weights & Biases.

Best effort: a tracker that raises is left out for the rest of the run, with one warning. Trackers show what
metrics.jsonl holds. A resumed run passes all rows on again, so that no row is missing or doubled after a kill.
"""

import importlib
import itertools
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from samtune.config.run_config import RunConfig
from samtune.distributed import environment
from samtune.errors import UsageError, first_line
from samtune.report import run_report
from samtune.runs.metrics import read_metrics
from samtune.runs.run_log import RunLog

_TIMEOUT = 15.0  # seconds after which W&B gives up by itself: login, start, end
_END_TIMEOUT = 20.0  # seconds for all trackers to end
_STOP_TIMEOUT = 3.0  # the same where the run was stopped or has failed, and a user or a scheduler waits
_RESULT = (
    "test",
    "test_by_checkpoint",
    "val",
    "ema",
    "steps",
    "train_seconds",
    "images_per_second",
    "cost",
    "warnings",
)

Row = Mapping[str, Any]


def check(track: str) -> None:
    """Raise UsageError for a tracker whose package cannot be imported. track: as in RunConfig."""
    for name in _names(track):
        try:
            importlib.import_module(_TRACKERS[name].package)
        except Exception as error:  # a broken installation raises anything
            raise UsageError(
                f"--track {name}: its package cannot be used", first_line(error), "pip install 'samtune[track]'"
            ) from None


def _names(track: str) -> list[str]:
    return [] if track == "none" else track.split(",")


class Trackers:
    """The trackers of a run, in a `with` block: they get each row that the log writes in it. Only rank 0 has any.

    result: the report. Set it before the block ends; None where the run has none.
    """

    def __init__(self, config: RunConfig, log: RunLog) -> None:
        self.result: Mapping[str, Any] | None = None
        self._config, self._log = config, log
        self._trackers: dict[str, _Tracker] = {}
        self._left_out: set[str] = set()
        self._indices = itertools.count()

    def __enter__(self) -> Self:
        started = time.time() - self._log.seconds()
        for name in _names(self._config.track) if environment.is_rank0() else []:
            self._call(name, self._start, name, started)
        if self._trackers:
            for row in read_metrics(self._log.folder):
                self._log_row(row)
            self._log.listeners.append(self._log_row)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all trackers. One that hangs must not keep the run and its other ranks from ending: hence a thread."""
        self._log.listeners.clear()
        deadline = time.monotonic() + (_END_TIMEOUT if kind is None else _STOP_TIMEOUT)
        threads = {
            name: threading.Thread(target=self._call, args=(name, tracker.finish, self.result), daemon=True)
            for name, tracker in self._trackers.items()
        }
        for thread in threads.values():
            thread.start()
        for name, thread in threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._leave_out(name, "it does not answer")

    def _start(self, name: str, started: float) -> None:
        self._trackers[name] = _TRACKERS[name](self._log.folder, self._config, started)

    def _log_row(self, row: Row) -> None:
        index = next(self._indices)
        for name, tracker in self._trackers.items():
            self._call(name, tracker.log_row, index, row)

    def _call(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        if name in self._left_out:
            return
        try:
            function(*arguments)
        except (Exception, SystemExit) as error:
            self._leave_out(name, first_line(error))

    def _leave_out(self, name: str, reason: str) -> None:
        if name in self._left_out:  # its end took too long, and then failed
            return
        self._left_out.add(name)
        self._log.degraded = True
        self._log.warn(f"tracker {name} is left out: {reason}; the run goes on")


class _Tracker(Protocol):
    """One tracker. Its methods are called in this order, and may raise anything."""

    package: ClassVar[str]

    def __init__(self, folder: Path, config: RunConfig, started: float) -> None:
        """folder: the run's. started: time.time() at which the run would have started without its pauses."""

    def log_row(self, index: int, row: Row) -> None:
        """Show a row of metrics.jsonl. index: its line there, from 0."""

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Show the report, which is None where the run was stopped or has failed, and close."""


def _scalars(row: Row) -> dict[str, float]:
    """The numbers of a row by the names that trackers group: train/loss, val/top1_error."""
    named = {f"{row['split']}/{key}": value for key, value in row.items() if key != "step"}
    return {name: value for name, value in named.items() if isinstance(value, float) or type(value) is int}


class _TensorBoard(_Tracker):
    """Event files under RUN/tensorboard, which `tensorboard --logdir runs` finds."""

    package = "torch.utils.tensorboard"

    def __init__(self, folder: Path, config: RunConfig, started: float) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._started = started
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=0)  # hides all earlier rows
        self._writer.add_text("config", "".join(f"    {line}\n" for line in config.to_toml().splitlines()))

    def log_row(self, index: int, row: Row) -> None:
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row["step"], walltime=self._started + row["seconds"])
        self._writer.flush()

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            rows = "".join(f"| {name} | {value} |\n" for name, value in run_report.summary(result).items())
            self._writer.add_text("report", f"| | |\n|---|---|\n{rows}")
        self._writer.close()


class _WandB(_Tracker):
    """A run of Weights & Biases under RUN/wandb, offline unless WANDB_MODE says otherwise.

    W&B's step must not decrease, but the run's does when an earlier checkpoint is tested. So W&B's step is the index of
    the row, and the run's step is the x axis.
    """

    package = "wandb"

    def __init__(self, folder: Path, config: RunConfig, started: float) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # send nothing unasked
        import wandb

        files = folder / "wandb"
        files.mkdir(exist_ok=True)
        id_file = files / "run-id.txt"
        run_id = (id_file.read_text(encoding="utf-8") if id_file.exists() else "") or secrets.token_hex(4)
        id_file.write_text(run_id, encoding="utf-8")
        for earlier in files.glob(f"offline-run-*-{run_id}"):  # all of its rows are logged again
            shutil.rmtree(earlier)
        self._run: Any = wandb.init(
            dir=folder,
            id=run_id,
            name=folder.resolve().name,
            project=os.environ.get("WANDB_PROJECT", "samtune"),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off",
                silent=True,
                login_timeout=_TIMEOUT,
                init_timeout=_TIMEOUT,
                finish_timeout=_TIMEOUT,  # also bounds the wait at Python's exit
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        self._uploaded = self._run.step  # rows that the server has

    def log_row(self, index: int, row: Row) -> None:
        if index >= self._uploaded:
            self._run.log(_scalars(row) | {"step": row["step"]}, step=index)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self._run.summary.update({"report": {key: result[key] for key in _RESULT}})
        self._run.finish(exit_code=int(result is None))


_TRACKERS: dict[str, type[_Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
