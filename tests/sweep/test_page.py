"""The pages of a sweep and of a comparison: what holds for the page of a run holds for them."""

import json

import pytest

from samtune.cli.sweep import report_sweep
from samtune.report import comparison, comparison_page
from samtune.sweep import page
from samtune.sweep.report import build
from tests.conftest import samtune
from tests.report.test_run_page import (
    Document,
    table_of,
    test_it_loads_nothing_and_runs_nothing,  # noqa: F401
    test_its_structure_can_be_followed_without_seeing_it,  # noqa: F401
)
from tests.support.run_folders import write_run, write_sweep

ARMS = {"sam": 6, "sam-late": 7, "sgd": 9, "sgd-2x": 8}
BUDGETS = 'seeds = 2\nbudgets = ["100 passes", "200 passes"]\n[sweep.grid]\nrho = [0.05, 0.1]\n'


def wrong(run):
    """More for a larger rho, other images for each seed."""
    return range(run.seed, run.seed + ARMS[run.arm] + run.seed % 2 + round(10 * run.point.get("rho", 0)))


def troubled(run):
    """A radius diverges, and all seeds but the first fail."""
    return 7 if run.point.get("rho") == 0.5 else 9 if run.seed else wrong(run)


CASES = {
    "ordinary": ("seeds = 3\n", wrong),
    "budgets": (BUDGETS, wrong),
    "a grid for sgd": ('seeds = 2\n[sweep.sgd]\nlr = [0.1, 0.2]\nopt = ["sgd", "adamw"]\n', wrong),
    "one seed": ("seeds = 1\n", wrong),
    "nothing is done": ("seeds = 2\n", lambda run: None),
    "chosen only": ("seeds = 2\n", lambda run: wrong(run) if run.stage == "select" else None),
    "failed and diverged": ("seeds = 2\n", troubled),
    "no error at all": ("seeds = 2\n", lambda run: ()),
    "no SAM": ('seeds = 2\narms = ["sgd", "sgd-2x"]\n', wrong),
}


@pytest.fixture(params=[*CASES, "comparison", "comparison of single runs"], scope="module")
def drawn(request, tmp_path_factory):
    """(text, document, report) of a page."""
    folder = tmp_path_factory.mktemp("pages")
    if request.param in CASES:
        write_sweep(folder / "s", *CASES[request.param])
        result = build(folder / "s")
        page.write(folder / "page.html", folder / "s", result)
    else:
        seeds = range(1 if "single" in request.param else 3)
        made = [
            write_run(folder / f"{rho}-{seed}", rho=rho, seed=seed, wrong=range(wrong + seed % 2))
            for rho, wrong in ((0.0, 9), (0.05, 6), (0.1, 7))
            for seed in seeds
        ]
        result = comparison.compare(made)
        comparison_page.write(folder / "page.html", result)
    text = (folder / "page.html").read_text(encoding="utf-8")
    return text, Document(text), result


def test_every_number_that_is_named_is_the_reports(drawn):
    _, document, result = drawn
    paths = set()
    for path, value, text in document.numbers(result):
        assert float(text) == pytest.approx(value, rel=0.006, abs=0.00501)
        paths.add(path)
    pairs = enumerate(result.get("comparisons", ()))
    wanted = [f"comparisons.{i}.difference.mean" for i, pair in pairs if pair["baseline"] == "sgd"]
    wanted += [f"final.{i}.mean_error" for i, entry in enumerate(result.get("final", ())) if entry["n"]]
    wanted += [f"pairs.{i}.difference.mean" for i in range(len(result.get("pairs", ())))]
    assert set(wanted) <= paths


def test_the_verdict_comes_first_and_all_warnings_are_there(drawn):
    _, document, result = drawn
    said = document.text("p").replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " ")
    for text in (*result.get("verdict", ()), *result.get("warnings", ())):
        assert text in said
    first = next(e for e in document.all("p") if e["attributes"].get("class") == "headline")
    assert document.all("h2")[0] is document.elements[document.elements.index(first) - 1]


def test_people_who_read_the_terminal_alone_are_warned_too(tmp_path, capsys):
    write_sweep(tmp_path, *CASES["failed and diverged"])
    report_sweep(tmp_path, tmp_path, as_json=False)
    result = json.loads((tmp_path / "report.json").read_text())
    assert len(result["warnings"]) > 1
    seen = " ".join(capsys.readouterr().err.split())
    assert all(seen.count(" ".join(["warning:", *text.split()])) == 1 for text in result["warnings"])


@pytest.mark.parametrize("drawn", ["budgets"], indirect=True)
def test_tables_beside_the_charts_say_what_the_report_says(drawn):
    _, document, result = drawn
    seeds = table_of(document, "test error of each final run")
    assert [row[:4] for row in seeds[:2]] == [
        ["100 passes", "sam", "0", f"{result['final'][0]['test_errors'][0]:.2f}"],
        ["100 passes", "sam", "1", f"{result['final'][0]['test_errors'][1]:.2f}"],
    ]
    pairs = table_of(document, "differences of test errors")
    first = result["comparisons"][0]
    assert pairs[0][:3] == ["100 passes", "sam", "sgd"]
    assert pairs[0][3].replace("\N{MINUS SIGN}", "-") == f"{first['difference']['mean']:+.2f}"
    points = table_of(document, "validation error of sam at 100 passes")
    assert [row[:3] for row in points] == [
        [point["label"], "chosen" if point["chosen"] else "done", f"{point['mean_error']:.2f}"]
        for point in result["selection"][:2]
    ]
    cost = table_of(document, "test error against forward-backward passes")
    assert [row[2] for row in cost] == [f"{entry['passes']:,.0f}" for entry in result["final"]]
    images = table_of(document, "images that one of two models")
    test = first["mcnemar"][0]
    assert [int(cell) for cell in images[0][3:6]] == [0, test["only_wrong"], test["baseline_only_wrong"]]


def test_curves_are_the_mean_over_seeds(tmp_path):
    folder = write_sweep(tmp_path / "s", 'seeds = 2\narms = ["sam", "sgd"]\n[sweep.grid]\nrho = [0.05]\n', wrong)
    rows = folder / "runs" / "final-sam-seed1" / "metrics.jsonl"
    rows.write_text(rows.read_text().replace('"loss": 1.5,', '"loss": 2.5,'))
    page.write(folder / "report.html", folder, build(folder))
    curve = table_of(Document((folder / "report.html").read_text()), "train loss by epoch")
    assert curve[0] == ["1", "2.0000", "1.5000"]
    assert curve[1] == ["2", "0.7500", "0.7500"]


def test_a_comparison_that_is_written_has_a_page_too(tmp_path):
    runs = [write_run(tmp_path / name, rho=rho, wrong=range(5)) for name, rho in (("sgd", 0.0), ("<b>sam</b>", 0.05))]
    done = samtune("report", *runs, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"comparison.json", "comparison.md", "comparison.html"}
    document = Document((tmp_path / "out" / "comparison.html").read_text())
    assert not document.all("b")
    assert ["rho", "0", "0.05"] in table_of(document, "settings and circumstances")
