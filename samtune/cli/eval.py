"""`samtune eval`: score a checkpoint on any split, or on other data."""

import sys
from functools import partial
from typing import Annotated, Any

import typer

from samtune.cli.arguments import CheckpointName, Ema, RunOrCheckpoint
from samtune.cli.config_flags import DATA_KEYS, Gpus, Processes, with_config_flags
from samtune.cli.help import Json
from samtune.cli.ranks import print_result
from samtune.distributed import rank_status, signals


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
    ema: Ema = None,
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
    print_result(result, as_json, is_evaluation=True)
