"""stdout and stderr that are closed, full, without a reader, narrow, or do not speak UTF-8: never a traceback."""

import json
import os
import pty
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT, SMALL_MODEL, write_image_folder
from tests.runs.test_listing import write_run
from tests.support.fault_matrix import row

pytestmark = row(30)

ODD = {
    "dumb": {"TERM": "dumb"},
    "narrow": {"COLUMNS": "20"},
    "one_column": {"COLUMNS": "1"},
    "c_locale": {"LANG": "C", "LC_ALL": "C"},
    "ascii": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii_streams": {"PYTHONIOENCODING": "ascii:strict"},
    "no_color": {"NO_COLOR": "1"},
}


def in_shell(*words, redirect="", env=None):
    """The command line as a shell runs it; its exit code, not that of what it is piped into."""
    command = f"{shlex.join([sys.executable, '-m', 'samtune', *map(str, words)])} {redirect}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=os.environ | (env or {}), capture_output=True, timeout=300, check=False
    )


def a_small_run(folder, data):
    return ["run", *SMALL_MODEL, "--epochs", 1, "--lr", 0.01, "--dataset", data, "--output", folder]


def check_done(folder):
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert json.loads((folder / "report.json").read_text())["val"]["n"] > 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("Bilder") / "Käse", {"train": 12}, classes=("Käse", "naïve"))


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "größer [/b] :cat:", "stopped", degraded=True)
    return folder


@pytest.fixture
def commands(listed):
    """Each with its exit code, and a word of its result."""
    return {
        ("--version",): (0, "samtune"),
        ("datasets",): (0, "flowers102"),
        ("runs", listed): (0, "stopped"),
        ("runs", listed, "--json"): (0, '"state": "stopped"'),
        ("runs", listed / "none"): (2, ""),
    }


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", "| true"])
def test_streams_that_are_closed_full_or_unread_change_no_exit_code(commands, redirect):
    for words, (code, said) in commands.items():
        done = in_shell(*words, redirect=redirect)
        assert done.returncode == code, (words, done.stderr)
        assert code == 2 or done.stderr == b"", words
        assert b"Traceback" not in done.stderr
        if redirect in ("2>&-", "2>/dev/full"):
            assert said in done.stdout.decode(), words


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_before_a_word_is_said_changes_no_exit_code(commands, stream):
    for words, (code, _) in ({("--help",): (0, "")} | commands).items():
        reader, writer = os.pipe()
        os.close(reader)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer}
        command = [sys.executable, "-m", "samtune", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, **streams, check=False)
        os.close(writer)
        assert done.returncode == code, words
        assert code == 2 or not done.stderr


def test_a_result_that_cannot_be_written_is_an_error_of_the_machine(commands):
    for words, (code, _) in commands.items():
        done = in_shell(*words, redirect=">/dev/full")
        assert done.returncode == (code or 8), words
        if code == 0:
            first, why, hint = done.stderr.decode().splitlines()
            assert first == "error: the result could not be written"
            assert "No space left on device" in why
            assert "hint:" in hint


@pytest.mark.parametrize("env", ODD.values(), ids=ODD)
def test_odd_terminals_and_languages_get_plain_text_that_says_all(commands, listed, env):
    for words, (code, said) in commands.items():
        done = in_shell(*words, env=env)
        assert done.returncode == code, (words, done.stderr)
        assert b"\x1b" not in done.stdout + done.stderr
        assert b"Traceback" not in done.stderr
        if env != ODD["one_column"]:  # in which a word does not stay in one piece
            assert said in done.stdout.decode(), words
        if "--json" in words:
            json.loads(done.stdout)
    if "PYTHONIOENCODING" in env:
        assert json.loads(in_shell("runs", listed, "--json", env=env).stdout)[0]["path"].endswith("größer [/b] :cat:")


def test_names_are_shown_as_they_are(listed):
    """They are no markup and no emoji."""
    said = in_shell("runs", listed, env={"COLUMNS": "200"}).stdout.decode()
    assert said.count("größer [/b] :cat:") == 3  # table, what to do, the command


@pytest.mark.parametrize("name", ["narrow", "c_locale", "ascii_streams"])
def test_class_names_in_other_letters_are_shown_or_spelt(data, name):
    done = in_shell("datasets", "show", data, env=ODD[name])
    assert done.returncode == 0, done.stderr
    said = "".join(done.stdout.decode().replace("│", "").split())  # unfolded
    assert ("K\\xe4se" if name == "ascii_streams" else "Käse") in said


def test_a_path_that_is_no_text_is_listed(tmp_path):
    write_run(tmp_path / os.fsdecode(b"caf\xe9"))
    for words in (("runs", tmp_path), ("runs", tmp_path, "--json")):
        done = in_shell(*words)
        assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)[0]["state"] == "done"


def test_what_libraries_print_to_a_closed_stream_does_not_get_into_a_file(tmp_path):
    """The first file that is opened would take the number of the stream."""
    code = (
        "import os, sys; from samtune.console import stdio; stdio.guard(); file = open(sys.argv[1], 'w');"
        "os.write(1, b'noise'); os.write(2, b'noise'); file.write('kept')"
    )
    command = shlex.join([sys.executable, "-c", code, str(tmp_path / "file")])
    subprocess.run(["bash", "-c", f"{command} <&- >&- 2>&-"], cwd=ROOT, check=True)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_pipe_that_does_not_block_gets_the_whole_result():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = "from samtune.console import stdio; stdio.guard(); print('x' * 1_000_000)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=writer)
    os.close(writer)
    with open(reader) as file:
        assert len(file.read()) == 1_000_001
    assert process.wait() == 0


def test_a_run_goes_on_without_its_streams(tmp_path, data):
    done = in_shell(*a_small_run(tmp_path / "r", data), redirect="<&- >&- 2>/dev/full")
    assert (done.returncode, done.stderr) == (0, b"")
    check_done(tmp_path / "r")


def test_a_run_whose_result_cannot_be_written_has_it_in_its_folder(tmp_path, data):
    done = in_shell(*a_small_run(tmp_path / "r", data), "--json", redirect=">/dev/full")
    assert done.returncode == 8
    assert "error: the result could not be written" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    check_done(tmp_path / "r")


def test_a_run_in_a_narrow_room_without_colours_or_letters_says_what_it_has_to_say(tmp_path, data):
    env = ODD["narrow"] | ODD["c_locale"] | ODD["dumb"] | ODD["no_color"] | ODD["ascii_streams"]
    done = in_shell(*a_small_run(tmp_path / "r", data), env=env)
    assert done.returncode == 0, done.stderr
    assert b"epoch   1" in done.stderr
    assert b"val" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr


def test_a_run_outlives_the_terminal_that_shows_its_progress(tmp_path, data):
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "samtune", *map(str, a_small_run(tmp_path / "r", data))]
    env = os.environ | {"TERM": "xterm"}
    streams = {"stderr": terminal, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **streams)
    os.close(terminal)
    shown = b""
    while b"step" not in shown:  # the bar
        shown += os.read(screen, 1000)
    os.close(screen)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert b"val" in said
    check_done(tmp_path / "r")
