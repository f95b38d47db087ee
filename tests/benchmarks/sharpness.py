"""What a product with the Hessian costs, and `samtune sharpness` in all: python -m tests.benchmarks.sharpness

A product is compared with a forward-backward pass over the same images, in turn in one process, by their medians:
alone, and after one whose graph is kept.
Then the measures of the command itself: EfficientNet-Lite0, 256 images of 64 px, the five largest eigenvalues and the
density from 2 probes of 40 steps; the images are noise, which changes no time but how soon eigenvalues converge.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from samtune.distributed.device import free_memory_bytes
from samtune.models.build import build_model
from samtune.sam.second_derivative import HESSIAN_PASSES
from samtune.sharpness import Hessian
from samtune.sharpness.measure import Measures, Subject, measure

MODELS = (("tf_efficientnet_lite0", 64, 32), ("resnet10t", 32, 32), ("wrn16_2_nonorm", 32, 32))  # name, px, images
IMAGES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="repetitions of each, in turn")
    parser.add_argument("--no-command", action="store_true", help="leave out the measures of the whole command")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    given = parser.parse_args()
    result: dict[str, object] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "products": [product_over_pass(*model, rounds=given.rounds) for model in MODELS],
    }
    if not given.no_command:
        result["command"] = whole_command()
    if given.json:
        print(json.dumps(result, indent=2))
        return
    for one in result["products"]:  # type: ignore[attr-defined]
        print(
            f"{one['model']:22} {one['px']} px, batch {one['batch']}: pass {one['pass_ms']:.0f} ms, product "
            f"{one['product_ms']:.0f} ms, ratio {one['ratio']:.2f} (counted as {HESSIAN_PASSES}); "
            f"with a kept graph {one['kept_ms']:.0f} ms, ratio {one['kept_ratio']:.2f}"
        )
    if "command" in result:
        whole = "lite0, 256 images of 64 px, top 5 and density 2 x 40: {seconds:.0f} s, {products} products"
        print(whole.format(**result["command"]))  # type: ignore[arg-type]


def subject(name: str, px: int, images: int) -> Subject:
    """A model with random weights in evaluation mode, and images of noise."""
    torch.manual_seed(0)
    model, _ = build_model(name, classes=10, img_size=px, drop=0.0, pretrained=False)
    nn.init.normal_(model.get_classifier().weight, std=0.01)
    pixels = torch.randint(0, 256, (images, 3, px, px), dtype=torch.uint8)
    statistics_of = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    model = model.to(memory_format=torch.channels_last).eval()
    return Subject(model, pixels, torch.arange(images) % 10, statistics_of, channels_last=True)


def product_over_pass(name: str, px: int, batch: int, *, rounds: int) -> dict[str, object]:
    """Median milliseconds of a forward-backward pass and of products, and the medians of their ratios."""
    one = subject(name, px, batch)
    params = list(one.model.parameters())
    hessian, kept = (Hessian(one.loss, params, [(one.images, one.labels)], memory=m) for m in (0, 1 << 62))
    vector = hessian.draw(0)
    passes, products, later = [], [], []
    for _ in range(rounds + 2):
        passes.append(timed(lambda: torch.autograd.grad(one.loss(one.images, one.labels), params)))
        products.append(timed(lambda: hessian @ vector))
        later.append(timed(lambda: kept @ vector))
    passes, products, later = passes[2:], products[2:], later[2:]  # the first two are warm-up
    return {
        "model": name,
        "px": px,
        "batch": batch,
        "pass_ms": 1e3 * statistics.median(passes),
        "product_ms": 1e3 * statistics.median(products),
        "kept_ms": 1e3 * statistics.median(later),
        "ratio": statistics.median(b / a for a, b in zip(passes, products, strict=True)),
        "kept_ratio": statistics.median(b / a for a, b in zip(passes, later, strict=True)),
    }


def whole_command() -> dict[str, object]:
    """Seconds of the measures that the command makes, and the number of products."""
    one = subject("tf_efficientnet_lite0", 64, IMAGES)
    measures = Measures(top=5, probes=2, lanczos_steps=40)
    began = time.perf_counter()
    found: dict[str, object] = {}
    for part in measure(one, measures, memory=free_memory_bytes(one.images.device) // 2):
        found |= part
    seconds, of_eigenvalues = time.perf_counter() - began, found["hessian"]["products"]  # type: ignore[index]
    steps = of_eigenvalues - measures.top  # the first probe of the density shares them
    products = of_eigenvalues + max(0, measures.lanczos_steps - steps) + measures.lanczos_steps
    return {"seconds": seconds, "products": products}


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
