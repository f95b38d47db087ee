"""The start of a run that resumes: its lock, its newest checkpoint, and what must be the same as before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samtune import console
from samtune.config.duration import Duration
from samtune.config.run_config import RunConfig
from samtune.distributed import collectives, device, environment, signals
from samtune.errors import CheckpointError, MachineError, first_line, plural
from samtune.runs import checkpoint, lock, run_log
from samtune.runs.folder import read_provenance
from samtune.runs.resume import Resumed
from samtune.runs.run_log import NullLog, RunLog
from samtune.train import provenance
from samtune.train.run_data import Resolved
from samtune.train.schedule import cosine, warmup
from samtune.train.setup import Setup, build_setup
from samtune.train.start import disk_errors, log_startup, open_log
from samtune.train.state import TrainState, find_newest, load_state_dict


def resume_run(
    config: RunConfig, resumed: Resumed, stop: signals.StopRequest
) -> tuple[Setup, RunLog, Path | None, TrainState]:
    """Set up a run from its newest valid checkpoint, or from its beginning if there is none.

    Returns its setup, log, newest checkpoint and state. Raises CheckpointError for other data or another division of
    them than before, and for damaged checkpoints.
    """
    folder = resumed.folder
    held_lock = lock.acquire(folder) if environment.is_rank0() else None
    try:
        with disk_errors(folder):
            return _resume(config, resumed, stop, held_lock)
    except BaseException:
        if held_lock is not None:
            held_lock.release()
        raise


def _resume(
    config: RunConfig, resumed: Resumed, stop: signals.StopRequest, held_lock: lock.Lock | None
) -> tuple[Setup, RunLog, Path | None, TrainState]:
    folder = resumed.folder
    collectives.init(device.select_device(config.gpus, config.processes))
    newest, before = collectives.broadcast_from_rank0(lambda: (find_newest(folder), _provenance(folder)))
    stop.has_checkpoint = newest is not None
    if newest is not None and "epochs" in resumed.changed:
        config = _keep_past_steps(config, int(checkpoint.verify(newest)["step"]), before, resumed)
    setup = build_setup(config, _resolved(newest, before) if newest else None)
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
            f"run {folder} has done {plural(state.step, 'step')} already",
            f"--epochs {setup.config.epochs} is {plural(setup.total_steps, 'step')}",
            "give it more",
        )
    if setup.config.average_tail is not None and "epochs" in resumed.changed and setup.total_steps == state.step:
        raise CheckpointError(
            f"run {folder} has done all its {plural(state.step, 'step')} already",
            f"none is left to average, by --average-tail {setup.config.average_tail}",
            "give it more --epochs",
        )
    if "micro_batch" in resumed.changed:
        setup.update.sam.micro_batch = setup.config.micro_batch
    changed = {key: [str(value) for value in values] for key, values in resumed.changed.items()}
    entry = {"step": state.step, "started": run_log.now(), "command": run_log.command()}
    entry |= {"versions": about["versions"], "changed": changed}
    about["model"] = before.get("model", about["model"])

    def reopen() -> RunLog:
        assert held_lock is not None
        log = RunLog.reopen(
            folder,
            held_lock,
            setup.total_steps,
            step=state.step,
            seconds=state.seconds,
            metrics_bytes=state.metrics_bytes,
            keep_tests=state.step == setup.total_steps and not resumed.changed,
        )
        with log.best_effort("provenance.json"):
            run_log.note_resume(folder, setup.config.to_toml() if changed else None, entry, about)
        return log

    log = open_log(reopen, lambda: NullLog(folder, collectives.rank(), setup.total_steps, state.step, state.seconds))
    log_startup(setup, log, about)
    log.info(f"resume  {newest.name if newest else 'from the beginning: no checkpoint was saved yet'}")
    if newest is not None and "epochs" in resumed.changed:
        log.info(_learning_rate_change(setup, state.step, resumed.changed["epochs"][0]))
    if before.get("versions", entry["versions"]) != entry["versions"]:
        log.warn("versions have changed since: the run is no longer the same to the last bit")
    return setup, log, newest, state


def _check_same(setup: Setup, before: Mapping[str, Any], about: Mapping[str, Any], resumed: Resumed) -> None:
    """Raise CheckpointError if the run would resume with other images, or another division of them."""
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
            f"run {resumed.folder} was started with {plural(then, 'device')}, and now has {now}",
            f"a step would have {plural(setup.batch.total, 'image')}, and not {before['optimizer']['batch_size']}",
            f"go on with {then}; only a run with --global-batch-size can go on with another number",
        )
    if not resumed.other_devices:
        raise CheckpointError(
            f"run {resumed.folder} was started with {plural(then, 'device')}, and now has {now}",
            "masks are drawn by device: the run would no longer be the same to the last bit",
            f"go on with {then}, or let the number differ by --allow-change gpus",
        )


def _keep_past_steps(config: RunConfig, step: int, before: Mapping[str, Any], resumed: Resumed) -> RunConfig:
    """The config of a run whose length changed: warm-up and SAM's start stay at their step if that has passed.

    They may be shares of the run's length, which is now another one.
    """
    past = {
        "warmup_epochs": before.get("optimizer", {}).get("warmup_steps"),
        "sam_start": before.get("sam", {}).get("start"),
    }
    for key, steps in past.items():
        if steps is not None and steps <= step and key not in resumed.changed:
            config = config.derive(key, Duration(steps, "steps"), "as the run began, before its length was changed")
    return config


def _learning_rate_change(setup: Setup, step: int, epochs: Duration) -> str:
    """How the learning rate changes where a run of another length resumes after this step."""
    steps_before = max(1, epochs.steps(setup.steps_per_epoch))
    last = setup.lr * cosine(step - 1, steps_before) * warmup(step - 1, setup.warmup_steps) if step else 0.0
    now = setup.lr * cosine(step, setup.total_steps) * warmup(step, setup.warmup_steps)
    return (
        f"rate    a cosine over {setup.total_steps} steps in place of {steps_before}: {last:.3g} in step {step} and "
        f"{now:.3g} in step {step + 1}; the warm-up of {setup.warmup_steps} steps is "
        + ("not repeated" if step >= setup.warmup_steps else "not over yet")
    )


def _resolved(newest: Path, before: Mapping[str, Any]) -> Resolved:
    """What the run resolved when it started, by its newest checkpoint and its provenance."""
    manifest = checkpoint.verify(newest)
    return Resolved(before.get("model", {}), manifest["class_names"], checkpoint.decode_rule(manifest))


def _provenance(folder: Path) -> dict[str, Any]:
    try:
        return read_provenance(folder)
    except (OSError, ValueError) as error:
        console.warn(f"{first_line(error)}: whether the data are what they were is not known")
        return {}
