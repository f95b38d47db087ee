"""All commands, and the way from what was typed to an exit code. Nothing heavy is imported before a command runs."""

import inspect
import os
import re
import sys
from typing import Annotated, Any

import typer

from samtune import __version__, caches, ranks, signals, streams
from samtune.cli.data import data_app, datasets_app
from samtune.cli.doctor import doctor
from samtune.cli.eval import evaluate
from samtune.cli.models import models_app
from samtune.cli.recipes import recipes_app
from samtune.cli.results import results_app
from samtune.cli.run import run
from samtune.cli.sweep import sweep
from samtune.errors import SamtuneError, Stopped

app = typer.Typer(
    help="Fine-tune pretrained image models with Sharpness-Aware Minimization, and measure what it gained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(datasets_app, name="datasets")
app.add_typer(models_app)
app.add_typer(recipes_app, name="recipes")
app.add_typer(results_app)

_INTERRUPTED = 130  # 128 + SIGINT
_UsageError: Any = typer.BadParameter.__base__  # of the click that this typer stands on


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"samtune {__version__}")
        raise typer.Exit


app.command()(run)
app.command()(sweep)
app.command(name="eval")(evaluate)
app.command()(doctor)

for _each in (app, data_app, datasets_app, models_app, recipes_app, results_app):
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
        if code == _INTERRUPTED:  # typer has turned Ctrl-C into this code, without a word
            _print_error("stopped by Ctrl-C")
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
        return _INTERRUPTED


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
