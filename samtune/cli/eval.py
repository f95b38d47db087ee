"""`samtune eval`: parse, one call, print."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from samtune import ranks, signals
from samtune.cli import completion
from samtune.cli.config_flags import DATA_KEYS, with_config_flags
from samtune.cli.help import Json
from samtune.cli.ranks import result_to_print
from samtune.options import MOST_PROCESSES


@partial(with_config_flags, only=DATA_KEYS)
def evaluate(
    run_or_checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A run folder, or a checkpoint folder inside one.",
            metavar="RUN_OR_CHECKPOINT",
            autocompletion=completion.runs,
        ),
    ],
    *,
    split: Annotated[
        str | None,
        typer.Option(
            help="val, train and test as the run took them, or another split of the data set; always clean labels. By "
            "default test, or all of other data that has one split.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Of a run: last or best; by default the one it reported.", metavar="last|best")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="Score the averaged weights of a run with --model-ema.")
    ] = False,
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
    gpus: Annotated[str, typer.Option(help="auto, all, a number of GPUs, or a list of them, as in a run.")] = "auto",
    processes: Annotated[
        int | None, typer.Option(min=1, max=MOST_PROCESSES, help="So many ranks on the CPU, in place of GPUs.")
    ] = None,
    as_json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Score a checkpoint: exact top-1, top-5 and mean per-class error, every image once.

    Example: samtune eval runs/r1 --split val

    Example: samtune eval runs/r1 --dataset other/photos

    Example: samtune eval runs/r1 --temperature

    The options of other data tell how to read what --dataset names.
    """
    from samtune import api

    with signals.listening() as stop:
        ranks.report_for_work()
        result = api.score(
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
    result = result_to_print(result)
    if result is None:
        return
    from samtune import console

    if as_json:
        console.print_json(result)
    else:
        console.print_table("Result", api.evaluation_summary(result))
