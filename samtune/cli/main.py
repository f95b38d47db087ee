"""All commands, and the main function. Nothing heavy is imported before a command runs."""

import os
import sys
from typing import Annotated, Any, ClassVar

import typer

from samtune import __version__
from samtune.cli.help import SETTINGS, Commands
from samtune.config import cache_folders
from samtune.console import stdio
from samtune.distributed import environment, rank_status, signals
from samtune.errors import MachineError, SamtuneError, Stopped, first_line


class _Samtune(Commands):
    """All commands, in the order of a working day."""

    topics: ClassVar = {
        "Look": {
            "doctor": ("samtune.cli.doctor", "doctor", "what this machine can do, and what is missing"),
            "models": ("samtune.cli.models", "list_models", "pretrained models, and where their weights are"),
            "datasets": ("samtune.cli.data", "datasets_app", "the data sets that have a name"),
            "data": ("samtune.cli.data", "data_app", "check a data set of your own"),
            "recipes": ("samtune.cli.recipes", "recipes_app", "settings that ship with samtune, to run or to copy"),
            "guide": ("samtune.cli.guide", "guide", "how things work: data, training, SAM, resume, sweeps, ..."),
        },
        "Train": {
            "plan": ("samtune.cli.plan", "plan", "what a run will do, take and cost, before it starts"),
            "run": ("samtune.cli.run", "run", "fine-tune a model, and report its top-1 error"),
            "sweep": ("samtune.cli.sweep", "sweep", "compare SAM with SGD over seeds, by the paper's protocol"),
        },
        "Judge": {
            "runs": ("samtune.cli.results", "list_runs", "what became of each run, and what to do next"),
            "report": ("samtune.cli.results", "report_runs", "draw the page of a run or a sweep, or compare runs"),
            "eval": ("samtune.cli.eval", "evaluate", "score a checkpoint on any split or other data"),
            "sharpness": ("samtune.cli.sharpness", "sharpness", "measure sharpness: m-sharpness, Hessian, slices"),
        },
        "Use": {
            "predict": ("samtune.cli.predict", "predict", "classify pictures: class names and probabilities"),
            "relabel": ("samtune.cli.relabel", "relabel", "predict the labels of training images, to train on them"),
            "export": ("samtune.cli.export", "export", "a timm folder, ONNX, or a torch program; checked"),
        },
    }


app = typer.Typer(
    cls=_Samtune,
    help="Fine-tune pretrained image models with Sharpness-Aware Minimization, and measure what it gained.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=SETTINGS,
)

_COMPLETE = "_SAMTUNE_COMPLETE"  # set by a shell that asks for completions
_INTERRUPTED = 130  # 128 + SIGINT
_UsageError: Any = typer.BadParameter.__base__  # of the click that this typer stands on


@app.callback()
def _samtune(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"samtune {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        from samtune.cli import start

        print(start.text())


def main() -> None:
    """Run the command line and exit with the codes of `samtune.errors`."""
    stdio.guard()
    try:  # before anything asks for these
        _check_working_folder()
        environment.rank_info()
    except SamtuneError as error:
        _print_error(str(error))
        sys.exit(error.exit_code)
    if environment.status_folder() is not None:
        over = rank_status.exit_code_of_launch()
        if over is not None:
            sys.exit(over)
    if not environment.is_rank0():
        from samtune import console

        console.configure(quiet=True)
    environment.exit_with_launcher()
    signals.exit_with_parent()
    note = cache_folders.prepare()
    if note is not None:
        from samtune import console

        console.info(note)
    sys.exit(_exit_code())


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise MachineError(
            "the working folder is not there any more", first_line(error), "change to one that is there: cd"
        ) from None


def _exit_code() -> int:
    try:
        code = int(_call(sys.argv[1:]) or 0)
        sys.stdout.flush()
        if code == _INTERRUPTED:  # typer has turned Ctrl-C into this code, without a word
            _print_error("stopped by Ctrl-C")
        return code
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 2
        context = f"{error.ctx.command_path} --help" if error.ctx else "samtune --help"
        _print_error(f"{error.format_message()}\n  hint:  `{context}` shows what there is")
        return 2
    except (SamtuneError, Stopped) as error:
        return _end(error)
    except (KeyboardInterrupt, typer.Abort):
        _print_error("stopped by Ctrl-C")
        return _INTERRUPTED


def _call(arguments: list[str]) -> Any:
    """Call a command directly: parsing the options of samtune before it would double the time."""
    command = _Samtune.find(arguments[0]) if arguments and _COMPLETE not in os.environ else None
    if command is None:
        return app(prog_name="samtune", standalone_mode=False)
    return command.main(arguments[1:], prog_name=f"samtune {arguments[0]}", standalone_mode=False)


def _end(error: SamtuneError | Stopped) -> int:
    """Print why the command ends, or hand it to the launcher; returns the exit code."""
    if environment.status_folder() is not None:
        rank_status.write_status(error.exit_code, error)
        # All ranks have agreed to stop: torch's agent must not restart them.
        return 0 if error.exit_code == Stopped.SAVED else error.exit_code
    who = "" if environment.is_rank0() else f"rank {os.environ['RANK']}: "
    _print_error(who + (str(error) if isinstance(error, SamtuneError) else f"{error}\n  hint:  {error.hint}"))
    return error.exit_code


def _print_error(text: str) -> None:
    from samtune import console

    console.error(text)
