"""The result of a command that several ranks run together."""

from collections.abc import Mapping
from typing import Any

from samtune.distributed import environment, rank_status


def result_to_print(result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The result that this process prints: None on ranks above 0, and on ranks whose launcher prints it."""
    if environment.status_folder() is not None:
        rank_status.write_status(0, result=result)
    if environment.rank_info() is not None:
        from samtune.distributed import collectives

        collectives.shutdown()
    return result if environment.status_folder() is None and environment.is_rank0() else None


def print_result(result: Mapping[str, Any] | None, as_json: bool, *, is_evaluation: bool) -> None:
    """Print the result of a run or an evaluation, on the process that prints it."""
    result = result_to_print(result)
    if result is None:
        return
    from samtune import console
    from samtune.report import run_report

    if as_json:
        console.print_json(result)
    else:
        summary = run_report.evaluation_summary if is_evaluation else run_report.summary
        console.print_table("Result", summary(result))
