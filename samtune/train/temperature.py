"""Temperature scaling (Guo et al. 2017): fit one temperature on validation, and store it beside the weights.

Logits are divided by the temperature before the softmax. The most probable class does not change.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from samtune import console
from samtune.errors import CheckpointError, DataError, MachineError, first_line
from samtune.files import write_atomic
from samtune.report.stats import expected_calibration_error

if TYPE_CHECKING:
    from samtune.train.evaluation import Evaluation

NAME = "temperature.json"
_MIN_RATIO = 3.841  # 95th percentile of chi-squared with one degree of freedom
_MAX = 100.0  # the search is between this and its inverse

Logits = npt.NDArray[np.float32]  # (n, classes)
Labels = npt.NDArray[np.int64]  # (n,)


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature, and NLL (nats per image) and ECE (in [0, 1]) of its n images without and with it."""

    temperature: float
    split: str
    n: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float

    @property
    def is_sure(self) -> bool:
        """Whether it differs from 1 by the likelihood-ratio test at 5 %."""
        return 2 * self.n * (self.nll_before - self.nll_after) > _MIN_RATIO


def fit(logits: Logits, labels: Labels, split: str = "val") -> Temperature:
    """The temperature with the lowest NLL; the search is over its inverse, in which the NLL is convex.

    Raises DataError if every image is classified correctly: the NLL then falls with the temperature down to 0.
    """
    import scipy.optimize  # slow to import

    z = logits.astype(np.float64)
    if (z.argmax(axis=1) == labels).all():
        raise DataError(
            f"no temperature can be fitted on {split}: all its {len(labels)} images are classified rightly",
            "the surer the model, the lower its loss there: the best temperature would be 0",
            "hold more images out of training (--val-fraction), or use the probabilities as they are",
        )
    minimum = scipy.optimize.minimize_scalar(
        lambda log_inverse: nll(z, labels, np.exp(-log_inverse)),
        bounds=(-np.log(_MAX), np.log(_MAX)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    fitted = float(np.exp(-minimum.x))
    if not nll(z, labels, fitted) < nll(z, labels, 1.0):
        fitted = 1.0
    return Temperature(
        fitted,
        split,
        len(labels),
        nll(z, labels, 1.0),
        nll(z, labels, fitted),
        _ece(z, labels, 1.0),
        _ece(z, labels, fitted),
    )


def nll(logits: npt.NDArray[Any], labels: Labels, temperature: float) -> float:
    """The mean negative log-likelihood of the labels, in nats."""
    import scipy.special

    log_p = scipy.special.log_softmax(logits / temperature, axis=1)
    return float(-log_p[np.arange(len(labels)), labels].mean())


def _ece(logits: npt.NDArray[Any], labels: Labels, temperature: float) -> float:
    import scipy.special

    p = np.exp(scipy.special.log_softmax(logits / temperature, axis=1))
    return expected_calibration_error(p.max(axis=1), p.argmax(axis=1) == labels).ece


def write(weights: Path, fitted: Temperature) -> Path:
    """Store it beside its weights, in place of an earlier one. Raises MachineError."""
    path = weights / NAME
    try:
        write_atomic(path, json.dumps(asdict(fitted), indent=2) + "\n")
    except OSError as error:
        raise MachineError(
            f"{path} cannot be written", error.strerror or "", "copy the checkpoint where you may write"
        ) from None
    return path


def read(weights: Path) -> Temperature | None:
    """The temperature stored beside these weights, if any. Raises CheckpointError if it cannot be read."""
    path = weights / NAME
    try:
        stored = Temperature(**json.loads(path.read_text(encoding="utf-8")))
        if not 0 < stored.temperature < float("inf"):
            raise ValueError(f"temperature {stored.temperature}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        hint = "fit it again by `samtune eval RUN --temperature`, or leave it out by --no-temperature"
        raise CheckpointError(f"{path} cannot be read", first_line(error), hint) from None
    return stored


def fit_and_store(scored: "Evaluation", weights: Path) -> dict[str, Any]:
    """Fit on an evaluation that has logits, and write beside the weights, to "file". Raises as `fit` and `write`."""
    assert scored.logits is not None
    fitted = fit(scored.logits, scored.labels, scored.split)
    if not fitted.is_sure:
        console.warn(
            f"{fitted.n} images of {fitted.split} do not tell temperature {fitted.temperature:.3g} from 1 (likelihood "
            "ratio, 5 %): on other images it may make probabilities worse; `samtune predict --no-temperature` is "
            "without it"
        )
    return asdict(fitted) | {"file": str(write(weights, fitted))}
