"""The start of a run: its folder and log, what it logs first, and how its end is recorded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from samtune.config.run_config import RunConfig
from samtune.distributed import collectives, device
from samtune.errors import MachineError, SamtuneError, Stopped, first_line, plural
from samtune.report import run_report
from samtune.runs.run_log import NullLog, RunLog
from samtune.train import checkpointing, provenance
from samtune.train.setup import Setup, build_setup
from samtune.train.state import TrainState


def start_run(config: RunConfig) -> tuple[Setup, RunLog, None, TrainState]:
    """Set up a new run and create its folder: setup, log, no checkpoint, and the state before the first step."""
    setup = build_setup(config)
    setup.config = collectives.broadcast_from_rank0(setup.config.with_output)
    assert setup.config.output is not None
    folder = setup.config.output
    about = provenance.describe(setup)

    def create() -> RunLog:
        try:
            checkpointing.check_disk_space(setup, folder)
            is_new = not config.bootstrap  # else its first training has been here
            return RunLog.create(folder, setup.config.to_toml(), about, setup.total_steps, is_new=is_new)
        except SamtuneError:
            if setup.config.origins["output"].startswith("derived"):
                with suppress(OSError):
                    folder.rmdir()  # it was made for this run, and is empty
            raise

    log = open_log(create, lambda: NullLog(folder, collectives.rank(), setup.total_steps))
    with disk_errors(folder):
        log_startup(setup, log, about)
    return setup, log, None, TrainState()


def open_log(on_rank0: Callable[[], RunLog], on_others: Callable[[], RunLog]) -> RunLog:
    """The log of this rank. Rank 0 opens first; where it fails, all ranks raise its error."""
    opened = []
    collectives.broadcast_from_rank0(lambda: opened.append(on_rank0()))
    return opened[0] if opened else on_others()


def log_startup(setup: Setup, log: RunLog, about: dict[str, Any]) -> None:
    """Log what the run is made of. about: the content of provenance.json."""
    for line in provenance.startup_lines(setup, about):
        log.info(line)
    for warning in about["warnings"]:
        log.warn(warning)
    if setup.bad_images:
        log.warn(f"cannot be decoded and left out: {plural(len(setup.bad_images), 'image')}; the report lists them")
    if setup.noise is not None:
        if collectives.rank() == 0:
            setup.noise.write(log.folder / "label_noise.parquet")
        words = run_report.noise_words(about["dataset"]["label_noise"])
        log.info(f"noise   {words}; what is scored keeps clean labels")
    for note in setup.data.notes:
        log.log(note)
    if setup.data.test is None:
        log.warn(f"{setup.data.name} has no test split: the report will show the validation error alone")


@contextmanager
def recording_outcome(setup: Setup, log: RunLog) -> Iterator[None]:
    """Record in status.json how the block ended; errors of disk, memory and connections become SamtuneErrors."""
    with recording_errors(log):
        images = plural(setup.update.sam.effective_micro_batch(setup.batch.per_device), "image")
        images += f" of {setup.info.img_size} px"
        with disk_errors(log.folder), device.oom_as_user_error(images), collectives.connection_errors():
            yield
        log.status("done", 0)


@contextmanager
def recording_errors(log: RunLog) -> Iterator[None]:
    """Record in status.json the error that ended the block, and close the log at its end."""
    try:
        yield
    except (SamtuneError, Stopped) as error:
        log.log(str(error))
        log.status("stopped" if isinstance(error, Stopped) else "failed", error.exit_code, error)
        raise
    except BaseException as error:
        log.status("failed", SamtuneError.exit_code, error)
        raise
    finally:
        log.close()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise a MachineError in place of an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"the machine broke off run {folder}",
            first_line(error),
            "check disk space and permissions, then go on with --resume",
        ) from None
