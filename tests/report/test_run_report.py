"""The report of a run: the errors on test of the last checkpoint, and of the one that is best on validation."""

import json

import pytest

from samtune.report import html, run_page, run_report
from samtune.runs.metrics import best_key, read_metrics
from tests.support.run_folders import write_run

EPOCHS, STEPS = 4, 20


def rows_of(folder):
    return [row for row in read_metrics(folder) if row["split"] == "test"]


def rewrite(folder, change):
    """metrics.jsonl with each row as `change` makes it; rows of None are left out."""
    rows = [changed for row in read_metrics(folder) if (changed := change(row)) is not None]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """A run whose second epoch is the best of four on validation."""
    write_run(tmp_path / "r", epochs=EPOCHS, both=True, seed=5)
    best = min((row for row in read_metrics(tmp_path / "r") if row["split"] == "val"), key=best_key)
    assert best["step"] < STEPS
    return tmp_path / "r"


def test_both_checkpoints_are_reported_and_the_selected_one_is_the_result(folder):
    best, last = rows_of(folder)
    assert best["top1_error"] != last["top1_error"]
    report = run_report.build(folder)
    both = report["test_by_checkpoint"]
    assert list(both) == ["last", "best"]
    for name, row in (("last", last), ("best", best)):
        assert {key: both[name][key] for key in both[name]} == {key: row[key] for key in both[name]}
    assert (both["last"]["step"], both["last"]["epoch"]) == (STEPS, EPOCHS)
    assert report["test"] == {key: value for key, value in both["last"].items() if key != "step"}


def test_both_are_lines_of_the_summary_and_columns_of_the_page(folder):
    best, last = rows_of(folder)
    report = run_report.build(folder)
    lines = run_report.summary(report)
    words = (f"last epoch ({EPOCHS})", f"best epoch on validation ({best['epoch']})")
    for name, row in zip(words, (last, best), strict=True):
        assert lines[f"test top-1 error, {name}"] == run_report.score_line(row)
    markdown = html.render("run.md", run_report.content(report))
    page = html.render("run.html", run_page.content(folder, report) | {"refresh": None})
    for name in words:
        assert f"| test top-1 error, {name} |" in markdown
        assert f">test, {name}</th>" in page
    assert 'data-path="test_by_checkpoint.best.top1_error"' in page


def test_one_row_is_of_both_where_the_last_step_is_the_best(folder):
    def improve(row):
        if row["split"] == "val" and row["step"] == STEPS:
            return row | {"top1_error": 0.0}
        return None if row.get("checkpoint") == "best" else row

    rewrite(folder, improve)
    report = run_report.build(folder)
    both = report["test_by_checkpoint"]
    assert both["last"] == both["best"] == report["test"] | {"step": STEPS}
    assert not any("epoch" in name for name in run_report.summary(report))


def test_a_run_that_ended_before_the_selected_one_was_scored_has_no_result_of_the_other(folder):
    rewrite(folder, lambda row: None if row.get("checkpoint") == "last" else row)
    report = run_report.build(folder)
    assert report["test"] is None
    assert list(report["test_by_checkpoint"]) == ["best"]


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_run_from_before_both_were_scored_has_the_selected_one(tmp_path, select):
    folder = write_run(tmp_path / "r", epochs=EPOCHS, seed=5, select=select)
    (row,) = rows_of(folder)
    assert "checkpoint" not in row
    report = run_report.build(folder)
    assert report["test"]["wrong"] == row["wrong"]
    assert list(report["test_by_checkpoint"]) == [select]
    del report["test_by_checkpoint"]  # as its report.json was written
    assert "test top-1 error" in run_report.summary(report)


def test_without_a_test_split_there_is_none(tmp_path):
    report = run_report.build(write_run(tmp_path / "r", test=False))
    assert (report["test"], report["test_by_checkpoint"]) == (None, {})
