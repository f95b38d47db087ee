"""Commands that are imported when they are called, and their help: by topic, the common options first."""

import inspect
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from samtune.errors import did_you_mean

_HYPHEN = "\ue000"  # stands for a hyphen while lines are broken
_WIDTH = 100  # characters of a line of help, at most: longer ones are hard to read
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")]
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": _WIDTH}


class Command(TyperCommand):
    """A command whose options stand under the topics that they were declared with.

    common: names of the parameters that --help shows; None shows all. --help-all shows all in any case.
    """

    common: ClassVar[frozenset[str] | None] = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Answer --help before the values are parsed, which takes longer."""
        if not ctx.resilient_parsing and any(arg in ctx.help_option_names for arg in args):
            typer.echo(self.get_help(ctx))
            raise typer.Exit
        return list(super().parse_args(ctx, args))

    def get_help(self, ctx: Any) -> str:
        """The help text. Its lines break at spaces only: half of a flag cannot be searched for."""
        return str(super().get_help(ctx)).replace(_HYPHEN, "-")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the command's docstring says."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(_unbroken(inspect.cleandoc(self.help or "")))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of a help text: arguments, then each topic in the order of its first option."""
        shows_all = self.common is None or ctx.meta.get(_ALL, False)
        sections: dict[str, list[tuple[str, str]]] = {}
        hidden = 0
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            record = _unbroken(record[0]), _unbroken(record[1] if shows_all else _first_clause(record[1]))
            topic = "Arguments" if parameter.param_type_name == "argument" else None
            topic = topic or getattr(parameter, "rich_help_panel", None) or "Options"
            if shows_all or topic in ("Arguments", "Options") or parameter.name in (self.common or ()):
                sections.setdefault(topic, []).append(record)
            else:
                hidden += 1
        options = sections.pop("Options", [])
        for topic, records in [*sections.items(), ("Options", options)]:
            with formatter.section(topic):
                formatter.write_dl(records)
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(_unbroken(f"{hidden} more options, and more on these: {ctx.command_path} --help-all"))


def _unbroken(text: str) -> str:
    return text.replace("-", _HYPHEN)


def _first_clause(text: str) -> str:
    """A description up to its first semicolon, and its default."""
    description, default = re.fullmatch(r"(.*?)( Default: .*)?", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return description.partition("; ")[0].rstrip(".") + "." + (default or "")


_ALL = "samtune.help-all"


def show_all(ctx: typer.Context, value: bool) -> None:
    """The callback of --help-all."""
    if value and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


HelpAll = typer.Option("--help-all", help="Show all options.", is_eager=True, callback=show_all)


@dataclass(frozen=True)
class _Completion:
    """A completion for a shell. (The place of click's own class differs between versions.)"""

    value: str
    help: str
    type: str = "plain"


class Commands(TyperGroup):
    """The commands of samtune. The module of a command is imported when it is called.

    topics: topic -> command -> (module, name of a function or a Typer in it, line of help).
    """

    topics: ClassVar[dict[str, dict[str, tuple[str, str, str]]]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the topics."""
        return [name for commands in self.topics.values() for name in commands]

    @classmethod
    def find(cls, name: str) -> Any:
        """Import a command; None for an unknown name."""
        for commands in cls.topics.values():
            if name in commands:
                module, attribute, _ = commands[name]
                return _command(name, getattr(import_module(module), attribute))
        return None

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command, as click asks for it."""
        return self.find(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command by name; the error for an unknown one names the nearest."""
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{args[0]}'. {did_you_mean(args[0], names).capitalize()}".rstrip())
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Names and lines of help, without importing a command."""
        found = [
            _Completion(name, line)
            for commands in self.topics.values()
            for name, (_, _, line) in commands.items()
            if name.startswith(incomplete)
        ]
        return found or list(super(TyperGroup, self).shell_complete(ctx, incomplete))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The commands by topic, then the options of samtune itself."""
        for topic, commands in self.topics.items():
            with formatter.section(topic):
                formatter.write_dl([(name, line) for name, (_, _, line) in commands.items()])
        records = [record for parameter in self.get_params(ctx) if (record := parameter.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(records)


def new_group(about: str | None = None) -> typer.Typer:
    """A command that has commands of its own. about: its help, where it does nothing by itself."""
    group = typer.Typer(
        no_args_is_help=about is not None, add_completion=False, rich_markup_mode=None, context_settings=SETTINGS
    )
    if about is not None:
        group.info.help = about
    return group


def _command(name: str, found: Any) -> Any:
    """A function or a Typer -> the command of click that stands for it."""
    if isinstance(found, typer.Typer):
        return typer.main.get_group(found)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, cls=getattr(found, "command_class", Command), context_settings=SETTINGS)(found)
    return typer.main.get_command(app)
