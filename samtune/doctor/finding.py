"""The result of a check of this machine."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One result. value: one line of text. hint: how to fix what is broken. details: for programs."""

    name: str
    status: Status
    value: str
    hint: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def gib(size: int) -> str:
    """A number of bytes in GiB."""
    return f"{size / (1 << 30):.1f} GiB"
