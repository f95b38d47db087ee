"""`samtune guide`: its pages, in the terminal and for a shell."""

import json
import re
import tomllib

import pytest

from samtune import guide
from samtune.cli.completion import topics
from samtune.console import markdown
from tests.conftest import ROOT, samtune

TOPICS = ("data", "training", "sam", "resume", "devices", "sweep", "reports", "sharpness", "python", "contributing")
each_topic = pytest.mark.parametrize("topic", TOPICS)


def words(text):
    """Heading without the marks of Markdown, and without the bullets and numbers that rich draws in their place."""
    text = re.sub(r"^```\w+$|^ *[-•] |^( *\d)\.?(?= )", r"\1", text, flags=re.M)
    return re.sub(r"[`*#]", "", text).split()


def test_a_page_for_each_topic_with_a_line_about_it():
    assert tuple(guide.topics()) == TOPICS
    assert all(guide.topics().values())
    assert json.loads(samtune("guide", "--json").stdout)[0] == {"topic": "data", "about": guide.topics()["data"]}
    listed = samtune("guide", env={"COLUMNS": "100"}).stdout
    assert all(f" {topic} " in listed and about in listed for topic, about in guide.topics().items())


@each_topic
def test_a_page_is_short_and_its_code_fits_a_terminal(topic):
    text = guide.read(topic)
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 120
    for block in re.findall(r"^```\w+\n(.+?)^```", text, re.S | re.M):
        assert max(map(len, block.splitlines())) <= 76


@each_topic
@pytest.mark.parametrize("columns", [60, 80])
def test_a_page_fits_the_terminal_and_loses_no_word(topic, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    rendered = markdown.render(guide.read(topic))
    assert max(map(len, rendered.splitlines())) <= columns
    assert words(rendered) == words(guide.read(topic))


def test_a_page_is_printed_or_given_as_json():
    printed = samtune("guide", "sam", env={"COLUMNS": "60"})
    assert printed.returncode == 0
    assert printed.stdout.startswith("SAM: what a step does")
    assert "`--rho 0`" in printed.stdout  # backquotes stay where no colour marks a command
    assert json.loads(samtune("guide", "sam", "--json").stdout) == {"topic": "sam", "text": guide.read("sam")}
    assert "•" not in samtune("guide", "sam", env={"PYTHONIOENCODING": "ascii"}).stdout


@pytest.mark.parametrize(
    ("typed", "hint"), [("swep", "did you mean sweep?"), ("../guide/sam", "lists them"), ("", "lists them")]
)
def test_an_unknown_topic_ends_with_the_nearest(typed, hint):
    done = samtune("guide", typed)
    assert done.returncode == 2
    assert hint in done.stderr
    assert "data, training, sam" in done.stderr


def test_a_shell_completes_topics():
    assert topics("s") == ["sam", "sweep", "sharpness"]
    asked = {"_SAMTUNE_COMPLETE": "complete_bash", "COMP_WORDS": "samtune guide re", "COMP_CWORD": "2"}
    assert samtune(env=asked).stdout.split() == ["resume", "reports"]


def test_the_pages_are_in_the_wheel():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "samtune.guide" in tool["packages"]
    assert tool["package-data"]["samtune.guide"] == ["*.md"]
