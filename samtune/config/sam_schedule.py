"""The notation of --sam-schedule: in which steps of a run SAM is on."""

import re
from typing import Any

from samtune.config.duration import Duration

_FORMS = 'must be "always", or "late 25%", "early 50%", "every 5", or several of these, as "late 25% every 2"'
_PART = re.compile(r"(?P<word>late|early|every) (?P<amount>[\d.]+ ?(?:epochs?|steps?|%)?)(?: |$)")


def parse(text: str, run: Duration) -> dict[str, Any]:
    """The settings sam_start, sam_end and sam_every that a schedule stands for.

    run: length of the run, from whose end `late` counts back. Raises ValueError with the accepted forms, or where
    `late` is longer than the run or has another unit.
    """
    rest, parts = " ".join(text.replace(",", " ").split()), dict[str, str]()
    if rest == "always":
        rest, parts = "", {"every": "1"}
    while match := _PART.match(rest):
        if match["word"] in parts:
            raise ValueError(_FORMS)
        parts[match["word"]] = match["amount"]
        rest = rest[match.end() :]
    every = parts.get("every", "1")
    if rest or not parts or not every.isdigit() or int(every) < 1:
        raise ValueError(_FORMS)
    late, early = Duration.parse(parts.get("late", "100%")), Duration.parse(parts.get("early", "100%"))
    whole = Duration(100, "%") if late.unit == "%" else run
    if late.unit != whole.unit:
        raise ValueError(f'late must be in the unit of the run\'s length, which is "{run}", or in %')
    if late.amount > whole.amount:
        raise ValueError(f'late must be at most the run\'s length, "{whole}"')
    return {"sam_start": Duration(whole.amount - late.amount, whole.unit), "sam_end": early, "sam_every": int(every)}
