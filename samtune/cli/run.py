"""`samtune run`: fine-tune a model."""

import sys
from typing import Annotated, Any

import typer

from samtune.cli.arguments import Recipe
from samtune.cli.config_flags import with_config_flags
from samtune.cli.help import Json
from samtune.cli.ranks import print_result
from samtune.distributed import rank_status, signals
from samtune.errors import UsageError


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
    print_result(result, as_json, is_evaluation=False)
