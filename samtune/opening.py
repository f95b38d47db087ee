"""A run is opened, new or interrupted; and whatever ends it is written down."""

import faulthandler
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from samtune import console, device, lock, position, provenance, report, runlog, saver, signals
from samtune.config import RunConfig
from samtune.errors import CheckpointError, MachineError, SamtuneError, Stopped, WorkerLost, first_line
from samtune.job import Job, prepare
from samtune.position import Position
from samtune.resume import Resumed
from samtune.runlog import RunLog
from samtune.watchdog import Watchdog

_PATIENCE = 5.0  # seconds for a last word on the terminal


@contextmanager
def _disks(folder: Path) -> Iterator[None]:
    """What a disk refuses in this block is said as an error of the machine."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"the machine broke off run {folder}",
            first_line(error),
            "check disk space and permissions, then go on with --resume",
        ) from None


def begin(config: RunConfig) -> tuple[Job, RunLog, None, Position]:
    """A new run and its folder."""
    job = prepare(config)
    assert job.config.output is not None
    saver.check_room(job, job.config.output)
    about = provenance.describe(job)
    log = RunLog.create(job.config.output, job.config.to_toml(), about, job.total_steps)
    with _disks(log.folder):
        _introduce(job, log, about)
    return job, log, None, Position()


def go_on(config: RunConfig, resumed: Resumed, stop: signals.StopRequest) -> tuple[Job, RunLog, Path | None, Position]:
    """A run as its newest valid checkpoint left it; without one, from its beginning."""
    folder = resumed.folder
    held = lock.take(folder)
    try:
        with _disks(folder):
            return _go_on(config, resumed, stop, held)
    except BaseException:
        held.release()
        raise


def _go_on(
    config: RunConfig, resumed: Resumed, stop: signals.StopRequest, held: lock.Lock
) -> tuple[Job, RunLog, Path | None, Position]:
    folder = resumed.folder
    newest = position.find(folder)
    stop.saved = newest is not None
    before = _provenance(folder)
    job = prepare(config, trained=before.get("model", {}) if newest else None)
    about = provenance.describe(job)
    if before and about["dataset"]["split_hash"] != before["dataset"]["split_hash"]:
        raise CheckpointError(
            f"run {folder} cannot go on: data set {job.data.origin} is not what it was",
            "other images or labels would be trained and validated on",
            "give the data of the run by --dataset and --allow-change dataset, or start a new run",
        )
    place = position.load(job, newest) if newest else Position()
    if job.total_steps < place.step:
        raise CheckpointError(
            f"run {folder} has done {place.step} steps already",
            f"--epochs {job.config.epochs} is {job.total_steps} steps",
            "give it more",
        )
    if "micro_batch" in resumed.changed:
        job.update.sam.micro_batch = job.config.micro_batch
    changed = {key: [str(value) for value in values] for key, values in resumed.changed.items()}
    entry = {"step": place.step, "started": runlog.now(), "command": runlog.command()}
    entry |= {"versions": runlog.versions(), "changed": changed}
    about["model"] = before.get("model", about["model"])
    log = RunLog.reopen(
        folder, held, job.total_steps, step=place.step, seconds=place.seconds, metrics_bytes=place.metrics_bytes
    )
    with log.never_fatal("provenance.json"):
        runlog.note_resume(folder, job.config.to_toml() if changed else None, entry, about)
    _introduce(job, log, about)
    log.say(f"resume  {newest.name if newest else 'from the beginning: no checkpoint was saved yet'}")
    if before.get("versions", entry["versions"]) != entry["versions"]:
        log.warn("versions have changed since: the run is no longer the same to the last bit")
    return job, log, newest, place


def _provenance(folder: Path) -> dict[str, Any]:
    try:
        return runlog.read_provenance(folder)
    except (OSError, ValueError) as error:
        console.warn(f"{first_line(error)}: whether the data are what they were is not known")
        return {}


def _introduce(job: Job, log: RunLog, about: dict[str, Any]) -> None:
    for line in provenance.lines(job, about):
        log.say(line)
    for warning in about["warnings"]:
        log.warn(warning)
    if job.bad_images:
        log.warn(f"{len(job.bad_images)} images cannot be decoded and are left out; the report lists them")
    if job.noise is not None:
        job.noise.write(log.folder / "label_noise.parquet")
        log.say(f"noise   {report.noise_words(job.noise.about)}; validation and test keep clean labels")
    for note in job.data.notes:
        log.note(note)
    if job.data.test is None:
        log.warn(f"{job.data.name} has no test split: the report will show the validation error alone")


@contextmanager
def outcome(job: Job, log: RunLog) -> Iterator[None]:
    """Whatever ends the run, status.json says how."""
    try:
        with _disks(log.folder), device.room_for(f"{job.batch_size} images of {job.info.img_size} px"):
            yield
        log.status("done", 0)
    except (SamtuneError, Stopped) as error:
        log.note(str(error))
        log.status("stopped" if isinstance(error, Stopped) else "failed", error.exit_code, error)
        raise
    except BaseException as error:
        log.status("failed", SamtuneError.exit_code, error)
        raise
    finally:
        log.close()


def watchdog(log: RunLog, timeout: float) -> Watchdog:
    """Warns where a step takes far longer than usual, and ends the process after the timeout, in seconds."""

    def slow(seconds: float, usual: float) -> None:
        log.warn(
            f"after step {log.step} nothing has moved for {seconds:.0f} s, usually {usual:.1f} s; log.txt says where"
        )
        _write_stacks(log)

    def stuck(seconds: float) -> None:
        error = WorkerLost(
            f"after step {log.step} nothing has moved for {seconds / 60:.0f} minutes",
            "a device, a disk or a data worker does not answer; log.txt says where the run stands",
            "go on with --resume; --step-timeout gives it more time",
        )
        try:
            log.note(str(error))
            _write_stacks(log)
            log.status("failed", error.exit_code, error)
            # The main thread may hang in a terminal that takes nothing more, and so would this one.
            saying = threading.Thread(target=console.error, args=(str(error),), daemon=True)
            saying.start()
            saying.join(_PATIENCE)
        finally:
            os._exit(error.exit_code)  # from this thread: the main one cannot be reached

    return Watchdog(timeout, slow, stuck)


def _write_stacks(log: RunLog) -> None:
    with suppress(OSError), (log.folder / "log.txt").open("a", encoding="utf-8") as file:
        faulthandler.dump_traceback(file)
