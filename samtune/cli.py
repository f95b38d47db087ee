"""The command line: parse, one call, print. Nothing heavy is imported before a command runs."""

import inspect
import os
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from samtune import __version__, caches, config, ranks, signals, streams
from samtune.cli_data import data_app, datasets_app
from samtune.cli_results import results_app
from samtune.errors import SamtuneError, Stopped, UsageError
from samtune.flags import DATA_KEYS, Json, with_config_flags
from samtune.options import MOST_PROCESSES
from samtune.resume import finished_report, settle
from samtune.runlog import has_checkpoints
from samtune.sweep.command import sweep

app = typer.Typer(
    help="Fine-tune pretrained image models with Sharpness-Aware Minimization, and measure what it gained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(datasets_app, name="datasets")
app.add_typer(results_app)

_UsageError: Any = typer.BadParameter.__base__  # of the click that this typer stands on


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"samtune {__version__}")
        raise typer.Exit


@app.command()
@with_config_flags
def run(
    recipe: Annotated[Path | None, typer.Argument(help="TOML file with any of the options below as keys.")] = None,
    *,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with the run in --output from its newest valid checkpoint, exactly; settings that are not "
            "given are the run's own. Where there is no run yet, begin one.",
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(help="With --resume: a setting that may differ from before. Repeatable.", metavar="SETTING"),
    ] = None,
    as_json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Fine-tune a pretrained model and report its top-1 error.

    Example: samtune run --model tf_efficientnet_lite0 --dataset mnist5k --img-size 64 --epochs 2 --rho 0.05

    A flag goes before the recipe, the recipe before the default. The run folder keeps the resolved settings (as a
    recipe), metrics, checkpoints that load in timm, and the report. A GPU is used if there is one;
    CUDA_VISIBLE_DEVICES chooses.
    """
    with signals.listening() as stop:
        ranks.report_for_work()
        result = _run(recipe, flags, resume, allow_change or [], stop)
    mine = _to_print(result)
    if mine is not None:
        from samtune import console, report

        if as_json:
            console.print_json(mine)
        else:
            console.print_table("Result", report.summary(mine))


def _run(
    recipe: Path | None, flags: dict[str, Any], resume: bool, allow_change: list[str], stop: signals.StopRequest
) -> Mapping[str, Any] | None:
    resumed = None
    # A rank goes on with what is there, if it is started again; on what the command may find its launcher has decided.
    if resume or ranks.folder() is not None or ranks.restarts() > 0:
        settings, resumed = settle(recipe, flags, allow_change)
        if resumed is None and resume:
            from samtune import console

            console.note(f"{settings.output} holds no run yet: a new one begins")
    elif allow_change:
        raise UsageError("--allow-change without --resume", mend="it says what may differ from the run that goes on")
    else:
        settings = config.load(recipe, flags)
    if resumed is not None:
        stop.saved = has_checkpoints(resumed.folder)
        result = finished_report(resumed.folder) if not resumed.changed else None
        if result is not None:
            from samtune import console

            console.note(f"run {resumed.folder} is done already; this is its result")
            return result
    ranks.check_processes(settings.processes)
    if ranks.is_first():
        from samtune.preflight import check_before_slow_work

        check_before_slow_work(settings, resumed)
    if ranks.asked_for(settings.gpus, settings.processes, settings.nnodes):
        from samtune import launch

        return launch.run(settings, stop)

    from samtune import train

    return train.run(settings, resumed)


def _to_print(result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What this process prints of a result: a rank of our launcher hands it on, and ranks beside rank 0 print none."""
    if ranks.folder() is not None:
        ranks.say(0, result=result)
    if ranks.place() is not None:
        from samtune import distributed

        distributed.leave()
    return result if ranks.folder() is None and ranks.is_first() else None


app.command()(sweep)


@app.command(name="eval")
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

    The options of other data tell how to read what --dataset names.
    """
    if checkpoint not in (None, "last", "best"):
        raise UsageError(f"--checkpoint {checkpoint}: must be last or best")
    if flags and dataset is None:
        raise UsageError(f"{config.flag_name(next(iter(flags)))} without --dataset", mend="it is about other data")
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
            )
        return about | scored.summary()

    def score_on_ranks() -> Mapping[str, Any] | None:
        from samtune import launch

        return launch.launch(sys.argv[1:], launch.Fleet(launch.ranks_here(gpus, processes)), stop)

    with signals.listening() as stop:
        ranks.report_for_work()
        result = score_on_ranks() if ranks.asked_for(gpus, processes) else score()
    result = _to_print(result)
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
    about = ("checkpoint", "step", "ema", "dataset")
    console.print_table("Result", rows | {key: str(result[key]) for key in about})


for _each in (app, data_app, datasets_app, results_app):
    for _command in _each.registered_commands:  # a paragraph is one line: the width of the terminal breaks it
        _command.help = re.sub(r"(?<=\S)\n(?=\S)", " ", inspect.getdoc(_command.callback) or "")


def main() -> None:
    """Run the command line and exit with the codes of `samtune.errors`."""
    streams.guard()
    if ranks.folder() is not None:
        over = ranks.over()
        if over is not None:
            sys.exit(over)
    ranks.end_with_the_launcher()
    signals.end_with_the_parent()
    note = caches.prepare()
    if note is not None:
        from samtune import console

        console.note(note)
    sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        code = int(app(standalone_mode=False) or 0)
        sys.stdout.flush()
        return code
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 2
        context = f"{error.ctx.command_path} --help" if error.ctx else "samtune --help"
        _print_error(f"{error.format_message()}\n  mend: `{context}` shows what there is")
        return 2
    except (SamtuneError, Stopped) as error:
        return _end(error)
    except (KeyboardInterrupt, typer.Abort):
        _print_error("stopped by Ctrl-C")
        return 130


def _end(error: SamtuneError | Stopped) -> int:
    """Say why the command ends, or have the launcher say it; returns the exit code."""
    if ranks.folder() is not None:
        ranks.say(error.exit_code, error)
        # All ranks have agreed to stop: nothing for torch's agent to clear up, or to begin again.
        return 0 if error.exit_code == Stopped.SAVED else error.exit_code
    who = "" if ranks.is_first() else f"rank {os.environ['RANK']}: "
    _print_error(who + (str(error) if isinstance(error, SamtuneError) else f"{error}\n  mend: {error.mend}"))
    return error.exit_code


def _print_error(text: str) -> None:
    from samtune import console

    console.error(text)
