"""What SAM in pieces costs (`--m 8`): python -m tests.benchmarks.pieces

A step whose batch is cut into pieces of m images runs the same images through the model in smaller parts, which
hardware does less well. The plain passes show how much less: two forward-backward passes with the whole batch at once,
and with the pieces one after the other, without samtune. Then SAM with m = batch, and with m. All run in turn in one
process and are compared by their medians. "loss" is what the hardware loses, "SAM" what SAM in pieces takes over SAM
with m = batch; their quotient is samtune's own part.
"""

import argparse
import copy
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import samtune
from tests.benchmarks.step import CLASSES, RHO, build, conditions, in_turn, sgd, show_conditions

SETTINGS = (("resnet10t", 32, 32), ("tf_efficientnet_lite0", 32, 32), ("tf_efficientnet_lite0", 64, 32))


def steps(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], m: int) -> dict[str, Callable[[], object]]:
    """One function per kind of step, each with a model of its own."""

    def plain(size: int):
        own = copy.deepcopy(model)
        optimizer = sgd(own)

        def step():
            optimizer.zero_grad()
            for images, labels in zip(batch[0].split(size), batch[1].split(size), strict=True):
                for _ in range(2):
                    (F.cross_entropy(own(images), labels) * (len(labels) / len(batch[1]))).backward()
            optimizer.step()

        return step

    def ours(m: int):
        own = copy.deepcopy(model)
        optimizer, sam = sgd(own), samtune.SAM(own, RHO, m=m)

        def step():
            optimizer.zero_grad()
            sam.backward(lambda x, y: F.cross_entropy(own(x), y), *batch)
            optimizer.step()

        return step

    n = len(batch[1])
    return {"passes": plain(n), "passes in pieces": plain(m), "SAM": ours(n), "SAM in pieces": ours(m)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=40, help="timed rounds")
    parser.add_argument("--m", type=int, default=8, help="images in a piece")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for name, img_size, n in SETTINGS:
        images = torch.randn(n, 3, img_size, img_size).contiguous(memory_format=torch.channels_last)
        model = build(name, img_size)
        seconds = in_turn(steps(model, (images, torch.arange(n) % CLASSES), options.m), options.repeat)
        loss, sam = (seconds[f"{kind} in pieces"] / seconds[kind] for kind in ("passes", "SAM"))
        row = {"model": name, "px": img_size, "batch": n, "m": options.m, "loss": loss, "sam": sam, "own": sam / loss}
        rows.append(row | {"ms": {kind: 1000 * s for kind, s in seconds.items()}})
    result = {**conditions(options.repeat), "rows": rows}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    show_conditions(result)
    for row in rows:
        ms = ", ".join(f"{kind} {value:.0f} ms" for kind, value in row["ms"].items())
        print(f"{row['model']}, {row['px']} px, batch {row['batch']}, m {row['m']}: {ms}")
        print(f"    loss x {row['loss']:.2f}, SAM x {row['sam']:.2f}, samtune's own part x {row['own']:.3f}")


if __name__ == "__main__":
    main()
