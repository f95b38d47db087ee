"""How far an exported ONNX model agrees with the run that it is from, on every test image of a data set.

    python -m tests.benchmarks.onnx_agreement --json

Trains EfficientNet-Lite0 from its ImageNet weights (extra: demo) on three breeds of pets, or takes a run by --run, and
exports it with and without preprocessing. Without, the file gets the pixels that `samtune eval` gets. With, it gets
each picture as it lies in the data set, decoded by Pillow at its full size. It is compared with the model on these
pixels through the evaluation transform, and with the evaluation itself, which decodes large pictures at half of
their size or less.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image

from samtune.data.cache import Images
from samtune.data.decode import PLAIN
from samtune.data.splits import open_run_splits
from samtune.data.transforms import EvalTransform, normalize
from samtune.export import export
from samtune.models.timm_format import load_checkpoint
from samtune.runs import checkpoint

PETS = Path(__file__).parents[3] / "shared" / "data" / "pets_3breeds" / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run that is there, in place of a new one")
    parser.add_argument("--dataset", default=str(PETS), help="what a new run trains on")
    parser.add_argument("--img-size", type=int, default=128, help="of a new run, in pixels")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samtune-onnx-") as scratch:
        run = given.run or train(Path(scratch) / "run", given.dataset, given.img_size)
        result = agreement(run, Path(scratch))
    if given.json:
        print(json.dumps(result, indent=2))
        return
    for key, value in result.items():
        words = key.replace("_", " ")
        print(f"{words}: {value:.2g}" if isinstance(value, float) else f"{words}: {value}")


def train(folder: Path, dataset: str, img_size: int) -> Path:
    """A short run."""
    settings = ["--model", "tf_efficientnet_lite0", "--img-size", str(img_size), "--epochs", "4", "--workers", "0"]
    command = [sys.executable, "-m", "samtune", "run", *settings, "--dataset", dataset, "--output", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@torch.no_grad()
def agreement(run: Path, scratch: Path) -> dict[str, int | float | str]:
    """Counts of all test images, and the largest differences. Times are of one core, the model's size at a time."""
    torch.set_num_threads(1)
    plain, whole = scratch / "plain.onnx", scratch / "whole.onnx"
    export.export(run, "onnx", output=plain)
    export.export(run, "onnx", output=whole, with_preprocessing=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    plain_session, whole_session = (
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]) for file in (plain, whole)
    )
    folder = checkpoint.find(run)
    manifest = checkpoint.verify(folder)
    parts = open_run_splits(checkpoint.run_config(manifest), classes=manifest["class_names"])
    assert parts.test is not None
    model, data_config = load_checkpoint(folder)
    transform = EvalTransform(data_config)
    evaluated = Images(parts.test, checkpoint.decode_rule(manifest))
    full_size = Images(parts.test, PLAIN)

    def logits_of(pixels: torch.Tensor) -> torch.Tensor:
        return model(normalize(transform(pixels)[None], data_config))[0]

    n = len(parts.test_rows)
    found: dict[str, Any] = {"images": n}
    seconds = {"torch": 0.0, "onnx": 0.0, "onnx_with_preprocessing": 0.0}

    def timed(kind: str, compute: Callable[..., Any], *arguments: object) -> Any:
        began = time.perf_counter()
        value = compute(*arguments)
        seconds[kind] += time.perf_counter() - began
        return value

    def add(which: str, value: str, ours: np.ndarray, expected: np.ndarray) -> None:
        """Count an image of the same class, and keep the largest difference of a value."""
        same, difference = f"same_class_{which}", f"largest_{value}_difference_{which}"
        found[same] = found.get(same, 0) + int(ours.argmax() == expected.argmax())
        found[difference] = max(found.get(difference, 0.0), float(np.abs(ours - expected).max()))

    wrong = dict.fromkeys(("wrong_by_eval", "wrong_without_preprocessing", "wrong_with_preprocessing"), 0)
    for row in parts.test_rows.tolist():
        label = int(parts.test.labels[row])
        images = normalize(transform(evaluated[row])[None], data_config).contiguous()
        picture = np.array(Image.open(io.BytesIO(parts.test.image_bytes(row))).convert("RGB"))
        expected = timed("torch", model, images)[0]
        logits = timed("onnx", plain_session.run, None, {"images": images.numpy()})[0][0]
        (probabilities,) = timed("onnx_with_preprocessing", whole_session.run, None, {"image": picture})
        of_model, of_eval = (value.softmax(0).numpy() for value in (logits_of(full_size[row]), expected))
        add("without_preprocessing", "logit", logits, expected.numpy())
        add("with_preprocessing", "probability", probabilities, of_model)
        add("with_preprocessing_as_evaluated", "probability", probabilities, of_eval)
        for name, scores in zip(wrong, (expected.numpy(), logits, probabilities), strict=True):
            wrong[name] += int(scores.argmax() != label)
    return found | wrong | {f"{kind}_images_per_second": n / took for kind, took in seconds.items()}


if __name__ == "__main__":
    main()
