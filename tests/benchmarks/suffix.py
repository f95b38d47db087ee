"""What SAM on the last part of a network costs: python -m tests.benchmarks.suffix

Whole steps on one batch, in turn in one process, compared by their medians: SGD; SAM; SAM from each stage on
(perturb_from), beside the six lines of a plain script that has the network in two parts; SAM of norm layers alone; SAM
along the momentum, which takes one pass; and SAM in a quarter of the steps, as --sam-schedule "late 25%" has it,
computed from the first two. "counted" is 1 + the suffix's share of the multiplications.
"""

import argparse
import copy
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import samtune
from samtune.models.cuts import cut_points
from tests.benchmarks.step import CLASSES, RHO, build, conditions, in_turn, sgd, show_conditions

SETTINGS = (("tf_efficientnet_lite0", 128, 16), ("tf_efficientnet_lite0", 64, 16), ("resnet10t", 32, 32))
CUTS = {
    "tf_efficientnet_lite0": ("blocks.3", "blocks.4", "blocks.5", "blocks.6"),
    "resnet10t": ("layer2", "layer3", "layer4"),
}


def parts(model: nn.Module, cut: str) -> tuple[nn.Module, nn.Module]:
    """The network before and from a stage on, as sequences."""
    if hasattr(model, "conv_stem"):
        number = int(cut.split(".")[1])
        after = (*model.blocks[number:], model.conv_head, model.bn2, model.global_pool, model.classifier)
        return nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:number]), nn.Sequential(*after)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    number = int(cut.removeprefix("layer")) - 1
    front = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool, *stages[:number])
    return front, nn.Sequential(*stages[number:], model.global_pool, model.fc)


def steps(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Callable[[], object]]:
    """One function per kind of step, each with a model of its own."""
    images, labels = batch

    def plain():
        own = copy.deepcopy(model)
        optimizer = sgd(own)

        def step():
            optimizer.zero_grad()
            F.cross_entropy(own(images), labels).backward()
            optimizer.step()

        return step

    def ours(**options):
        own = copy.deepcopy(model)
        optimizer = sgd(own)
        sam = samtune.SAM(own, RHO, optimizer=optimizer, **options)

        def step():
            optimizer.zero_grad()
            sam.backward(lambda x, y: F.cross_entropy(own(x), y), images, labels)
            optimizer.step()

        return step

    def script(cut: str):
        own = copy.deepcopy(model)
        optimizer, (front, suffix) = sgd(own), parts(own, cut)
        params = list(suffix.parameters())

        def step():
            optimizer.zero_grad()
            z = front(images)
            g1 = torch.autograd.grad(F.cross_entropy(suffix(z.detach()), labels), params)
            with torch.no_grad():
                norm = torch.stack(torch._foreach_norm(g1)).norm()
                kept = [w.clone() for w in params]
                torch._foreach_add_(params, g1, alpha=float(RHO / norm))
            F.cross_entropy(suffix(z), labels).backward()
            with torch.no_grad():
                torch._foreach_copy_(params, kept)
            optimizer.step()

        return step

    name = "resnet10t" if hasattr(model, "layer1") else "tf_efficientnet_lite0"
    kinds: dict[str, Callable[[], object]] = {"SGD": plain(), "SAM": ours(), "SAM, norm layers": ours(perturb="norm")}
    kinds["SAM along the momentum"] = ours(ascent="momentum")
    for cut in CUTS[name]:
        kinds[f"SAM from {cut}"] = ours(perturb_from=cut)
        kinds[f"script, {cut}"] = script(cut)
    return kinds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=40, help="timed rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tables = []
    for name, img_size, batch_size in SETTINGS:
        model = build(name, img_size)
        images = torch.randn(batch_size, 3, img_size, img_size).contiguous(memory_format=torch.channels_last)
        seconds = in_turn(steps(model, (images, torch.arange(batch_size) % CLASSES)), options.repeat)
        seconds["SAM in the last quarter of a run"] = 0.75 * seconds["SGD"] + 0.25 * seconds["SAM"]
        counted = {f"SAM from {point.name}": 1 + point.share for point in cut_points(model, (3, img_size, img_size))}
        rows = {
            kind: {"ms": 1000 * s, "ratio": s / seconds["SGD"], "counted": counted.get(kind)}
            for kind, s in seconds.items()
        }
        tables.append({"title": f"{name}, {img_size} px, batch {batch_size}", "rows": rows})
    result = {**conditions(options.repeat), "tables": tables}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    show_conditions(result)
    for table in tables:
        print(f"\n{table['title']}")
        for kind, row in table["rows"].items():
            floor = "" if row["counted"] is None else f"  counted {row['counted']:.3f}"
            print(f"  {kind:<34}{row['ms']:8.1f} ms  x {row['ratio']:.3f}{floor}")


if __name__ == "__main__":
    main()
