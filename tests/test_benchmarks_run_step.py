"""The benchmark of a run's step: that it runs, and what it works out from what it measures."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.benchmarks import cost, run_step
from tests.conftest import ROOT


@pytest.mark.slow
def test_in_miniature_it_fills_its_tables():
    command = [sys.executable, "-m", "tests.benchmarks.run_step", "--smoke", "--json", "--minutes", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    eager, graphs = json.loads(done.stdout)["tables"]
    assert eager["error"] is graphs["error"] is None
    rows = {row["side"]: row for row in eager["rows"]}
    assert rows.keys() == {*run_step.OURS, run_step.FLOOR, run_step.PLAIN, run_step.PUBLISHED}
    for name, row in rows.items():
        assert row["error"] is None
        assert row["ms"] * row["images_per_second"] == pytest.approx(4000)
        assert row["ratio"] == pytest.approx(row["ms"] / rows[row["reference"]]["ms"])
        assert ("data_wait" in row) == (name in run_step.OURS)
        assert 0 <= row.get("data_wait", 0) <= 1
    assert rows["samtune SAM"]["ms"] > rows[run_step.PLAIN]["ms"]
    assert [row["error"] is None for row in graphs["rows"]] == [True, True, False, False]  # none on a CPU


def test_shares_are_of_the_device_and_of_the_passes_of_the_side():
    case, paper = run_step.Case("any", 32, 10), {"flops": 100, "sgd": 2000, "sam": 4000}
    speed = (1e6, 1e6)
    assert run_step.shares({"side": "samtune SAM", "ms": 10.0}, case, paper, speed) == pytest.approx(
        {"mfu": 6 * 100 * 10 / 0.01 / 1e6, "bandwidth_share": 0.4}
    )
    assert run_step.shares({"side": run_step.PLAIN, "ms": 10.0}, case, paper, speed) == pytest.approx(
        {"mfu": 3 * 100 * 10 / 0.01 / 1e6, "bandwidth_share": 0.2}
    )


@pytest.mark.parametrize(
    ("name", "speed"),
    [("NVIDIA H100 80GB HBM3", (989e12, 3.35e12)), ("NVIDIA H200", (989e12, 4.8e12)), ("cpu (2 threads)", None)],
)
def test_speeds_go_by_the_name_of_the_device(name, speed):
    assert cost.speed(name) == speed


@pytest.fixture
def endless(monkeypatch):
    """Tables are never done, in 0.3 s for all of them; a function to be called while they are at work."""

    def build(table):
        while True:
            meanwhile()

    def meanwhile():
        pass

    def measure(during=lambda: None):
        nonlocal meanwhile
        meanwhile = during
        result = {}
        run_step.measure_all(run_step.SMOKE_CASES * 2, ("eager",), 0.005, run_step.SMOKE_EFFORT, result)
        return [table["error"] for table in result["tables"]]

    monkeypatch.setattr(run_step.Table, "build", build)
    monkeypatch.setattr(run_step.single_steps, "write_pictures", lambda *_: None)
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGTERM)
    yield measure
    assert (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGTERM)) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_table_that_takes_too_long_is_ended_and_those_without_time_say_so(endless):
    errors = endless()
    assert errors[0] == "ended after 0 s"
    assert errors[-1] == "no time left"


def test_a_table_may_take_three_times_its_share_of_what_is_left(monkeypatch):
    def fail(*_):
        raise OSError("gone")

    limits, limit = [], run_step.time_limit
    monkeypatch.setattr(run_step, "time_limit", lambda seconds: limits.append(seconds) or limit(seconds))
    monkeypatch.setattr(run_step, "Table", fail)
    result = {}
    run_step.measure_all(run_step.SMOKE_CASES * 4, ("eager",), 60, run_step.SMOKE_EFFORT, result)
    count = len(result["tables"])
    assert limits[:2] == pytest.approx([3 * 3600 / count, 3 * 3600 / (count - 1)], rel=0.01)
    assert limits[-1] == pytest.approx(3600, rel=0.01)
    assert [table["error"] for table in result["tables"]] == ["OSError: gone"] * count


def test_a_benchmark_that_is_asked_to_end_has_what_it_has(endless):
    errors = endless(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert errors == ["no time left"] * len(errors)


def test_a_side_that_fails_leaves_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(run_step, "WARM_UP", 1)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    table = run_step.Table(run_step.SMOKE_CASES[0], "eager", tmp_path)
    table.build()
    rows = {row["side"]: row for row in table.measure(0.0, run_step.SMOKE_EFFORT)}
    assert "pytorch_optimizer" in rows[run_step.PUBLISHED]["error"]
    assert all(row["error"] is None for name, row in rows.items() if name != run_step.PUBLISHED)
