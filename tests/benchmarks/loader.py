"""How fast batches come: python -m tests.benchmarks.loader FOLDER_OF_FLOWERS FOLDER_OF_CIFAR10

samtune's loader, timm's `create_loader` and a plain torchvision transform with a DataLoader, on the same encoded images
with training transforms of equal content: a random resized crop with flips (192 px photographs to 160 px), or pad, crop
and flip (32 px). By number of workers; the first epoch (for samtune with the decoding that fills its cache) and the
median of the later ones. All kinds run in turn in one process; nothing else is done with a batch than to look at it.
"""

import argparse
import io
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import timm.data
import timm.data.transforms
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from samtune.data import cache, source
from samtune.data.loader import steps_per_epoch, train_batches
from samtune.data.transforms import TrainTransform, normalize
from samtune.distributed import device

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = {"flowers, 192 -> 160 px, batch 32": ("resized", 160, 32), "cifar10, 32 px, batch 128": ("pad", 32, 128)}


class Pictures(torch.utils.data.Dataset):
    """Encoded images as PIL, as timm's and torchvision's own data sets give them."""

    def __init__(self, split: source.Split, transform: Callable | None = None) -> None:
        self.encoded = [split.image_bytes(row) for row in range(len(split))]
        self.labels = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int):
        image = Image.open(io.BytesIO(self.encoded[row])).convert("RGB")
        return (self.transform(image) if self.transform else image), self.labels[row]


def samtune_epochs(split, crop, size, batch_size, workers, epochs) -> Iterator[Iterator]:
    """Decoding is part of the first epoch."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SAMTUNE_CACHE"] = folder
        transform = TrainTransform((size, size), "bilinear" if crop == "pad" else "bicubic", MEAN, crop=crop)
        steps = steps_per_epoch(len(split), batch_size)
        batches: Iterator | None = None

        def one_epoch():
            nonlocal batches
            if batches is None:
                images = cache.decode_into_cache(
                    split, np.arange(len(split)), limit=2**34, threads=device.available_cpus(), progress=lambda *_: None
                )
                batches = train_batches(
                    images,
                    np.arange(len(split)),
                    transform,
                    batch_size=batch_size,
                    seed=0,
                    total_steps=epochs * steps,
                    workers=workers,
                    pin_memory=False,
                )
            for _ in range(steps):
                images, labels = next(batches)
                yield normalize(images, {"mean": MEAN, "std": STD}), labels

        for _ in range(epochs):
            yield one_epoch()


def timm_epochs(split, crop, size, batch_size, workers, epochs) -> Iterator[Iterator]:
    """With its prefetcher, as its training script has it: uint8 from the workers, normalised as a batch."""
    pictures = Pictures(split)
    loader = timm.data.create_loader(
        pictures,
        input_size=(3, size, size),
        batch_size=batch_size,
        is_training=True,
        scale=(0.35, 1.0),
        color_jitter=0.0,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=workers > 0,
    )
    if crop == "pad":  # which timm does not have
        to_array = timm.data.transforms.ToNumpy()
        pictures.transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), to_array])
    for _ in range(epochs):
        yield iter(loader)


def torchvision_epochs(split, crop, size, batch_size, workers, epochs) -> Iterator[Iterator]:
    geometry = (
        v2.RandomCrop(32, padding=4)
        if crop == "pad"
        else v2.RandomResizedCrop(size, scale=(0.35, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    )
    to_float = (v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD))
    transform = v2.Compose([v2.PILToTensor(), geometry, v2.RandomHorizontalFlip(), *to_float])
    loader = torch.utils.data.DataLoader(
        Pictures(split, transform),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    for _ in range(epochs):
        yield iter(loader)


LOADERS = {"samtune": samtune_epochs, "timm": timm_epochs, "torchvision": torchvision_epochs}


def speeds(make, split, crop, size, batch_size, workers, epochs) -> Iterator[float]:
    """Images per second of each epoch, one after the other."""
    for epoch in make(split, crop, size, batch_size, workers, epochs):
        started, seen = time.perf_counter(), 0
        for images, _ in epoch:
            seen += len(images)
            images[0, 0, 0, 0].item()
        yield seen / (time.perf_counter() - started)


def measure(split, crop, size, batch_size, workers, epochs) -> dict[str, dict[str, float]]:
    """All loaders in turn, an epoch of each at a time."""
    running = {name: speeds(make, split, crop, size, batch_size, workers, epochs) for name, make in LOADERS.items()}
    seen: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(epochs):
        for name, epoch in running.items():
            seen[name].append(next(epoch))
    for epoch in running.values():
        epoch.close()
    rows = {name: {"first": values[0], "later": statistics.median(values[1:])} for name, values in seen.items()}
    for row in rows.values():
        for part in ("first", "later"):
            row[f"{part}_over_timm"] = row[part] / rows["timm"][part]
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER", help="Flowers, and CIFAR-10, in hub layout")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(1)  # the main process normalises batches and does nothing else
    tables = {}
    for folder, (title, (crop, size, batch_size)) in zip(options.folders, KINDS.items(), strict=True):
        split = source.open_source(str(folder)).splits["train"]
        for workers in options.workers:
            rows = measure(split, crop, size, batch_size, workers, options.epochs)
            tables[f"{title}, {len(split)} images, {workers} workers"] = rows
    result = {
        "machine": f"{platform.machine()}, {device.available_cpus()} cores",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "epochs": options.epochs,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tables": tables,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in result.items() if key != "tables"))
    for title, rows in tables.items():
        print(f"\n{title}\n  {'images/s':<14}{'first':>9}{'later':>9}   over timm: first, later")
        for name, row in rows.items():
            speed = f"{row['first']:9.0f}{row['later']:9.0f}"
            print(f"  {name:<14}{speed}   x {row['first_over_timm']:.2f}, x {row['later_over_timm']:.2f}")


if __name__ == "__main__":
    main()
