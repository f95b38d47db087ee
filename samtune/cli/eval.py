"""`samtune eval`: parse, one call, print."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from samtune import config, ranks, signals
from samtune.cli.config_flags import DATA_KEYS, Json, with_config_flags
from samtune.cli.ranks import result_to_print
from samtune.errors import UsageError
from samtune.options import MOST_PROCESSES


@partial(with_config_flags, only=DATA_KEYS)
def evaluate(
    run_or_checkpoint: Annotated[
        Path, typer.Argument(help="A run folder, or a checkpoint folder inside one.", metavar="RUN_OR_CHECKPOINT")
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
    if checkpoint not in (None, "last", "best"):
        raise UsageError(f"--checkpoint {checkpoint}: must be last or best")
    if flags and dataset is None:
        raise UsageError(f"{config.flag_name(next(iter(flags)))} without --dataset", mend="it is about other data")
    if temperature and dataset is not None:
        raise UsageError("--temperature with --dataset", "it is fitted on the run's own validation images")
    if temperature and split not in (None, "val"):
        raise UsageError(f"--temperature with --split {split}", "it is fitted on validation, and never on test")
    split = "val" if temperature else split
    wanted = config.wanted(flags) if flags else None

    config.check_devices(gpus, processes)
    ranks.check_processes(processes)

    def score() -> dict[str, Any]:
        from samtune import console, distributed
        from samtune.evaluate import evaluate_checkpoint

        with console.RunProgress() as progress, distributed.losses_named():
            scored, about = evaluate_checkpoint(
                run_or_checkpoint,
                name=checkpoint,
                split=split,
                dataset=dataset,
                wanted=wanted,
                progress=progress.score,
                ema=ema,
                gpus=gpus,
                processes=processes,
                keep_logits=temperature,
            )
        result = about | scored.summary()
        if temperature:
            from samtune.temperature import fit_and_store

            weights = Path(about["checkpoint"]) / ("ema" if ema else "")
            result["temperature"] = distributed.from_first(lambda: fit_and_store(scored, weights))
        return result

    def score_on_ranks() -> Mapping[str, Any] | None:
        from samtune import launch

        return launch.launch(sys.argv[1:], launch.Fleet(launch.ranks_here(gpus, processes)), stop)

    with signals.listening() as stop:
        ranks.report_for_work()
        result = score_on_ranks() if ranks.asked_for(gpus, processes) else score()
    result = result_to_print(result)
    if result is None:
        return
    from samtune import console, report

    if as_json:
        console.print_json(result)
        return
    others = f"{result['top5_error']:.2f} %, {result['mean_per_class_error']:.2f} %"
    rows = {f"{result['split']} top-1 error": report.score_line(result), "top-5, mean per class": others}
    if result["unknown_classes"]:
        rows["classes left out"] = ", ".join(f"{name} ({n})" for name, n in result["unknown_classes"].items())
    if temperature:
        rows |= _temperature_rows(result["temperature"])
    about = ("checkpoint", "step", "ema", "dataset")
    console.print_table("Result", rows | {key: str(result[key]) for key in about})


def _temperature_rows(fitted: Mapping[str, Any]) -> dict[str, str]:
    """What was fitted, for people."""
    return {
        "temperature": f"{fitted['temperature']:.4g}, fitted on {fitted['n']} images of {fitted['split']}",
        "NLL": f"{fitted['nll_before']:.4f} before, {fitted['nll_after']:.4f} after (nats)",
        "calibration error": f"{100 * fitted['ece_before']:.2f} % before, {100 * fitted['ece_after']:.2f} % after",
        "stored in": fitted["file"],
    }
