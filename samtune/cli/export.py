"""`samtune export`: parse, one call, print."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from samtune.cli.arguments import CheckpointName, Ema, RunOrCheckpoint
from samtune.cli.help import Json
from samtune.distributed import signals


def export(
    run_or_checkpoint: RunOrCheckpoint,
    *,
    to: Annotated[
        Literal["timm", "onnx", "torch"],
        typer.Option(help="A folder that timm loads, an ONNX file, or a torch.export program (.pt2)."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The file, or the folder of timm; by default in the folder export of the run.",
            show_default=False,
        ),
    ] = None,
    checkpoint: CheckpointName = None,
    ema: Ema = None,
    with_preprocessing: Annotated[
        bool,
        typer.Option(
            "--with-preprocessing",
            help="ONNX only: resize, crop and normalisation inside. It takes one RGB picture of any size, (height, "
            "width, 3) uint8, and gives probabilities, with the temperature of the checkpoint where there is one.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at --output.")] = False,
    as_json: Json = False,
) -> None:
    """Write a trained model for other programs, and check that it gives the same logits.

    Example: samtune export runs/r1 --to onnx --with-preprocessing

    Example: samtune export runs/r1 --to timm --ema --output exported/pets

    What was written is loaded again and compared on 32 pictures of validation. Where a logit differs by more than 1e-4,
    nothing is left, and the exit code is 5.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # it compares on pictures that are here
    from samtune import console
    from samtune.export.export import export as export_checkpoint

    with signals.listening(), console.RunProgress() as progress:
        result = export_checkpoint(
            run_or_checkpoint,
            to,
            output=output,
            name=checkpoint,
            ema=ema,
            with_preprocessing=with_preprocessing,
            force=force,
            progress=progress.count,
        )
    if as_json:
        console.print_json(result)
        return
    rows = {
        "written": f"{result['output']} ({result['bytes'] / 2**20:.1f} MiB)",
        "checkpoint": f"{result['checkpoint']} (step {result['step']}{', averaged weights' if result['ema'] else ''})",
        "compared on": result["pictures"],
        "same class": f"{result['same_class']} of {result['n']}",
        "largest difference": f"{result['largest_difference']:.1e} of a logit",
    }
    if with_preprocessing:
        rows["of a probability"] = f"{result['largest_probability_difference']:.1e}"
        rows["pixel values rounded otherwise"] = f"{result['values_rounded_otherwise']} of {result['values']}"
        rows["temperature"] = "none" if result["temperature"] is None else f"{result['temperature']:.3g}"
    console.print_table("Export", rows)
