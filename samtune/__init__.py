"""samtune: fine-tune pretrained image models with Sharpness-Aware Minimization, and prove what it gained.

report = samtune.run(model="tf_efficientnet_lite0", dataset="flowers102", rho=0.05)  # as `samtune run`
scores = samtune.evaluate(report["folder"], split="val")                             # as `samtune eval`
predictions = samtune.Predictor(report["folder"])(["a.jpg", "b.jpg"])                # names and probabilities
sam = samtune.SAM(model, rho=0.05)                                                   # in a loop of your own
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samtune.api import evaluate, run
    from samtune.predict.predictor import Prediction, Predictor
    from samtune.sam.gradient import SAM

__all__ = ["SAM", "Prediction", "Predictor", "__version__", "evaluate", "run"]
__version__ = "0.1.0"

_MODULES = {
    "SAM": "samtune.sam.gradient",
    "Prediction": "samtune.predict.predictor",
    "Predictor": "samtune.predict.predictor",
    "evaluate": "samtune.api",
    "run": "samtune.api",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def __getattr__(name: str) -> Any:
    """The names above on first use: the command line answers --help without torch."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
