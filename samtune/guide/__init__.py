"""The guide: one page per topic, in Markdown, for `samtune guide` and for readers of the repository."""

from pathlib import Path

from samtune.errors import UsageError, did_you_mean

FOLDER = Path(__file__).parent
_ORDER = ("data", "training", "sam", "resume", "devices", "sweep", "reports", "sharpness", "python", "contributing")


def topics() -> dict[str, str]:
    """Topic -> what its page is about, in the order in which a newcomer needs them."""
    found = sorted((path.stem for path in FOLDER.glob("*.md")), key=lambda topic: (*_ORDER, topic).index(topic))
    return {topic: _about(read(topic)) for topic in found}


def read(topic: str) -> str:
    """The page of a topic, in Markdown. Raises UsageError for an unknown topic."""
    path = FOLDER / f"{topic}.md"
    if path.parent != FOLDER or not path.is_file():
        known = list(topics())
        raise UsageError(
            f"no page about {topic}",
            f"the topics are {', '.join(known)}",
            did_you_mean(topic, known) or "`samtune guide` lists them",
        )
    return path.read_text(encoding="utf-8")


def _about(text: str) -> str:
    """The first line of a page, after the colon."""
    return text.partition("\n")[0].partition(": ")[2]
