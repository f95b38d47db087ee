"""What a folder of ImageNet's size costs before the first step: python -m tests.benchmarks.listing --folder TMP

Makes train/<wnid>/*.JPEG and val/<wnid>/*.JPEG below TMP, 1,281,000 and 50,000 pictures in 1,000 classes, as hard links
to one small JPEG a class, and removes them at the end. Then, in a new process, all that a run does with a list of
files: it reads the folder, splits it, names the split and the data, decides that the pixels do not fit the cache, and
takes the first batch of the first epoch. Prints seconds, seconds of computing
and peak memory of each part, and how many files were opened.
"""

import argparse
import io
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samtune.config import loading
from samtune.data import depth
from samtune.data.loader import train_batches
from samtune.data.splits import open_run_splits, split_hash
from samtune.data.transforms import TrainTransform
from samtune.train.run_data import load_run_data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_folder(root: Path, classes: int, train: int, val: int) -> None:
    """The layout of ImageNet, with so many pictures a class; a picture is a hard link to the first of its class."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=50)
        wnid, first = f"n{1440764 + 7919 * label:08d}", None
        for split, count in (("train", train), ("val", val)):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                name = folder / (
                    f"{wnid}_{i}.JPEG" if split == "train" else f"ILSVRC2012_val_{label * val + i:08d}.JPEG"
                )
                if first is None:
                    name.write_bytes(buffer.getvalue())
                    first = name
                else:
                    name.hardlink_to(first)


@contextmanager
def counted_opens() -> Iterator[list[str]]:
    """The files that Python opens in the block."""
    opened: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)  # which cannot be removed
    try:
        yield opened
    finally:
        active = False


def measure(root: Path) -> list[dict[str, Any]]:
    """Seconds, peak memory and files opened, part by part."""
    rows: list[dict[str, Any]] = []

    def part(name: str, function: Callable[[], Any]) -> Any:
        started, cpu = time.perf_counter(), time.process_time()
        with counted_opens() as opened:
            result = function()
        pictures = sum(path.endswith(".JPEG") for path in opened)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        print(f"{name}: {seconds:.1f} s, {cpu:.1f} s of them computing, {peak:.0f} MiB", file=sys.stderr)
        rows.append({"part": name, "seconds": seconds, "cpu": cpu, "peak_mib": peak, "pictures_opened": pictures})
        return result

    def batch(data: Any) -> None:
        transform = TrainTransform((224, 224), "bicubic", MEAN)
        steps = len(data.train_rows) // 256
        options = {"batch_size": 256, "seed": 0, "total_steps": 100 * steps, "workers": 2, "pin_memory": False}
        batches = train_batches(data.train, data.train_rows, transform, **options)
        next(batches)
        batches.close()

    config = loading.load(
        None, {"model": "resnet50", "dataset": str(root), "test_split": "val", "batch_size": 256, "pretrained": False}
    )
    part("start of Python", lambda: None)
    splits = part("scan, validation split", lambda: open_run_splits(config))
    part("hash of the split", lambda: split_hash(splits.train_rows, splits.val_rows, splits.test_rows))
    part("fingerprint of the data", lambda: splits.data.fingerprint)
    part("range of deep pictures", lambda: depth.value_ranges(splits.train, splits.train.labelled))
    data = part("all of it, as a run starts", lambda: load_run_data(config))
    part("first batch of 256", lambda: batch(data))
    return rows


def main() -> None:
    """Make the folder, measure, print, remove it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the pictures are made, and removed again")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--train", type=int, default=1281, help="training pictures a class")
    parser.add_argument("--val", type=int, default=50, help="validation pictures a class")
    parser.add_argument("--keep", action="store_true", help="leave the pictures there; an existing folder is used")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    root = asked.folder / "imagenet" if asked.keep else Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        started = time.perf_counter()
        if not (root / "train").exists():
            make_folder(root, asked.classes, asked.train, asked.val)
        made = time.perf_counter() - started
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows = pool.apply(measure, (root,))
    finally:
        if not asked.keep:
            shutil.rmtree(root)
    if asked.json:
        print(json.dumps({"made_in_seconds": made, "parts": rows}, indent=2))
        return
    print(f"{asked.classes * (asked.train + asked.val):,} pictures, made in {made:.0f} s")
    for row in rows:
        times = "{part:<28} {seconds:7.1f} s, {cpu:6.1f} s of them computing".format(**row)
        print(times, "{peak_mib:7.0f} MiB at most, {pictures_opened} pictures opened".format(**row), sep=", ")


if __name__ == "__main__":
    main()
