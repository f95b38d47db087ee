"""The page of a run: its numbers are the report's, it needs nothing else, and whoever reads it can."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from samtune.cli.results import report_runs
from samtune.config import loading
from samtune.data.thumbnails import open_splits, thumbnails
from samtune.errors import CheckpointError, DataError, UsageError
from samtune.report import html, run_page, run_report, svg_charts
from samtune.report.stats import wilson_interval
from samtune.report.svg_charts import Heading, Series
from tests.conftest import image_bytes, samtune, write_image_folder
from tests.support.run_folders import write_predictions, write_run

VOID = {"meta", "link", "br", "img", "input", "hr"}
ODD = ("<b>cat</b> & dog", 'owl" onload="x', "漢字 naïve", "$x_1$ \\frac", "a\x01b", "long " * 40, "{{ 7 * 7 }}")


class Document(HTMLParser):
    """All elements with their attributes and text, and whether they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "attributes": dict(attributes), "text": "", "inside": [e["tag"] for e in self.open]}
        element["parents"] = list(self.open)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [element for element in self.elements if element["tag"] in tags]

    def numbers(self, report):
        """(path in the report, its value, its text) of each number; the value is that of the report."""
        for element in self.all("data"):
            path = element["attributes"]["data-path"]
            value = value_at(report, path)
            assert json.loads(element["attributes"]["value"]) == value
            yield path, value, element["text"].replace(",", "").replace("\N{MINUS SIGN}", "-")

    def text(self, tag):
        return "\n".join(" ".join(element["text"].split()) for element in self.all(tag))


def value_at(report, path):
    for key in path.split("."):
        report = report[int(key) if isinstance(report, list) else key]
    return report


def draw(folder):
    """(text, document, report) of a run's page."""
    result, drawn = run_page.write_report_page(folder, folder)
    text = drawn.read_text(encoding="utf-8")
    return text, Document(text), result


CASES = {
    "ordinary": {},
    "two classes, one epoch, all right": {"classes": ("a", "b"), "epochs": 1, "right": 1.0},
    "all wrong": {"right": 0.0},
    "1000 classes": {"classes": [f"class {i}" for i in range(1000)], "images": 1500},
    "41 classes, one of them without images": {"classes": [f"class {i}" for i in range(41)], "images": 40},
    "odd names": {"classes": ODD, "images": 200},
    "averaged weights, SAM in the last part": {"ema": True, "sam_start": 10},
    "no test split": {"test": False},
    "no test split, averaged weights": {"test": False, "ema": True},
    "no validation": {"val": False},
    "nothing scored": {"val": False, "test": False},
    "a loss that is not finite": {"not_finite": (2,)},
    "no finite loss": {"not_finite": (1, 2, 3)},
    "one image": {"images": 1},
}


@pytest.fixture(params=CASES, scope="module")
def drawn(request, tmp_path_factory):
    return draw(write_run(tmp_path_factory.mktemp("runs") / "r", **CASES[request.param]))


def test_every_number_that_is_named_is_the_reports(drawn):
    _, document, result = drawn
    shown = {}
    for path, value, text in document.numbers(result):
        factor = {"data_wait": 100, "peak_memory_bytes": 2**-30}.get(path, 1)
        decimals = len(text.partition(".")[2])
        assert float(text) == pytest.approx(value * factor, abs=0.5001 * 10**-decimals)
        shown[path] = value
    assert shown["cost.forward_backward_passes"] == result["cost"]["forward_backward_passes"]
    scored = [f"{split}.{key}" for split in ("test", "val") if result[split] for key in ("top1_error", "n", "wrong")]
    assert set(scored) <= shown.keys()


def test_it_loads_nothing_and_runs_nothing(drawn):
    text, document, _ = drawn
    assert not document.all("script", "iframe", "object", "embed")
    assert not re.search("https?://|@import|url\\((?!#)", text)
    for element in document.elements:
        for key, value in element["attributes"].items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href", "srcset"):
                assert value.startswith(("#", "data:")), (key, value)


def test_its_structure_can_be_followed_without_seeing_it(drawn):
    _, document, _ = drawn
    assert document.all("html")[0]["attributes"]["lang"] == "en"
    assert len(document.all("title")[0]["text"]) > 5
    assert [len(document.all(tag)) for tag in ("h1", "main", "header", "footer")] == [1, 1, 1, 1]
    levels = [int(element["tag"][1]) for element in document.all("h1", "h2", "h3", "h4")]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [element["attributes"]["id"] for element in document.elements if "id" in element["attributes"]]
    assert len(ids) == len(set(ids))
    for element in document.elements:
        for key in ("href", "aria-labelledby", "aria-describedby"):
            value = element["attributes"].get(key, "")
            names = value.split() if key.startswith("aria") else [value[1:]] if value.startswith("#") else []
            assert set(names) <= set(ids)
        for name in re.findall(r"url\(#([^)]*)\)", " ".join(filter(None, element["attributes"].values()))):
            assert name in ids
    first = next(element for element in document.elements if element["tag"] in ("a", "summary", "button"))
    assert first["attributes"]["href"] == "#main"


def test_every_picture_has_words_and_every_chart_a_table(drawn):
    _, document, result = drawn
    assert all(element["attributes"]["alt"] for element in document.all("img"))
    drawings = document.all("svg")
    assert len(drawings) >= 3 * bool(result.get("test") or result.get("val"))
    for drawing in drawings:
        assert drawing["attributes"]["role"] == "img"
        inside = [element for element in document.elements if drawing in element["parents"]]
        assert [element["tag"] for element in inside[:2]] == ["title", "desc"]
        assert all(element["text"] for element in inside[:2])
        figure = drawing["parents"][-1]
        assert figure["tag"] == "figure"
        tables = [table for table in document.all("table") if figure in table["parents"]]
        assert len(tables) == 1
        assert "details" in tables[0]["inside"]
    for table in document.all("table"):
        assert "scroll" in table["parents"][-1]["attributes"].get("class", "") or "aria-label" in table["attributes"]


def test_the_same_folder_gives_the_same_bytes(tmp_path, monkeypatch):
    import matplotlib

    folder = write_run(tmp_path / "r", ema=True)
    once, _, _ = draw(folder)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)  # nor does it matter how others draw
    again, _, _ = draw(folder)
    assert once == again


def test_names_are_text_whatever_is_in_them(tmp_path):
    _, document, _ = draw(write_run(tmp_path / "r", classes=ODD, images=200))
    assert not document.all("b", "script")  # no class is markup
    cells = document.text("th")
    for name in ("<b>cat</b> & dog", 'owl" onload="x', "漢字 naïve", "$x_1$ \\frac", "{{ 7 * 7 }}"):
        assert name in cells
    labels = document.text("text")
    assert "$x_1$ \\frac" in labels
    assert "…" in labels


def table_of(document, label):
    box = next(e for e in document.all("div") if e["attributes"].get("aria-label", "").startswith(label))
    rows = [row for row in document.all("tr") if box in row["parents"]]
    return [
        [" ".join(e["text"].split()) for e in document.all("td", "th") if e["parents"][-1] is row] for row in rows[1:]
    ]


def test_tables_of_predictions_say_what_the_predictions_say(tmp_path):
    folder = write_run(tmp_path / "r", classes=("cat", "dog", "owl"), images=6)
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 1, 0, 2])
    probability = np.array([0.9, 0.8, 0.75, 0.7, 0.95, 1.0])
    write_predictions(folder / "predictions.parquet", "test", labels, predicted, probability)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics[-1] |= {"n": 6, "wrong": 3}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    _, document, _ = draw(folder)
    by_class = table_of(document, "errors of 3 classes")
    assert [" ".join(row[:4]) for row in by_class] == ["cat 3 2 66.67", "dog 2 1 50.00", "owl 1 0 0.00"]
    assert by_class[0][4:] == [f"{100 * bound:.2f}" for bound in wilson_interval(2, 3)]
    matrix = table_of(document, "images by true class")
    assert [" ".join(row) for row in matrix] == ["cat 1 2 0", "dog 1 1 0", "owl 0 0 1"]
    assert table_of(document, "the most frequent")[:2] == [["cat", "dog", "2", "3"], ["dog", "cat", "1", "2"]]
    mistakes = table_of(document, "wrong predictions")
    assert [row[0] for row in mistakes] == ["4", "0", "1"]  # the surest first
    assert mistakes[0] == ["4", "dog", "cat", "0.950"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "predictions.parquet is not there"),
        (lambda path: path.write_bytes(b"PAR1 and no more"), "predictions.parquet cannot be read"),
        (lambda path: write_predictions(path, "test", [0, 1], [0, 1], [1.0, 1.0]), "is not of the result above"),
        (lambda path: write_predictions(path, "val", [0] * 60, [0] * 60, [1.0] * 60), "is not of the result above"),
        (lambda path: write_predictions(path, "test", [7], [7], [1.0]), "cannot be read"),
    ],
)
def test_predictions_that_are_not_the_results_are_not_shown_and_it_says_why(tmp_path, change, said):
    folder = write_run(tmp_path / "r")
    change(folder / "predictions.parquet")
    _, document, _ = draw(folder)
    assert said in document.text("p")
    assert str(tmp_path) not in document.text("p")
    assert [e["text"] for e in document.all("h2")] == [
        *("Result", "Learning curves", "Cost", "Errors", "Settings", "Provenance")
    ]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({}, "cannot show that its settings are better"),
        ({"test": False}, "No test split was scored"),
        ({"test": False}, "Top-1 error on validation"),
        ({"val": False, "test": False}, "Nothing was scored"),
        ({"status": {"state": "failed", "step": 7}}, "not done (state: failed, step 7 of 15)"),
        ({"status": {"degraded": True}}, "could not be written"),
        ({"provenance": {"warnings": ["<i>seen</i>"]}}, "<i>seen</i>"),
        ({"sam_start": 10}, "trained with SAM, steps 10 to 15"),
        ({}, "data set ./nowhere is not there"),
        ({"classes": [f"c{i}" for i in range(41)], "images": 40}, "1 classes have no image there"),
        ({"select": "best"}, "was best on validation (epoch"),
    ],
)
def test_what_a_reader_must_know_is_said(tmp_path, made, said):
    _, document, _ = draw(write_run(tmp_path / "r", **made))
    assert said in document.text("p")


def test_that_a_run_is_not_done_is_said_on_the_terminal_too(tmp_path, capsys):
    report_runs([write_run(tmp_path / "r", status={"state": "stopped", "step": 7})], as_json=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["schema_version"] == run_report.SCHEMA_VERSION
    assert "warning: This run is not done (state: stopped, step 7 of 15)" in " ".join(shown.err.split())


def test_resumes_and_images_left_out_are_listed(tmp_path):
    resumed = [{"step": 7, "started": "2026-01-03T00:00:00Z", "changed": {"lr": ["0.1", "0.01"]}}]
    bad = [{"split": "train", "row": 3, "where": "image 3 of split train", "reason": "it is empty"}]
    _, document, _ = draw(write_run(tmp_path / "r", provenance={"resumed": resumed, "bad_images": bad}))
    assert table_of(document, "resumed") == [["7", "2026-01-03T00:00:00Z", "lr: 0.1 → 0.01"]]
    assert table_of(document, "images that cannot")[0] == ["image 3 of split train", "it is empty"]


def test_settings_come_with_their_origins(tmp_path):
    _, document, _ = draw(write_run(tmp_path / "r", rho=0.1))
    assert ["rho", "0.1", "flag"] in table_of(document, "settings that are not the default")
    everything = table_of(document, "all settings")
    assert ["momentum", "0.9", "default"] in everything
    assert ["micro_batch", "open", "default"] in everything


def test_the_surest_mistakes_are_pictures_of_the_data_set_while_it_is_there(tmp_path):
    data = write_image_folder(tmp_path / "pets", {"train": 5, "test": 3})
    folder = write_run(tmp_path / "r", classes=("cat", "dog"), images=6, right=0.0, dataset=str(data))
    predicted = np.array([1, 1, 1, 0, 0, 0])
    probability = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    write_predictions(folder / "predictions.parquet", "test", 1 - predicted, predicted, probability)
    _, document, _ = draw(folder)
    pictures = document.all("img")
    assert len(pictures) == 6
    assert pictures[0]["attributes"]["alt"] == "Image 5 of test: dog, taken for cat"
    assert all(picture["attributes"]["src"].startswith("data:image/png;base64,") for picture in pictures)
    shutil.rmtree(data / "test" / "dog")
    assert "is not what it was" in draw(folder)[1].text("p")
    shutil.rmtree(data)
    _, document, _ = draw(folder)
    assert document.all("img") == []
    assert "is not there" in document.text("p")


def test_a_large_picture_becomes_a_small_one(tmp_path):
    data = write_image_folder(tmp_path / "pets", {"train": 5, "test": 1})
    for name in ("cat", "dog"):
        (data / "test" / name / "0.png").write_bytes(image_bytes(0, (400, 200)))
    rows = np.array([1])
    settings = loading.load(None, {"model": "resnet10t", "dataset": str(data)})
    test = open_splits(settings)["test"]
    (uri,) = thumbnails(test, rows, rows)
    kind, _, encoded = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (112, 56)
    with pytest.raises(DataError, match="not what it was"):
        thumbnails(test, rows, rows - 1)


def test_a_chart_says_the_same_twice_and_takes_its_colours_from_the_page():
    series = [Series("a", [1, 2, 3], [1, None, 3], [0.5, None, 2], [2, None, 4]), Series("b", [1], [2])]
    once, again = (
        svg_charts.lines(Heading("x", "A & B", "<d>"), series, x_label="epoch", y_label="loss") for _ in range(2)
    )
    assert once == again
    assert "A &amp; B" in once
    assert "var(--series-2" in once
    assert "#0000f" not in once
    assert "xmlns" not in once


@pytest.mark.parametrize(
    ("value", "form", "written"), [("a", None, "a"), (1.25, ".1f", "1.2"), (7, "d", "7"), (None, ".2f", "\N{EN DASH}")]
)
def test_a_cell_is_written_in_the_form_of_its_column(value, form, written):
    assert html.cell(value, form) == written


def test_the_command_writes_three_files_prints_the_summary_and_says_where_the_page_is(tmp_path):
    folder = write_run(tmp_path / "r")
    done = samtune("report", folder, "--output", tmp_path / "out" / "deep", env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out" / "deep").iterdir()} == {"report.json", "report.md", "report.html"}
    assert not (folder / "report.html").exists()
    assert "test top-1 error" in done.stdout
    assert done.stdout.endswith(f"page: {tmp_path / 'out' / 'deep' / 'report.html'}\n")
    again = samtune("report", folder, "--json")
    result = json.loads(again.stdout)
    assert result == json.loads((folder / "report.json").read_text())
    assert (folder / "report.html").read_bytes() == (tmp_path / "out" / "deep" / "report.html").read_bytes()


def test_the_command_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="there is no run"):
        run_report.rebuild(tmp_path)
    folder = write_run(tmp_path / "r")
    (tmp_path / "file").touch()
    refused = samtune("report", folder, "--output", tmp_path / "file" / "x")
    assert refused.returncode == 8
    assert "another --output" in refused.stderr
    (folder / "provenance.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_report.rebuild(folder)
