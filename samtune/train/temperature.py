"""One temperature that makes a model as sure as it is right (Guo et al. 2017): fitted on validation, stored beside it.

Logits are divided by it before the softmax: which class is the most probable stays as it is.
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
_LEAST_RATIO = 3.841  # chi-squared with one degree of freedom exceeds it by chance one time in twenty
_MOST = 100.0  # temperatures are looked for between this and its inverse

Logits = npt.NDArray[np.float32]  # (n, classes)
Labels = npt.NDArray[np.int64]  # (n,)


@dataclass(frozen=True)
class Temperature:
    """What was fitted, and on how many images; NLL in nats an image, and ECE in [0, 1], without it and with it."""

    temperature: float
    split: str
    n: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float

    @property
    def is_sure(self) -> bool:
        """Whether these images tell it from 1, by the likelihood-ratio test at 5 %: few images may mislead."""
        return 2 * self.n * (self.nll_before - self.nll_after) > _LEAST_RATIO

    def to_json(self) -> dict[str, Any]:
        """Plain data, as temperature.json has them."""
        return asdict(self)


def fit(logits: Logits, labels: Labels, split: str = "val") -> Temperature:
    """The temperature of the lowest NLL. Its inverse is found, in which the NLL is convex.

    Raises DataError where every image is classified rightly: the NLL then falls with the temperature, down to 0.
    """
    import scipy.optimize

    z = logits.astype(np.float64)
    if (z.argmax(axis=1) == labels).all():
        raise DataError(
            f"no temperature can be fitted on {split}: all its {len(labels)} images are classified rightly",
            "the surer the model, the lower its loss there: the best temperature would be 0",
            "hold more images out of training (--val-fraction), or use the probabilities as they are",
        )
    found = scipy.optimize.minimize_scalar(
        lambda log_inverse: nll(z, labels, np.exp(-log_inverse)),
        bounds=(-np.log(_MOST), np.log(_MOST)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    fitted = float(np.exp(-found.x))
    if not nll(z, labels, fitted) < nll(z, labels, 1.0):  # it cannot be told apart from 1
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
    log_p = _log_softmax(logits / temperature)
    return float(-log_p[np.arange(len(labels)), labels].mean())


def _ece(logits: npt.NDArray[Any], labels: Labels, temperature: float) -> float:
    p = np.exp(_log_softmax(logits / temperature))
    return expected_calibration_error(p.max(axis=1), p.argmax(axis=1) == labels).ece


def _log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def write(weights: Path, fitted: Temperature) -> Path:
    """Store it beside the weights that it was fitted for, in place of an earlier one. Raises MachineError."""
    path = weights / NAME
    try:
        write_atomic(path, json.dumps(fitted.to_json(), indent=2) + "\n")
    except OSError as error:
        raise MachineError(
            f"{path} cannot be written", error.strerror or "", "copy the checkpoint where you may write"
        ) from None
    return path


def read(weights: Path) -> Temperature | None:
    """What is stored beside these weights, if anything. Raises CheckpointError for what is no temperature."""
    path = weights / NAME
    try:
        found = Temperature(**json.loads(path.read_text(encoding="utf-8")))
        if not 0 < found.temperature < float("inf"):
            raise ValueError(f"temperature {found.temperature}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        hint = "fit it again by `samtune eval RUN --temperature`, or leave it out by --no-temperature"
        raise CheckpointError(f"{path} cannot be read", first_line(error), hint) from None
    return found


def fit_and_store(scored: "Evaluation", weights: Path) -> dict[str, Any]:
    """Fit on an evaluation that has its logits, and write the result beside the weights; "file" says where.

    Raises what `fit` and `write` raise.
    """
    assert scored.logits is not None
    fitted = fit(scored.logits, scored.labels, scored.split)
    if not fitted.is_sure:
        console.warn(
            f"{fitted.n} images of {fitted.split} do not tell temperature {fitted.temperature:.3g} from 1 (likelihood "
            "ratio, 5 %): on other images it may make probabilities worse; `samtune predict --no-temperature` is "
            "without it"
        )
    return fitted.to_json() | {"file": str(write(weights, fitted))}
