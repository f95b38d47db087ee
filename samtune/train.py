"""The story of a run, from top to bottom: job, run folder, steps, validation, one test, report."""

import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_model

from samtune import checkpoint, console, device, models, report, runlog
from samtune.config import RunConfig
from samtune.data.loader import train_batches
from samtune.data.splits import split_hash
from samtune.data.transforms import mix, train_transform
from samtune.errors import Diverged, MachineError, SamtuneError, Stopped, first_line
from samtune.evaluate import Evaluation, evaluate, to_device
from samtune.job import Job, prepare
from samtune.runlog import RunLog
from samtune.schedules import cosine, warmup
from samtune.step import StepResult

_ROW_STEPS = 100  # a row of metrics at least this often
# Steps in a row without an update after which a run is given up. A loss scale for float16 finds its place in 16.
_MOST_SKIPPED = 20


def run(config: RunConfig) -> dict[str, Any]:
    """Fine-tune as the config says, leave a run folder, and return its report.

    Raises a SamtuneError for what the user can mend, Stopped after Ctrl-C or SIGTERM; status.json says so too.
    """
    job = prepare(config)
    log = _open_run_folder(job)
    with _outcome(job, log):
        with console.RunProgress(job.total_steps) as progress:
            validated = _train(job, log, progress)
            scored = _test_once(job, log, progress) or validated
        _write_predictions(log.folder / "predictions.parquet", scored)
        return report.write(log.folder)


# ---------------------------------------------------------------------------------------------------------- run folder


def _open_run_folder(job: Job) -> RunLog:
    config, info, data = job.config, job.info, job.data
    optimizer: dict[str, Any] = {
        "name": config.opt,
        "lr": config.lr,
        "head_lr": max(group["lr"] for group in job.optimizer.param_groups if group["name"] == "head"),
        "weight_decay": config.weight_decay,
        "clip_grad": config.clip_grad,
        "schedule": "cosine",
        "warmup_steps": job.warmup_steps,
        "batch_size": job.batch_size,
        "l2_in_loss": config.l2_in_loss,
    }
    if config.opt == "sgd":
        optimizer |= {"momentum": config.momentum, "nesterov": config.momentum > 0}
    provenance: dict[str, Any] = {
        "command": runlog.command(),
        "started": runlog.now(),
        "versions": runlog.versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": [device.describe(job.device)],
        "model": {
            "requested": info.requested,
            "resolved": info.resolved,
            "weights": info.weights,
            "pretraining": info.pretraining,
            "parameters": info.parameters,
            "img_size": info.img_size,
        },
        "dataset": {
            "name": data.name,
            "source": data.origin,
            "train": len(job.train_rows),
            "val": len(job.val_rows),
            "test": len(job.test_rows),
            "classes": len(data.class_names),
            "split_hash": split_hash(
                job.train_rows,
                job.train.split.labels[job.train_rows],
                job.val_rows,
                job.val.split.labels[job.val_rows],
            ),
        },
        "optimizer": optimizer,
        "sam": {
            "enabled": config.rho > 0,
            "rho": config.rho,
            "p": "inf" if math.isinf(config.p) else config.p,
            "adaptive": config.adaptive,
            "eta": config.eta,
            "m": config.m,
            "perturb": config.perturb,
            "head_rho_factor": config.head_rho_factor,
            "start": job.rho.start,
            "end": job.rho.end,
            "every": job.rho.every,
            "schedule": job.rho.shape,
            "final": job.rho.final,
            "warmup_steps": job.rho.warmup_steps,
            "ascent_fraction": config.ascent_fraction,
            "ascent_steps": config.ascent_steps,
        },
        "bad_images": job.bad_images,
        "warnings": [report.seen_warning(job.seen_test_images)] if job.seen_test_images else [],
        "steps_per_epoch": job.steps_per_epoch,
    }
    if job.noise is not None:
        provenance["dataset"]["label_noise"] = job.noise.about
    assert config.output is not None
    log = RunLog(config.output, config.to_toml(), provenance, job.total_steps)

    resolved = "" if info.requested == info.resolved else f" -> {info.resolved}"
    held_out = job.val.split.name == job.train.split.name
    own = f"a stratified {100 * config.val_fraction:g} % of train" if held_out else "its own split"
    sizes = f"train {len(job.train_rows)}, val {len(job.val_rows)} ({own}), test {provenance['dataset']['test']}"
    for line in (
        f"model   {info.requested}{resolved}: pretrained on {info.pretraining}, weights {info.weights}, "
        f"{info.parameters / 1e6:.1f} M parameters, {info.img_size} px",
        f"data    {data.name} ({data.origin}): {sizes}; {len(data.class_names)} classes",
        f"steps   {job.total_steps} of {job.batch_size} images ({config.epochs}), warm-up {job.warmup_steps}, cosine",
        f"update  {report.sam_words(provenance['sam'], job.total_steps)}",
        f"        {config.opt}, lr {config.lr:g} (head {optimizer['head_lr']:g}), clip {config.clip_grad:g}",
        f"device  {provenance['devices'][0]}, {config.amp_dtype}; {config.workers} data workers",
        f"output  {config.output}",
    ):
        _say(log, line)
    for warning in provenance["warnings"]:
        _say(log, warning, console.warn)
    if job.bad_images:
        _say(
            log, f"{len(job.bad_images)} images cannot be decoded and are left out; the report lists them", console.warn
        )
    if job.noise is not None:
        job.noise.write(log.folder / "label_noise.parquet")
        _say(log, f"noise   {report.noise_words(job.noise.about)}; validation and test keep clean labels")
    for note in data.notes:
        log.note(note)
    if data.test is None:
        _say(log, f"{data.name} has no test split: the report will show the validation error alone", console.warn)
    return log


def _say(log: RunLog, text: str, speak: Callable[[str], None] = console.note) -> None:
    speak(text)
    log.note(text)


@contextmanager
def _outcome(job: Job, log: RunLog) -> Iterator[None]:
    """Whatever ends the run, status.json says how; SIGTERM and SIGHUP end it like Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name, 128 + number)

    # What is ignored stays ignored: nohup means it.
    heard = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, stop) for s in heard}
    try:
        try:
            with device.room_for(f"{job.batch_size} images of {job.info.img_size} px"):
                yield
            log.status("done", 0)
        except KeyboardInterrupt:
            raise Stopped("Ctrl-C", 128 + signal.SIGINT) from None
        except OSError as error:
            raise MachineError(
                f"the machine broke off run {log.folder}",
                first_line(error),
                "check disk space and permissions, run again",
            ) from None
    except (SamtuneError, Stopped) as error:
        with suppress(OSError):
            log.note(str(error))
            log.status("stopped" if isinstance(error, Stopped) else "failed", error.exit_code)
        raise
    except BaseException:
        log.status("failed", SamtuneError.exit_code)
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# -------------------------------------------------------------------------------------------------------------- epochs


class _Meter:
    """Sums over some steps; means are taken when they are asked for."""

    def __init__(self) -> None:
        self.steps = self.skipped = self.n = self.seen = self.wrong = 0
        self.loss = self.grad_norm = self.passes = self.rho = self.waiting = self.working = 0.0

    def add(self, result: StepResult, n: int, rho: float, waiting: float, working: float) -> None:
        """A step on n images. Where nothing was updated, loss and error are not counted."""
        self.steps += 1
        self.n += n
        self.passes += result.passes
        self.rho = rho or self.rho
        self.waiting += waiting
        self.working += working
        if not result.applied:
            self.skipped += 1
            return
        self.seen += result.n
        self.wrong += result.wrong
        self.loss += result.loss * result.n
        self.grad_norm += result.grad_norm

    @property
    def mean_grad_norm(self) -> float:
        """NaN if no step was applied."""
        return self.grad_norm / (self.steps - self.skipped) if self.seen else math.nan

    def means(self) -> dict[str, float]:
        """Loss in nats, error in percent, images per second, share of the time spent waiting for data in [0, 1].

        Loss and error are NaN if no step was applied.
        """
        seconds = self.waiting + self.working
        return {
            "loss": self.loss / self.seen if self.seen else math.nan,
            "top1_error": 100 * self.wrong / self.seen if self.seen else math.nan,
            "images_per_second": self.n / seconds,
            "data_wait": self.waiting / seconds,
        }


def _train(job: Job, log: RunLog, progress: console.RunProgress) -> Evaluation:
    """All steps, with validation and checkpoints on the way; returns the validation of the selected checkpoint."""
    config = job.config
    peaks = [group["lr"] for group in job.optimizer.param_groups]
    eval_steps = max(1, config.eval_every.steps(job.steps_per_epoch, job.total_steps))
    batches = train_batches(
        job.train,
        job.train_rows,
        train_transform(job.info.data_config, config),
        batch_size=job.batch_size,
        seed=config.seed,
        total_steps=job.total_steps,
        workers=config.workers or 0,
        pin_memory=job.device.type == "cuda",
    )
    row, whole_epoch = _Meter(), _Meter()
    best: Evaluation | None = None
    skipped_in_a_row = 0
    models.train_mode(job.model, freeze_bn=config.freeze_bn)
    for step in range(1, job.total_steps + 1):
        asked = time.perf_counter()
        images, labels = next(batches)
        arrived = time.perf_counter()
        # While a new head knows nothing, gradients of the body and perturbations are noise: both rise slowly, rho by
        # its schedule.
        rising = warmup(step - 1, job.warmup_steps)
        for group, peak in zip(job.optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine(step - 1, job.total_steps) * (rising if group["name"] == "body" else 1)
        rho = job.update.sam.rho = job.rho(step - 1)
        inputs = to_device(images, job.device, job.info.data_config, config.channels_last)
        targets = labels.to(job.device, non_blocking=True)
        # Mixed once, so that both passes see the same images and shares.
        inputs, targets = mix(
            inputs,
            targets,
            len(job.data.class_names),
            mixup=config.mixup,
            cutmix=config.cutmix,
            seed=config.seed,
            step=step,
        )
        result = job.update(inputs, targets)
        skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
        if skipped_in_a_row == _MOST_SKIPPED:
            raise _diverged(step, result)
        for meter in (row, whole_epoch):
            meter.add(result, len(labels), rho, arrived - asked, time.perf_counter() - arrived)
        progress.train(step, **whole_epoch.means())

        last = step == job.total_steps
        end_of_epoch = last or step % job.steps_per_epoch == 0
        validating = last or step % eval_steps == 0
        if end_of_epoch or validating or row.steps == _ROW_STEPS:
            log.metrics(
                step=step,
                epoch=job.epoch(step),
                split="train",
                n=row.n,
                **{key: _or_null(value) for key, value in row.means().items()},
                lr=job.optimizer.param_groups[0]["lr"],
                rho=row.rho,
                sam=row.rho > 0,
                grad_norm=_or_null(row.mean_grad_norm),
                passes=row.passes,
                skipped=row.skipped,
                peak_memory_bytes=device.peak_memory_bytes(job.device),
            )
            row = _Meter()
        if not (end_of_epoch or validating):
            continue

        means = whole_epoch.means()
        line = f"epoch {job.epoch(step):>3}  step {step}/{job.total_steps}"
        line += f"  train loss {means['loss']:.3f}, error {means['top1_error']:.1f} %"
        line += f", {whole_epoch.skipped} steps skipped (not finite)" if whole_epoch.skipped else ""
        if validating:
            validation = evaluate(job.model, job.val, job.val_rows, "val", config, job.info.data_config, progress.score)
            models.train_mode(job.model, freeze_bn=config.freeze_bn)
            scores = validation.summary()
            log.metrics(step=step, epoch=job.epoch(step), **scores)
            is_best = best is None or report.best_key(scores) < report.best_key(best.summary())
            best = validation if is_best else best
            _save(job, log, step, is_best)
            line += f"  val error {validation.top1_error:.2f} % ({validation.wrong}/{len(job.val_rows)})"
        left = log.seconds() / step * (job.total_steps - step)
        line += f"  {means['images_per_second']:.0f} images/s, data wait {100 * means['data_wait']:.0f} %"
        line += f", {left:.0f} s left"
        _say(log, line)
        if step % job.steps_per_epoch == 0:
            warning = report.collapse_warning(job.epoch(step), means["loss"], len(job.data.class_names))
            if warning:
                _say(log, warning, console.warn)
            whole_epoch = _Meter()
    return best if config.select == "best" and best is not None else validation


def _or_null(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _diverged(step: int, result: StepResult) -> Diverged:
    return Diverged(
        f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}",
        f"values were not finite in {_MOST_SKIPPED} steps in a row; the weights were not updated with them",
        "lower --lr or --rho, or clip with --clip-grad 1; the last checkpoint of the run is intact",
    )


def _save(job: Job, log: RunLog, step: int, is_best: bool) -> None:
    class_names = job.data.class_names
    folder = checkpoint.save(
        log.checkpoints,
        job.model,
        step,
        timm_config=models.timm_config(job.model, job.info, class_names),
        about={
            "config": job.config.model_dump(mode="json"),
            "class_names": list(class_names),
            "versions": runlog.versions(),
        },
    )
    if is_best:
        checkpoint.point(log.checkpoints, "best", folder)
    checkpoint.point(log.checkpoints, "last", folder)
    log.status("running", None)


# ---------------------------------------------------------------------------------------------------------- test, once


def _test_once(job: Job, log: RunLog, progress: console.RunProgress) -> Evaluation | None:
    """Score the selected checkpoint on test; None without a test split or with --no-test."""
    if job.test is None or not job.config.test:
        return None
    folder = log.checkpoints / job.config.select
    step = int(checkpoint.verify(folder)["step"])
    load_model(job.model, folder / "model.safetensors", device=str(job.device))
    scored = evaluate(job.model, job.test, job.test_rows, "test", job.config, job.info.data_config, progress.score)
    log.metrics(step=step, epoch=job.epoch(step), **scored.summary())
    return scored


def _write_predictions(path: Path, scored: Evaluation) -> None:
    """What paired tests need: one row per image of the split that was scored."""
    table = pa.table(
        {
            "index": scored.rows,
            "label": scored.labels,
            "prediction": scored.predictions,
            "probability": scored.probability,
        }
    )
    pq.write_table(table.replace_schema_metadata({"split": scored.split}), path)
