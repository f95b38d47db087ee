"""The story of a sweep: probe, select, fit again, test once. What is done stays done, in this process or another."""

import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.distributed import signals
from samtune.errors import Diverged, MachineError, SamtuneError, Stopped, UsageError, WorkerLost, first_line
from samtune.files import write_atomic
from samtune.models.pretrained import resolve
from samtune.runs import lock
from samtune.runs.listing import read_step
from samtune.runs.resume import RUNTIME_ONLY
from samtune.sweep import arms, ledger
from samtune.sweep.decode_once import alone_here, images_to_train_on, prepared
from samtune.sweep.executors import Engine, Local, places_here
from samtune.sweep.ledger import Outcome, Run
from samtune.sweep.plan import Plan
from samtune.sweep.spec import Sweep, differences
from samtune.text import plural
from samtune.train.preflight import check_inputs

_T = TypeVar("_T")

_LOOK = 1.0  # seconds between two looks at the runs


def check(plan: Plan) -> list[Run]:
    """Every run that may come, to be counted; those of the last fits with the first point of each arm.

    Raises UsageError for the first setting of any of them that cannot be meant. A budget in seconds gives no length
    before probes have shown how long a step takes: 0 steps.
    """
    found = plan.probes()
    for budget, arm in plan.arms():
        known = budget if budget is None or budget.unit == "passes" else None
        runs = [run for by_seed in plan.selections(known, arm, {}) for run in by_seed]
        for i, point in enumerate(arms.points(plan.sweep, arm)):
            finals = plan.finals(known, arm, point, {})  # any of the points may be chosen
            runs += finals if i == 0 else []
        found += runs if known == budget else [replace(run, budget=str(budget), steps=0, passes=0.0) for run in runs]
    return found


def check_names(sweep: Sweep, runs: Iterable[Run]) -> None:
    """Raise ModelError, DataError or CheckpointError for a model or a file of any of these runs that is not there."""
    settings = [sweep.config(run.settings) for run in runs]
    for one in {(each.model, each.weights, each.train_labels): each for each in settings}.values():
        resolve(one.model)
        check_inputs(one)


def counted(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What a sweep will do: one row for each stage, budget and arm."""
    groups: dict[tuple[str, str | None, str | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.stage, run.budget, run.arm), []).append(run)
    return [
        {
            "stage": stage,
            "budget": budget,
            "arm": arm,
            "points": len({arms.words(run.point) for run in group}),
            "runs": len(group),
            "steps": _span([run.steps for run in group]),
            "passes": _span([round(run.passes) for run in group]),
        }
        for (stage, budget, arm), group in groups.items()
    ]


def _span(numbers: Sequence[int]) -> str | None:
    low, high = min(numbers), max(numbers)
    return None if high == 0 else str(low) if low == high else f"{low} to {high}"


# --------------------------------------------------------------------------------------------------------- the folder


def open_folder(sweep: Sweep, folder: Path) -> Sweep:
    """The sweep as its folder has it from now on. Raises what `check_same` raises, and MachineError."""
    file = folder / "sweep.toml"
    try:
        for part in ("runs", "logs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        with alone_here(folder):  # two that begin at once are not both the first
            check_same(sweep, folder)
            write_atomic(file, sweep.to_toml())
    except OSError as error:
        raise MachineError(f"{folder} cannot be written", error.strerror or "", "give another --output") from None
    return Sweep(file, {}, sweep.base, sweep.table)


def check_same(sweep: Sweep, folder: Path) -> None:
    """Raise UsageError where another sweep is in the folder, or one whose recipe is damaged."""
    file = folder / "sweep.toml"
    if not file.is_file():
        return
    try:
        before = _recipe(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file} is damaged", first_line(error), "remove it: the same command makes it again"
        ) from None
    differ = differences(before, _recipe(sweep.to_toml()))
    if differ:
        raise UsageError(
            f"{folder} holds a sweep with other settings",
            "; ".join(differ),
            "leave them as they were, or give another --output",
        )


def _recipe(text: str) -> dict[str, Any]:
    return {key: value for key, value in tomllib.loads(text).items() if key not in RUNTIME_ONLY}


# ------------------------------------------------------------------------------------------------------------ the work


@dataclass
class _Work:
    """A sweep that this process has a part in.

    again: failed runs of earlier commands, which this one tries once more; what fails while it is there is left to the
    next. tried: what this process has begun. taken: what it has claimed now, with lock and time. spent: passes and
    seconds of the runs that it has seen through. seen: what became of each run, as of the last look: all that follows
    from a look follows from the same states, whatever other processes do meanwhile.
    """

    plan: Plan
    folder: Path
    engine: Engine
    total: int
    again: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    taken: dict[str, tuple[Run, lock.Lock, float]] = field(default_factory=dict)
    spent: list[tuple[float, float]] = field(default_factory=list)
    seen: dict[str, Outcome] = field(default_factory=dict)
    planned: dict[Any, Any] = field(default_factory=dict)

    def look(self) -> None:
        """See anew what became of each run; one that is done stays done."""
        self.seen = {run: found for run, found in self.seen.items() if found.state == "done"}

    def outcome(self, run: Run) -> Outcome:
        """What became of a run, as of this look."""
        if run.id not in self.seen:
            self.seen[run.id] = ledger.outcome(self.folder, run.id)
            if self.seen[run.id].state == "done":
                ledger.drop_checkpoints(self.folder, run)
        return self.seen[run.id]

    def is_open(self, run: Run) -> bool:
        """Whether this process would begin a run, or go on with it, if it had room."""
        found = self.outcome(run)
        again = found.state == "failed" and run.id in self.again and not ledger.is_answer(run, found)
        return run.id not in self.tried and (found.state in ("waiting", "stopped") or again)

    def once(self, key: Any, plan: Callable[[], _T]) -> _T:
        """A part of the plan, made when it can be."""
        if key not in self.planned:
            self.planned[key] = plan()
        found: _T = self.planned[key]
        return found

    def known(self) -> tuple[list[Run], list[dict[str, Any]]]:
        """The runs of all stages that can be told by now, and what is chosen for each budget and arm."""
        plan = self.plan
        probes = self.once("probes", plan.probes)
        measured = all(self.outcome(run).state == "done" for run in probes)
        selections: list[Run] = []
        finals: list[Run] = []
        chosen: list[dict[str, Any]] = []
        for budget, arm in plan.arms():
            entry: dict[str, Any] = {"budget": budget and str(budget), "arm": arm, "point": None, "by": None}
            chosen.append(entry)
            if budget is not None and budget.unit == "seconds" and not measured:
                continue
            paces = self.once("paces", lambda: plan.paces(self.folder)) if measured else {}
            tried = self.once((budget, arm), partial(plan.selections, budget, arm, paces))
            selections += [run for by_seed in tried for run in by_seed]
            best = ledger.choose([{run.seed: self.outcome(run) for run in runs} for runs in tried]) if tried else 0
            if best is not None:
                point = arms.points(plan.sweep, arm)[best]
                entry |= {"point": point, "by": "validation" if tried else "only point"}
                finals += self.once((budget, arm, best), partial(plan.finals, budget, arm, point, paces))
        return [*probes, *selections, *finals], chosen


def open_engine(name: str, address: str, config: RunConfig, jobs: int) -> Engine:
    """The engine local or ray.

    Raises what `places_here` and the cluster raise, and MachineError where ray is not installed.
    """
    if name == "local":
        return Local(places_here(config, jobs))
    try:
        from samtune.sweep.ray_executor import Cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MachineError("--engine ray needs the package ray", hint="pip install 'samtune[ray]'") from None
    return Cluster(address, config, jobs)


def run(sweep: Sweep, folder: Path, engine: Engine, stop: signals.StopRequest) -> SamtuneError | None:
    """All of a sweep, or what is left of it, in this folder: see `work`.

    Raises UsageError, DataError or MachineError before the first run begins, where one of them could not be run.
    """
    in_folder = open_folder(sweep, folder)
    with alone_here(folder):
        plan = Plan(in_folder, images_to_train_on(prepared))
        total = len(check(plan))
    return work(plan, folder, engine, stop, total)


def work(plan: Plan, folder: Path, engine: Engine, stop: signals.StopRequest, total: int) -> SamtuneError | None:
    """Do what is left of a sweep, beside other processes that do the same; total: how many runs it has.

    Returns the error of the command if runs failed; all others are done by then. Its exit code is that of the runs,
    where those that failed have one in common; else that of a lost worker, which a run is to its sweep. A run that
    chooses and whose loss is not finite is no failure: its point is out.

    Raises Stopped after a signal, once the runs have saved.
    """
    this = _Work(plan, folder, engine, total)
    this.again = {run.id for run in this.known()[0] if this.outcome(run).state == "failed"}
    stop.patient = True
    with console.RunsProgress() as progress:
        try:
            while True:
                this.look()
                runs, chosen = this.known()
                ledger.write(folder, runs, {run.id: this.outcome(run) for run in runs}, chosen, total)
                _take_some(this, runs)
                if not this.taken and not _waits(this, runs):
                    return _failure(this, runs, chosen)
                progress.show({run: read_step(ledger.run_folder(folder, run)) for run in this.taken})
                for run, code in engine.ended(_LOOK):
                    _end(this, run, code, runs)
                if stop.is_requested():
                    _stop(this, stop)
        except OSError as error:
            engine.kill()
            hint = "fix the cause; the same command goes on"
            raise MachineError(f"{folder} cannot be written", first_line(error), hint) from None
        except BaseException:
            engine.kill()
            raise
        finally:
            for _, held, _ in this.taken.values():
                held.release()


def _take_some(this: _Work, runs: Sequence[Run]) -> None:
    """Claim and begin runs while there is room for them."""
    for run in filter(this.is_open, runs):
        if len(this.taken) >= this.engine.slots:
            return
        place = ledger.log_folder(this.folder, run.id)
        place.mkdir(exist_ok=True)
        held = lock.try_acquire(place)
        if held is None:
            continue
        if ledger.outcome(this.folder, run.id, mine=True).state in ("done", "running"):
            held.release()
            continue
        this.tried.add(run.id)
        this.taken[run.id] = run, held, time.monotonic()
        this.engine.start(this.folder, run)
        console.info(f"begin  {run.id}: {plural(run.steps, 'step')}, {run.passes:.0f} passes")


def _waits(this: _Work, runs: Sequence[Run]) -> bool:
    """Whether something will come of waiting: others are at work, or there is no room for what is left."""
    others = [run.id for run in runs if this.outcome(run).state == "running"]
    if others:
        this.once("waiting", lambda: console.info(f"waiting for other processes: {', '.join(others)}"))
    elif not this.engine.slots:
        this.once("no room", lambda: console.info("waiting for a node that can have a run: there is none now"))
    return bool(others) or any(map(this.is_open, runs))


def _end(this: _Work, run_id: str, code: int, runs: Sequence[Run]) -> None:
    """A run has ended by itself."""
    run, held, began = this.taken.pop(run_id)
    if code == MachineError.exit_code and lock.holder(ledger.run_folder(this.folder, run_id)) is not None:
        this.tried.discard(run_id)  # a run of a sweep that was killed has not ended yet
        held.release()
        return
    if code != 0:
        ledger.note_end(this.folder, run_id, code)
    held.release()
    this.seen.pop(run_id, None)
    found, seconds = this.outcome(run), time.monotonic() - began
    if found.state == "done":
        this.spent.append((run.passes, seconds))
    done = sum(this.outcome(other).state == "done" for other in runs)
    console.info(
        f"{found.state:<6} {run_id}: {_said(found)}, {seconds:.0f} s  ({done} of {this.total}{_left(this, runs)})"
    )


def _said(found: Outcome) -> str:
    if found.report is None:
        return found.cause or "the same command goes on with it"
    return ", ".join(
        f"{split} error {found.report[split]['top1_error']:.2f} %" for split in ("val", "test") if found.report[split]
    )


def _left(this: _Work, runs: Sequence[Run]) -> str:
    """An estimate by the passes of the runs that are left; those that are not chosen yet count as the mean run."""
    if not this.spent:
        return ""
    left = sum(run.passes for run in runs if this.outcome(run).state != "done")
    left += (this.total - len(runs)) * sum(run.passes for run in runs) / len(runs)
    per_pass = sum(seconds for _, seconds in this.spent) / sum(passes for passes, _ in this.spent)
    minutes = left * per_pass / this.engine.slots / 60
    return f", about {minutes:.0f} minutes left" if minutes >= 1.5 else ""


def _stop(this: _Work, stop: signals.StopRequest) -> NoReturn:
    """Hand a signal on, and wait until all have saved."""
    assert stop.by is not None
    if this.taken:
        runs = plural(len(this.taken), "run")
        console.info(f"{stop.by.name}: waiting for {runs} to end a step; a second one ends them at once")
    this.engine.stop()
    while this.taken:
        for run_id, _ in this.engine.ended(_LOOK):
            this.taken.pop(run_id)[1].release()
    raise Stopped(f"stopped by {stop.by.name}", Stopped.SAVED, "the same command goes on")


def _failure(this: _Work, runs: Sequence[Run], chosen: Sequence[Mapping[str, Any]]) -> SamtuneError | None:
    found = {run: this.outcome(run) for run in runs}
    failed: dict[Run, Outcome] = {}
    for run, outcome in found.items():
        if outcome.state == "failed":
            log = ledger.log_folder(this.folder, run.id) / "output.txt"
            out = ledger.is_answer(run, outcome)
            console.warn(f"{run.id} failed: {outcome.cause}{'; its point is out' if out else ''}; see {log}")
            failed |= {} if out else {run: outcome}
    left = [run.id for run, outcome in found.items() if outcome.state == "stopped"]
    if not failed and not left:
        hopeless = [entry["arm"] for entry in chosen if entry["point"] is None]
        what = f"no point of {' and '.join(hopeless)} trained: every loss was not finite"
        hint = "give a smaller grid of rho or lr, in a sweep of its own (--output)"
        return Diverged(what, hint=hint) if hopeless else None
    codes = {outcome.exit_code for outcome in failed.values()}
    names = ", ".join(run.id for run in failed) or ", ".join(left)
    error = WorkerLost(
        f"{len(failed) or len(left)} of {this.total} runs {'failed' if failed else 'were stopped'}: {names}",
        "their log.txt and output.txt say why" if failed else "",
        "fix the cause; the same command tries them again, and does what waits for them",
    )
    if len(codes) == 1 and (code := codes.pop()) is not None and 0 < code < Stopped.SAVED:
        error.exit_code = code
    return error
