"""`samtune sharpness`: read checkpoints and their data, measure, write sharpness.json and its page."""

import errno
import hashlib
import math
import os
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
from samtune.sweep import ledger
from samtune.train.eval_checkpoint import OpenedCheckpoint, Selected, open_own_data, rows_of_run

Dtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class Target:
    """A checkpoint to measure. run: the name of its run. label: its name in tables and charts. No two are equal."""

    run: str
    label: str
    opened: OpenedCheckpoint


def find_targets(paths: Sequence[Path], name: str | None, *, ema: bool | None) -> list[Target]:
    """The checkpoints that these paths of runs, checkpoints and sweeps mean, each once.

    name: last, best, or all that a run has kept. A sweep stands for its final runs. Raises CheckpointError or
    UsageError.
    """
    folders: list[Path] = []
    for path in paths:
        if not is_sweep(path):
            folders.append(path)
            continue
        finals = [Path(run["folder"]) for arm in ledger.read(path)["arms"] for run in arm["final"] if run["report"]]
        if not finals:
            raise CheckpointError(f"sweep {path} has no final run that is done", hint="let it finish first")
        folders += finals
    found: dict[Path, OpenedCheckpoint] = {}
    for folder in folders:
        by_step = checkpoint.steps(folder / "checkpoints") if name == "all" else {}
        for one in [by_step[step] for step in sorted(by_step)] or [folder]:
            opened = OpenedCheckpoint.of(one, None if name == "all" else name, ema=ema)
            found.setdefault(opened.folder.resolve(), opened)
    runs = _distinct_names([_run_folder(folder) for folder in found])
    targets = []
    for run, opened in zip(runs, found.values(), strict=True):
        step = f" step {opened.manifest['step']}" if runs.count(run) > 1 else ""
        targets.append(Target(run, run + step, opened))
    return targets


def _run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to, or its own if it has left its run."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: the last parts of its path, as many as tell all different folders apart."""
    different = set(folders)
    for n in range(1, max(len(folder.parts) for folder in folders)):
        names = {folder: "/".join(folder.parts[-n:]) for folder in different}
        if len(set(names.values())) == len(different):
            return [names[folder] for folder in folders]
    return [str(folder) for folder in folders]


def measure_or_launch(
    paths: Sequence[Path],
    measures: Measures,
    *,
    name: str | None,
    ema: bool | None,
    split: str,
    max_images: int,
    line_to: Path | None,
    dataset: str | None,
    dtype: Dtype,
    gpus: str,
    processes: int | None,
    output: Path | None,
    stop: signals.StopRequest,
    arguments: Sequence[str],
) -> Mapping[str, Any] | None:
    """Check the checkpoints, measure them, write the files, and return the result; None on a rank that has none.

    paths, name: see find_targets. line_to: another run or checkpoint; the loss is measured on the line from the first
    one to it. dataset: where the data of the runs are now. output: the folder of the files; None: that of the first
    run, or of the sweep. arguments: the command line that starts each rank. What was measured is written even if a
    later checkpoint cannot be.
    """
    loading.check_devices(gpus, processes)
    environment.check_processes(processes)
    targets = find_targets(paths, name, ema=ema)
    other = None if line_to is None else OpenedCheckpoint.of(line_to, None if name == "all" else name, ema=ema)
    if other is not None:
        _check_same_architecture(targets[0], other)
    if output is None:
        output = paths[0] if is_sweep(paths[0]) else _run_folder(targets[0].opened.folder.absolute())
    with result_folder(output):
        if not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if environment.wants_launch(gpus, processes):
        return launch.launch(arguments, launch.LaunchSpec(launch.local_rank_count(gpus, processes)), stop)
    result: dict[str, Any] = {
        "schema_version": 1,
        "split": split,
        "measures": {**asdict(measures), "p": "inf" if math.isinf(measures.p) else measures.p},
        "dtype": dtype,
        "checkpoints": [],
        "interrupted": True,
    }
    started = time.perf_counter()
    with collectives.connection_errors():
        try:
            _measure(result, targets, measures, split, max_images, other, dataset, dtype, gpus, processes, stop)
        finally:
            result |= {"seconds": time.perf_counter() - started, "versions": run_log.versions()}
            if collectives.rank() == 0 and result["checkpoints"]:
                with result_folder(output):
                    page = report.write(output, result)
                console.info(f"page    {page}")
        collectives.barrier()  # a rank that ends early would have the others ended while the first one writes
    return result


def is_sweep(path: Path) -> bool:
    """Whether a path is the folder of a sweep."""
    return (path / "sweep.toml").is_file()


def _measure(
    result: dict[str, Any],
    targets: Sequence[Target],
    measures: Measures,
    split: str,
    max_images: int,
    line_to: OpenedCheckpoint | None,
    dataset: str | None,
    dtype: Dtype,
    gpus: str,
    processes: int | None,
    stop: signals.StopRequest,
) -> None:
    """Fill the content of sharpness.json. After a signal it holds what was found so far, and `interrupted` is true."""

    def check_stop() -> None:
        if collectives.any_rank_true(stop.is_requested())[0]:
            raise signals.Interrupted

    checkpoints = result["checkpoints"]
    with console.RunProgress() as progress:
        for number, target in enumerate(targets, start=1):
            subject, about = _load(target.opened, split, max_images, measures.seed, dataset, dtype, gpus, processes)
            _check_pattern(subject, measures.params)
            n = len(subject.labels)
            label = f"{target.label} ({number} of {len(targets)})" if len(targets) > 1 else target.label
            has_line = line_to is not None and number == 1
            work = measures.work(n) + (measures.line_work(n) if has_line else 0)
            counter = _Counter(progress, label, work, later=measures.work(n) * (len(targets) - number))
            stop.is_deferred = True
            found = {"run": target.run, "label": target.label, **target.opened.about, **about}
            try:
                with device.oom_as_user_error(
                    f"{measures.micro_batch} images of a second derivative, or Lanczos' vectors of the model's size",
                    "lower --micro-batch, --top or --lanczos-steps",
                ):
                    memory = _memory_for_graphs(subject, measures)
                    parts = measure(subject, measures, counter.add, check_stop, memory)
                    checkpoints.append(found | next(parts))
                    for part in parts:
                        checkpoints[-1] |= _without_nan(part)
                    if line_to is not None and number == 1:
                        other = safetensors.torch.load_file(line_to.weights / "model.safetensors")
                        line = measure_line(subject, other, measures, counter.add, check_stop)
                        to = _run_folder(line_to.folder.absolute()).name
                        ends = {"from": target.label, "to": to, "to_checkpoint": str(line_to.folder)}
                        result["line"] = {**ends, **_without_nan(line)}
            except signals.Interrupted:
                return
            finally:
                stop.is_deferred = False
    result["interrupted"] = False
    if split == "train":
        result |= _correlation(targets, checkpoints)


def _without_nan(value: Any) -> Any:
    """The value as JSON has it: a number that is not finite is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _load(
    opened: OpenedCheckpoint,
    split: str,
    max_images: int,
    seed: int,
    dataset: str | None,
    dtype: Dtype,
    gpus: str,
    processes: int | None,
) -> tuple[Subject, dict[str, Any]]:
    """A model on its device with images drawn from a split of its run, and what the result says of them.

    Training images have the labels that the run was trained on, wrong ones included.
    """

    def select() -> list[Selected]:
        own = open_own_data(opened.folder, opened.config, opened.manifest, dataset)
        return [rows_of_run(opened.config, opened.manifest, split, own)]

    loaded = opened.load(select, gpus=gpus, processes=processes)
    (images,), (rows,), (selected,) = loaded.images, loaded.rows, loaded.selections
    drawn = rows[np.random.default_rng(seed).permutation(len(rows))[:max_images]]
    transform = EvalTransform(loaded.data_config)
    batches = eval_batches(images, drawn, transform, batch_size=256, workers=0, pin_memory=False)
    pixels = torch.cat([pixels for pixels, _ in batches])
    labels = selected.split.labels
    labels = opened.trained_labels(labels) if split == "train" else labels
    target = next(loaded.model.parameters()).device
    device.set_float32_arithmetic(target, "float32")  # what tf32 rounds is as large as the residuals
    subject = Subject(
        loaded.model.to(getattr(torch, dtype)),
        pixels.to(target),
        torch.from_numpy(labels[drawn]).to(target),
        loaded.data_config,
        opened.config.channels_last,
    )
    sha256 = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    return subject, {"dataset": selected.origin, "images": len(drawn), "pixels_sha256": sha256, "device": str(target)}


def _memory_for_graphs(subject: Subject, measures: Measures) -> int:
    """Bytes for graphs that are kept on a rank: half of what Lanczos' vectors leave free.

    Of a CPU's memory, a part for each rank that shares it.
    """
    target, params = subject.images.device, select_parameters(subject.model, measures.params).values()
    sharing = 1 if target.type == "cuda" else collectives.local_world_size()
    vectors = measures.vectors * sum(w.nbytes for w in params)
    return max(0, device.free_memory_bytes(target) // sharing - vectors) // 2


class _Counter:
    """Counts images that went through a model, and shows them with the time that is left.

    total: of this checkpoint. later: images of the checkpoints that follow.
    """

    def __init__(self, progress: console.RunProgress, label: str, total: int, later: int) -> None:
        self._progress, self._label, self._total, self._later = progress, label, total, later
        self._done = 0
        self._started = time.perf_counter()

    def add(self, what: str, images: int) -> None:
        """Count images. A search that converges early does less than the total."""
        self._done = min(self._total, self._done + images)
        rate = (time.perf_counter() - self._started) / max(1, self._done)
        left = duration(rate * (self._total - self._done + self._later))
        self._progress.count(f"{self._label}: {what}, about {left} left", self._done, self._total)


def _correlation(targets: Sequence[Target], checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """m-sharpness against generalisation over runs (Foret et al. 2021, figure 3): two entries of the result.

    `gaps`: for each run the test error minus the error on the measured images, in points. `correlation`: for each m,
    Kendall's tau between m-sharpness and these gaps; the paper has mutual information in its place. A run counts with
    the last of its checkpoints here that was scored on test. Both are empty for fewer than four such runs, and for runs
    of different models or data sets.
    """
    gaps: dict[Path, tuple[int, float]] = {}
    for number, (target, one) in enumerate(zip(targets, checkpoints, strict=True)):
        run = _run_folder(target.opened.folder.resolve())
        if one["ema"] or not (run / "report.json").is_file():
            continue  # of averaged weights, or of a run that has not finished
        scored = read_report(run).get("test_by_checkpoint") or {}
        test = next((test for test in scored.values() if test["step"] == one["step"]), None)
        if test is not None:
            gaps[run] = number, test["top1_error"] - one["top1_error"]
    numbers, heights = [number for number, _ in gaps.values()], [gap for _, gap in gaps.values()]
    by_m = [[entry["m"] for entry in checkpoints[number].get("m_sharpness", ())] for number in numbers]
    kinds = {(targets[number].opened.config.model, targets[number].opened.config.dataset) for number in numbers}
    if len(gaps) < 4 or len(kinds) > 1 or not by_m[0] or any(sizes != by_m[0] for sizes in by_m):
        return {"gaps": [], "correlation": []}
    correlation = []
    for i, m in enumerate(by_m[0]):
        sharpness = [checkpoints[number]["m_sharpness"][i]["maximum"] for number in numbers]
        correlation.append({"m": m, "runs": len(numbers), **kendall(sharpness, heights)._asdict()})
    return {"gaps": [{"checkpoint": n, "gap": gap} for n, gap in zip(numbers, heights, strict=True)]} | {
        "correlation": correlation
    }


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
