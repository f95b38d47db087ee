"""Commands that several ranks run together: one of them prints."""

from collections.abc import Mapping
from typing import Any

from samtune.distributed import environment


def result_to_print(result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What this process prints of a result: a rank of our launcher hands it on, and ranks beside rank 0 print none."""
    if environment.folder() is not None:
        environment.say(0, result=result)
    if environment.place() is not None:
        from samtune.distributed import collectives

        collectives.leave()
    return result if environment.folder() is None and environment.is_first() else None
