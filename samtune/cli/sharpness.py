"""`samtune sharpness`: parse, measure, print."""

import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from samtune.cli import completion
from samtune.cli.arguments import Ema
from samtune.cli.config_flags import Gpus, Processes
from samtune.cli.help import Json
from samtune.cli.ranks import result_to_print
from samtune.distributed import rank_status, signals
from samtune.errors import UsageError


def sharpness(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders or checkpoints, shown on one scale; or a sweep, which stands for its final runs.",
            metavar="RUN_OR_CHECKPOINT...",
            autocompletion=completion.runs,
        ),
    ],
    *,
    m: Annotated[
        str | None,
        typer.Option(
            help="Measure m-sharpness, the largest rise of m images' loss near the weights, for each m: 1,16,256.",
            show_default=False,
        ),
    ] = None,
    rho: Annotated[float, typer.Option(help="m-sharpness: radius around the weights, in weight units.")] = 0.05,
    p: Annotated[float, typer.Option(help="m-sharpness: the norm that rho is of, from 1 to inf.")] = 2.0,
    adaptive: Annotated[
        bool,
        typer.Option("--adaptive", help="m-sharpness: rho in units of each weight's size (ASAM); use a larger --rho."),
    ] = False,
    ascent_steps: Annotated[
        int, typer.Option(min=1, help="m-sharpness: passes of the search for the largest rise, and of each restart.")
    ] = 20,
    restarts: Annotated[int, typer.Option(min=0, help="m-sharpness: further searches, each from a random point.")] = 1,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measure the largest eigenvalues of the Hessian (second derivatives), so many.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        bool, typer.Option("--density", help="Estimate the spectral density: how all eigenvalues are spread.")
    ] = False,
    probes: Annotated[int, typer.Option(min=1, help="Density: number of random vectors.")] = 2,
    lanczos_steps: Annotated[
        int, typer.Option(min=2, help="Density: products with the Hessian for each random vector.")
    ] = 40,
    slices: Annotated[
        Literal["1", "2"] | None,
        typer.Option(
            help="Measure the loss along a random direction (1), or on the plane of two (2).", show_default=False
        ),
    ] = None,
    points: Annotated[int, typer.Option(min=3, help="Slices: points along each direction.")] = 21,
    direction_to: Annotated[
        Path | None,
        typer.Option(
            help="Measure the loss on the line from the first model to this run or checkpoint.", show_default=False
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of the run that images are drawn from: train, val or test.")
    ] = "train",
    max_images: Annotated[int, typer.Option(min=1, help="Number of images, at most.")] = 256,
    dataset: Annotated[str | None, typer.Option(help="Where the data set of the runs is now, if it has moved.")] = None,
    params: Annotated[
        str,
        typer.Option(help="Parameters of m-sharpness and Hessian: all, norm, no-norm, or a pattern for their names."),
    ] = "all",
    dtype: Annotated[
        Literal["float32", "float64"], typer.Option(help="Precision of weights and arithmetic.")
    ] = "float32",
    micro_batch: Annotated[int, typer.Option(min=1, help="Images that pass through the model at once.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images and of all random vectors.")] = 0,
    checkpoint: Annotated[
        Literal["last", "best", "all"] | None,
        typer.Option(help="Checkpoint of a run; all: each that it kept, a curve over training.", show_default=False),
    ] = None,
    ema: Ema = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the files; by default that of the first run, or of the sweep.",
            show_default=False,
        ),
    ] = None,
    gpus: Gpus = "auto",
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Measure how sharp a minimum is: m-sharpness, the Hessian's eigenvalues and density, slices of the loss.

    Example: samtune sharpness runs/r1

    Example: samtune sharpness runs/sgd runs/sam --m 1,16,256 --density --slices 1

    Example: samtune sharpness runs/r1 --checkpoint all --top 5

    Without --m, --top, --density, --slices and --direction-to it measures --m 16 and --top 5. It writes sharpness.json,
    sharpness.md and the page sharpness.html.

    Sharpness is a diagnostic, not a score: in fine-tuning it says little about which model generalises better.
    """
    from samtune.sharpness import run
    from samtune.sharpness.measure import Measures

    if not 0 <= rho < math.inf:
        raise UsageError(f"--rho {rho:g}: must be finite and at least 0")
    if not p >= 1:
        raise UsageError(f"--p {p:g}: must be in [1, inf]")
    if not (m or top or density or slices or direction_to):
        m, top = "16", 5
    measures = Measures(
        m=_sizes(m),
        rho=rho,
        p=p,
        adaptive=adaptive,
        ascent_steps=ascent_steps,
        restarts=restarts,
        top=top or 0,
        probes=probes if density else 0,
        lanczos_steps=lanczos_steps,
        slices=int(slices or 0),
        points=points,
        params=params,
        seed=seed,
        micro_batch=micro_batch,
    )
    with signals.listening() as stop:
        rank_status.report_ready()
        result = run.measure_or_launch(
            checkpoints,
            measures,
            name=checkpoint,
            ema=ema,
            split=split,
            max_images=max_images,
            line_to=direction_to,
            dataset=dataset,
            dtype=dtype,
            gpus=gpus,
            processes=processes,
            output=output,
            stop=stop,
            arguments=sys.argv[1:],
        )
        shown = result_to_print(result)
        if shown is not None:
            from samtune import console
            from samtune.sharpness import report

            if as_json:
                console.print_json(shown)
            else:
                for title, rows in report.text_tables(shown).items():
                    console.print_rows(title, rows)
                console.print_prose(report.notes(shown))
        if result is not None and result["interrupted"]:
            stop.raise_stopped()


def _sizes(m: str | None) -> tuple[int, ...]:
    """The sizes of --m. Raises UsageError."""
    if m is None:
        return ()
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in m.split(",")))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--m {m}: must be numbers of images, such as 1,16,256")
    return sizes
