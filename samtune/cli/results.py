"""The commands that look at runs: `samtune runs`, `samtune report`."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from samtune.cli import completion
from samtune.cli.help import Json
from samtune.errors import UsageError

_LOOK = 2.0  # seconds between two looks of --watch


def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder of run folders, or one of them.")] = Path("runs"),
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every two seconds, until Ctrl-C; on a terminal.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List runs, the newest first: how far each came, its errors, and what to do next.

    Example: samtune runs

    A run whose process ended without a word, as at a power cut, is shown as killed; it can be resumed. The error is
    that of the report, or else the last that the run measured.
    """
    from samtune import console
    from samtune.runs import listing

    title = f"Runs in {folder}, with top-1 errors"
    if watch:
        if as_json:
            raise UsageError(
                "--watch with --json", "a table that is drawn over is not for programs", "give one of them"
            )
        if not console.is_watched():
            hint = "leave it out, or do not send stdout elsewhere"
            raise UsageError("--watch without a terminal", "the table is drawn over", hint)
        console.watch_rows(title, lambda: _looked_at(folder), seconds=_LOOK, droppable=listing.DROPPABLE)
        return
    rows = listing.list_runs(folder)
    if as_json:
        console.print_json(rows)
    elif rows:
        console.print_rows(title, listing.table(rows, folder), droppable=listing.DROPPABLE)
        console.print_lines(listing.todo(rows))
    else:
        console.info(f"there are no runs in {folder}")


def _looked_at(folder: Path) -> tuple[list[dict[str, str | float | None]], list[str]]:
    """The table of a folder now, and what is said below it."""
    from samtune.runs import listing

    rows = listing.list_runs(folder)
    return listing.table(rows, folder), [*listing.todo(rows)] if rows else [f"there are no runs in {folder}"]


def report_runs(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, of which the first is the baseline; or one sweep.",
            metavar="RUN_OR_SWEEP",
            autocompletion=completion.runs,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the files; the report of one run or sweep goes to its own by default."
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Of a run that goes on: draw its page again whenever it has measured more, until it ends."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw the page of a run or a sweep, or compare runs: errors with intervals, paired tests, what it cost.

    Example: samtune report runs/sgd runs/sam

    Of one run, report.json and report.md are made again from its files, and report.html: curves, errors, calibration,
    mistakes, in one file without network or script. A run that has ended early, or goes on, is shown as far as it came.

    With --watch the page is kept up to date while the run goes on, and a browser that shows it follows.

    Several runs must be done. Those that differ in the seed alone are one setting with so many seeds. Two runs are
    tested on the images that both scored (McNemar), settings over the seeds that they share (Student); where that
    cannot be, it is said why. --output writes comparison.json, comparison.md and comparison.html.

    Of a sweep, the same three files as of a run: what was chosen and how surely, errors over seeds with intervals, each
    arm against SGD, cost against error.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # pictures are shown if they are here
    sweeps = [folder for folder in runs if (folder / "sweep.toml").is_file()]
    if watch and (sweeps or len(runs) > 1):
        raise UsageError("--watch is for one run", hint="give one run folder, or leave --watch out")
    if sweeps and len(runs) > 1:
        raise UsageError(
            f"{sweeps[0]} is a sweep, and not a run that could be compared",
            "a sweep compares its own arms",
            "give it alone, or give run folders in its place: it has them in runs/",
        )
    if sweeps:
        from samtune.cli.sweep import report_sweep

        report_sweep(runs[0], output or runs[0], as_json)
    elif len(runs) == 1:
        _report_run(runs[0], output or runs[0], as_json, watch)
    else:
        _compare_runs(runs, output, as_json)


def _report_run(run: Path, output: Path, as_json: bool, watch: bool) -> None:
    from samtune import console
    from samtune.report import run_page, run_report

    console.info(f"drawing the page of {run} ...")
    if watch:
        with suppress(KeyboardInterrupt):
            run_page.follow(run, output, _LOOK, console.info)
    result, drawn = run_page.write_report_page(run, output)
    for warning in run_page.state(run):
        console.warn(warning)
    if as_json:
        console.print_json(result)
    else:
        console.print_table("Result", run_report.summary(result))
        console.print_lines([f"page: {drawn}"])


def _compare_runs(runs: list[Path], output: Path | None, as_json: bool) -> None:
    from samtune import console
    from samtune.report import comparison, comparison_page
    from samtune.runs.folder import result_folder

    result = comparison.compare(runs)
    if output is not None:
        with result_folder(output):
            comparison.write(output, result)
            comparison_page.write(output / "comparison.html", result)
    if as_json:
        console.print_json(result)
        return
    for title, rows in comparison.tables(result).items():
        console.print_rows(title, rows, droppable=("scored", "time s", "epochs", "passes"))
    for title, lines in comparison.paragraphs(result).items():
        console.print_prose([title, *(f"  {line}" for line in lines)])
