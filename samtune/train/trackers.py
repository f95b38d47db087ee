"""Settings, rows of metrics and the result of a run, handed on to trackers: TensorBoard, and Weights & Biases.

No tracker is worth a run. Each is served by a thread of its own; one that raises, or does not answer in time, is left
out from then on. What a tracker shows is made from metrics.jsonl: a run that goes on hands over all rows again, those
of the steps before as well, so that none is missing that a killed run had not passed on, and none is there twice.
"""

import importlib
import itertools
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

from samtune.config.run_config import RunConfig
from samtune.distributed import environment
from samtune.errors import UsageError, first_line
from samtune.report import run_report
from samtune.runs.metrics import read_metrics
from samtune.runs.run_log import RunLog

_PATIENCE = 20.0  # seconds for a tracker to begin, and to end
_TIMEOUT = 15.0  # seconds after which W&B gives up by itself, and says why
_HASTE = 3.0  # seconds to end where the run was stopped or has failed: somebody waits for that
_RESULT = ("test", "val", "ema", "steps", "train_seconds", "images_per_second", "cost", "warnings")

Row = Mapping[str, Any]


def check(track: str) -> None:
    """Raise UsageError for a tracker whose package is not there, before a run begins. track: as in RunConfig."""
    for name in _chosen(track):
        try:
            importlib.import_module(_TRACKERS[name].package)
        except Exception as error:  # a broken installation raises anything
            raise UsageError(
                f"--track {name}: its package cannot be used", first_line(error), "pip install 'samtune[track]'"
            ) from None


def _chosen(track: str) -> list[str]:
    return [] if track == "none" else track.split(",")


class Trackers:
    """The trackers of a run, within a `with` block: each row that the log writes there is handed on to them.

    Rank 0 has them alone. result: the report, to be set before the block ends; None where the run has none.
    """

    def __init__(self, config: RunConfig, log: RunLog) -> None:
        self.result: Mapping[str, Any] | None = None
        self._config, self._log = config, log
        self._feeds: list[_Feed] = []
        self._indices = itertools.count()

    def __enter__(self) -> Self:
        names = _chosen(self._config.track) if environment.is_rank0() else []
        started = time.time() - self._log.seconds()
        self._feeds = [_Feed(name, self._config, self._log, started) for name in names]
        deadline = time.monotonic() + _PATIENCE
        for feed in self._feeds:
            feed.wait(feed.begun, deadline)
        if self._feeds:
            for row in read_metrics(self._log.folder):
                self._hand_on(row)
            self._log.listeners.append(self._hand_on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.listeners.clear()
        for feed in self._feeds:
            feed.end(self.result)
        deadline = time.monotonic() + (_PATIENCE if kind is None else _HASTE)
        for feed in self._feeds:
            feed.wait(feed.ended, deadline)

    def _hand_on(self, row: Row) -> None:
        index = next(self._indices)
        for feed in self._feeds:
            feed.call(lambda tracker: tracker.row(index, row))


class _Feed:
    """One tracker, and the thread that serves it: not of a pool, for whose threads Python waits at its end."""

    def __init__(self, name: str, config: RunConfig, log: RunLog, started: float) -> None:
        self._name, self._log = name, log
        self._begin = partial(_TRACKERS[name], log.folder, config, started)
        self._calls: SimpleQueue[Callable[[_Tracker], None] | None] = SimpleQueue()  # None: there are no more
        self._lock = threading.Lock()
        self._left_out = False
        self.begun, self.ended = threading.Event(), threading.Event()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def call(self, call: Callable[["_Tracker"], None]) -> None:
        """Have the thread do this, when all before is done."""
        if not self._left_out:
            self._calls.put(call)

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Have it end, then."""
        self.call(lambda tracker: tracker.end(result))
        self._calls.put(None)

    def wait(self, event: threading.Event, deadline: float) -> None:
        """Until then at most, on the clock time.monotonic(); a tracker that takes longer is left out."""
        if not event.wait(max(0.0, deadline - time.monotonic())):
            self._leave_out("it does not answer")

    def _serve(self) -> None:
        try:
            tracker = self._begin()
            self.begun.set()
            while (call := self._calls.get()) is not None and not self._left_out:
                call(tracker)
        except (Exception, SystemExit) as error:
            self._leave_out(first_line(error))
        finally:
            self.begun.set()
            self.ended.set()

    def _leave_out(self, why: str) -> None:
        with self._lock:
            if self._left_out:
                return
            self._left_out = True
        self._log.degraded = True
        self._log.warn(f"tracker {self._name} is left out: {why}; the run goes on")


class _Tracker(Protocol):
    """What a tracker is told, in this order, by one thread. It may raise whatever it likes, or never return."""

    package: ClassVar[str]

    def __init__(self, folder: Path, config: RunConfig, started: float) -> None:
        """folder: the run's. started: when the run would have begun had it never paused, as time.time() says it."""

    def row(self, index: int, row: Row) -> None:
        """A row of metrics.jsonl and its place there, from 0."""

    def end(self, result: Mapping[str, Any] | None) -> None:
        """There is no more to come. result: the report, None where the run was stopped or has failed."""


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
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=0)  # all that was there before
        self._writer.add_text("config", "".join(f"    {line}\n" for line in config.to_toml().splitlines()))

    def row(self, index: int, row: Row) -> None:
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row["step"], walltime=self._started + row["seconds"])
        self._writer.flush()

    def end(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            rows = "".join(f"| {name} | {value} |\n" for name, value in run_report.summary(result).items())
            self._writer.add_text("report", f"| | |\n|---|---|\n{rows}")
        self._writer.close()


class _WandB(_Tracker):
    """A run of Weights & Biases under RUN/wandb, offline unless WANDB_MODE says otherwise.

    W&B's own step must not go back, as the run's does where a checkpoint before the last is tested: it counts the rows,
    and the run's step is the axis.
    """

    package = "wandb"

    def __init__(self, folder: Path, config: RunConfig, started: float) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing is sent that nobody asked for
        import wandb

        place = folder / "wandb"
        place.mkdir(exist_ok=True)
        identity = place / "run-id.txt"
        run_id = (identity.read_text(encoding="utf-8") if identity.exists() else "") or secrets.token_hex(4)
        identity.write_text(run_id, encoding="utf-8")
        for before in place.glob(f"offline-run-*-{run_id}"):  # all of its rows come again
            shutil.rmtree(before)
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
                init_timeout=_TIMEOUT,
                finish_timeout=_TIMEOUT,  # W&B makes Python's end wait, too
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        self._there = self._run.step  # rows that the server has already

    def row(self, index: int, row: Row) -> None:
        if index >= self._there:
            self._run.log(_scalars(row) | {"step": row["step"]}, step=index)

    def end(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self._run.summary.update({"report": {key: result[key] for key in _RESULT}})
        self._run.finish(exit_code=int(result is None))


_TRACKERS: dict[str, type[_Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
