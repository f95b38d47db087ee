"""Commands that several ranks run together: one of them prints."""

from collections.abc import Mapping
from typing import Any

from samtune.distributed import environment, rank_status


def result_to_print(result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What this process prints of a result: a rank of our launcher hands it on, and ranks beside rank 0 print none."""
    if environment.status_folder() is not None:
        rank_status.write_status(0, result=result)
    if environment.rank_info() is not None:
        from samtune.distributed import collectives

        collectives.shutdown()
    return result if environment.status_folder() is None and environment.is_rank0() else None
