"""Checks before slow work: files, packages and folders that a run needs."""

from pathlib import Path

from samtune.config.run_config import RunConfig
from samtune.data.source import locate, split_config
from samtune.errors import CheckpointError, DataError, UsageError
from samtune.runs.folder import check_free, has_checkpoints
from samtune.runs.lock import check_unused
from samtune.runs.resume import Resumed


def check_before_slow_work(settings: RunConfig, resumed: Resumed | None) -> None:
    """Raise a SamtuneError for missing files, and for a run folder that cannot be used."""
    check_inputs(settings, weights=resumed is None or not has_checkpoints(resumed.folder))
    check_apart(settings.output, settings.dataset)
    if resumed is not None:
        check_unused(resumed.folder)
    elif settings.output is not None:
        check_free(settings.output)


def check_apart(output: Path | None, dataset: str) -> None:
    """Raise UsageError for an output folder that is the data set's own: its files would be among the images."""
    if output is not None and output.is_dir() and output.resolve() == Path(split_config(dataset)[0]).resolve():
        raise UsageError(f"--output {output} is the folder of the data set", hint="give another --output")


def check_inputs(settings: RunConfig, *, weights: bool = True) -> None:
    """Raise DataError, CheckpointError or UsageError for a missing data set, file or package.

    weights: whether those of the settings are needed; a run that has a checkpoint needs none.
    """
    locate(settings.dataset)
    if weights and settings.weights is not None and not settings.weights.exists():
        raise CheckpointError(f"weights {settings.weights} are not there", hint="check the path of --weights")
    if settings.train_labels is not None and not settings.train_labels.is_file():
        raise DataError(f"labels {settings.train_labels} are not there", hint="check the path of --train-labels")
    if settings.track != "none":
        from samtune.train import trackers

        trackers.check(settings.track)
