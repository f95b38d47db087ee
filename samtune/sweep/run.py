"""A sweep from top to bottom: probe, select, train the choices again, test once. Finished runs are never repeated."""

import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.distributed import signals
from samtune.errors import Diverged, MachineError, SamtuneError, Stopped, UsageError, WorkerLost, first_line, plural
from samtune.files import write_atomic
from samtune.models.names import resolve
from samtune.runs import lock
from samtune.runs.listing import read_step
from samtune.runs.resume import RUNTIME_ONLY
from samtune.sweep import arms, ledger
from samtune.sweep.decode_once import count_decoded, count_once, one_per_machine
from samtune.sweep.executors import Executor, LocalExecutor, local_slots
from samtune.sweep.ledger import Outcome, Run
from samtune.sweep.plan import Plan
from samtune.sweep.spec import Sweep, differences
from samtune.train.preflight import check_inputs

_T = TypeVar("_T")
_POLL = 1.0  # seconds between two looks at the runs


def check(plan: Plan) -> list[Run]:
    """All runs of a sweep, checked; the final runs are those of the first point of each arm.

    Raises UsageError for the first invalid setting of any run. With a budget in seconds, whose length only probes can
    tell, runs have 0 steps.
    """
    checked = plan.probes()
    for budget, arm in plan.arms():
        passes = budget if budget is None or budget.unit == "passes" else None
        runs = [run for by_seed in plan.selections(passes, arm, {}) for run in by_seed]
        for i, point in enumerate(arms.points(plan.sweep, arm)):
            finals = plan.finals(passes, arm, point, {})  # any of the points may be chosen
            runs += finals if i == 0 else []
        checked += runs if passes == budget else [replace(run, budget=str(budget), steps=0, passes=0.0) for run in runs]
    return checked


def check_names(sweep: Sweep, runs: Iterable[Run]) -> None:
    """Raise ModelError, DataError or CheckpointError for a model or a file of any of these runs that does not exist."""
    configs = [sweep.config(run.settings) for run in runs]
    for config in {(each.model, each.weights, each.train_labels): each for each in configs}.values():
        resolve(config.model)
        check_inputs(config)


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The plan of a sweep: one row for each stage, budget and arm."""
    groups: dict[tuple[str, str | None, str | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.stage, run.budget, run.arm), []).append(run)
    return [
        {"stage": stage, "budget": budget, "arm": arm}
        | {"points": len({arms.label(run.point) for run in group}), "runs": len(group)}
        | {"steps": _span([run.steps for run in group]), "passes": _span([round(run.passes) for run in group])}
        for (stage, budget, arm), group in groups.items()
    ]


def _span(numbers: Sequence[int]) -> str | None:
    low, high = min(numbers), max(numbers)
    return None if high == 0 else str(low) if low == high else f"{low} to {high}"


# --------------------------------------------------------------------------------------------------------- the folder


def open_folder(sweep: Sweep, folder: Path) -> Sweep:
    """Store a sweep in its folder and return it as stored. Raises what `check_same` raises, and MachineError."""
    file = folder / "sweep.toml"
    try:
        for part in ("runs", "logs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        with one_per_machine(folder):  # only one of two processes that start at once is the first
            check_same(sweep, folder)
            write_atomic(file, sweep.to_toml())
    except OSError as error:
        raise MachineError(f"{folder} cannot be written", error.strerror or "", "give another --output") from None
    return Sweep(file, {}, sweep.base, sweep.table)


def check_same(sweep: Sweep, folder: Path) -> None:
    """Raise UsageError where the folder has another sweep, or a damaged recipe."""
    file = folder / "sweep.toml"
    if not file.is_file():
        return
    try:
        before = _recipe(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "remove it: the same command makes it again"
        raise UsageError(f"{file} is damaged", first_line(error), hint) from None
    if differ := differences(before, _recipe(sweep.to_toml())):
        hint = "leave them as they were, or give another --output"
        raise UsageError(f"{folder} holds a sweep with other settings", "; ".join(differ), hint)


def _recipe(text: str) -> dict[str, Any]:
    return {key: value for key, value in tomllib.loads(text).items() if key not in RUNTIME_ONLY}


# ------------------------------------------------------------------------------------------------------------ the work


def open_executor(name: str, address: str, config: RunConfig, jobs: int) -> Executor:
    """The executor local or ray.

    Raises what `local_slots` and the cluster raise, and MachineError where ray is not installed.
    """
    if name == "local":
        return LocalExecutor(local_slots(config, jobs))
    try:
        from samtune.sweep.ray_executor import RayExecutor
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MachineError("--engine ray needs the package ray", hint="pip install 'samtune[ray]'") from None
    return RayExecutor(address, config, jobs)


def run(sweep: Sweep, folder: Path, executor: Executor, stop: signals.StopRequest) -> SamtuneError | None:
    """Do all of a sweep, or what is left of it, in this folder: see `work`.

    Raises UsageError, DataError or MachineError before the first run starts, for a run that could not start.
    """
    stored = open_folder(sweep, folder)
    with one_per_machine(folder):
        plan = Plan(stored, count_once(count_decoded))
        total = len(check(plan))
    return work(plan, folder, executor, stop, total)


def work(plan: Plan, folder: Path, executor: Executor, stop: signals.StopRequest, total: int) -> SamtuneError | None:
    """Do what is left of a sweep, next to other processes that do the same. total: its number of runs.

    Returns the error of the command if runs failed; all others are done by then. Its exit code is the one that failed
    runs have in common, else that of a lost worker. A selection run whose loss is not finite is no failure: its point
    is out.

    Raises Stopped after a signal, when the runs have saved.
    """
    worker = _Worker(plan, folder, executor, total)
    worker.again = {run.id for run in worker.planned_runs()[0] if worker.outcome(run).state == "failed"}
    stop.is_deferred = True
    with console.RunsProgress() as progress:
        try:
            while True:
                worker.forget()
                runs, chosen = worker.planned_runs()
                ledger.write(folder, runs, {run.id: worker.outcome(run) for run in runs}, chosen, total)
                worker.start_some(runs)
                if not worker.taken and not worker.has_to_wait(runs):
                    return worker.failure(runs, chosen)
                progress.show({run: read_step(ledger.run_folder(folder, run)) for run in worker.taken})
                for run_id, code in executor.wait(_POLL):
                    worker.end(run_id, code, runs)
                if stop.is_requested():
                    worker.stop(stop)
        except OSError as error:
            executor.kill()
            hint = "fix the cause; the same command continues"
            raise MachineError(f"{folder} cannot be written", first_line(error), hint) from None
        except BaseException:
            executor.kill()
            raise
        finally:
            for _, held, _ in worker.taken.values():
                held.release()


@dataclass
class _Worker:
    """The part of this process in a sweep.

    again: runs that failed under earlier commands, which this one tries once more; runs that fail meanwhile are left to
    the next command. tried: runs that this process has started. taken: runs that it has claimed, with lock and time.
    spent: passes and seconds of its finished runs. seen: outcomes as of the last look, so that all decisions after a
    look use the same states, whatever other processes do. cache: parts of the plan.
    """

    plan: Plan
    folder: Path
    executor: Executor
    total: int
    again: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    taken: dict[str, tuple[Run, lock.Lock, float]] = field(default_factory=dict)
    spent: list[tuple[float, float]] = field(default_factory=list)
    seen: dict[str, Outcome] = field(default_factory=dict)
    cache: dict[Any, Any] = field(default_factory=dict)

    def forget(self) -> None:
        """Start a new look at the outcomes; a run that is done stays done."""
        self.seen = {run: outcome for run, outcome in self.seen.items() if outcome.state == "done"}

    def outcome(self, run: Run) -> Outcome:
        """The outcome of a run, as of this look."""
        if run.id not in self.seen:
            self.seen[run.id] = ledger.outcome(self.folder, run.id)
            if self.seen[run.id].state == "done":
                ledger.drop_checkpoints(self.folder, run)
        return self.seen[run.id]

    def is_open(self, run: Run) -> bool:
        """Whether this process would start or resume a run, if it had a slot."""
        outcome = self.outcome(run)
        again = outcome.state == "failed" and run.id in self.again and not ledger.is_answer(run, outcome)
        return run.id not in self.tried and (outcome.state in ("waiting", "stopped") or again)

    def once(self, key: Any, make: Callable[[], _T]) -> _T:
        """Make a part of the plan at the first call, and return it."""
        if key not in self.cache:
            self.cache[key] = make()
        return cast(_T, self.cache[key])

    def planned_runs(self) -> tuple[list[Run], list[dict[str, Any]]]:
        """The runs of all stages that are known so far, and the choice for each budget and arm."""
        plan = self.plan
        probes = self.once("probes", plan.probes)
        is_measured = all(self.outcome(run).state == "done" for run in probes)
        selections: list[Run] = []
        finals: list[Run] = []
        chosen: list[dict[str, Any]] = []
        for budget, arm in plan.arms():
            entry: dict[str, Any] = {"budget": budget and str(budget), "arm": arm, "point": None, "by": None}
            chosen.append(entry)
            if budget is not None and budget.unit == "seconds" and not is_measured:
                continue
            paces = self.once("paces", lambda: plan.paces(self.folder)) if is_measured else {}
            tried = self.once((budget, arm), partial(plan.selections, budget, arm, paces))
            selections += [run for by_seed in tried for run in by_seed]
            best = ledger.choose([{run.seed: self.outcome(run) for run in runs} for runs in tried]) if tried else 0
            if best is not None:
                point = arms.points(plan.sweep, arm)[best]
                entry |= {"point": point, "by": "validation" if tried else "only point"}
                finals += self.once((budget, arm, best), partial(plan.finals, budget, arm, point, paces))
        return [*probes, *selections, *finals], chosen

    def start_some(self, runs: Sequence[Run]) -> None:
        """Claim and start runs while there are slots."""
        for run in filter(self.is_open, runs):
            if len(self.taken) >= self.executor.slots:
                return
            log = ledger.log_folder(self.folder, run.id)
            log.mkdir(exist_ok=True)
            held = lock.try_acquire(log)
            if held is None:
                continue
            if ledger.outcome(self.folder, run.id, mine=True).state in ("done", "running"):
                held.release()
                continue
            self.tried.add(run.id)
            self.taken[run.id] = run, held, time.monotonic()
            self.executor.start(self.folder, run)
            console.info(f"begin  {run.id}: {plural(run.steps, 'step')}, {run.passes:.0f} passes")

    def has_to_wait(self, runs: Sequence[Run]) -> bool:
        """Whether other processes are at work, or runs are left that have no slot yet."""
        others = [run.id for run in runs if self.outcome(run).state == "running"]
        if others:
            self.once("waiting", lambda: console.info(f"waiting for other processes: {', '.join(others)}"))
        elif not self.executor.slots:
            self.once("no slot", lambda: console.info("waiting for a node that can have a run: there is none now"))
        return bool(others) or any(map(self.is_open, runs))

    def end(self, run_id: str, code: int, runs: Sequence[Run]) -> None:
        """Record a run that has ended by itself."""
        run, held, started = self.taken.pop(run_id)
        if code == MachineError.exit_code and lock.holder(ledger.run_folder(self.folder, run_id)) is not None:
            self.tried.discard(run_id)  # the run of a sweep that was killed has not ended yet
            held.release()
            return
        if code != 0:
            ledger.write_exit_code(self.folder, run_id, code)
        held.release()
        self.seen.pop(run_id, None)
        outcome, seconds = self.outcome(run), time.monotonic() - started
        if outcome.state == "done":
            self.spent.append((run.passes, seconds))
        message = outcome.cause or "the same command continues it"
        if outcome.report is not None:
            scores = ((split, outcome.report[split]) for split in ("val", "test"))
            message = ", ".join(f"{split} error {score['top1_error']:.2f} %" for split, score in scores if score)
        done = sum(self.outcome(other).state == "done" for other in runs)
        console.info(
            f"{outcome.state:<6} {run_id}: {message}, {seconds:.0f} s  ({done} of {self.total}{self._time_left(runs)})"
        )

    def _time_left(self, runs: Sequence[Run]) -> str:
        """An estimate by the passes of the runs that are left; runs that are not known yet count as the mean run."""
        if not self.spent:
            return ""
        left = sum(run.passes for run in runs if self.outcome(run).state != "done")
        left += (self.total - len(runs)) * sum(run.passes for run in runs) / len(runs)
        per_pass = sum(seconds for _, seconds in self.spent) / sum(passes for passes, _ in self.spent)
        minutes = left * per_pass / self.executor.slots / 60
        return f", about {minutes:.0f} minutes left" if minutes >= 1.5 else ""

    def stop(self, stop: signals.StopRequest) -> NoReturn:
        """Pass a signal on to the runs, and wait until all have saved."""
        assert stop.signal is not None
        if self.taken:
            runs = plural(len(self.taken), "run")
            console.info(f"{stop.signal.name}: waiting for {runs} to end a step; a second one ends them at once")
        self.executor.stop()
        while self.taken:
            for run_id, _ in self.executor.wait(_POLL):
                self.taken.pop(run_id)[1].release()
        raise Stopped(f"stopped by {stop.signal.name}", Stopped.SAVED, "the same command continues")

    def failure(self, runs: Sequence[Run], chosen: Sequence[Mapping[str, Any]]) -> SamtuneError | None:
        """The error of the command for its failed and stopped runs, and arms without a point; None without any."""
        outcomes = {run: self.outcome(run) for run in runs}
        stopped = [run.id for run, outcome in outcomes.items() if outcome.state == "stopped"]
        failed: dict[str, Outcome] = {}
        for run in (run for run, outcome in outcomes.items() if outcome.state == "failed"):
            log, is_out = ledger.log_folder(self.folder, run.id) / "output.txt", ledger.is_answer(run, outcomes[run])
            console.warn(f"{run.id} failed: {outcomes[run].cause}{'; its point is out' if is_out else ''}; see {log}")
            failed |= {} if is_out else {run.id: outcomes[run]}
        if not failed and not stopped:
            diverged = [entry["arm"] for entry in chosen if entry["point"] is None]
            message = f"no point of {' and '.join(diverged)} trained: every loss was not finite"
            hint = "give a smaller grid of rho or lr, in a sweep of its own (--output)"
            return Diverged(message, hint=hint) if diverged else None
        names = list(failed) or stopped
        error = WorkerLost(
            f"{len(names)} of {self.total} runs {'failed' if failed else 'were stopped'}: {', '.join(names)}",
            "their log.txt and output.txt say why" if failed else "",
            "fix the cause; the same command tries them again, and does what waits for them",
        )
        codes = {outcome.exit_code for outcome in failed.values()}
        if len(codes) == 1 and (code := codes.pop()) is not None and 0 < code < Stopped.SAVED:
            error.exit_code = code
        return error
