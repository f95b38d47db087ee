"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from samtune.cli import completion

Recipe = Annotated[
    Path | None,
    typer.Argument(
        help="TOML file with any of the options below as keys, or a name of `samtune recipes ls`.",
        autocompletion=completion.recipes,
    ),
]
RunOrCheckpoint = Annotated[
    Path,
    typer.Argument(
        help="A run folder, or a checkpoint folder inside one.",
        metavar="RUN_OR_CHECKPOINT",
        autocompletion=completion.runs,
    ),
]
CheckpointName = Annotated[
    Literal["last", "best"] | None,
    typer.Option(help="Of a run: last or best; by default the one it reported.", metavar="last|best"),
]
Ema = Annotated[
    bool | None,
    typer.Option(
        "--ema/--no-ema",
        help="Take the averaged weights of a run with --average-tail or --model-ema; by default only with --select "
        "average, if no checkpoint is named.",
        show_default=False,
    ),
]
