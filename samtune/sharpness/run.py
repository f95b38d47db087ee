"""`samtune sharpness`: from checkpoints and their data to sharpness.json and its page."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch

from samtune import console
from samtune.console.live import duration
from samtune.data.loader import eval_batches
from samtune.data.transforms import EvalTransform
from samtune.distributed import collectives, device, signals
from samtune.errors import CheckpointError, UsageError
from samtune.report.stats import kendall
from samtune.runs import checkpoint
from samtune.runs.folder import read_report
from samtune.sharpness.measure import Measures, Subject, measure, measure_line
from samtune.train.eval_checkpoint import LoadedCheckpoint, OpenedCheckpoint

Dtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class Target:
    """A checkpoint to measure. run: the name of its run. label: its name in tables and charts."""

    run: str
    label: str
    opened: OpenedCheckpoint


def find_targets(paths: Sequence[Path], name: str | None, *, ema: bool) -> list[Target]:
    """The checkpoints of runs, checkpoints and sweeps. name: last, best, or all that a run has kept.

    Of a sweep, those of its final runs. Raises CheckpointError or UsageError.
    """
    folders: list[Path] = []
    for path in paths:
        if (path / "sweep.toml").is_file():
            finals = sorted(file.parent for file in (path / "runs").glob("final*/**/report.json"))
            if not finals:
                raise CheckpointError(f"sweep {path} has no final run that is done", hint="let it finish first")
            folders += finals
        else:
            folders.append(path)
    found: list[tuple[str, OpenedCheckpoint]] = []
    for folder in folders:
        if name == "all" and (folder / "checkpoints").is_dir():
            by_step = checkpoint.steps(folder / "checkpoints")
            found += [(folder.name, OpenedCheckpoint.of(by_step[step], None, ema=ema)) for step in sorted(by_step)]
        else:
            opened = OpenedCheckpoint.of(folder, None if name == "all" else name, ema=ema)
            in_run = opened.folder.parent.name == "checkpoints"
            found.append((opened.folder.parents[1].name if in_run else opened.folder.name, opened))
    runs = [run for run, _ in found]
    targets = []
    for run, opened in found:
        step = f" step {opened.manifest['step']}" if runs.count(run) > 1 else ""
        targets.append(Target(run, run + step, opened))
    return targets


def measure_checkpoints(
    targets: Sequence[Target],
    measures: Measures,
    *,
    split: str,
    max_images: int,
    line_to: OpenedCheckpoint | None,
    dtype: Dtype,
    gpus: str,
    processes: int | None,
    stop: signals.StopRequest,
    is_sweep: bool = False,
) -> dict[str, Any]:
    """Measure each checkpoint on the same images: the content of sharpness.json. All ranks call it.

    split: val, train or test of the first one's run. max_images: drawn from it by the seed of the measures. line_to: a
    checkpoint to which the loss is followed from the first. is_sweep: add the correlation of m-sharpness with the gap
    between test and train error over the runs. After a signal the result holds what was found, and says so.
    """
    result: dict[str, Any] = {
        "schema_version": 1,
        "split": split,
        "measures": asdict(measures),
        "dtype": dtype,
        "checkpoints": [],
        "interrupted": False,
    }
    started = time.perf_counter()
    stop.is_deferred = True

    def check_stop() -> None:
        if collectives.any_rank_true(stop.is_requested())[0]:
            raise signals.Interrupted

    with console.RunProgress() as progress:
        try:
            for i, target in enumerate(targets):
                loaded = target.opened.load(split, gpus=gpus, processes=processes)
                subject = _subject(loaded, max_images, measures.seed, dtype)
                n = len(subject.labels)
                result |= {"images": n, "dataset": loaded.selected.origin, "device": str(subject.images.device)}
                entry: dict[str, Any] = {"run": target.run, "label": target.label, **target.opened.about}
                result["checkpoints"].append(entry)
                counter = _Counter(progress, target.label, measures.work(n), i, len(targets))
                with device.oom_as_user_error(f"{measures.micro_batch} images of a second derivative"):
                    for part in measure(subject, measures, counter.add, check_stop):
                        for key, value in part.items():
                            entry[key] = [*entry[key], *value] if key == "m_sharpness" and key in entry else value
                    if line_to is not None and i == 0:
                        other = safetensors.torch.load_file(line_to.weights / "model.safetensors")
                        line = measure_line(subject, other, measures, counter.add, check_stop)
                        result["line"] = {"from": target.label, "to": str(line_to.folder), **line}
        except signals.Interrupted:
            result["interrupted"] = True
            result["checkpoints"] = [one for one in result["checkpoints"] if "loss" in one]
    if is_sweep:
        result["correlation"] = _correlation(targets, result["checkpoints"], measures)
    return result | {"seconds": time.perf_counter() - started}


class _Counter:
    """Counts images that went through a model, and shows them with the time that is left."""

    def __init__(self, progress: console.RunProgress, label: str, total: int, number: int, of: int) -> None:
        self._progress, self._total = progress, total
        self._label = label if of == 1 else f"{label} ({number + 1} of {of})"
        self._done = 0
        self._started = time.perf_counter()

    def add(self, what: str, images: int) -> None:
        """Count images. What converged early leaves the rest out, so that the time left is an upper bound."""
        self._done = min(self._total, self._done + images)
        left = (time.perf_counter() - self._started) / max(1, self._done) * (self._total - self._done)
        name = f"{self._label}: {what}, at most {duration(left)} left"
        self._progress.count(name, self._done, self._total)


def _subject(loaded: LoadedCheckpoint, max_images: int, seed: int, dtype: Dtype) -> Subject:
    """A model on its device, with images that are drawn from the selected rows."""
    rows = loaded.rows
    order = np.random.default_rng(seed).permutation(len(rows))[:max_images]
    transform = EvalTransform(loaded.data_config)
    batches = list(eval_batches(loaded.images, rows[order], transform, batch_size=256, workers=0, pin_memory=False))
    target = next(loaded.model.parameters()).device
    model = loaded.model.to(getattr(torch, dtype)).eval()
    return Subject(
        model,
        torch.cat([images for images, _ in batches]).to(target),
        torch.cat([labels for _, labels in batches]).to(target),
        loaded.data_config,
        loaded.config.channels_last,
    )


def _correlation(
    targets: Sequence[Target], checkpoints: Sequence[Mapping[str, Any]], measures: Measures
) -> list[dict[str, Any]]:
    """For each m, Kendall's tau between m-sharpness and the gap of test and train error, over runs.

    The paper's Figure 3 has mutual information in place of tau. Runs without a test error are left out.
    """
    gaps, measured = [], []
    for target, one in zip(targets, checkpoints, strict=False):
        report = read_report(target.opened.folder.parents[1])
        if report.get("test") and len(one.get("m_sharpness", ())) == len(measures.m):
            gaps.append(report["test"]["top1_error"] - one["top1_error"])
            measured.append({entry["m"]: entry["maximum"] for entry in one["m_sharpness"]})
    if len(gaps) < 4:
        return []
    found = {m: kendall([values[m] for values in measured], gaps, seed=measures.seed) for m in measures.m}
    return [{"m": m, "runs": len(gaps), **one._asdict()} for m, one in found.items()]


def check_same_architecture(targets: Sequence[Target], line_to: OpenedCheckpoint | None) -> None:
    """Raise UsageError where a line is asked for between models whose weights differ in name or shape."""
    if line_to is None:
        return
    shapes = []
    for opened in (targets[0].opened, line_to):
        with safetensors.safe_open(opened.weights / "model.safetensors", framework="pt") as file:
            shapes.append({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"--direction-to {line_to.folder}: its weights are not those of the model {targets[0].label}",
            "names or shapes differ",
            "a line needs two checkpoints of one architecture and the same number of classes",
        )
