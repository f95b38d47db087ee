"""Comparison of an export with the model of its checkpoint, on pictures."""

import contextlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data.cache import Images
from samtune.data.splits import open_run_splits
from samtune.data.transforms import EvalTransform, normalize
from samtune.errors import CheckpointError, DataError, SamtuneError, first_line
from samtune.export import onnx_file
from samtune.runs import checkpoint

TOLERANCE = 1e-4  # of a logit, in float32
_PICTURES = 32
_BATCH = 8
# Share of pixels, halfway between two levels, that may be rounded to the other level.
_ROUNDED = 1e-3

Compute = Callable[[torch.Tensor], torch.Tensor]  # (batch, 3, size, size) float32 -> logits (batch, classes)
Progress = Callable[[str, int, int], None]  # label, pictures done, pictures in total


@dataclass(frozen=True)
class Pictures:
    """Pictures to compare on. pixels: (3, h, w) uint8 each. origin: a description of their source."""

    pixels: list[torch.Tensor]
    origin: str


def find_pictures(config: RunConfig, manifest: Mapping[str, Any]) -> Pictures:
    """32 of the run's validation images, else of its test images, else parts of a photograph.

    Pictures that cannot be decoded are left out. manifest: that of the checkpoint.
    """
    try:
        parts = open_run_splits(config, classes=manifest["class_names"])
        for name, split, rows in (("validation", parts.val, parts.val_rows), ("test", parts.test, parts.test_rows)):
            if split is None:
                continue
            images = Images(split, checkpoint.decode_rule(manifest))
            pixels = []
            for i in np.unique(np.linspace(0, len(rows) - 1, min(_PICTURES, len(rows))).astype(int)):
                with contextlib.suppress(DataError):
                    pixels.append(images[int(rows[i])])
            if pixels:
                return Pictures(pixels, f"{len(pixels)} {name} images of {parts.data.name}")
    except SamtuneError as error:
        console.info(f"the run's data set is not here ({error.message})")
    pixels = _photograph_crops()
    return Pictures(pixels, f"{len(pixels)} parts of a photograph that comes with Matplotlib")


def _photograph_crops() -> list[torch.Tensor]:
    """Crops of a photograph in many sizes and shapes, always the same: (3, h, w) uint8 each."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    photograph = Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    try:
        pixels = np.array(Image.open(BytesIO(photograph.read_bytes())).convert("RGB"))
    except OSError as error:
        raise DataError(
            f"no picture to compare on: {photograph} cannot be read",
            first_line(error),
            "put the run's data set back, or install matplotlib again by pip",
        ) from None
    rng = np.random.default_rng(0)
    crops = []
    for _ in range(_PICTURES):
        height, width = (int(rng.integers(side // 6, side + 1)) for side in pixels.shape[:2])
        top, left = int(rng.integers(pixels.shape[0] - height + 1)), int(rng.integers(pixels.shape[1] - width + 1))
        crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        crops.append(torch.from_numpy(crop).permute(2, 0, 1))
    return crops


@torch.no_grad()
def logits(
    exported: Compute, model: nn.Module, data_config: Mapping[str, Any], pictures: Pictures, progress: Progress
) -> dict[str, Any]:
    """The largest difference of logits, and the number of pictures whose class is the same."""
    transform = EvalTransform(data_config)
    images = normalize(torch.stack([transform(pixels) for pixels in pictures.pixels]), data_config).contiguous()
    largest, same, done, n = 0.0, 0, 0, len(images)
    for batch in (images[:1], *images[1:].split(_BATCH)):  # the first of another size, which is free
        expected, actual = model(batch), exported(batch)
        largest = _larger(largest, (actual - expected).abs().max())
        same += int((actual.argmax(1) == expected.argmax(1)).sum())
        done += len(batch)
        progress("comparing", done, n)
    return {"n": n, "largest_difference": largest, "same_class": same}


@torch.no_grad()
def with_preprocessing(
    written: Path,
    model: nn.Module,
    data_config: Mapping[str, Any],
    temperature: float | None,
    pictures: Pictures,
    progress: Progress,
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Compare an ONNX file with preprocessing: (the differences of logits, probabilities and pixels, probabilities).

    The logits are compared on the same pixels, because a pixel that is rounded differently may change a logit by more
    than the arithmetic does.
    """
    session, transform = onnx_file.Session(written), EvalTransform(data_config)
    difference = probability_difference = level = 0.0
    same = rounded = values = 0
    probabilities = []
    for i, pixels in enumerate(pictures.pixels):
        outputs = [torch.from_numpy(output) for output in session(pixels.permute(1, 2, 0))]
        expected_pixels = transform(pixels)
        expected = model(normalize(expected_pixels[None], data_config))[0]
        expected_on_outputs = model(normalize(outputs[2].to(torch.uint8)[None], data_config))[0]
        difference = _larger(difference, (outputs[1] - expected_on_outputs).abs().max())
        expected_probabilities = (expected / (temperature or 1.0)).softmax(0)
        probability_difference = _larger(probability_difference, (outputs[0] - expected_probabilities).abs().max())
        levels = (outputs[2] - expected_pixels.float()).abs()
        level = _larger(level, levels.max())
        rounded, values = rounded + int((levels > 0).sum()), values + levels.numel()
        same += int(outputs[0].argmax() == expected.argmax())
        probabilities.append(outputs[0])
        progress("comparing", i + 1, len(pictures.pixels))
    compared = {
        "n": len(pictures.pixels),
        "largest_difference": difference,
        "same_class": same,
        "largest_probability_difference": probability_difference,
        "values": values,
        "values_rounded_otherwise": rounded,
        "level": level,
    }
    return compared, probabilities


def _larger(one: float, other: torch.Tensor) -> float:
    """The larger one; NaN where either is."""
    return float(torch.maximum(torch.tensor(one, dtype=torch.float64), other.double()))


def check_probabilities(written: Path, pictures: Pictures, probabilities: Sequence[torch.Tensor]) -> None:
    """Raise CheckpointError where the final file, without the outputs for the comparison, gives other probabilities."""
    session = onnx_file.Session(written)
    for pixels, expected in zip(pictures.pixels, probabilities, strict=True):
        (actual,) = session(pixels.permute(1, 2, 0))
        difference = float(np.abs(actual - expected.numpy()).max())
        if not difference <= TOLERANCE:
            raise CheckpointError("the exported file gives other probabilities", f"by up to {difference:.1e}")


def raise_if_different(compared: Mapping[str, Any], to: str) -> None:
    """Raise CheckpointError for logits or pixels that differ by more than is allowed."""
    difference = compared["largest_difference"]
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the export --to {to} gives other logits than the checkpoint: by up to {difference:.1e}",
            f"at most {TOLERANCE:g} in float32 is allowed; {compared['same_class']} of {compared['n']} classes agree",
            "nothing was written; try another format",
        )
    if "level" not in compared:
        return
    rounded, values, level = compared["values_rounded_otherwise"], compared["values"], compared["level"]
    if level > 1 or rounded > _ROUNDED * values:
        raise CheckpointError(
            "the preprocessing in the export gives other pixels than the evaluation: "
            f"{rounded} of {values}, by up to {level:.0f} levels",
            hint="nothing was written; export without --with-preprocessing",
        )
