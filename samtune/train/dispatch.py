"""Runs and evaluations on as many ranks as their settings ask for: in this process, or in ranks that it launches."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from samtune import console
from samtune.config import loading, shipped_recipes
from samtune.config.run_config import RunConfig, flag_name
from samtune.data.split_roles import DataSelection
from samtune.distributed import environment, signals
from samtune.errors import SamtuneError, Stopped, UsageError
from samtune.runs.folder import has_checkpoints
from samtune.runs.resume import finished_report, resolve_resume
from samtune.runs.run_log import amend_status

# torch takes a second to import, so it is imported when it is needed.


def start_or_resume(
    recipe: Path | None,
    flags: Mapping[str, Any],
    resume: bool,
    allow_change: Sequence[str],
    stop: signals.StopRequest,
    arguments: Sequence[str],
) -> Mapping[str, Any] | None:
    """Start or resume a run: its report, or None on a rank that has none.

    recipe: a file, or the name of a recipe that ships with samtune. flags: settings that take precedence over it.
    arguments: the command line that starts each rank.
    """
    is_launched = environment.status_folder() is not None
    recipe = recipe and shipped_recipes.find(recipe, quiet=is_launched)  # the launcher has named it
    resumed = None
    if resume or is_launched or environment.restart_count() > 0:  # a restarted rank resumes
        settings, resumed = resolve_resume(recipe, flags, allow_change)
        if resumed is None and resume:
            console.info(f"{settings.output} holds no run yet: a new one begins")
    elif allow_change:
        raise UsageError("--allow-change without --resume", hint="it says what may differ from the run that goes on")
    else:
        settings = loading.load(recipe, flags)
    if resumed is not None:
        stop.has_checkpoint = has_checkpoints(resumed.folder)
        result = finished_report(resumed.folder) if not resumed.changed else None
        if result is not None:
            console.info(f"run {resumed.folder} is done already; this is its result")
            return {"folder": str(resumed.folder), **result}
    environment.check_processes(settings.processes)
    if environment.is_rank0():
        from samtune.train.preflight import check_before_slow_work

        check_before_slow_work(settings, resumed)
    if environment.wants_launch(settings.gpus, settings.processes, settings.nnodes):
        return _launch(settings, stop, arguments)

    from samtune.train import bootstrap, loop

    return bootstrap.run(settings, resumed, stop) if settings.bootstrap else loop.run(settings, resumed)


def _launch(settings: RunConfig, stop: signals.StopRequest, arguments: Sequence[str]) -> Mapping[str, Any] | None:
    """Run these settings on several ranks: the report, or None if rank 0 is on another machine.

    arguments: the command line that gave the settings. Raises as `launch.launch`; status.json has the error, too.
    """
    from samtune.distributed import launch

    count = launch.local_rank_count(settings.gpus, settings.processes)  # before a folder is made
    settings = settings.with_output()
    assert settings.output is not None
    spec = launch.LaunchSpec(
        count,
        settings.nnodes,
        settings.node_rank,
        settings.rdzv_endpoint if settings.nnodes > 1 else None,
        settings.max_restarts,
    )
    output = [] if settings.origins["output"] == "flag" else ["--output", str(settings.output)]
    try:
        result = launch.launch([*arguments, *output], spec, stop)
    except (SamtuneError, Stopped) as error:
        amend_status(settings.output, error)
        if output:
            with suppress(OSError):
                settings.output.rmdir()  # it was made for this run, and is still empty
        raise
    if result is None:
        console.info("the result is on the machine of rank 0")
    return result


def score_checkpoint(
    run_or_checkpoint: Path,
    *,
    split: str | None,
    checkpoint: str | None,
    ema: bool | None,
    temperature: bool,
    dataset: str | None,
    gpus: str,
    processes: int | None,
    data_settings: Mapping[str, Any],
    stop: signals.StopRequest,
    arguments: Sequence[str],
) -> Mapping[str, Any] | None:
    """Score a checkpoint: its scores, or None on a rank that has none.

    data_settings: how to read `dataset`. arguments: the command line that starts each rank.
    """
    if checkpoint not in (None, "last", "best"):
        raise UsageError(f"--checkpoint {checkpoint}: must be last or best")
    if data_settings and dataset is None:
        raise UsageError(f"{flag_name(next(iter(data_settings)))} without --dataset", hint="it is about other data")
    if temperature and dataset is not None:
        raise UsageError("--temperature with --dataset", "it is fitted on the run's own validation images")
    if temperature and split not in (None, "val"):
        raise UsageError(f"--temperature with --split {split}", "it is fitted on validation, and never on test")
    split = "val" if temperature else split
    selection = DataSelection.from_flags(data_settings) if data_settings else None
    loading.check_devices(gpus, processes)
    environment.check_processes(processes)
    if environment.wants_launch(gpus, processes):
        from samtune.distributed import launch

        return launch.launch(arguments, launch.LaunchSpec(launch.local_rank_count(gpus, processes)), stop)

    from samtune.distributed import collectives
    from samtune.train.eval_checkpoint import evaluate_checkpoint

    with console.RunProgress() as progress, collectives.connection_errors():
        scored, about = evaluate_checkpoint(
            run_or_checkpoint,
            name=checkpoint,
            split=split,
            dataset=dataset,
            selection=selection,
            progress=progress.score,
            ema=ema,
            gpus=gpus,
            processes=processes,
            keep_logits=temperature,
        )
    result = about | scored.summary()
    if temperature:
        from samtune.train.temperature import fit_and_store

        weights = Path(about["checkpoint"]) / ("ema" if about["ema"] else "")
        result["temperature"] = collectives.broadcast_from_rank0(lambda: fit_and_store(scored, weights))
    return result


def relabel(
    run_or_checkpoint: Path,
    output: Path,
    *,
    checkpoint: str | None,
    ema: bool | None,
    dataset: str | None,
    probabilities: bool,
    gpus: str,
    processes: int | None,
    stop: signals.StopRequest,
    arguments: Sequence[str],
) -> Mapping[str, Any] | None:
    """Write a run's predictions for its training images: the summary, or None on a rank that has none.

    arguments: the command line that starts each rank.
    """
    loading.check_devices(gpus, processes)
    environment.check_processes(processes)
    if environment.wants_launch(gpus, processes):
        from samtune.distributed import launch

        return launch.launch(arguments, launch.LaunchSpec(launch.local_rank_count(gpus, processes)), stop)

    from samtune.distributed import collectives
    from samtune.train import relabel

    with console.RunProgress() as progress, collectives.connection_errors():
        return relabel.relabel(
            run_or_checkpoint,
            output,
            name=checkpoint,
            progress=progress.score,
            ema=ema,
            dataset=dataset,
            probabilities=probabilities,
            gpus=gpus,
            processes=processes,
        )
