"""What `samtune runs` makes of run folders: those written by hand here, with a writer or without."""

import json
import os
import subprocess
import sys

import pytest

from samtune.errors import UsageError
from samtune.runs import listing
from tests.conftest import samtune
from tests.runs.test_lock import another_process


def write_run(folder, state="done", *, metrics=(), report=None, **more):
    """A run folder with what `samtune runs` reads; more: fields of status.json."""
    folder.mkdir(parents=True)
    status = {"state": state, "exit_code": None, "step": 6, "total_steps": 8, "degraded": False}
    status |= {"updated": "2026-01-02T03:04:05Z"} | more
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if report is not None:
        (folder / "report.json").write_text(json.dumps(report))
    return folder


def only(folder):
    (row,) = listing.list_runs(folder)
    return row


MEASURED = [
    {"step": 2, "epoch": 1, "split": "val", "top1_error": 50.0, "seconds": 1.0},
    {"step": 4, "epoch": 2, "split": "train", "top1_error": 40.0, "seconds": 2.0},
    {"step": 6, "epoch": 3, "split": "val", "top1_error": 25.0, "seconds": 3.0},
]
FAILURE = {"what": "step 3: loss nan\nand more", "why": "values were not finite", "mend": "lower --lr"}


@pytest.mark.parametrize(
    ("written", "state", "then"),
    [
        ({"state": "done"}, "done", None),
        ({"state": "running"}, "killed", "samtune run --resume --output {folder}"),
        ({"state": "stopped"}, "stopped", "samtune run --resume --output {folder}"),
        ({"state": "failed", "error": FAILURE}, "failed", "lower --lr"),
        ({"state": "failed", "error": FAILURE | {"mend": ""}}, "failed", "look at {folder}/log.txt"),
        ({"state": "failed"}, "failed", "look at {folder}/log.txt"),
        ({"state": "failed", "error": None}, "failed", "look at {folder}/log.txt"),
    ],
)
def test_what_status_says_decides_the_state_and_what_to_do_next(tmp_path, written, state, then):
    folder = write_run(tmp_path / "r", **written)
    row = only(tmp_path)
    assert (row["state"], row["next"]) == (state, then and then.format(folder=folder))
    assert row["error"] == ("step 3: loss nan" if written.get("error") else None)


def test_the_first_of_two_trainings_is_no_run_of_its_own_and_its_steps_are_those_of_the_run(tmp_path):
    write_run(tmp_path / "r", "stopped", step=0, total_steps=0)
    write_run(tmp_path / "r" / "bootstrap", "stopped", step=3, total_steps=8)
    row = only(tmp_path)
    assert (row["path"], row["step"], row["total_steps"]) == (str(tmp_path / "r"), 3, 8)
    assert row["next"] == f"samtune run --resume --output {tmp_path / 'r'}"
    assert listing.read_step(tmp_path / "r") == (3, 8)
    write_run(tmp_path / "x" / "bootstrap", step=8)  # the name alone says nothing
    assert len(listing.list_runs(tmp_path)) == 2


def test_a_run_that_is_done_is_done_before_its_process_has_ended(tmp_path):
    folder = write_run(tmp_path / "r")
    with another_process(folder):
        assert only(folder)["state"] == "done"


@pytest.mark.parametrize("written", ["running", "stopped", "failed"])
def test_a_run_whose_folder_has_a_writer_is_running_and_needs_nothing(tmp_path, written):
    folder = write_run(tmp_path / "r", written)
    with another_process(folder):
        row = only(tmp_path)
        assert (row["state"], row["next"], row["updated"]) == ("running", None, "2026-01-02T03:04:05Z")
    assert only(tmp_path)["state"] == ("killed" if written == "running" else written)


def test_a_run_that_ends_while_it_is_looked_at_is_not_taken_for_killed(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "r", "running")

    def ends(asked):
        (folder / "status.json").write_text(json.dumps({"state": "done"}))

    monkeypatch.setattr("samtune.runs.lock.holder", ends)
    assert only(tmp_path)["state"] == "done"


def test_a_run_that_begins_while_it_is_looked_at_is_not_taken_for_killed(tmp_path, monkeypatch):
    write_run(tmp_path / "r", "running")
    answers = iter([None, "process 1 on host h"])
    monkeypatch.setattr("samtune.runs.lock.holder", lambda folder: next(answers))
    assert only(tmp_path)["state"] == "running"


def test_errors_are_those_of_the_report_or_the_last_that_were_measured(tmp_path):
    report = {"val": {"top1_error": 12.5}, "test": {"top1_error": 13.25}}
    runs = {
        "reported": ({"report": report, "metrics": MEASURED}, (12.5, 13.25)),
        "without test": ({"report": {"val": {"top1_error": 9}, "test": None}}, (9.0, None)),
        "without report": ({"metrics": MEASURED}, (25.0, None)),
        "stopped": ({"state": "stopped", "report": report, "metrics": MEASURED}, (25.0, None)),
        "young": ({"state": "stopped"}, (None, None)),
    }
    for name, (written, errors) in runs.items():
        row = only(write_run(tmp_path / name, **written))
        assert (row["val_error"], row["test_error"]) == errors, name


def test_a_torn_last_line_of_metrics_is_passed_over(tmp_path):
    folder = write_run(tmp_path / "r", "running", metrics=MEASURED)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"split": "val", "top1_er\xff')
    assert only(folder)["val_error"] == 25


def test_runs_are_found_two_levels_deep_the_newest_first_and_the_folder_may_be_one(tmp_path):
    write_run(tmp_path / "old", updated="2025-01-01T00:00:00Z")
    write_run(tmp_path / "sweep" / "new", updated="2027-01-01T00:00:00Z")
    write_run(tmp_path / "middle", updated="2026-01-01T00:00:00Z")
    write_run(tmp_path / "too" / "far" / "down")
    (tmp_path / "no run").mkdir()
    unsaid = write_run(tmp_path / "unsaid", updated=None)  # then the file's own time counts
    os.utime(unsaid / "status.json", (1751328000, 1751328000))
    found = [row["path"] for row in listing.list_runs(tmp_path)]
    assert found == [str(tmp_path / name) for name in ("sweep/new", "middle", "unsaid", "old")]
    assert only(unsaid)["updated"] == "2025-07-01T00:00:00Z"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"state": "asleep"}', '{"state": []}', "\ud800\udcff"])
def test_a_status_that_cannot_be_read_is_listed_as_damaged(tmp_path, content):
    folder = write_run(tmp_path / "r")
    (folder / "status.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    row = only(tmp_path)
    assert (row["state"], row["next"]) == ("damaged", f"look at {folder}")
    assert "status.json cannot be read" in row["error"]


def test_a_status_with_nonsense_in_it_is_read_as_far_as_it_goes(tmp_path):
    nonsense = {"step": "many", "total_steps": None, "degraded": 7, "error": "oh", "updated": 5, "pid": {}}
    folder = write_run(tmp_path / "r", "failed", **nonsense)
    for name in ("metrics.jsonl", "report.json"):
        (folder / name).write_text('[1]\n{"step": 1, "epoch": 1, "seconds": 1, "split": "val", "top1_error": "high"}\n')
    done = samtune("runs", tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "failed" in done.stdout


def test_people_see_progress_errors_marks_and_commands_that_can_be_copied(tmp_path):
    write_run(tmp_path / "my run", "stopped", metrics=MEASURED, degraded=True)
    done = samtune("runs", tmp_path, env={"COLUMNS": "200"})
    assert done.returncode == 0
    for part in ("stopped (degraded)", "6/8 (75 %)", " 25.00 ", "2026-01-02 03:04:05"):
        assert part in done.stdout
    assert f"  next: samtune run --resume --output '{tmp_path}/my run'\n" in done.stdout


def test_on_a_narrow_terminal_every_value_is_still_there(tmp_path):
    folder = write_run(tmp_path / "a run with a name", "stopped", metrics=MEASURED)
    done = samtune("runs", tmp_path, env={"COLUMNS": "20"})
    assert done.returncode == 0
    for line in (f"run: {folder.name}", "state: stopped", "progress: 6/8 (75 %)", "val %: 25.00", "test %: -"):
        assert f"{line}\n" in done.stdout


def test_programs_get_the_same_rows_alone_on_stdout(tmp_path):
    write_run(tmp_path / "a", "failed", error=FAILURE, exit_code=7)
    write_run(tmp_path / "b", pid=12, host="h")
    done = samtune("runs", tmp_path, "--json")
    assert json.loads(done.stdout) == listing.list_runs(tmp_path)
    assert done.stderr == ""


def test_a_folder_without_runs_is_no_error_and_a_missing_folder_is_one(tmp_path):
    done = samtune("runs", tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "no runs" in done.stderr
    assert samtune("runs", tmp_path, "--json").stdout == "[]\n"
    missing = samtune("runs", cwd=tmp_path)
    assert missing.returncode == 2
    assert "there is no folder runs" in missing.stderr
    with pytest.raises(UsageError):
        listing.list_runs(tmp_path / "none")


def test_listing_loads_nothing_heavy(tmp_path):
    write_run(tmp_path / "r")
    check = (
        f"import sys; sys.argv[1:] = ['runs', {str(tmp_path)!r}]; from samtune.cli.main import _exit_code;"
        "code = _exit_code(); heavy = {'torch', 'timm', 'numpy', 'datasets'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
