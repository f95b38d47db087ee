"""The commands of one run: `samtune plan`, `samtune run`, `samtune eval`."""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import typer

from samtune.cli.arguments import CheckpointName, Ema, Recipe, RunOrCheckpoint
from samtune.cli.config_flags import DATA_KEYS, Gpus, Processes, with_config_flags
from samtune.cli.help import Json
from samtune.cli.ranks import result_to_print
from samtune.distributed import rank_status, signals
from samtune.errors import UsageError


@with_config_flags
def plan(recipe: Recipe = None, *, as_json: Json = False, flags: dict[str, Any]) -> None:
    """Tell what a run will do and take before it does: steps, memory, time, disk, and the cost of SAM.

    Example: samtune plan --model tf_efficientnet_lite0 --dataset mnist5k --img-size 64 --epochs 2 --rho 0.05

    Takes the recipe and the flags of `samtune run`. A few real steps with and without SAM, an evaluation and a
    checkpoint are measured on the device that is there; of the images a few are decoded. Nothing is kept: no run
    folder, no decoded images, no weights.
    """
    from samtune.config import loading, shipped_recipes

    recipe = recipe and shipped_recipes.find(recipe)
    settings = loading.load(recipe, flags)

    from samtune.train.preflight import check_before_slow_work

    with signals.listening():
        check_before_slow_work(settings, None)

        from samtune import console
        from samtune.plan.plan import plan as make_plan
        from samtune.plan.tables import tables

        result = make_plan(settings)
        if as_json:
            console.print_json(result)
            return
        for title, rows in tables(result).items():
            console.print_table(title, rows)
        for warning in result["warnings"]:
            console.warn(warning)


@with_config_flags
def run(
    recipe: Recipe = None,
    *,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="resume the run in --output from its newest valid checkpoint, bit for bit; settings that are not "
            "given are the run's own; where there is no run yet, one starts.",
            show_default=False,
            rich_help_panel="Run",
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            help="with --resume: a setting that may differ from before; repeatable.",
            metavar="SETTING",
            rich_help_panel="Run",
        ),
    ] = None,
    as_json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Fine-tune a pretrained model and report its top-1 error.

    Example: samtune run --model tf_efficientnet_lite0 --dataset mnist5k --img-size 64 --epochs 2 --rho 0.05

    A flag takes precedence over the recipe, the recipe over the default. The run folder gets the settings, metrics,
    checkpoints that load in timm, and the report.
    """
    if recipe is None and not flags and not resume and sys.stderr.isatty():
        from samtune.cli import start

        raise UsageError("no model and no data set are given", hint=start.shortest_commands())
    from samtune.train import dispatch

    with signals.listening() as stop:
        rank_status.report_ready()
        result = dispatch.start_or_resume(recipe, flags, resume, allow_change or [], stop, sys.argv[1:])
    _print(result, as_json, is_evaluation=False)


@partial(with_config_flags, only=DATA_KEYS)
def evaluate(
    run_or_checkpoint: RunOrCheckpoint,
    *,
    split: Annotated[
        str | None,
        typer.Option(
            help="val, train and test as the run took them, or another split of the data set; always clean labels. By "
            "default test, or all of other data that has none.",
            show_default=False,
        ),
    ] = None,
    checkpoint: CheckpointName = None,
    ema: Ema = False,
    temperature: Annotated[
        bool,
        typer.Option(
            "--temperature",
            help="Fit one temperature on the run's validation images, never on test, and store it beside the weights: "
            "`samtune predict` then is as sure as it is right.",
        ),
    ] = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Name or path of other data, whose classes are matched by name; or of the run's, if they have moved."
        ),
    ] = None,
    gpus: Gpus = "auto",
    processes: Processes = None,
    as_json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Score a checkpoint: exact top-1, top-5 and mean per-class error, every image once.

    Example: samtune eval runs/r1 --split val

    Example: samtune eval runs/r1 --dataset other/photos

    Example: samtune eval runs/r1 --temperature

    The options of other data tell how to read what --dataset names.
    """
    from samtune.train import dispatch

    with signals.listening() as stop:
        rank_status.report_ready()
        result = dispatch.score_checkpoint(
            run_or_checkpoint,
            split=split,
            checkpoint=checkpoint,
            ema=ema,
            dataset=dataset,
            gpus=gpus,
            processes=processes,
            data_settings=flags,
            temperature=temperature,
            stop=stop,
            arguments=sys.argv[1:],
        )
    _print(result, as_json, is_evaluation=True)


def _print(result: Mapping[str, Any] | None, as_json: bool, *, is_evaluation: bool) -> None:
    """Print what a run or an evaluation gave, on the process that does so."""
    result = result_to_print(result)
    if result is None:
        return
    from samtune import console
    from samtune.report import run_report

    if as_json:
        console.print_json(result)
    else:
        summary = run_report.evaluation_summary if is_evaluation else run_report.summary
        console.print_table("Result", summary(result))
