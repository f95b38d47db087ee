"""samtune: fine-tune pretrained image models with Sharpness-Aware Minimization, and prove what it gained."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samtune.gradient import SAM
    from samtune.predict import Prediction, Predictor

__all__ = ["SAM", "Prediction", "Predictor", "__version__"]
__version__ = "0.1.0"
_HOMES = {"SAM": "samtune.gradient", "Prediction": "samtune.predict", "Predictor": "samtune.predict"}


def __getattr__(name: str) -> Any:
    """What the library offers, on first use: the command line answers --help without torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
