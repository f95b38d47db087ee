"""How processes share a sweep: what one does when another changes what became of a run between two looks."""

import itertools
from types import SimpleNamespace

import pytest

from samtune.distributed import signals
from samtune.errors import Diverged, MachineError, UsageError
from samtune.sweep import arms, ledger, run, spec
from samtune.sweep.ledger import Outcome, Run
from tests.support.small_sweep import write_recipe


def run_of(stage, name, rho=0.1):
    return Run(f"{stage}-{name}", stage, None, "sam", {"rho": rho}, 0, {}, 4, 8.0)


MINE, THEIRS, FINAL = run_of("select", "mine", 0.1), run_of("select", "theirs", 0.2), run_of("final", "sam")
DONE = Outcome("done", 0, report={"val": {"top1_error": 1.0, "loss": 1.0}, "test": None})


class Begun(BaseException):
    """A run was begun."""


class Engine:
    def __init__(self, slots=(1,)):
        self.room = itertools.chain(slots, itertools.repeat(slots[-1]))
        self.looks = 0

    @property
    def slots(self):
        return next(self.room)

    def start(self, folder, run):
        raise Begun(run.id)

    def wait(self, seconds):
        self.looks += 1
        assert self.looks < 100, "waits for ever"
        return []

    def kill(self):
        pass


@pytest.fixture
def plan(monkeypatch):
    """Two points of one arm, and a final run."""
    monkeypatch.setattr(arms, "points", lambda sweep, arm: [{"rho": 0.1}, {"rho": 0.2}])
    return SimpleNamespace(
        sweep=None,
        probes=list,
        paces=lambda folder: {},
        arms=lambda: [(None, "sam")],
        selections=lambda *about: [[MINE], [THEIRS]],
        finals=lambda *about: [FINAL],
    )


def work(plan, folder, engine, monkeypatch, outcome):
    (folder / "logs").mkdir(exist_ok=True)
    monkeypatch.setattr(ledger, "outcome", lambda folder, run, mine=False: outcome(run))
    return run.work(plan, folder, engine, signals.StopRequest(), 3)


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize(("becomes", "begun"), [(DONE, FINAL.id), (Outcome("stopped"), THEIRS.id)])
def test_a_run_of_another_process_may_end_at_any_moment(plan, tmp_path, monkeypatch, at, becomes, begun):
    asked = itertools.count()

    def outcome(run):
        if run == THEIRS.id:
            return Outcome("running") if next(asked) < at else becomes
        return DONE if run == MINE.id else Outcome("waiting")

    with pytest.raises(Begun, match=begun):
        work(plan, tmp_path, Engine(), monkeypatch, outcome)


def test_a_cluster_without_room_is_waited_for(plan, tmp_path, monkeypatch, capsys):
    engine = Engine(slots=(0, 0, 0, 0, 1))
    with pytest.raises(Begun, match=MINE.id):
        work(plan, tmp_path, engine, monkeypatch, lambda run: Outcome("waiting"))
    assert engine.looks > 0
    assert capsys.readouterr().err.count("there is none now") == 1


def test_an_arm_is_given_up_where_all_its_points_diverged(plan, tmp_path, monkeypatch):
    error = work(plan, tmp_path, Engine(), monkeypatch, lambda run: Outcome("failed", Diverged.exit_code))
    assert isinstance(error, Diverged)


def test_a_folder_that_cannot_be_written_ends_the_sweep_and_says_so(plan, tmp_path, monkeypatch):
    def full(*about):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger, "write_atomic", full)
    with pytest.raises(MachineError, match="cannot be written") as error:
        work(plan, tmp_path, Engine(), monkeypatch, lambda run: Outcome("waiting"))
    assert "No space left" in error.value.cause


def test_a_node_that_lends_no_cores_does_not_count(monkeypatch):
    module = pytest.importorskip("samtune.sweep.ray_executor", reason="ray is not installed (extra: ray)")
    monkeypatch.setattr(module, "_nodes", lambda: [{}, {"CPU": 0.0}, {"CPU": 8.0}, {"CPU": 4.0}])
    executor = object.__new__(module.RayExecutor)
    executor._jobs, executor._on_gpus = 2, False
    assert (executor._cores, executor.slots) == (2, 6)


def test_a_damaged_recipe_of_a_sweep_is_named(tmp_path, photos):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.toml").write_text("x = [")
    with pytest.raises(UsageError, match=r"sweep\.toml is damaged"):
        run.open_folder(spec.load(write_recipe(tmp_path / "r.toml", photos), {}), tmp_path / "s")
