"""What a SAM step costs over the SGD step of the same run: python -m tests.benchmarks.step

Both steps are those of `samtune run` (tf_efficientnet_lite0, new head, frozen statistics, clipping, Nesterov SGD) on
the same batch. They are timed in turn in one process and compared by their medians, so that a machine whose speed
drifts slows both.
"""

import argparse
import json
import platform
import statistics
import time
from functools import partial

import torch

from samtune import device, models
from samtune.losses import cross_entropy
from samtune.step import Step


def make_step(rho: float, img_size: int, target: torch.device) -> Step:
    """A step of a run on 102 classes; weights and labels do not change what it costs."""
    torch.manual_seed(0)
    model, _ = models.build("tf_efficientnet_lite0", classes=102, img_size=img_size, drop=0.2, pretrained=False)
    model = model.to(device=target, memory_format=torch.channels_last)
    models.train_mode(model, freeze_bn=True)
    groups = models.parameter_groups(model, lr=1e-3, head_lr=3e-2, weight_decay=1e-3)
    return Step(
        model,
        torch.optim.SGD(groups, momentum=0.9, nesterov=True),
        partial(cross_entropy, smoothing=0.0),
        rho=rho,
        clip_grad=1.0,
        autocast=device.autocast(target, device.best_dtype(target)),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=20, help="timed steps of each kind")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    target = device.pick()
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size, device=target)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(options.batch_size, device=target) % 102
    steps = {"sgd": make_step(0.0, options.img_size, target), "sam": make_step(0.05, options.img_size, target)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.repeat + 3):
        for name, step in steps.items():
            started = time.perf_counter()
            step(images, labels)  # reads its result back from the device, so the device is done
            if turn >= 3:
                seconds[name].append(time.perf_counter() - started)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    weights = sum(p.numel() * p.element_size() for p in steps["sam"].params)
    result = {
        "device": device.describe(target),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "img_size": options.img_size,
        "batch_size": options.batch_size,
        "repeat": options.repeat,
        "sgd_ms": 1000 * medians["sgd"],
        "sam_ms": 1000 * medians["sam"],
        "sam_over_sgd": medians["sam"] / medians["sgd"],
        "weights_mib": weights / 2**20,
    }
    if target.type == "cuda":
        for name, step in steps.items():
            torch.cuda.reset_peak_memory_stats()
            step(images, labels)
            result[f"{name}_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key:>14}  {value:.3f}" if isinstance(value, float) else f"{key:>14}  {value}")


if __name__ == "__main__":
    main()
