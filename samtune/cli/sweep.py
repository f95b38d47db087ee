"""`samtune sweep`: parse, check, one call, print."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from samtune.cli import completion
from samtune.cli.config_flags import with_config_flags
from samtune.cli.help import Json
from samtune.config import shipped_recipes
from samtune.config.types import endpoint
from samtune.distributed import signals
from samtune.errors import UsageError, plural
from samtune.runs.folder import result_folder
from samtune.sweep import spec as sweeps


@partial(with_config_flags, without=sweeps.OWN.keys() - {"gpus"})
def sweep(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="TOML file with any of the options below as keys, and a table [sweep]; or a name of `samtune recipes "
            "ls`.",
            autocompletion=completion.recipes,
        ),
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of the sweep; by default sweeps/ and the recipe's name and variant."
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at a time: on each GPU of --gpus, or on the CPU, whose cores they share.")
    ] = 1,
    engine: Annotated[
        str, typer.Option(help="local: this machine; ray: a cluster that runs already.", metavar="local|ray")
    ] = "local",
    address: Annotated[
        str, typer.Option(help="Of the Ray cluster: host:port, or auto, the one that this machine belongs to.")
    ] = "auto",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help='What each run may cost: "2000 passes" (forward-backward, of a batch) or "600 seconds" (of training). '
            "The schedule is fitted to it. Repeatable; it takes the place of the recipe's.",
            metavar="COST",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Of the final runs: how many (5), or which (0,1,2). Default: the recipe's, or 5.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan; run nothing.")
    ] = False,
    as_json: Json = False,
    flags: dict[str, Any],
) -> None:
    """Compare SAM with SGD by the paper's protocol: choose on validation, fit again with several seeds, test once.

    Example: samtune sweep recipes/demo.toml --jobs 2

    Every point of an arm's grid is trained on the training part and scored on validation; the best is fitted again on
    both, with each seed, and scored on test once. What is done is never done again: the same command continues, and
    several of them on one folder share the work.
    """
    from samtune import console
    from samtune.sweep import ledger
    from samtune.train import preflight

    if engine not in ("local", "ray"):
        raise UsageError(f"--engine {engine}: must be local or ray")
    if address != "auto":
        _check_address(address, engine)
    recipe = shipped_recipes.find(recipe)
    asked = sweeps.load(recipe, flags, budgets=budget, seeds=seeds)
    folder = output or Path("sweeps") / asked.name
    ledger.check_usable(folder)
    preflight.check_inputs(asked.base)
    preflight.check_apart(folder, asked.base.dataset)

    from samtune.sweep import arms, decode_once, executors
    from samtune.sweep.plan import Plan
    from samtune.sweep.run import check, check_names, check_same, open_executor, run, summarize

    executors.refuse_ranks()
    runs = check(Plan(asked, decode_once.count_once(decode_once.count_listed)))
    check_names(asked, runs)
    check_same(asked, folder)
    for note in arms.notes(asked):
        console.info(note)
    if dry_run:
        if engine == "local":
            executors.local_slots(asked.base, jobs)
        rows = summarize(runs)
        if as_json:
            console.print_json(rows)
        else:
            console.print_rows(plural(len(runs), "run"), rows, droppable=("points", "steps"))
        return
    executor = open_executor(engine, address, asked.base, jobs)  # Ray's own handlers come before ours
    with signals.listening() as stop:
        failure = run(asked, folder, executor, stop)
    report_sweep(folder, folder, as_json)
    if failure is not None:
        raise failure


def report_sweep(folder: Path, output: Path, as_json: bool) -> None:
    """Write the report of a sweep, and print its table and verdict."""
    from samtune import console
    from samtune.sweep import page, report, tables

    result = report.build(folder)
    for warning in result["warnings"]:
        console.warn(warning)
    with result_folder(output):
        report.write(output, result)
        page.write(output / "report.html", folder, result)
    if as_json:
        console.print_json(result)
    else:
        console.print_rows(tables.title(result), tables.arm_rows(result), droppable=("seconds", "passes", "n"))
        console.print_prose(result["verdict"])
        console.print_lines([f"page: {output / 'report.html'}"])


def _check_address(address: str, engine: str) -> None:
    if engine != "ray":
        raise UsageError(f"--address {address} without --engine ray", hint="give both, or none")
    try:
        endpoint(address)
    except ValueError:
        raise UsageError(f'--address {address}: must be "host:port" of the cluster\'s head, or auto') from None
