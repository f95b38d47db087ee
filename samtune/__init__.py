"""samtune: fine-tune pretrained image models with Sharpness-Aware Minimization, and prove what it gained."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samtune.gradient import SAM

__all__ = ["SAM", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """SAM on first use: the command line answers --help without torch."""
    if name == "SAM":
        from samtune.gradient import SAM

        return SAM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
