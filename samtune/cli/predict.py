"""`samtune predict`: parse, one call, write rows as they come."""

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from samtune.cli.arguments import CheckpointName, Ema, RunOrCheckpoint
from samtune.cli.config_flags import Gpus, Processes, with_config_flags
from samtune.cli.help import Json
from samtune.cli.ranks import result_to_print
from samtune.distributed import environment, rank_status, signals
from samtune.errors import UsageError
from samtune.runs.folder import holds_run


@partial(with_config_flags, only=("image_key", "image_root", "image_suffix", "workers"))
def predict(
    run_or_checkpoint: RunOrCheckpoint,
    images: Annotated[
        list[str],
        typer.Argument(
            help="Pictures; folders of them, at any depth; quoted globs; lists (.csv, .tsv, .jsonl with a column of "
            "paths); .parquet files; - for paths on stdin.",
            metavar="IMAGES...",
        ),
    ],
    *,
    top: Annotated[int, typer.Option(min=1, help="So many classes of each picture, the most probable first.")] = 1,
    every: Annotated[bool, typer.Option("--all", help="The probabilities of all classes, too.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the predictions, in place of stdout.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="By default as --output ends, else csv.",
            metavar="csv|jsonl|json|parquet",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="File for the pooled features, a row for each prediction: .safetensors or .npy.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="File for a page of thumbnails, the least certain first, 500 at most.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
    tta: Annotated[
        Literal["hflip"] | None,
        typer.Option(help="hflip: the mean over a picture and its mirror image.", metavar="hflip"),
    ] = None,
    use_temperature: Annotated[
        bool,
        typer.Option(
            "--temperature/--no-temperature",
            help="Use the temperature that `samtune eval --temperature` has stored, if there is one.",
        ),
    ] = True,
    checkpoint: CheckpointName = None,
    ema: Ema = None,
    on_bad_image: Annotated[
        Literal["error", "skip"],
        typer.Option(
            help="What cannot be decoded is named and left out: then it is an error (exit code 3) after all others "
            "are written, or none.",
            metavar="error|skip",
        ),
    ] = "error",
    gpus: Gpus = "auto",
    processes: Processes = None,
    as_json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Classify pictures: path, class name, probability, a row each, in their order.

    Example: samtune predict runs/r1 photos --top 3

    Example: find photos -name "*.jpg" | samtune predict runs/r1 - --output predictions.parquet

    Pictures are decoded and computed as `samtune eval` does it; the data set of the run is not needed. Rows are written
    as they come: any number of pictures takes the same memory. A csv has path, class, probability, then class_2,
    probability_2, ... with --top, and p_NAME for each class with --all; jsonl has lists of them.
    """
    from samtune.config import loading
    from samtune.data.split_roles import DataSelection

    loading.check_devices(gpus, processes)
    environment.check_processes(processes)
    workers = flags.pop("workers", None)
    wanted = DataSelection.from_flags(flags)

    from samtune import console
    from samtune.data import inputs
    from samtune.predict import writers

    output = None if output == Path(inputs.STDIN) else output  # a dash is stdout here
    kind = writers.format_of("json" if as_json and output is None and kind is None else kind, output)
    if as_json and output is None and kind != "json":
        raise UsageError(f"--json with --format {kind}", "both say what stdout is", "leave one out, or give --output")
    if kind == "parquet" and output is None and sys.stdout.isatty():
        raise UsageError("--format parquet to a terminal", hint="give --output FILE, or send stdout elsewhere")
    files = {"--output": output, "--embeddings": embeddings, "--html": html}
    writers.check(files, force=force, read=[Path(image) for image in images if os.path.isfile(image)])
    for image in images:
        if holds_run(Path(image)):
            raise UsageError(f"IMAGES {image} is a run", "one run predicts at a time", "give pictures after the run")
    found = inputs.find(images, wanted)
    if environment.status_folder() is None:  # else the launcher has said so
        for note in found.notes:
            console.info(note)

    result: Mapping[str, Any] | None
    with signals.listening() as stop:
        rank_status.report_ready()
        if environment.wants_launch(gpus, processes):
            from samtune.distributed import launch

            result = launch.launch(sys.argv[1:], launch.LaunchSpec(launch.local_rank_count(gpus, processes)), stop)
        else:
            from samtune.distributed import collectives
            from samtune.predict import run

            with console.RunProgress() as progress, collectives.connection_errors():
                result = run.run(
                    run_or_checkpoint,
                    found,
                    name=checkpoint,
                    ema=ema,
                    use_temperature=use_temperature,
                    tta=tta,
                    kind=kind,
                    output=output,
                    top=top,
                    every=every,
                    embeddings=embeddings,
                    html=html,
                    workers=workers,
                    gpus=gpus,
                    processes=processes,
                    on_bad_image=on_bad_image,
                    progress=progress,
                )
    result = result_to_print(result)
    if result is not None and as_json and output is not None:
        console.print_json(result)
