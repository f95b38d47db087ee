"""How many steps each network for CIFAR needs to learn 1,000 images of CIFAR-10 from scratch, with SGD and with SAM.

    python -m tests.benchmarks.learning --json

Learned is: less than 5 % training error in evaluation mode, looked at after every epoch of 20 steps of 50 images. By
default each network is trained as a CPU can, at 8 px: the narrow ones as they are, of the others siblings of the same
depth and an eighth of the width (of PyramidNet with 12 of its 90 blocks). With --full it is every network itself at
32 px, on a GPU if there is one. The learning rate rises over the first 40 steps and then stays; Nesterov momentum 0.9,
gradients clipped at norm 5; no augmentation and no weight decay.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import samtune.models  # registers the networks  # noqa: F401
from samtune import SAM
from samtune.sam.step import Step

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
EIGHTH = {"widths": (20, 40, 80)}
SHORT = {"blocks": 4, "alpha": 25}
# Network -> learning rate, rho, and what the sibling is built with that a CPU trains.
NETWORKS: dict[str, tuple[float, float, dict[str, Any]]] = {
    "resnet20": (0.05, 0.05, {}),
    "resnet32": (0.05, 0.05, {}),
    "resnet56": (0.05, 0.05, {}),
    "resnet32_wide": (0.05, 0.05, {"widths": (16, 32, 64), "stem": 8}),
    "wrn16_2_nonorm": (0.02, 0.05, {}),
    "wrn40_2": (0.05, 0.05, {}),
    "wrn16_8": (0.05, 0.05, {"widths": (16, 32, 64)}),
    "wrn28_10": (0.05, 0.05, EIGHTH),
    "wrn40_10": (0.05, 0.05, EIGHTH),
    "wrn40_10_nonorm": (0.02, 0.05, EIGHTH),
    "shake26_2x96d": (0.05, 0.02, {"width": 12}),
    "pyramidnet272_a200": (0.05, 0.05, SHORT),
    "pyramidnet272_a200_shakedrop": (0.05, 0.05, SHORT),
}
WARMUP = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="those to train; all by default")
    parser.add_argument("--dataset", type=Path, default=CIFAR10, help="a folder of CIFAR-10 in the hub's layout")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--most-steps", type=int, default=1200, help="after which a network has not learned")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--full", action="store_true", help="the networks themselves at 32 px")
    given = parser.parse_args()
    device = torch.device("cuda" if given.full and torch.cuda.is_available() else "cpu")
    pixels, labels = (tensor.to(device) for tensor in read(given.dataset, given.images))
    results = []
    for name in given.networks:
        lr, rho_of_sam, sibling = NETWORKS[name]
        size, sibling = (32, {}) if given.full else (8, sibling)
        images = F.interpolate(pixels, size=(size, size), mode="area")
        for rho in (0.0, rho_of_sam):
            torch.manual_seed(0)
            model = timm.create_model(name, **sibling).to(device, memory_format=torch.channels_last)
            began = time.perf_counter()

            def show(step: int, error: float, what: str = f"{name}, rho {rho:g}") -> None:
                print(f"{what}: step {step}, training error {error:.1%}", file=sys.stderr, flush=True)

            steps = learn(model, images, labels, lr=lr, rho=rho, most_steps=given.most_steps, progress=show)
            seconds = time.perf_counter() - began
            parameters = sum(w.numel() for w in model.parameters())
            result = {"network": name, "parameters": parameters, "px": size, "lr": lr, "rho": rho}
            results.append(result | {"steps": steps, "seconds": seconds})
    if given.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        steps = "not learned" if result["steps"] is None else f"{result['steps']} steps"
        size = f"{result['parameters'] / 1e6:.2f} M, {result['px']} px"
        print(f"{result['network']:29} {size:16} rho {result['rho']:<5g} {steps}, {result['seconds']:.0f} s")


def read(dataset: Path, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n training images, normalised, (n, 3, 32, 32), and their labels (n,)."""
    table = pyarrow.parquet.read_table(next(dataset.glob("data/train-*.parquet"))).slice(0, n)
    pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table["img"].to_pylist()]
    images = torch.stack([pil_to_tensor(picture) for picture in pictures]).float()
    return (images - images.mean()) / images.std(), torch.tensor(table["label"].to_pylist())


def learn(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    lr: float,
    rho: float,
    most_steps: int,
    progress: Callable[[int, float], None] = lambda step, error: None,
) -> int | None:
    """Train a model on images (n, 3, h, w) until fewer than 5 % are wrong; the steps that took, or None."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    update = Step(SAM(model, rho), optimizer, F.cross_entropy, clip_grad=5.0)
    step = 0
    while step < most_steps:
        model.train()
        for batch in torch.randperm(len(images), device=images.device).split(50):
            step += 1
            optimizer.param_groups[0]["lr"] = lr * min(1, step / WARMUP)
            update(images[batch], labels[batch])
        error = training_error(model, images, labels)
        progress(step, error)
        if error < 0.05:
            return step
    return None


@torch.no_grad()
def training_error(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images that a model gets wrong in evaluation mode."""
    model.eval()
    wrong: Any = sum((model(x).argmax(1) != y).sum() for x, y in zip(images.split(250), labels.split(250), strict=True))
    return float(wrong) / len(images)


if __name__ == "__main__":
    main()
