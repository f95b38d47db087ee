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
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

from samtune.data.cache import Images
from samtune.data.decode import PLAIN
from samtune.data.splits import open_run_splits
from samtune.data.transforms import eval_transform, normalize
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
    transform = eval_transform(data_config)
    evaluated = Images(parts.test, checkpoint.decode_rule(manifest))
    full_size = Images(parts.test, PLAIN)

    def logits_of(pixels: torch.Tensor) -> torch.Tensor:
        return model(normalize(transform(pixels)[None], data_config))[0]

    def probability_difference(one: np.ndarray, logits: torch.Tensor) -> float:
        return float(np.abs(one - logits.softmax(0).numpy()).max())

    names = ("plain", "whole", "whole_as_evaluated", "wrong_eval", "wrong_plain", "wrong_whole")
    counts = dict.fromkeys(names, 0)
    largest = dict.fromkeys(("plain_logit", "whole_probability", "whole_probability_as_evaluated"), 0.0)
    seconds = {"torch": 0.0, "plain": 0.0, "whole": 0.0}
    for row in parts.test_rows.tolist():
        label = int(parts.test.labels[row])
        images = normalize(transform(evaluated[row])[None], data_config).contiguous()
        began = time.perf_counter()
        expected = model(images)[0]
        seconds["torch"] += time.perf_counter() - began
        began = time.perf_counter()
        found = plain_session.run(None, {"images": images.numpy()})[0][0]
        seconds["plain"] += time.perf_counter() - began
        picture = np.array(Image.open(io.BytesIO(parts.test.image_bytes(row))).convert("RGB"))
        began = time.perf_counter()
        (probabilities,) = whole_session.run(None, {"image": picture})
        seconds["whole"] += time.perf_counter() - began
        same_pixels = logits_of(full_size[row])
        largest = {
            "plain_logit": max(largest["plain_logit"], float(np.abs(found - expected.numpy()).max())),
            "whole_probability": max(largest["whole_probability"], probability_difference(probabilities, same_pixels)),
            "whole_probability_as_evaluated": max(
                largest["whole_probability_as_evaluated"], probability_difference(probabilities, expected)
            ),
        }
        counts["plain"] += int(found.argmax() == int(expected.argmax()))
        counts["whole"] += int(probabilities.argmax() == int(same_pixels.argmax()))
        counts["whole_as_evaluated"] += int(probabilities.argmax() == int(expected.argmax()))
        counts["wrong_eval"] += int(int(expected.argmax()) != label)
        counts["wrong_plain"] += int(found.argmax() != label)
        counts["wrong_whole"] += int(probabilities.argmax() != label)
    n = len(parts.test_rows)
    return {
        "images": n,
        "same_class_without_preprocessing": counts["plain"],
        "largest_logit_difference_without_preprocessing": largest["plain_logit"],
        "same_class_with_preprocessing": counts["whole"],
        "largest_probability_difference_with_preprocessing": largest["whole_probability"],
        "same_class_with_preprocessing_as_evaluated": counts["whole_as_evaluated"],
        "largest_probability_difference_as_evaluated": largest["whole_probability_as_evaluated"],
        "wrong_by_eval": counts["wrong_eval"],
        "wrong_without_preprocessing": counts["wrong_plain"],
        "wrong_with_preprocessing": counts["wrong_whole"],
        "torch_images_per_second": n / seconds["torch"],
        "onnx_images_per_second": n / seconds["plain"],
        "onnx_with_preprocessing_images_per_second": n / seconds["whole"],
    }


if __name__ == "__main__":
    main()
