"""`samtune relabel`: predict the labels of a run's training images."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from samtune.cli.arguments import CheckpointName, Ema, RunOrCheckpoint
from samtune.cli.config_flags import Gpus, Processes
from samtune.cli.help import Json
from samtune.cli.ranks import result_to_print
from samtune.distributed import rank_status, signals
from samtune.errors import UsageError


def relabel(
    run_or_checkpoint: RunOrCheckpoint,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Parquet file for the labels, with a row for each row of train.")
    ],
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Also write the probabilities of all classes, as a list in each row."),
    ] = False,
    checkpoint: CheckpointName = None,
    ema: Ema = None,
    dataset: Annotated[str | None, typer.Option(help="Where the data set of the run is now, if it has moved.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    gpus: Gpus = "auto",
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Predict the labels of a run's training images, to train on them.

    Example: samtune relabel runs/r1 --output labels.parquet

    Example: samtune run --model resnet18 --dataset photos --train-labels labels.parquet

    All images of train are predicted, also those held out for validation, in evaluation mode and without augmentation.
    The columns are index, label (the predicted class), probability, dataset_label, and trained_label, which the run was
    trained on.
    """
    from samtune.predict import writers
    from samtune.train import dispatch, relabel

    if output.suffix.lower() != ".parquet":
        raise UsageError(f"--output {output}: must end in .parquet")
    writers.check({"--output": output}, force=force)
    with signals.listening() as stop:
        rank_status.report_ready()
        result = dispatch.relabel(
            run_or_checkpoint,
            output,
            checkpoint=checkpoint,
            ema=ema,
            dataset=dataset,
            probabilities=probabilities,
            gpus=gpus,
            processes=processes,
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
        console.print_table("Labels", relabel.summary(result))
