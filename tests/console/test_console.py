"""What people see in a terminal that is narrow: no word is broken, what matters least goes first, and a run is live."""

import itertools
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from fcntl import ioctl

import pytest

from samtune import console
from samtune.console import live
from samtune.report import run_page
from samtune.train import summary
from tests.conftest import ROOT, SMALL_MODEL, samtune, write_image_folder
from tests.runs.test_listing import write_run
from tests.support.run_folders import write_sweep

WIDTHS = (60, 80, 100, 120)
NAMES = ("20260102-030405-test_resnet-flowers102-rho0.05-seed0", "größer", "東京-rho0.1", "x" * 130)


def at_width(width, *words):
    done = samtune(*words, env={"COLUMNS": str(width)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def tokens(text):
    return set(re.sub("[┏━┳┓┡╇┩│┃└─┴┘├┼┤┌┬┐]", " ", text).replace(": ", " ").split())


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    report = {"val": {"top1_error": 12.5}, "test": {"top1_error": 1234.25}}
    for name, state in zip(NAMES[:3], ("done", "stopped", "failed"), strict=True):
        write_run(folder / name, state, report=report)
    return folder


def a_terminal(width, height=40):
    screen, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    return screen, terminal


def shown_on(screen, process, until=None):
    """What a process writes to a terminal until it ends, or until it has written something."""
    seen = b""
    with suppress(OSError):  # nobody writes any more
        while (until is None or until not in seen) and (piece := os.read(screen, 10_000)):
            seen += piece
    if until is None:
        process.wait(timeout=60)
    return seen.decode()


def start(*words, terminal, **streams):
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    command = [sys.executable, "-m", "samtune", *map(str, words)]
    streams = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": terminal, "stderr": terminal} | streams
    process = subprocess.Popen(command, env=env, start_new_session=True, **streams)
    os.close(terminal)
    return process


def run_on_a_terminal(width, *words, **streams):
    screen, terminal = a_terminal(width)
    process = start(*words, terminal=terminal, **streams)
    return process, shown_on(screen, process)


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("command", ["datasets", "runs"])
def test_words_of_a_table_are_whole_at_every_width(listed, command):
    words = ("datasets",) if command == "datasets" else ("runs", listed)
    whole = tokens(at_width(400, *words))
    for width in WIDTHS:
        said = at_width(width, *words)
        table, note, _ = said.partition("no room here for")
        table = table if note else said
        assert tokens(table) <= whole, width
        assert all(len(line) <= width for line in table.splitlines() if line[:1] in "┏┃┡│└"), width
        assert command != "runs" or set(NAMES[:3]) <= tokens(table) or width < 80
        assert bool(note) == (tokens(table) < whole and "┏" in table)


def test_the_least_important_columns_go_first_and_it_is_said_which():
    at_80, at_60 = at_width(80, "datasets"), at_width(60, "datasets")
    assert "no room here for: source (" in at_80
    assert "non-commercial" in at_80
    assert "no room here for: source, licence (" in at_60
    assert "flowers102" in at_60


@pytest.fixture(scope="module")
def shown_folders(tmp_path_factory):
    """A data set, a run and a sweep, by name."""
    folder = tmp_path_factory.mktemp("shown")
    data = write_image_folder(folder / "data", {"train": 12, "test": 4})
    done = samtune("run", *SMALL_MODEL, "--dataset", data, "--epochs", 1, "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    write_sweep(folder / "sweep", 'seeds = 2\nbudgets = ["100 passes"]\n[sweep.grid]\nrho=[0.05]\n', lambda run: [1])
    return folder


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(
    "command", ["report run", "report sweep", "data check data", "models lite", "recipes ls", "eval run"]
)
def test_on_a_terminal_no_result_breaks_a_word(command, width, shown_folders, monkeypatch):
    words = command.split()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    wide = samtune(*words, env={"COLUMNS": "1000"}, cwd=shown_folders)
    process, shown = run_on_a_terminal(width, *words, stderr=subprocess.DEVNULL, cwd=shown_folders)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert process.returncode == wide.returncode == 0, shown
    assert tokens(shown.partition("no room here for")[0]) <= tokens(wide.stdout)
    for line in shown.splitlines():
        short = line.replace(str(shown_folders), "")  # a path is one word, however long
        assert len(short) <= width or len(re.sub("`[^`]*`", "", line).split()) <= 1, line


@pytest.fixture
def shown(capsys, monkeypatch):
    """What is printed at a width by a function, called with the other arguments."""

    def at(width, print_it, *arguments, **named):
        monkeypatch.setenv("COLUMNS", str(width))
        print_it(*arguments, **named)
        return capsys.readouterr().out

    return at


def test_a_table_that_fits_nowhere_is_a_value_a_line(shown):
    rows = [{"run": name, "error": 1.5} for name in NAMES]
    said = shown(60, console.print_rows, "Title", rows, droppable=("error",))
    assert said.splitlines() == [line for name in NAMES for line in (f"run: {name}", "  error: 1.50")]
    assert "no room" not in shown(200, console.print_rows, "Title", rows, droppable=("error",))


def test_a_table_takes_the_whole_width_before_it_gives_up_a_column(shown):
    rows = [{"a": "x" * 10, "b": "y " * 10, "c": 12}]
    narrowest = 1 + 3 * 3 + 10 + 1 + 2
    assert "c" in tokens(shown(narrowest, console.print_rows, "Title", rows, droppable=("c",)))
    assert "no room here for: c" in shown(narrowest - 1, console.print_rows, "Title", rows, droppable=("c",))


def test_a_result_with_a_long_path_has_it_in_one_piece(shown):
    path = "/" + "/".join(["folder"] * 12)
    for width in (30, 60, 80, 200):
        rows = {"top-1 error": "1.50 % of many images", "checkpoint": path}
        assert path in shown(width, console.print_table, "Result", rows)


# ---------------------------------------------------------------------------------------------------------------- notes


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_a_note_is_broken_between_words_below_its_label(width):
    line = "data    pets (hub:timm/oxford-iiit-pet): train 3312, val 368 (a stratified 10 % of train), test 3669"
    broken = console.wrapped(line, width).split("\n")
    assert " ".join(part.strip() for part in broken).split() == line.split()
    assert all(len(part) <= width or len(part.split()) == 1 for part in broken[1:])
    assert all(part.startswith(" " * 8) and part[8] != " " for part in broken[1:])


def test_what_has_to_be_copied_is_not_broken():
    path = "x" * 50
    assert console.wrapped(f"output  {path}", 40) == f"output  {path}"
    command = "`samtune report runs/one --output elsewhere`"
    assert command in console.wrapped(f"a few words that come before it, then {command}; then more words", 40)


def test_notes_are_wrapped_on_a_terminal_alone(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 12})
    words = ("run", *SMALL_MODEL, "--dataset", data, "--epochs", 1, "--lr", 0.01)
    process, shown = run_on_a_terminal(60, *words, "--output", tmp_path / "r")
    plain = samtune(*words, "--output", tmp_path / "s").stderr
    assert process.returncode == 0, shown
    assert any(line.startswith("model ") and "parameters" in line for line in plain.splitlines())
    (first,) = (line for line in shown.splitlines() if line.startswith("model "))
    assert len(first.rstrip()) <= 60
    assert "parameters" not in first
    # What the live bar was drawn with, in its own lines.
    bars = [line for line in re.split(r"[\r\n]|\x1b\[2K|\x1b\[1A", shown) if "step" in line and "/" in line]
    assert bars
    assert all("…" not in line for line in bars)


# ----------------------------------------------------------------------------------------------------------------- live


def words_of(line):
    return "".join(text for text, _ in line)


NUMBERS = {"loss": "loss 1.234", "error": "error 12.3 %", "speed": "123 images/s"}
NUMBERS |= {"data wait": "data wait 12 %", "left": "1:02:03 left"}
IMPORTANCE = ["left", "loss", "speed", "bar", "error", "data wait"]


def test_a_bar_never_shows_half_a_number_and_data_wait_goes_before_error():
    kept = {}
    for width in range(10, 131):
        line = words_of(live.draw_bar("step", 1234, 5678, width, numbers=NUMBERS, importance=IMPORTANCE))
        assert "1234/5678" in line or width < 16
        assert len(line) <= max(width, 16)
        kept[width] = [name for name in NUMBERS if NUMBERS[name] in line]
        rest = re.sub("|".join(map(re.escape, NUMBERS.values())), "", line).replace("━", "")
        assert rest.split() == ["step", "1234/5678"] or width < 16
    assert kept[60] == ["loss", "speed", "left"]
    assert kept[80] == ["loss", "error", "speed", "left"]
    assert kept[130] == [*NUMBERS]
    for narrow, wide in itertools.pairwise(range(10, 131)):
        assert set(kept[narrow]) <= set(kept[wide])


def test_a_bar_is_as_full_as_what_is_done():
    for done in range(11):
        line = words_of(live.draw_bar("x", done, 10, 80, importance=["bar"], ascii_only=True))
        assert (line.count("#"), line.count("-")) == (round(2.4 * done), 24 - round(2.4 * done))


def test_names_that_are_too_long_lose_their_beginning():
    line = words_of(live.draw_bar("runs/a/long/way/final-sam-seed0", 1, 20, 24, importance=["bar"]))
    assert line == ".../final-sam-seed0 1/20"
    assert len(line) <= 24
    assert live.shorten("short", 10) == "short"


def some_curves(n=50):
    curves = live.Curves()
    for step in range(1, n + 1):
        curves.add({"split": "train", "step": step, "epoch": step, "loss": 2 / step, "top1_error": 90 / step})
        if step % 5 == 0:
            curves.add({"split": "val", "step": step, "epoch": step, "loss": 1.0, "top1_error": 40 - step % 20})
    return curves


@pytest.mark.parametrize("width", [24, 50, 60, 80, 120])
def test_a_chart_fits_and_shows_both_lines_over_the_whole_run(width):
    lines = live.draw_chart(some_curves(), 100, width)
    assert {len(words_of(line)) for line in lines} == {len(words_of(lines[0]))}
    assert len(words_of(lines[0])) <= width
    assert ("loss" in words_of(lines[0])) == (width >= 50)
    assert "error %" in words_of(lines[0])
    # Half of the run is over: the right half of the last plot is empty.
    plot = [words_of(line)[-((width - 2) // 2 if width >= 50 else width) + 7 :] for line in lines[1:]]
    assert all(not row[len(row) // 2 + 1 :].strip() for row in plot)
    assert any(row[: len(row) // 2].strip() for row in plot)
    styles = {style for line in lines[1:] for text, style in line if any(c > "\u2800" for c in text)}
    assert styles == {"cyan", "magenta"}


def test_a_line_of_a_chart_goes_from_its_first_value_to_its_last():
    curves = live.Curves()
    for step, loss in ((0, 4.0), (99, 1.0)):
        curves.add({"split": "train", "step": step, "epoch": 1, "loss": loss, "top1_error": None})
    first, *_, last = live.draw_chart(curves, 100, 60)[1:]
    assert words_of(first)[:6].strip() == "4"
    assert words_of(last)[:6].strip() == "1"
    assert [words_of(first)[7 + x] == " " for x in (0, 21)] == [False, True]
    assert [words_of(last)[7 + x] == " " for x in (0, 21)] == [True, False]


def test_the_best_is_validations_lowest_error():
    curves = some_curves()
    assert curves.best == (40 - 15, 15)
    curves.add({"split": "test", "step": 60, "epoch": 60, "loss": 0.0, "top1_error": 0.0})
    assert curves.best == (25, 15)


def test_a_value_that_is_not_finite_leaves_a_chart_as_it_is():
    curves = some_curves()
    before = live.draw_chart(curves, 100, 80)
    curves.add({"split": "train", "step": 51, "epoch": 51, "loss": float("nan"), "top1_error": None})
    assert live.draw_chart(curves, 100, 80) == before


def test_a_run_shows_its_chart_on_a_terminal(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 24})
    words = ("run", *SMALL_MODEL, "--dataset", data, "--epochs", 6, "--lr", 0.01, "--no-html")
    process, shown = run_on_a_terminal(80, *words, "--output", tmp_path / "r")
    assert process.returncode == 0, shown
    assert re.search("[\u2801-\u28ff]", shown)
    assert re.search(r"best val \d+\.\d\d % \(epoch \d+\)   rate \S+   rho 0\.05   memory \d\.\d\d GiB", shown)
    assert not (tmp_path / "r" / "report.html").exists()


# ---------------------------------------------------------------------------------------------------------------- watch


def test_watching_runs_ends_well_with_ctrl_c(listed):
    screen, terminal = a_terminal(100)
    process = start("runs", listed, "--watch", terminal=terminal)
    shown = shown_on(screen, process, until=b"Ctrl-C ends")
    process.send_signal(signal.SIGINT)
    shown += shown_on(screen, process)
    assert process.returncode == 0
    assert NAMES[0] in shown
    assert "error" not in shown.replace("top-1 errors", "")


def test_watching_runs_is_for_people_at_a_terminal(listed):
    done = samtune("runs", listed, "--watch")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--watch without a terminal" in done.stderr
    done = samtune("runs", listed, "--watch", "--json")
    assert done.returncode == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    data = write_image_folder(folder / "data", {"train": 12, "test": 6})
    words = ("--dataset", data, "--epochs", 1, "--lr", 0.01, "--output", folder / "r 1")
    done = samtune("run", *SMALL_MODEL, *words, "--json")
    assert done.returncode == 0, done.stderr
    return folder / "r 1", done


def test_a_run_draws_its_page_and_says_what_its_number_means(finished):
    folder, done = finished
    result = json.loads(done.stdout)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") >= result["test"]["wrong"] > 0  # the pictures of mistakes
    assert "This run is not done" not in page
    assert 'http-equiv="refresh"' not in page
    assert summary.interpret(result) in done.stderr
    assert f"{result['test']['wrong']} of {result['test']['n']} test images are wrong" in done.stderr
    assert f"page    {folder / 'report.html'}" in done.stderr
    assert f"`samtune predict '{folder}' IMAGES`" in done.stderr
    assert f"page    {folder / 'report.html'}" in (folder / "log.txt").read_text()


def test_the_page_of_a_run_is_the_one_that_report_draws(finished, tmp_path):
    folder, _ = finished
    assert samtune("report", folder, "--output", tmp_path).returncode == 0
    assert (folder / "report.html").read_text() == (tmp_path / "report.html").read_text()


def test_what_a_number_means_without_a_test_split():
    scores = {"n": 40, "wrong": 4, "top1_error_ci95": [3.96, 23.05]}
    said = summary.interpret({"test": None, "val": scores})
    assert said.startswith("4 of 40 validation images are wrong: of such images, this model gets 4.0 to 23.1 % wrong")
    assert "that is too low" in said
    assert "that is too low" not in summary.interpret({"test": scores, "val": None})


def test_a_page_that_cannot_be_drawn_does_not_fail_a_run(finished, tmp_path, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.setattr("samtune.report.html.render", lambda *_: 1 / 0)

    class Part:
        split = None

    class Job:
        val, test = Part, None

    assert summary.write_page(Job, folder, json.loads((folder / "report.json").read_text())) is None
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert f"`samtune report '{folder}'` tries once more" in said


def test_report_follows_a_run_until_it_ends(finished, tmp_path, monkeypatch):
    folder, _ = finished
    looks, rows, said, drawn = iter([True, True, True, False]), iter([1, 1, 2]), [], []
    monkeypatch.setattr("samtune.runs.listing.is_running", lambda _: next(looks))
    monkeypatch.setattr(run_page, "read_metrics", lambda _: [None] * next(rows))
    monkeypatch.setattr(run_page.time, "sleep", lambda _: None)
    page = tmp_path / "report.html"
    monkeypatch.setattr(run_page, "write_report_page", lambda *_, refresh: (drawn.append(refresh), page))
    run_page.follow(folder, tmp_path, 2.0, said.append)
    assert drawn == [2.0, 2.0]  # not again while nothing was measured
    assert len(said) == 1


def test_a_page_reloads_while_its_run_goes_on_and_no_longer(finished, tmp_path):
    folder, _ = finished
    _, page = run_page.write_report_page(folder, tmp_path, refresh=2.0)
    assert '<meta http-equiv="refresh" content="2">' in page.read_text()
    done = samtune("report", folder, "--output", tmp_path, "--watch")  # it has ended
    assert done.returncode == 0
    assert 'http-equiv="refresh"' not in page.read_text()
    done = samtune("report", folder, folder, "--watch")
    assert (done.returncode, "--watch is for one run" in done.stderr) == (2, True)


def test_the_page_of_a_run_is_drawn_without_torch(finished, tmp_path):
    folder, _ = finished
    code = (
        "import sys; from pathlib import Path; from samtune.report import run_page;"
        "run_page.write_report_page(Path(sys.argv[1]), Path(sys.argv[2])); print('torch' in sys.modules)"
    )
    said = subprocess.check_output([sys.executable, "-c", code, folder, tmp_path], cwd=ROOT, text=True)
    assert said == "False\n"
    assert "data:image/png" in (tmp_path / "report.html").read_text()
