"""samtune from Python and notebooks: the same runs, folders and errors as those of the command line."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samtune import console
from samtune.config import cache_folders, loading
from samtune.config.run_config import RunConfig, flag_name
from samtune.distributed import environment, signals
from samtune.report import run_report
from samtune.train import dispatch


class Report(dict[str, Any]):
    """A report as report.json has it, or the scores of an evaluation; in a notebook it is shown as a table."""

    def __init__(self, content: Mapping[str, Any], rows: Mapping[str, str]) -> None:
        """rows: what the table shows, name -> value."""
        super().__init__(content)
        self._rows = dict(rows)

    def _repr_html_(self) -> str:
        cells = (
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._rows.items()
        )
        return f"<table>{''.join(cells)}</table>"


def run(
    recipe: str | Path | None = None, *, resume: bool = False, allow_change: Sequence[str] = (), **settings: Any
) -> Report:
    """Fine-tune a model and return its report. `samtune.run(model=..., dataset=..., rho=0.05, epochs=3)`

    recipe: a file, or the name of a recipe that comes with samtune. settings: the keys of a recipe, which are the flags
    of `samtune run` with underscores: batch_size=32. They take precedence over the recipe. resume: resume the run in
    `output`; allow_change: settings that may then differ from before. The run folder is that of the command; its path
    is the report's key "folder". In a notebook, progress is one line that is drawn over.

    Raises the errors of samtune.errors. Ctrl-C, or a notebook's interrupt, ends the run after its step with a
    checkpoint, and raises Stopped.
    """
    _prepare()
    unknown = next((key for key in settings if key not in RunConfig.model_fields), None)
    if unknown is not None:
        raise loading.unknown_key(unknown, "the call of samtune.run")
    flags = {key: _plain(value) for key, value in settings.items() if value is not None}
    arguments = ["run", *([] if recipe is None else [str(recipe)]), *(["--resume"] if resume else [])]
    arguments += [f"--allow-change={key}" for key in allow_change] + _flags(flags)
    with signals.listening() as stop:
        result = dispatch.start_or_resume(
            None if recipe is None else Path(recipe), flags, resume, allow_change, stop, arguments
        )
    assert result is not None
    return Report(result, run_report.summary(result))


def evaluate(
    run_or_checkpoint: str | Path,
    *,
    split: str | None = None,
    checkpoint: str | None = None,
    ema: bool | None = None,
    temperature: bool = False,
    dataset: str | Path | None = None,
    gpus: str | int = "auto",
    processes: int | None = None,
    **data_settings: Any,
) -> Report:
    """Score a run, or a checkpoint of one. `samtune.evaluate("runs/r1", split="val")["top1_error"]`

    The arguments are the options of `samtune eval`: exact top-1, top-5 and mean per-class error in percent, every image
    once. data_settings: how to read what `dataset` names, as label_key="species". Raises the errors of samtune.errors.
    """
    _prepare()
    options = {"split": split, "checkpoint": checkpoint, "dataset": _plain(dataset), "gpus": str(gpus), "ema": ema}
    arguments = ["eval", str(run_or_checkpoint)]
    arguments += ["--temperature"] if temperature else []
    arguments += _flags({**options, "processes": processes, **data_settings})
    with signals.listening() as stop:
        scores = dispatch.score_checkpoint(
            Path(run_or_checkpoint),
            **options,
            temperature=temperature,
            processes=processes,
            data_settings={key: _plain(value) for key, value in data_settings.items()},
            stop=stop,
            arguments=arguments,
        )
    assert scores is not None
    return Report(scores, run_report.evaluation_summary(scores))


def _prepare() -> None:
    """Silence ranks other than 0, and set writable caches before libraries are imported."""
    console.configure(quiet=not environment.is_rank0())
    note = cache_folders.prepare()
    if note is not None:
        console.info(note)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags; those that are None are left out."""
    flags = []
    for key, value in settings.items():
        if isinstance(value, bool):
            flags.append(flag_name(key if value else f"no_{key}"))
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
            flags.append(f"{flag_name(key)}={text}")
    return flags
