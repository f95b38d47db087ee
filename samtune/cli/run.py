"""`samtune run`: parse, one call, print."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from samtune import config, ranks, shipped, signals
from samtune.cli.config_flags import Json, with_config_flags
from samtune.cli.ranks import result_to_print
from samtune.errors import UsageError
from samtune.resume import finished_report, settle
from samtune.runlog import has_checkpoints


@with_config_flags
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="TOML file with any of the options below as keys, or a name of `samtune recipes ls`."),
    ] = None,
    *,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with the run in --output from its newest valid checkpoint, exactly; settings that are not "
            "given are the run's own. Where there is no run yet, begin one.",
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(help="With --resume: a setting that may differ from before. Repeatable.", metavar="SETTING"),
    ] = None,
    as_json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Fine-tune a pretrained model and report its top-1 error.

    Example: samtune run --model tf_efficientnet_lite0 --dataset mnist5k --img-size 64 --epochs 2 --rho 0.05

    A flag goes before the recipe, the recipe before the default. The run folder keeps the resolved settings (as a
    recipe), metrics, checkpoints that load in timm, and the report. A GPU is used if there is one;
    CUDA_VISIBLE_DEVICES chooses.
    """
    recipe = recipe and shipped.find(recipe)
    with signals.listening() as stop:
        ranks.report_for_work()
        result = _run(recipe, flags, resume, allow_change or [], stop)
    mine = result_to_print(result)
    if mine is not None:
        from samtune import console, report

        if as_json:
            console.print_json(mine)
        else:
            console.print_table("Result", report.summary(mine))


def _run(
    recipe: Path | None, flags: dict[str, Any], resume: bool, allow_change: list[str], stop: signals.StopRequest
) -> Mapping[str, Any] | None:
    resumed = None
    # A rank goes on with what is there, if it is started again; on what the command may find its launcher has decided.
    if resume or ranks.folder() is not None or ranks.restarts() > 0:
        settings, resumed = settle(recipe, flags, allow_change)
        if resumed is None and resume:
            from samtune import console

            console.note(f"{settings.output} holds no run yet: a new one begins")
    elif allow_change:
        raise UsageError("--allow-change without --resume", mend="it says what may differ from the run that goes on")
    else:
        settings = config.load(recipe, flags)
    if resumed is not None:
        stop.saved = has_checkpoints(resumed.folder)
        result = finished_report(resumed.folder) if not resumed.changed else None
        if result is not None:
            from samtune import console

            console.note(f"run {resumed.folder} is done already; this is its result")
            return result
    ranks.check_processes(settings.processes)
    if ranks.is_first():
        from samtune.preflight import check_before_slow_work

        check_before_slow_work(settings, resumed)
    if ranks.asked_for(settings.gpus, settings.processes, settings.nnodes):
        from samtune import launch

        return launch.run(settings, stop)

    from samtune import train

    return train.run(settings, resumed)
