"""samtune from Python and notebooks: the same runs, folders and errors as those of the command line."""

import html
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from samtune import console
from samtune.config import cache_folders, loading, shipped_recipes
from samtune.config.run_config import RunConfig, flag_name
from samtune.data.split_roles import DataSelection
from samtune.distributed import environment, signals
from samtune.errors import SamtuneError, Stopped, UsageError
from samtune.report import run_report
from samtune.runs.folder import has_checkpoints
from samtune.runs.resume import finished_report, resolve_resume
from samtune.runs.run_log import amend_status


class Report(dict[str, Any]):
    """A report as report.json has it, or the scores of an evaluation; in a notebook it is shown as a table."""

    def __init__(self, content: Mapping[str, Any], rows: Mapping[str, str]) -> None:
        """rows: what the table shows, name -> value."""
        super().__init__(content)
        self._rows = dict(rows)

    def _repr_html_(self) -> str:
        cells = (
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._rows.items()
        )
        return f"<table>{''.join(cells)}</table>"


def run(
    recipe: str | Path | None = None, *, resume: bool = False, allow_change: Sequence[str] = (), **settings: Any
) -> Report:
    """Fine-tune a model and return its report. `samtune.run(model=..., dataset=..., rho=0.05, epochs=3)`

    recipe: a file, or the name of a recipe that comes with samtune. settings: the keys of a recipe, which are the flags
    of `samtune run` with underscores: batch_size=32. They take precedence over the recipe. resume: resume the run in
    `output`; allow_change: settings that may then differ from before. The run folder is that of the command; its path
    is the report's key "folder". In a notebook, progress is one line that is drawn over.

    Raises the errors of samtune.errors. Ctrl-C, or a notebook's interrupt, ends the run after its step with a
    checkpoint, and raises Stopped.
    """
    _prepare()
    unknown = next((key for key in settings if key not in RunConfig.model_fields), None)
    if unknown is not None:
        raise loading.unknown_key(unknown, "the call of samtune.run")
    flags = {key: _plain(value) for key, value in settings.items() if value is not None}
    arguments = _command_line(recipe, resume, allow_change, flags)
    with signals.listening() as stop:
        result = start_or_resume(None if recipe is None else Path(recipe), flags, resume, allow_change, stop, arguments)
    assert result is not None
    return Report(result, run_report.summary(result))


def evaluate(
    run_or_checkpoint: str | Path,
    *,
    split: str | None = None,
    checkpoint: str | None = None,
    ema: bool = False,
    temperature: bool = False,
    dataset: str | Path | None = None,
    gpus: str | int = "auto",
    processes: int | None = None,
    **data_settings: Any,
) -> Report:
    """Score a run, or a checkpoint of one. `samtune.evaluate("runs/r1", split="val")["top1_error"]`

    The arguments are the options of `samtune eval`: exact top-1, top-5 and mean per-class error in percent, every image
    once. data_settings: how to read what `dataset` names, as label_key="species". Raises the errors of samtune.errors.
    """
    _prepare()
    options = {"split": split, "checkpoint": checkpoint, "dataset": _plain(dataset), "gpus": str(gpus)}
    arguments = ["eval", str(run_or_checkpoint)]
    arguments += ["--ema"] if ema else []
    arguments += ["--temperature"] if temperature else []
    arguments += _flags({**options, "processes": processes, **data_settings})
    with signals.listening() as stop:
        scores = score_checkpoint(
            Path(run_or_checkpoint),
            **options,
            ema=ema,
            temperature=temperature,
            processes=processes,
            data_settings={key: _plain(value) for key, value in data_settings.items()},
            stop=stop,
            arguments=arguments,
        )
    assert scores is not None
    return Report(scores, run_report.evaluation_summary(scores))


def _prepare() -> None:
    """Silence ranks other than 0, and set writable caches before libraries are imported."""
    console.configure(quiet=not environment.is_rank0())
    note = cache_folders.prepare()
    if note is not None:
        console.info(note)


def _plain(value: Any) -> Any:
    """A value in a form that a recipe can hold."""
    return str(value) if isinstance(value, Path) else value


def _command_line(
    recipe: str | Path | None, resume: bool, allow_change: Sequence[str], settings: Mapping[str, Any]
) -> list[str]:
    """The same call as arguments of `samtune`, for ranks in other processes."""
    arguments = ["run"]
    arguments += [str(recipe)] if recipe is not None else []
    arguments += ["--resume"] if resume else []
    return arguments + [f"--allow-change={key}" for key in allow_change] + _flags(settings)


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags; those that are None are left out."""
    flags = []
    for key, value in settings.items():
        if isinstance(value, bool):
            flags.append(flag_name(key if value else f"no_{key}"))
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
            flags.append(f"{flag_name(key)}={text}")
    return flags


def start_or_resume(
    recipe: Path | None,
    flags: Mapping[str, Any],
    resume: bool,
    allow_change: Sequence[str],
    stop: signals.StopRequest,
    arguments: Sequence[str],
) -> Mapping[str, Any] | None:
    """Start or resume a run on its ranks. Returns its report, or None where another rank has it.

    recipe: a file, or the name of a recipe that comes with samtune. flags: settings that take precedence over it.
    arguments: the command line that each rank is started with.
    """
    recipe = recipe and shipped_recipes.find(
        recipe, quiet=environment.status_folder() is not None
    )  # the launcher says it
    resumed = None
    # A rank that is started again resumes; its launcher has checked what the command may resume.
    if resume or environment.status_folder() is not None or environment.restart_count() > 0:
        settings, resumed = resolve_resume(recipe, flags, allow_change)
        if resumed is None and resume:
            console.info(f"{settings.output} holds no run yet: a new one begins")
    elif allow_change:
        raise UsageError("--allow-change without --resume", hint="it says what may differ from the run that goes on")
    else:
        settings = loading.load(recipe, flags)
    if resumed is not None:
        stop.saved = has_checkpoints(resumed.folder)
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

    from samtune.train import loop

    return loop.run(settings, resumed)


def _launch(settings: RunConfig, stop: signals.StopRequest, arguments: Sequence[str]) -> Mapping[str, Any] | None:
    """Start `samtune run` on several ranks. Returns the report, or None if rank 0 is on another machine.

    arguments: the command line of `samtune` that gave the settings. Raises as `launch.launch`, and writes the error to
    status.json of the run.
    """
    from samtune.distributed import launch

    count = launch.local_rank_count(settings.gpus, settings.processes)  # before a folder is made
    settings = settings.with_output()
    assert settings.output is not None
    fleet = launch.LaunchSpec(
        count,
        settings.nnodes,
        settings.node_rank,
        settings.rdzv_endpoint if settings.nnodes > 1 else None,
        settings.max_restarts,
    )
    named = [] if settings.origins["output"] == "flag" else ["--output", str(settings.output)]
    try:
        result = launch.launch([*arguments, *named], fleet, stop)
    except (SamtuneError, Stopped) as error:
        amend_status(settings.output, error)
        if named:
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
    ema: bool,
    temperature: bool,
    dataset: str | None,
    gpus: str,
    processes: int | None,
    data_settings: Mapping[str, Any],
    stop: signals.StopRequest,
    arguments: Sequence[str],
) -> Mapping[str, Any] | None:
    """Score a checkpoint on its ranks. Returns the scores, or None where another rank has them.

    data_settings: how to read `dataset`, which they are about. arguments: the command line that each rank is started
    with.
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
    wanted = DataSelection.from_flags(data_settings) if data_settings else None
    loading.check_devices(gpus, processes)
    environment.check_processes(processes)
    if environment.wants_launch(gpus, processes):
        from samtune.distributed import launch

        return launch.launch(arguments, launch.LaunchSpec(launch.local_rank_count(gpus, processes)), stop)

    from samtune.distributed import collectives
    from samtune.train.evaluation import evaluate_checkpoint

    with console.RunProgress() as progress, collectives.connection_errors():
        scored, about = evaluate_checkpoint(
            run_or_checkpoint,
            name=checkpoint,
            split=split,
            dataset=dataset,
            wanted=wanted,
            progress=progress.score,
            ema=ema,
            gpus=gpus,
            processes=processes,
            keep_logits=temperature,
        )
    result = about | scored.summary()
    if temperature:
        from samtune.train.temperature import fit_and_store

        weights = Path(about["checkpoint"]) / ("ema" if ema else "")
        result["temperature"] = collectives.broadcast_from_rank0(lambda: fit_and_store(scored, weights))
    return result
