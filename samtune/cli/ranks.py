"""Commands that several ranks run together: one of them prints."""

from collections.abc import Mapping
from typing import Any

from samtune import ranks


def result_to_print(result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What this process prints of a result: a rank of our launcher hands it on, and ranks beside rank 0 print none."""
    if ranks.folder() is not None:
        ranks.say(0, result=result)
    if ranks.place() is not None:
        from samtune import distributed

        distributed.leave()
    return result if ranks.folder() is None and ranks.is_first() else None
