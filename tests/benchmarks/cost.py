"""What communication would cost on many GPUs, on paper: python -m tests.benchmarks.cost

Computed, not measured. A step of SAM is two forward-backward passes; its gradients are reduced once (m device), while
the backward pass of pass 2 runs, or twice (m global), the first time with nothing to run beside it. What is sent is
what `python -m tests.benchmarks.scaling` counts; how fast it goes is an assumption. A GPU takes as long as its
arithmetic or its memory does, whichever is slower, both at their nominal speed: tests/benchmarks/traffic.py counts what
a step reads and writes.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from samtune.models.build import build_model, multiply_accumulates
from tests.benchmarks import traffic

# Model, image size in pixels, images of each GPU.
CASES = (("efficientnet_b7", 600, 16), ("efficientnet_l2", 475, 4), ("efficientnet_l2", 800, 4))
GPUS = (8, 16, 32, 64)
CLASSES = 1000
DECISION_BYTES = 5 * 8  # loss, wrong, n, out of memory, asked to end; float64
# FLOP/s in bf16 without sparsity and bytes/s of memory, by a part of the device's name.
SPEEDS = {
    "H100 80GB HBM3": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A100-SXM4-40GB": (312e12, 1.555e12),
    "A100-PCIE-40GB": (312e12, 1.555e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
}
PASSES = 2  # forward-backward passes of a SAM step
FORWARDS_PER_PASS = 3  # a backward pass takes two forward passes' operations


@dataclass(frozen=True)
class Machine:
    """Bandwidths in bytes/s, speed in FLOP/s.

    in_node: of each GPU in an all-reduce among those of its node (NCCL's "bus bandwidth"). networks: of each node,
    shared by its GPUs. peak: of one GPU, bf16 without sparsity. memory: of one GPU.
    """

    gpus_per_node: int = 8
    in_node: float = 300e9
    networks: tuple[tuple[str, float], ...] = (("25 Gb/s", 25e9 / 8), ("400 Gb/s", 400e9 / 8))
    peak: float = SPEEDS["H100 80GB HBM3"][0]
    memory: float = SPEEDS["H100 80GB HBM3"][1]


def speed(name: str) -> tuple[float, float] | None:
    """FLOP/s and bytes/s of the device of this name; None where they are not known."""
    return next((speed for part, speed in SPEEDS.items() if part in name), None)


def ring_seconds(size: int, members: int, bandwidth: float) -> float:
    """Time of an all-reduce of so many bytes in a ring: each member sends 2 (k-1)/k of them."""
    return 2 * (members - 1) / members * size / bandwidth


def reduction_seconds(size: int, gpus: int, network: float, machine: Machine) -> float:
    """Time of an all-reduce over the GPUs of several nodes: a ring in each node, and one of the nodes."""
    in_node = min(gpus, machine.gpus_per_node)
    return ring_seconds(size, in_node, machine.in_node) + ring_seconds(size, gpus // in_node, network)


def step_seconds(flops: int, size: int, machine: Machine) -> float:
    """The least time of a step that communicates nothing; flops, size: operations of a step, bytes that it moves."""
    return max(flops / machine.peak, size / machine.memory)


def step_flops(flops: int, images: int, passes: int = PASSES) -> int:
    """Operations of a step; flops: of one image's forward pass."""
    return passes * FORWARDS_PER_PASS * flops * images


def exposed_seconds(reduction: float, step: float, *, is_global: bool) -> float:
    """What of the communication a step waits for; reduction: time of one, step: time of the step without any.

    A gradient is reduced while the backward pass of pass 2 makes it: a third of the step. With m global the gradients
    of pass 1 are reduced before pass 2 can begin.
    """
    window = step / (PASSES * FORWARDS_PER_PASS) * 2
    return max(0.0, reduction - window) + (reduction if is_global else 0.0)


def efficiency(reduction: float, step: float, *, is_global: bool) -> float:
    """Images/s of a GPU among many over those of one alone."""
    return step / (step + exposed_seconds(reduction, step, is_global=is_global))


@cache
def counts(name: str, img_size: int, classes: int = CLASSES) -> tuple[int, int]:
    """Trainable parameters, and operations of one image's forward pass: 2 for each multiply-add of a convolution or a
    product of matrices, as torch's FlopCounterMode counts them; all else is left out. Nothing is computed for it.
    """
    with torch.device("meta"):
        model, _ = build_model(name, classes=classes, img_size=img_size, pretrained=False)
    parameters = sum(w.numel() for w in model.parameters() if w.requires_grad)
    return parameters, 2 * multiply_accumulates(model.eval(), (3, img_size, img_size))


def bytes_per_step(parameters: int, *, is_global: bool) -> int:
    """What a rank gives into reductions: float32 gradients, once or twice, and the decision."""
    return 4 * parameters * (2 if is_global else 1) + DECISION_BYTES


def row(name: str, img_size: int, images: int, gpus: int, machine: Machine) -> dict[str, Any]:
    """One model on so many GPUs, over each network. A node alone uses no network."""
    parameters, flops = counts(name, img_size)
    moved = traffic.count(name, img_size, images, CLASSES).bytes
    size, step = 4 * parameters + DECISION_BYTES, step_seconds(step_flops(flops, images), moved, machine)
    nodes = gpus // machine.gpus_per_node
    over = {}
    for network, bandwidth in machine.networks:
        reduction = reduction_seconds(size, gpus, bandwidth, machine)
        over[network] = {
            "network_ms": 1000 * ring_seconds(size, nodes, bandwidth),
            "efficiency_device": efficiency(reduction, step, is_global=False),
            "efficiency_global": efficiency(reduction, step, is_global=True),
        }
    return {
        "model": name,
        "img_size": img_size,
        "images_per_gpu": images,
        "gpus": gpus,
        "parameters": parameters,
        "forward_gflop_per_image": flops / 1e9,
        "bytes_device": bytes_per_step(parameters, is_global=False),
        "bytes_global": bytes_per_step(parameters, is_global=True),
        "memory_gb": moved / 1e9,
        "compute_ms": 1000 * step_flops(flops, images) / machine.peak,
        "memory_ms": 1000 * moved / machine.memory,
        "nvlink_ms": 1000 * ring_seconds(size, min(gpus, machine.gpus_per_node), machine.in_node),
        "step_ms": 1000 * step,
        "over": over,
    }


def assumptions(machine: Machine) -> list[str]:
    """One line each."""
    networks = " or ".join(f"{name} ({bandwidth / 1e9:g} GB/s)" for name, bandwidth in machine.networks)
    return [
        f"nodes of {machine.gpus_per_node} H100, which all-reduce at {machine.in_node / 1e9:g} GB/s per GPU (NVLink)",
        f"between nodes {networks} per node, shared by its GPUs",
        "hierarchical rings: 2 (k-1)/k of the bytes, in the node and then among the nodes, not both at once",
        f"{machine.peak / 1e12:g} TFLOP/s (bf16) or {machine.memory / 1e12:g} TB/s, whichever takes longer",
        "so a step is as fast as can be; a slower one hides more communication",
        f"a step is {PASSES} forward-backward passes of {FORWARDS_PER_PASS} x the forward operations",
        "operations: convolutions and products of matrices, 2 per multiply-add (FlopCounterMode on the meta device)",
        "memory: what the operations of a step read and write, bf16 activations; nothing is cached or fused",
        f"gradients are float32; {CLASSES} classes; nothing is recomputed; the images fit",
        "the reduction hides behind the backward pass of pass 2, a third of the step; that of pass 1 (m global) cannot",
        "left out: latency, the last bucket, waiting for a slower rank, data",
    ]


def show(machine: Machine, rows: list[dict[str, Any]]) -> None:
    print("computed, not measured")
    for line in assumptions(machine):
        print(f"  {line}")
    for number, row in enumerate(rows):
        if number % len(GPUS) == 0:
            print(f"\n{row['model']}, {row['img_size']} px, {row['images_per_gpu']} images per GPU", end=": ")
            print(f"{row['parameters']:,} parameters, {row['forward_gflop_per_image']:.1f} GFLOP forward per image")
            print(f"  bytes per step: m device {row['bytes_device']:,}, m global {row['bytes_global']:,}", end="; ")
            print(f"a step moves {row['memory_gb']:.0f} GB")
            print(f"  a step without communication {row['step_ms']:.1f} ms", end=": ")
            print(f"arithmetic {row['compute_ms']:.1f} ms, memory {row['memory_ms']:.1f} ms")
            print(f"  GPUs{'NVLink':>11}" + "".join(f"{name:>13}{'device':>8}{'global':>8}" for name in row["over"]))
        cells = [
            (f"{over['network_ms']:.1f} ms" if row["gpus"] > machine.gpus_per_node else "-", over)
            for over in row["over"].values()
        ]
        print(f"  {row['gpus']:>4}{row['nvlink_ms']:>8.1f} ms", end="")
        print("".join(f"{t:>13}{o['efficiency_device']:>8.3f}{o['efficiency_global']:>8.3f}" for t, o in cells))
    print("\nNVLink and network: time of one reduction; device and global: expected efficiency over that network")


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()
    machine = Machine()
    rows = [row(*case, gpus, machine) for case in CASES for gpus in GPUS]
    if given.json:
        told = {"measured": False, "assumptions": assumptions(machine), "machine": asdict(machine), "rows": rows}
        print(json.dumps(told, indent=2))
    else:
        show(machine, rows)


if __name__ == "__main__":
    main()
