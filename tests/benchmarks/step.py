"""What a SAM step costs on a CPU: python -m tests.benchmarks.step (on a GPU: tests.benchmarks.run_step)

First whole steps on one batch, as ordinary training loops without clipping: SGD, two plain forward-backward passes with
one SGD step (the least that SAM can cost), samtune's SAM, also perturbing norm parameters alone, pytorch-optimizer's
SAM, and a plain loop over tensors. Then the optimizer's side of SAM alone (norm, copy, perturb, restore) on the
parameters of EfficientNet-B7, against the same four passes over flat buffers. All run in turn in one process and are
compared by their medians, so that a machine whose speed drifts slows all of them.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pytorch_optimizer import SAM as PublishedSAM
from torch import nn

import samtune
from samtune.distributed import device
from samtune.models.build import build_model
from samtune.models.training import train_mode
from samtune.sam.perturbation import Perturbation

CLASSES = 102
RHO = 0.05
STEP = ("tf_efficientnet_lite0", 128, 16)  # name, image size, batch size
OPTIMIZER_SIDES = ("tf_efficientnet_lite0", "tf_efficientnet_b7")
CPU = torch.device("cpu")


class NoStep(torch.optim.Optimizer):
    """A base optimizer that costs nothing."""

    def __init__(self, params, **defaults):
        super().__init__(params, defaults)

    def step(self, closure=None):
        return None


def build(name: str, img_size: int) -> nn.Module:
    """A model as a run has it; weights and labels do not change what a step costs."""
    torch.manual_seed(0)
    model, _ = build_model(name, classes=CLASSES, img_size=img_size, drop=0.2, pretrained=False)
    model = model.to(memory_format=torch.channels_last)
    train_mode(model, freeze_bn=True)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)


def whole_steps(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Callable[[], object]]:
    """One function per kind of step, each with a model of its own."""
    autocast = device.autocast(CPU, device.best_dtype(CPU)[0])

    def loss_of(model):
        def loss(images, labels):
            with autocast():
                return F.cross_entropy(model(images).float(), labels)

        return loss

    def plain(passes: int):
        own = copy.deepcopy(model)
        optimizer, loss = sgd(own), loss_of(own)

        def step():
            for _ in range(passes):
                optimizer.zero_grad()
                value = loss(*batch)
                value.backward()
            optimizer.step()
            return value.item()

        return step

    def ours(**options):
        own = copy.deepcopy(model)
        optimizer, loss, sam = sgd(own), loss_of(own), samtune.SAM(own, RHO, **options)

        def step():
            optimizer.zero_grad()
            value = sam.backward(loss, *batch)
            optimizer.step()
            return value.item()

        return step

    def published():
        own = copy.deepcopy(model)
        loss = loss_of(own)
        optimizer = PublishedSAM(own.parameters(), torch.optim.SGD, rho=RHO, lr=1e-3, momentum=0.9, nesterov=True)

        def closure():
            optimizer.zero_grad()
            value = loss(*batch)
            value.backward()
            return value

        def step():
            value = closure()
            optimizer.step(closure)
            return value.item()

        return step

    def per_tensor():
        own = copy.deepcopy(model)
        optimizer, loss, params = sgd(own), loss_of(own), list(own.parameters())

        def step():
            optimizer.zero_grad()
            value = loss(*batch)
            value.backward()
            saved = perturb_per_tensor(params, [p.grad for p in params])
            optimizer.zero_grad()
            loss(*batch).backward()
            restore_per_tensor(params, saved)
            optimizer.step()
            return value.item()

        return step

    return {
        "two plain passes + SGD": plain(2),
        "SGD": plain(1),
        "samtune": ours(),
        "samtune --perturb norm": ours(perturb="norm"),
        "pytorch-optimizer": published(),
        "loop over tensors": per_tensor(),
    }


@torch.no_grad()
def perturb_per_tensor(params, grads):
    """As most published code has it: a norm of norms, a clone and an addition for each tensor."""
    norm = torch.stack([g.norm() for g in grads]).norm()
    saved = []
    for p, g in zip(params, grads, strict=True):
        saved.append(p.clone())
        p.add_(g * (RHO / norm))
    return saved


@torch.no_grad()
def restore_per_tensor(params, saved):
    for p, w in zip(params, saved, strict=True):
        p.copy_(w)


def optimizer_sides(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Norm, copy, perturb and restore, without any pass; the gradients are random numbers."""
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    grads = [p.grad for p in params]
    flat_w, flat_g = (torch.cat([t.detach().reshape(-1) for t in tensors]) for tensors in (params, grads))
    flat_copy = torch.empty_like(flat_w)
    ball = Perturbation(params)
    published = PublishedSAM(params, NoStep, rho=RHO)

    @torch.no_grad()
    def floor():
        scale = RHO / torch.linalg.vector_norm(flat_g)
        flat_copy.copy_(flat_w)
        flat_w.add_(flat_g, alpha=scale.item())
        flat_w.copy_(flat_copy)

    def ours():
        with ball.perturbed(grads, RHO):
            pass

    def theirs():
        published.first_step()
        published.second_step()

    def per_tensor():
        restore_per_tensor(params, perturb_per_tensor(params, grads))

    return {"flat buffers": floor, "samtune": ours, "pytorch-optimizer": theirs, "loop over tensors": per_tensor}


def in_turn(kinds: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds of each, after three rounds that do not count.

    Each round has an order of its own: what ran before leaves its traces in caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    order, shuffle = list(kinds), random.Random(0).shuffle
    for turn in range(repeat + 3):
        shuffle(order)
        for name in order:
            started = time.perf_counter()
            kinds[name]()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def table(title: str, seconds: dict[str, float]) -> dict[str, object]:
    """Rows with the ratio to the first one."""
    floor = next(iter(seconds.values()))
    return {"title": title, "rows": {name: {"ms": 1000 * s, "ratio": s / floor} for name, s in seconds.items()}}


def conditions(repeat: int) -> dict[str, object]:
    """What a measurement was made with."""
    return {
        "device": device.describe(CPU),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "repeat": repeat,
    }


def show_conditions(result: dict) -> None:
    print(", ".join(f"{key} {result[key]}" for key in conditions(0)))


def show(result: dict) -> None:
    show_conditions(result)
    for part in result["tables"]:
        print(f"\n{part['title']}")
        for name, row in part["rows"].items():
            print(f"  {name:<24}{row['ms']:9.1f} ms  x {row['ratio']:.3f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20, help="timed rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    name, img_size, batch_size = STEP
    images = torch.randn(batch_size, 3, img_size, img_size).contiguous(memory_format=torch.channels_last)
    kinds = whole_steps(build(name, img_size), (images, torch.arange(batch_size) % CLASSES))
    title = f"step, {name}, {img_size} px, batch {batch_size}, {device.best_dtype(CPU)[0]}"
    tables = [table(title, in_turn(kinds, options.repeat))]
    for name in OPTIMIZER_SIDES:
        model = build(name, 224)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        seconds = in_turn(optimizer_sides(model), options.repeat)
        tables.append(table(f"optimizer's side, {name}, {count:.1f} M parameters", seconds))
    result = {**conditions(options.repeat), "tables": tables}
    print(json.dumps(result, indent=2)) if options.json else show(result)


if __name__ == "__main__":
    main()
