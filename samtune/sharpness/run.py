"""`samtune sharpness`: read checkpoints and their data, measure, write sharpness.json and its page."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch

from samtune import console
from samtune.config import loading
from samtune.console.live import duration
from samtune.data.loader import eval_batches
from samtune.data.transforms import EvalTransform
from samtune.distributed import collectives, device, environment, launch, signals
from samtune.errors import CheckpointError, UsageError
from samtune.report.stats import kendall
from samtune.runs import checkpoint, run_log
from samtune.runs.folder import read_report, result_folder
from samtune.sam.filters import select_parameters
from samtune.sharpness import report
from samtune.sharpness.measure import Measures, Subject, measure, measure_line
from samtune.train.eval_checkpoint import OpenedCheckpoint, Selected, open_own_data, rows_of_run

Dtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class Target:
    """A checkpoint to measure. run: the name of its run. label: its name in tables and charts."""

    run: str
    label: str
    opened: OpenedCheckpoint


def find_targets(paths: Sequence[Path], name: str | None, *, ema: bool) -> list[Target]:
    """The checkpoints that these paths of runs, checkpoints and sweeps mean.

    name: last, best, or all that a run has kept. A sweep stands for its final runs. Raises CheckpointError or
    UsageError.
    """
    folders: list[Path] = []
    for path in paths:
        if is_sweep(path):
            finals = sorted(file.parent for file in (path / "runs").glob("*final-*/report.json"))
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


def measure_or_launch(
    paths: Sequence[Path],
    measures: Measures,
    *,
    name: str | None,
    ema: bool,
    split: str,
    max_images: int,
    line_to: Path | None,
    dtype: Dtype,
    gpus: str,
    processes: int | None,
    output: Path | None,
    stop: signals.StopRequest,
    arguments: Sequence[str],
) -> Mapping[str, Any] | None:
    """Check the checkpoints, measure them, write the files, and return the result; None on a rank that has none.

    paths, name: see find_targets. line_to: another run or checkpoint; the loss is measured on the line from the first
    one to it. output: the folder of the files; None: that of the first run, or of the sweep. arguments: the command
    line that starts each rank.
    """
    loading.check_devices(gpus, processes)
    environment.check_processes(processes)
    targets = find_targets(paths, name, ema=ema)
    other = None if line_to is None else OpenedCheckpoint.of(line_to, None, ema=False)
    if other is not None:
        _check_same_architecture(targets[0], other)
    if output is None:
        folder = targets[0].opened.folder.absolute()
        in_run = folder.parent.name == "checkpoints"
        output = paths[0] if is_sweep(paths[0]) else folder.parents[1] if in_run else folder
    if environment.wants_launch(gpus, processes):
        return launch.launch(arguments, launch.LaunchSpec(launch.local_rank_count(gpus, processes)), stop)
    with collectives.connection_errors():
        result = _measure(targets, measures, split, max_images, other, dtype, gpus, processes, stop)
        if is_sweep(paths[0]) and split == "train" and name in (None, "last") and not ema:
            result["correlation"] = _correlation(targets, result["checkpoints"], measures)
        if collectives.rank() == 0:
            with result_folder(output):
                page = report.write(output, result)
            console.info(f"page    {page}")
    return result


def is_sweep(path: Path) -> bool:
    """Whether a path is the folder of a sweep."""
    return (path / "sweep.toml").is_file()


def _measure(
    targets: Sequence[Target],
    measures: Measures,
    split: str,
    max_images: int,
    line_to: OpenedCheckpoint | None,
    dtype: Dtype,
    gpus: str,
    processes: int | None,
    stop: signals.StopRequest,
) -> dict[str, Any]:
    """The content of sharpness.json. After a signal it holds what was found so far, and `interrupted` is true."""
    checkpoints: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "schema_version": 1,
        "split": split,
        "measures": asdict(measures),
        "dtype": dtype,
        "checkpoints": checkpoints,
        "interrupted": False,
    }
    started = time.perf_counter()

    def check_stop() -> None:
        if collectives.any_rank_true(stop.is_requested())[0]:
            raise signals.Interrupted

    with console.RunProgress() as progress:
        for target in targets:
            subject, origin = _load(target.opened, split, max_images, measures.seed, dtype, gpus, processes)
            _check_pattern(subject, measures.params)
            result |= {"images": len(subject.labels), "dataset": origin, "device": str(subject.images.device)}
            label = f"{target.label} ({len(checkpoints) + 1} of {len(targets)})" if len(targets) > 1 else target.label
            counter = _Counter(progress, label, measures.work(len(subject.labels)))
            stop.is_deferred = True
            try:
                found = {"run": target.run, "label": target.label, **target.opened.about}
                checkpoints.append(found)
                with device.oom_as_user_error(f"{measures.micro_batch} images of a second derivative"):
                    for part in measure(subject, measures, counter.add, check_stop):
                        found |= part
                    if line_to is not None and target is targets[0]:
                        other = safetensors.torch.load_file(line_to.weights / "model.safetensors")
                        line = measure_line(subject, other, measures, counter.add, check_stop)
                        result["line"] = {"from": target.label, "to": str(line_to.folder), **line}
            except signals.Interrupted:
                result["interrupted"] = True
                break
    result |= {"seconds": time.perf_counter() - started, "versions": run_log.versions()}
    finite: dict[str, Any] = _without_nan(result)
    return finite


def _without_nan(value: Any) -> Any:
    """The value as JSON has it: p = inf is text, any other number that is not finite null."""
    if isinstance(value, dict):
        return {key: "inf" if key == "p" and item == math.inf else _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _load(
    opened: OpenedCheckpoint,
    split: str,
    max_images: int,
    seed: int,
    dtype: Dtype,
    gpus: str,
    processes: int | None,
) -> tuple[Subject, str]:
    """A model on its device with images drawn from a split of its run, and the origin of the data set.

    Training images have the labels that the run was trained on, wrong ones included.
    """

    def select() -> list[Selected]:
        own = open_own_data(opened.folder, opened.config, opened.manifest)
        return [rows_of_run(opened.config, opened.manifest, split, own)]

    loaded = opened.load(select, gpus=gpus, processes=processes)
    (images,), (rows,), (selected,) = loaded.images, loaded.rows, loaded.selections
    drawn = rows[np.random.default_rng(seed).permutation(len(rows))[:max_images]]
    transform = EvalTransform(loaded.data_config)
    batches = eval_batches(images, drawn, transform, batch_size=256, workers=0, pin_memory=False)
    pixels = torch.cat([pixels for pixels, _ in batches])
    labels = selected.split.labels.copy()
    changes = opened.label_changes() if split == "train" else None
    if changes is not None:
        labels[changes[0]] = changes[1]
    target = next(loaded.model.parameters()).device
    device.set_float32_arithmetic(target, "float32")  # what tf32 rounds is as large as the residuals
    subject = Subject(
        loaded.model.to(getattr(torch, dtype)),
        pixels.to(target),
        torch.from_numpy(labels[drawn]).to(target),
        loaded.data_config,
        opened.config.channels_last,
    )
    return subject, selected.origin


class _Counter:
    """Counts images that went through a model, and shows them with the time that is left."""

    def __init__(self, progress: console.RunProgress, label: str, total: int) -> None:
        self._progress, self._label, self._total = progress, label, total
        self._done = 0
        self._started = time.perf_counter()

    def add(self, what: str, images: int) -> None:
        """Count images. A search that converges early does less, so the time left is an upper bound."""
        self._done = min(self._total, self._done + images)
        left = (time.perf_counter() - self._started) / max(1, self._done) * (self._total - self._done)
        self._progress.count(f"{self._label}: {what}, at most {duration(left)} left", self._done, self._total)


def _correlation(
    targets: Sequence[Target], checkpoints: Sequence[Mapping[str, Any]], measures: Measures
) -> list[dict[str, Any]]:
    """For each m, Kendall's tau over runs between m-sharpness and the gap: test error minus the measured error.

    Figure 3 of Foret et al. 2021 has mutual information in place of tau. Runs without a test error are left out; with
    fewer than four runs there is no entry.
    """
    gaps, measured = [], []
    for target, one in zip(targets, checkpoints, strict=False):
        of_run = read_report(target.opened.folder.parents[1])
        if of_run.get("test") and len(one.get("m_sharpness", ())) == len(measures.m):
            gaps.append(of_run["test"]["top1_error"] - one["top1_error"])
            measured.append({entry["m"]: entry["maximum"] for entry in one["m_sharpness"]})
    if len(gaps) < 4:
        return []
    found = {m: kendall([values[m] for values in measured], gaps, seed=measures.seed) for m in measures.m}
    return [{"m": m, "runs": len(gaps), **one._asdict()} for m, one in found.items()]


def _check_pattern(subject: Subject, params: str) -> None:
    """Raise UsageError for a pattern that is invalid or matches no parameter."""
    try:
        select_parameters(subject.model, params)
    except (ValueError, re.error) as error:
        names = list(dict.fromkeys(name.partition(".")[0] for name, _ in subject.model.named_parameters()))
        raise UsageError(f"--params {params}", str(error), f"names begin with {', '.join(names)}") from None


def _check_same_architecture(target: Target, other: OpenedCheckpoint) -> None:
    """Raise UsageError where the weights of two checkpoints differ in name or shape."""
    shapes = []
    for opened in (target.opened, other):
        with safetensors.safe_open(opened.weights / "model.safetensors", framework="pt") as file:
            shapes.append({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"--direction-to {other.folder}: its weights are not those of the model {target.label}",
            "names or shapes differ",
            "a line needs two checkpoints of one architecture and the same number of classes",
        )
