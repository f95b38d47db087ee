"""A run is opened, new or interrupted; and whatever ends it is written down."""

import faulthandler
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from samtune import console
from samtune.config.duration import Duration
from samtune.config.run_config import RunConfig
from samtune.distributed import collectives, device, environment, rank_status, signals
from samtune.errors import ORPHANED, CheckpointError, MachineError, SamtuneError, Stopped, WorkerLost, first_line
from samtune.report import run_report
from samtune.runs import checkpoint, lock, run_log
from samtune.runs.folder import read_provenance
from samtune.runs.resume import Resumed
from samtune.runs.run_log import NullLog, RunLog
from samtune.train import checkpointing, provenance
from samtune.train.run_data import Resolved
from samtune.train.schedule import cosine, warmup
from samtune.train.setup import Setup, build_setup
from samtune.train.state import TrainState, find_newest, load_state_dict
from samtune.train.watchdog import Watchdog

_PATIENCE = 5.0  # seconds for a last word on the terminal


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What a disk refuses in this block is said as an error of the machine."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"the machine broke off run {folder}",
            first_line(error),
            "check disk space and permissions, then go on with --resume",
        ) from None


def start_run(config: RunConfig) -> tuple[Setup, RunLog, None, TrainState]:
    """A new run and its folder."""
    setup = build_setup(config)
    setup.config = collectives.broadcast_from_rank0(setup.config.with_output)
    assert setup.config.output is not None
    folder = setup.config.output
    about = provenance.describe(setup)

    def create() -> RunLog:
        try:
            checkpointing.check_disk_space(setup, folder)
            return RunLog.create(folder, setup.config.to_toml(), about, setup.total_steps)
        except SamtuneError:
            if setup.config.origins["output"].startswith("derived"):
                with suppress(OSError):
                    folder.rmdir()  # it was made for this run, and is empty
            raise

    log = _by_rank(create, lambda: NullLog(folder, collectives.rank(), setup.total_steps))
    with _disk_errors(folder):
        _log_startup(setup, log, about)
    return setup, log, None, TrainState()


def _by_rank(first: Callable[[], RunLog], others: Callable[[], RunLog]) -> RunLog:
    """The log of this rank: rank 0's goes before, and where it fails, all fail."""
    made = []
    collectives.broadcast_from_rank0(lambda: made.append(first()))
    return made[0] if made else others()


def resume_run(
    config: RunConfig, resumed: Resumed, stop: signals.StopRequest
) -> tuple[Setup, RunLog, Path | None, TrainState]:
    """A run as its newest valid checkpoint left it; without one, from its beginning."""
    folder = resumed.folder
    held = lock.acquire(folder) if environment.is_rank0() else None
    try:
        with _disk_errors(folder):
            return _resume(config, resumed, stop, held)
    except BaseException:
        if held is not None:
            held.release()
        raise


def _resume(
    config: RunConfig, resumed: Resumed, stop: signals.StopRequest, held: lock.Lock | None
) -> tuple[Setup, RunLog, Path | None, TrainState]:
    folder = resumed.folder
    collectives.init(device.select_device(config.gpus, config.processes))
    newest, before = collectives.broadcast_from_rank0(lambda: (find_newest(folder), _provenance(folder)))
    stop.saved = newest is not None
    if newest is not None and "epochs" in resumed.changed:
        config = _with_past(config, int(checkpoint.verify(newest)["step"]), before, resumed)
    setup = build_setup(config, _settled(newest, before) if newest else None)
    about = provenance.describe(setup)
    if before:
        _check_same(setup, before, about, resumed)
    if newest is not None and not newest.is_dir():
        raise MachineError(
            f"rank {collectives.rank()} does not see {newest}",
            hint="--output must be on a disk that all machines share",
        )
    state = load_state_dict(setup, newest) if newest else TrainState()
    if setup.total_steps < state.step:
        raise CheckpointError(
            f"run {folder} has done {state.step} steps already",
            f"--epochs {setup.config.epochs} is {setup.total_steps} steps",
            "give it more",
        )
    if "micro_batch" in resumed.changed:
        setup.update.sam.micro_batch = setup.config.micro_batch
    changed = {key: [str(value) for value in values] for key, values in resumed.changed.items()}
    entry = {"step": state.step, "started": run_log.now(), "command": run_log.command()}
    entry |= {"versions": run_log.versions(), "changed": changed}
    about["model"] = before.get("model", about["model"])

    def reopen() -> RunLog:
        assert held is not None
        log = RunLog.reopen(
            folder, held, setup.total_steps, step=state.step, seconds=state.seconds, metrics_bytes=state.metrics_bytes
        )
        with log.best_effort("provenance.json"):
            run_log.note_resume(folder, setup.config.to_toml() if changed else None, entry, about)
        return log

    log = _by_rank(reopen, lambda: NullLog(folder, collectives.rank(), setup.total_steps, state.step, state.seconds))
    _log_startup(setup, log, about)
    log.info(f"resume  {newest.name if newest else 'from the beginning: no checkpoint was saved yet'}")
    if newest is not None and "epochs" in resumed.changed:
        log.info(_seam(setup, state.step, resumed.changed["epochs"][0]))
    if before.get("versions", entry["versions"]) != entry["versions"]:
        log.warn("versions have changed since: the run is no longer the same to the last bit")
    return setup, log, newest, state


def _check_same(setup: Setup, before: Mapping[str, Any], about: Mapping[str, Any], resumed: Resumed) -> None:
    """Raise CheckpointError where the run would go on with other images, or another division of them."""
    if about["dataset"]["split_hash"] != before["dataset"]["split_hash"]:
        raise CheckpointError(
            f"run {resumed.folder} cannot go on: data set {setup.data.origin} is not what it was",
            "other images or labels would be trained and validated on",
            "give the data of the run by --dataset and --allow-change dataset, or start a new run",
        )
    then, now = before.get("world_size", 1), about["world_size"]
    if then == now:
        return
    if before["steps_per_epoch"] != setup.steps_per_epoch:
        raise CheckpointError(
            f"run {resumed.folder} was started with {then} devices, and there are {now}",
            f"a step would have {setup.batch.total} images, and not {before['optimizer']['batch_size']}",
            f"go on with {then}; only a run with --global-batch-size can go on with another number",
        )
    if not resumed.other_devices:
        raise CheckpointError(
            f"run {resumed.folder} was started with {then} devices, and there are {now}",
            "masks are drawn by device: the run would no longer be the same to the last bit",
            f"go on with {then}, or let the number differ by --allow-change gpus",
        )


def _with_past(config: RunConfig, step: int, before: Mapping[str, Any], resumed: Resumed) -> RunConfig:
    """A config of another length, in which what lies in the past stays there: the warm-up, and where SAM began.

    They may be given as shares of the run, which is now another one.
    """
    past = {
        "warmup_epochs": before.get("optimizer", {}).get("warmup_steps"),
        "sam_start": before.get("sam", {}).get("start"),
    }
    for key, steps in past.items():
        if steps is not None and steps <= step and key not in resumed.changed:
            config = config.derive(key, Duration(steps, "steps"), "as the run began, before its length was changed")
    return config


def _seam(setup: Setup, step: int, epochs: Duration) -> str:
    """What becomes of the learning rate where a run of another length goes on after so many steps."""
    steps_before = max(1, epochs.steps(setup.steps_per_epoch))
    last = setup.lr * cosine(step - 1, steps_before) * warmup(step - 1, setup.warmup_steps) if step else 0.0
    now = setup.lr * cosine(step, setup.total_steps) * warmup(step, setup.warmup_steps)
    return (
        f"rate    a cosine over {setup.total_steps} steps in place of {steps_before}: {last:.3g} in step {step} and "
        f"{now:.3g} in step {step + 1}; the warm-up of {setup.warmup_steps} steps is "
        + ("not repeated" if step >= setup.warmup_steps else "not over yet")
    )


def _settled(newest: Path, before: Mapping[str, Any]) -> Resolved:
    """What the run settled when it began, by its newest checkpoint and its provenance."""
    manifest = checkpoint.verify(newest)
    return Resolved(before.get("model", {}), manifest["class_names"], checkpoint.decode_rule(manifest))


def _provenance(folder: Path) -> dict[str, Any]:
    try:
        return read_provenance(folder)
    except (OSError, ValueError) as error:
        console.warn(f"{first_line(error)}: whether the data are what they were is not known")
        return {}


def _log_startup(setup: Setup, log: RunLog, about: dict[str, Any]) -> None:
    for line in provenance.startup_lines(setup, about):
        log.info(line)
    for warning in about["warnings"]:
        log.warn(warning)
    if setup.bad_images:
        log.warn(f"{len(setup.bad_images)} images cannot be decoded and are left out; the report lists them")
    if setup.noise is not None:
        if collectives.rank() == 0:
            setup.noise.write(log.folder / "label_noise.parquet")
        log.info(f"noise   {run_report.noise_words(setup.noise.about)}; what is scored keeps clean labels")
    for note in setup.data.notes:
        log.log(note)
    if setup.data.test is None:
        log.warn(f"{setup.data.name} has no test split: the report will show the validation error alone")


@contextmanager
def recording_outcome(setup: Setup, log: RunLog) -> Iterator[None]:
    """Whatever ends the run, status.json says how."""
    try:
        images = f"{setup.update.sam.effective_micro_batch(setup.batch.per_device)} images of {setup.info.img_size} px"
        with _disk_errors(log.folder), device.oom_as_user_error(images), collectives.connection_errors():
            yield
        log.status("done", 0)
    except (SamtuneError, Stopped) as error:
        log.log(str(error))
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
            f"after step {log.step} nothing has moved for {_long(seconds)}",
            f"a device, a disk or a data worker does not answer; {log.notes.name} says where the run stands",
            "go on with --resume; --step-timeout gives it more time",
        )
        try:
            if collectives.world_size() > 1:
                error = _named(error, _absent_ranks())
            log.log(str(error))
            _write_stacks(log)
            log.status("failed", error.exit_code, error)
            # The main thread may hang in a terminal that takes nothing more, and so would this one.
            saying = threading.Thread(target=_last_word, args=(error,), daemon=True)
            saying.start()
            saying.join(_PATIENCE)
        finally:
            os._exit(error.exit_code)  # from this thread: the main one cannot be reached

    def orphaned() -> None:
        error = WorkerLost(ORPHANED, "nobody watches over the ranks any more", "go on with --resume")
        log.log(str(error))
        log.status("failed", error.exit_code, error)

    environment.on_launcher_loss(orphaned)
    return Watchdog(timeout, slow, stuck)


def _long(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _absent_ranks() -> Sequence[int]:
    """Who the others wait for. They ask each other through rank 0: if even that does not answer, it is rank 0."""
    found: list[Sequence[int]] = []
    asking = threading.Thread(target=lambda: found.append(collectives.find_absent_ranks(_PATIENCE)), daemon=True)
    asking.start()
    asking.join(2 * _PATIENCE)
    return found[0] if found else [0]


def _named(error: WorkerLost, absent: Sequence[int]) -> WorkerLost:
    """Which rank the others wait for."""
    if not absent:
        return error
    names = " and ".join(f"rank {rank}" for rank in absent)
    return WorkerLost(f"{names} is stuck: {error.message}", "the other ranks wait for it", error.hint)


def _last_word(error: WorkerLost) -> None:
    if environment.status_folder() is not None:
        rank_status.write_status(error.exit_code, error)
    else:
        console.error(str(error))


def _write_stacks(log: RunLog) -> None:
    with suppress(OSError), log.notes.open("a", encoding="utf-8") as file:
        faulthandler.dump_traceback(file)
