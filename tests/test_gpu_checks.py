"""What tests/gpu.sh reports, seen on a machine without a GPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support import gpu_checks


def test_without_a_gpu_it_says_so_and_fails():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PATH": path}
    done = subprocess.run(
        ["bash", ROOT / "tests" / "gpu.sh"], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    report = json.loads(done.stdout)
    assert report["error"].startswith("no GPU")
    assert report["versions"].keys() >= {"torch", "timm", "python"}
    assert done.returncode == 1


def test_tests_are_counted_and_failures_are_named(tmp_path):
    file = tmp_path / "test_any.py"
    file.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_none(): pytest.skip('no')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('gone')\n"
        "def test_error(broken): pass\n"
    )
    other = tmp_path / "test_other.py"
    other.write_text("import not_there\n")
    report = gpu_checks.run_tests([str(file), str(other)], 100)
    assert [report[key] for key in ("passed", "failed", "skipped", "error")] == [1, 3, 1, None]
    uncollected, bad, broken = sorted(report["failures"])
    assert "not_there" in report["failures"][uncollected]
    assert bad.endswith("::test_bad")
    assert "1 == 2" in report["failures"][bad]
    assert broken.endswith("::test_error")
    good = {"failed": 0, "passed": 1, "error": None}
    assert gpu_checks.is_good({"sync_debug": good, "tests": good, "benchmark": {}})
    assert not gpu_checks.is_good({"sync_debug": good, "tests": report, "benchmark": {}})
    assert not gpu_checks.is_good({"sync_debug": good, "tests": {"error": "exit code 4"}, "benchmark": {}})
    assert not gpu_checks.is_good({"sync_debug": good, "tests": good, "benchmark": {"error": "no JSON"}})


def test_a_part_that_hangs_is_asked_to_end_with_what_it_has():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    script = "import signal\ntry: signal.pause()\nexcept KeyboardInterrupt: print('{}')"
    said, error = gpu_checks.run(["-c", script], 2, signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert (said.strip(), error) == ("{}", "ended after 2 s")


def test_a_part_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(gpu_checks, "GRACE", 0.1)
    script = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()"
    assert gpu_checks.run_json(["-c", script], 0.5) == {"error": "ended after 0 s"}


@pytest.mark.parametrize(
    ("script", "report"),
    [
        ("print('{\"a\": 1}')", {"a": 1}),
        ("print('{\"a\": 1}'); exit(3)", {"a": 1, "error": "exit code 3"}),
        ("exit(3)", {"error": "exit code 3"}),
        ("print('odd')", {"error": "no JSON: 'odd\\n'"}),
    ],
)
def test_a_part_reports_its_json_or_why_there_is_none(script, report):
    assert gpu_checks.run_json(["-c", script], 100) == report


def test_every_file_with_such_tests_is_run():
    assert {"tests/train/test_run.py", gpu_checks.WAITS} < set(gpu_checks.marked())


def test_a_part_that_fails_leaves_the_others_in_the_report(monkeypatch, capsys):
    monkeypatch.setattr(gpu_checks, "run_tests", lambda files, seconds: {"error": f"{len(files)} files"})
    monkeypatch.setattr(gpu_checks, "run_json", lambda command, seconds: {"device": "any", "command": command[1]})
    assert gpu_checks.main() == 1
    report = json.loads(capsys.readouterr().out)
    assert report["sync_debug"] == {"error": "1 files"}
    assert report["tests"] == {"error": f"{len(gpu_checks.marked()) - 1} files"}
    assert report["benchmark"]["command"] == "tests.benchmarks.run_step"
