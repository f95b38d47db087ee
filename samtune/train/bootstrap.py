"""A run with --bootstrap: train, predict the training labels, and train again from the same start on the predictions.

This is the bootstrap of Foret et al. 2021, section 3.3 and table 4, against noisy training labels. Both trainings have
the same settings, seed and validation images, which keep clean labels. Only the second one is scored on test.

    OUTPUT/bootstrap/                 the first training, a run of its own
    OUTPUT/bootstrap/labels.parquet   its predictions for the images that it was trained on
    OUTPUT/                           the second training: the run
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.distributed import collectives, device, signals
from samtune.errors import SamtuneError, Stopped
from samtune.runs.folder import BOOTSTRAP, BOOTSTRAP_LABELS, has_checkpoints, holds_run
from samtune.runs.resume import RUNTIME_ONLY, Resumed, finished_report, resolve_resume
from samtune.runs.run_log import NullLog, RunLog, amend_status
from samtune.train import loop, relabel
from samtune.train.start import disk_errors, open_log, recording_errors


def run(config: RunConfig, resumed: Resumed | None, stop: signals.StopRequest) -> dict[str, Any] | None:
    """Do both trainings of a run, or what is left of them; returns and raises what `loop.run` does.

    resumed: resume that run, in whichever training it was interrupted.
    """
    with collectives.connection_errors():
        collectives.init(device.select_device(config.gpus, config.processes))
        config = collectives.broadcast_from_rank0(config.with_output)
        assert config.output is not None
        if not collectives.broadcast_from_rank0(lambda: _second_has_begun(config)):
            with _recording(config, resumed) as log:
                _train_first(config, resumed, stop, log)
                log.info("bootstrap: second training, on the predicted labels")
            resumed = None
    try:
        return loop.run(config, resumed, stop)
    except (SamtuneError, Stopped) as error:
        if resumed is None and collectives.rank() == 0:
            amend_status(config.output, error)  # the log of the second training may not have been there yet
        raise


def _second_has_begun(config: RunConfig) -> bool:
    """Whether the first training is done. The second one writes provenance.json when it begins, and checkpoints."""
    assert config.output is not None
    return (config.output / "provenance.json").is_file() or has_checkpoints(config.output)


@contextmanager
def _recording(config: RunConfig, resumed: Resumed | None) -> Iterator[RunLog]:
    """Hold the folder of the run during its first training, with its settings, and with its status if that fails."""
    folder = config.output
    assert folder is not None

    def create() -> RunLog:
        return RunLog.create(folder, config.to_toml(), None, 0, is_new=resumed is None)

    log = open_log(create, lambda: NullLog(folder, collectives.rank(), 0))
    try:
        with recording_errors(log), disk_errors(folder):
            yield log
    except (SamtuneError, Stopped):
        if collectives.rank() == 0 and resumed is None and not holds_run(folder / BOOTSTRAP):
            _remove_unused(config)
        raise


def _remove_unused(config: RunConfig) -> None:
    """Leave nothing of a run that ended before it began, as by a misspelt name: the same command can be repeated."""
    folder = config.output
    assert folder is not None
    with suppress(OSError):
        for name in ("config.toml", "status.json", "log.txt"):
            (folder / name).unlink(missing_ok=True)
        (folder / "checkpoints").rmdir()
        if config.origins["output"].startswith("derived"):
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def _train_first(config: RunConfig, resumed: Resumed | None, stop: signals.StopRequest, log: RunLog) -> None:
    """Train on the labels as they are, and predict those of the second training; skip what is done already."""
    first = first_training(config)
    assert first.output is not None
    labels = first.output / BOOTSTRAP_LABELS
    folder = first.output
    if collectives.broadcast_from_rank0(lambda: finished_report(folder) is None):
        log.info(f"bootstrap: first training, in {folder}")
        loop.run(*collectives.broadcast_from_rank0(lambda: _resolve_first(first, folder, resumed)), stop)
        gc.collect()  # its model and optimizer would take memory beside those of the second training
    if not collectives.broadcast_from_rank0(labels.is_file):
        stop.is_deferred = stop.has_checkpoint = True
        _raise_if_stopped(stop)
        with console.RunProgress() as progress:
            try:
                predicted = relabel.relabel(
                    folder,
                    labels,
                    name=None,
                    progress=progress.score,
                    trained_only=True,
                    gpus=config.gpus,
                    processes=config.processes,
                    stop_requested=stop.is_requested,
                )
            except signals.Interrupted:
                stop.raise_stopped()
        if predicted["label_noise"] is not None:
            log.info(f"bootstrap: {relabel.noise_words(predicted['label_noise'])}")
    _raise_if_stopped(stop)
    stop.is_deferred = False  # until the second training takes its first step, a signal may end it at once


def _raise_if_stopped(stop: signals.StopRequest) -> None:
    """Raise Stopped on all ranks if one of them was asked to stop."""
    if collectives.any_rank_true(stop.is_requested())[0]:
        stop.raise_stopped()


def first_training(config: RunConfig) -> RunConfig:
    """The settings of the first training. It is not scored on test, and has no page."""
    assert config.output is not None
    why = "the first training of a run with bootstrap"
    for key, value in (("bootstrap", False), ("test", False), ("html", False), ("output", config.output / BOOTSTRAP)):
        config = config.derive(key, value, why)
    return config


def _resolve_first(first: RunConfig, folder: Path, resumed: Resumed | None) -> tuple[RunConfig, Resumed | None]:
    """The settings of the first training, and how to resume it; None where it has not begun.

    A training that is resumed keeps its own settings, except those that `resumed`, of the whole run, changes.
    """
    if resumed is None or not holds_run(folder):
        return first, None
    allowed = [*resumed.changed, *(["gpus"] if resumed.other_devices else [])]
    now = first.model_dump(mode="json")
    # What the variant of a recipe gave is among the settings.
    given = {key: now[key] for key in {*RUNTIME_ONLY, *resumed.changed} - {"variant"}}
    return resolve_resume(None, given, allowed)
