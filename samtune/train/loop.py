"""The story of a run, from top to bottom: job, run folder, steps, validation, checkpoints, one test, report."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data.cache import Images
from samtune.data.loader import Batch, rows_of_step, train_batches
from samtune.data.splits import Indices
from samtune.data.transforms import mix, train_transform
from samtune.distributed import collectives, device, signals
from samtune.errors import CheckpointError, Diverged, SamtuneError
from samtune.models import pretrained
from samtune.report import run_report
from samtune.runs import checkpoint, run_log
from samtune.runs.resume import Resumed
from samtune.runs.run_log import RunLog
from samtune.sam.snapshot import generator_states, set_generator_states
from samtune.sam.step import StepResult
from samtune.train import ending, opening, state
from samtune.train.checkpointing import CheckpointSaver
from samtune.train.evaluation import Evaluation, evaluate, to_device
from samtune.train.schedule import cosine, warmup
from samtune.train.setup import Setup
from samtune.train.state import StepStats, TrainState
from samtune.train.trackers import Trackers
from samtune.train.watchdog import Watchdog

_ROW_STEPS = 100  # a row of metrics at least this often
# Steps in a row without an update after which a run is given up. A loss scale for float16 finds its place in 16.
_MAX_SKIPPED = 20
_MAX_ROLLBACKS = 3


@dataclass(frozen=True)
class _Run:
    """A run and what goes with it."""

    job: Setup
    log: RunLog
    saver: CheckpointSaver
    stop: signals.StopRequest
    progress: console.RunProgress
    watchdog: Watchdog

    def heartbeat(self, step: int) -> None:
        """After so many steps something more is done: for those who look from outside, and for the watchdog."""
        self.log.heartbeat(step)
        self.watchdog.heartbeat()


def run(config: RunConfig, resumed: Resumed | None = None) -> dict[str, Any] | None:
    """Fine-tune as the config says, leave a run folder, and return its report and its path, "folder".

    resumed: resume that run.

    Each rank of a launch calls it; rank 0 writes and reports, the others return None.

    Raises a SamtuneError for what the user can fix, Stopped after a signal; status.json says so too.
    """
    with signals.listening() as stop, collectives.connection_errors():
        opened = opening.start_run(config) if resumed is None else opening.resume_run(config, resumed, stop)
        job, log, newest, place = opened
        watchdog = opening.watchdog(log, 60 * config.step_timeout)
        with (
            opening.recording_outcome(job, log),
            Trackers(job.config, log) as trackers,
            console.RunProgress(job.total_steps, place.step, run_log.read_metrics(log.folder)) as progress,
            watchdog,
        ):
            log.followers.append(progress.add)
            this = _Run(job, log, CheckpointSaver(job, log, newest), stop, progress, watchdog)
            stop.patient = True
            this.saver.link(place)  # a kill may have come before the links
            _train(this, place)
            try:
                scored = _score_selected(this)
            except signals.Interrupted:
                stop.end()
            if collectives.rank() > 0:
                return None
            with log.best_effort("predictions.parquet"):
                _write_predictions(log.folder / "predictions.parquet", scored)
            result = run_report.build(log.folder)
            with log.best_effort("report"):
                run_report.write(log.folder, result)
            trackers.result = result
        # The run is done, and what is still to come can be made again.
        drawn = ending.draw(job, log.folder, result) if config.html else None
        for line in ending.words(log.folder, result, drawn):
            log.info(line)
        return {"folder": str(log.folder), **result}


# --------------------------------------------------------------------------------------------------------------- steps


def _train(this: _Run, place: TrainState) -> None:
    """All steps that are left, with validation and checkpoints on the way."""
    job, config = this.job, this.job.config
    batches = train_batches(
        job.train,
        job.train_rows,
        train_transform(job.info.data_config, config),
        batch_size=job.batch.total,
        seed=config.seed,
        total_steps=job.total_steps,
        workers=config.workers or 0,
        pin_memory=job.device.type == "cuda",
        done=place.step,
        share=lambda rows: job.batch.share(rows, collectives.rank()),
    )
    peaks = [group["lr"] for group in job.optimizer.param_groups]
    pretrained.train_mode(job.model, freeze_bn=config.freeze_bn)
    if config.on_nan == "rollback" and this.saver.newest is None:
        this.saver.save(place)  # to go back to
    while True:
        # Between two steps, where all is whole: what is due is done before the next one, in this process or another.
        if place.evaluated_step < place.step:
            try:
                _log_and_validate(this, place)
            except signals.Interrupted:
                pass  # it is done when the run goes on
            except (SamtuneError, OSError):
                if not job.is_sharded and _is_finite(job.model):  # what was earned until now
                    this.saver.save(place)
                raise
        is_best, last, stopping = place.best_step == place.step > 0, place.step == job.total_steps, this.stop.agreed
        if is_best or last or (place.step > 0 and this.saver.due(place.step)) or stopping:
            this.saver.save(place)
            this.stop.saved = True
        if stopping:
            collectives.barrier()  # none ends before rank 0 has saved
            this.stop.end()
        if last:
            return
        _step(this, place, batches, peaks)
        this.heartbeat(place.step)


def _step(this: _Run, place: TrainState, batches: Iterator[Batch], peaks: list[float]) -> None:
    """One update, and what is counted of it."""
    job, config, step = this.job, this.job.config, place.step + 1
    asked = time.perf_counter()
    images, labels = next(batches)
    arrived = time.perf_counter()
    set_learning_rates(job, peaks, step)
    rho = job.update.sam.rho = job.rho(step - 1)
    inputs, targets = ready(job, images, labels, step)
    collectives.seed_this_rank(config.seed, step)
    generators = generator_states(job.device)
    micro_batch = job.update.sam.micro_batch
    result = job.update(inputs, targets, job.batch.weight(collectives.rank()), this.stop.is_requested)
    this.stop.agreed = result.stop_requested
    if job.update.sam.micro_batch != micro_batch:
        less = f"step {step}: no memory for {micro_batch or job.batch.per_device} images at once"
        this.log.warn(f"{less}; from now on {job.update.sam.micro_batch}, with the same update")
    if result.applied:
        place.skipped_in_a_row = 0
    else:
        _handle_not_finite(this, place, step, result, generators)
    place.step = step
    if result.applied and job.ema is not None:
        job.ema.update(job.model, step=step)
    for meter in (place.row, place.epoch):
        meter.add(result, job.batch.total, rho, arrived - asked, time.perf_counter() - arrived)
    this.progress.train(
        step,
        **place.epoch.means(),
        lr=job.optimizer.param_groups[0]["lr"],
        rho=rho,
        memory=lambda: device.peak_memory_bytes(job.device),
    )


def set_learning_rates(job: Setup, peaks: list[float], step: int) -> None:
    """Give the optimizer the learning rates of a step, from 1. peaks: of each group."""
    # While a new head knows nothing, gradients of the body and perturbations are noise: both rise slowly, rho by
    # its schedule.
    rising = warmup(step - 1, job.warmup_steps)
    for group, peak in zip(job.optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * cosine(step - 1, job.total_steps) * (rising if group["name"] == "body" else 1)


def ready(job: Setup, images: torch.Tensor, labels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the loader as the update of a step takes it: on the device, normalised, and mixed if asked for."""
    config = job.config
    # Mixed once, so that both passes see the same images and shares.
    return mix(
        to_device(images, job.device, job.info.data_config, config.channels_last),
        labels.to(job.device, non_blocking=True),
        len(job.data.class_names),
        mixup=config.mixup,
        cutmix=config.cutmix,
        seed=config.seed,
        step=step,
    )


def _handle_not_finite(
    this: _Run, place: TrainState, step: int, result: StepResult, generators: list[torch.Tensor]
) -> None:
    """A step that was not applied: pass over it, go back to the newest checkpoint, or end the run, as --on-nan says."""
    job, config = this.job, this.job.config
    in_a_row = place.skipped_in_a_row + 1
    # Of a float16 loss scale that finds its place, gradients overflow while the loss is finite.
    searching = job.update.scaler is not None and math.isfinite(result.loss)
    if (config.on_nan == "skip" or searching) and in_a_row < _MAX_SKIPPED:
        place.skipped_in_a_row = in_a_row
        return
    if config.on_nan == "rollback" and place.rollbacks < _MAX_ROLLBACKS and not searching:
        newest = collectives.broadcast_from_rank0(lambda: state.find_newest(this.log.folder))
        if newest is None:
            raise CheckpointError(f"run {this.log.folder} has lost its checkpoints", hint="start a new run")
        back = state.load_state_dict(job, newest)
        collectives.barrier()  # before rank 0 saves again, and removes it
        pretrained.train_mode(job.model, freeze_bn=config.freeze_bn)
        place.rollbacks += 1
        place.skipped_in_a_row = 0
        this.log.metrics(step=step, epoch=job.epoch(step), split="rollback", to_step=back.step)
        text = f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}; back to the weights of step"
        this.log.warn(f"{text} {back.step}, on to the batches that come next")
        return
    set_generator_states(generators, job.device)
    if place.step > 0:
        this.saver.save(place)
        this.stop.saved = True
        collectives.barrier()
    raise _diverged(this, place, step, result, in_a_row)


def _diverged(this: _Run, place: TrainState, step: int, result: StepResult, in_a_row: int) -> Diverged:
    job, config, rho = this.job, this.job.config, this.job.update.sam.rho
    where = "the loss is not finite at the weights themselves, in pass 1"
    if math.isfinite(result.loss):
        where = f"the loss is finite, its gradient is not, or not in pass 2, at the perturbed weights (rho {rho:g})"
    content = {
        "step": step,
        "epoch": job.epoch(step),
        "where": where,
        "loss": str(result.loss),
        "grad_norm": str(result.grad_norm),
        "mean_loss_before": str(place.epoch.means()["loss"]) if place.epoch.steps else None,
        "lr": [group["lr"] for group in job.optimizer.param_groups],
        "rho": rho,
        "weights_finite": None if job.is_sharded else _is_finite(job.model),
        "rows": rows_of_step(job.train_rows, job.batch.total, config.seed, step - 1).tolist(),
    }
    with suppress(OSError):
        if collectives.rank() == 0:
            text = json.dumps(content, indent=2) + "\n"
            (this.log.folder / "diagnostics.json").write_text(text, encoding="utf-8")
    times = f"; {in_a_row} steps in a row" if in_a_row > 1 else ""
    times += f"; went back {place.rollbacks} times" if place.rollbacks else ""
    return Diverged(
        f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}",
        f"{where}{times}; the weights were not updated with it, and diagnostics.json names the images",
        "go on with --resume and a lower --lr or --rho, or --on-nan skip (--allow-change lets each differ); "
        "or start anew with these, or with --clip-grad 1",
    )


def _is_finite(model: nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())


# ------------------------------------------------------------------------------------------------------ between steps


def _log_and_validate(this: _Run, place: TrainState) -> None:
    """All that is due after a step: a row of metrics, validation, a line.

    Raises Interrupted where a signal asks to end during validation; to settle again gives the same.
    """
    job, config, step = this.job, this.job.config, place.step
    last = step == job.total_steps
    end_of_epoch = last or step % job.steps_per_epoch == 0
    every = max(1, config.eval_every.steps(job.steps_per_epoch, job.total_steps))
    validating = config.val and (last or step % every == 0)
    if place.row.steps and (end_of_epoch or validating or place.row.steps == _ROW_STEPS):
        _write_row(this, place)
    if end_of_epoch or validating:
        means = place.epoch.means()
        line = f"epoch {job.epoch(step):>3}  step {step}/{job.total_steps}"
        line += f"  train loss {means['loss']:.3f}, error {means['top1_error']:.1f} %"
        line += f", {place.epoch.skipped} steps skipped (not finite)" if place.epoch.skipped else ""
        if validating:
            validation, averaged = _validate(this)
            scores = validation.summary()
            for scored in (validation, averaged):
                if scored is not None:
                    this.log.metrics(step=step, epoch=job.epoch(step), **scored.summary())
            key = run_report.best_key(scores)
            if place.best is None or key < place.best:
                place.best, place.best_step = key, step
            line += f"  val error {validation.top1_error:.2f} % ({validation.wrong}/{len(job.val_rows)})"
            line += f", averaged weights {averaged.top1_error:.2f} %" if averaged else ""
        left = this.log.seconds() / step * (job.total_steps - step)
        line += f"  {means['images_per_second']:.0f} images/s, data wait {100 * means['data_wait']:.0f} %"
        line += f", {left:.0f} s left"
        this.log.info(line)
    if step % job.steps_per_epoch == 0:
        means = place.epoch.means()
        warning = run_report.collapse_warning(
            job.epoch(step), means["loss"], means["top1_error"], len(job.data.class_names)
        )
        if warning:
            this.log.warn(warning)
        place.epoch = StepStats()
    place.evaluated_step = step


def _write_row(this: _Run, place: TrainState) -> None:
    job, row = this.job, place.row
    this.log.metrics(
        step=place.step,
        epoch=job.epoch(place.step),
        split="train",
        n=row.n,
        **{key: _or_null(value) for key, value in row.means().items()},
        lr=job.optimizer.param_groups[0]["lr"],
        rho=row.rho,
        sam=row.rho > 0,
        grad_norm=_or_null(row.mean_grad_norm),
        steps=row.steps,
        passes=row.passes,
        skipped=row.skipped,
        peak_memory_bytes=device.peak_memory_bytes(job.device),
    )
    place.row = StepStats()


def _or_null(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _validate(this: _Run) -> tuple[Evaluation, Evaluation | None]:
    """The last weights on validation, and their average, if there is one."""
    job = this.job
    try:
        validation = _score(this, job.model, job.val, job.val_rows, "val")
        averaged = _score(this, job.ema.module, job.val, job.val_rows, "val_ema") if job.ema else None
    finally:
        pretrained.train_mode(job.model, freeze_bn=job.config.freeze_bn)
    return validation, averaged


def _score(this: _Run, model: nn.Module, images: Images, rows: Indices, name: str) -> Evaluation:
    """Raises Interrupted, on all ranks, where a signal asks one of them to end."""
    job = this.job

    def seen(split: str, done: int, total: int) -> None:
        this.progress.score(split, done, total)
        this.heartbeat(this.log.step)

    try:
        scored = evaluate(
            model, images, rows, name, job.config, job.info.data_config, seen, job.eval_batch, this.stop.is_requested
        )
    except signals.Interrupted:
        this.stop.agreed = True
        raise
    job.eval_batch = scored.batch_size  # less than at first, if memory ran out
    return scored


# ---------------------------------------------------------------------------------------------------------- test, once


def _score_selected(this: _Run) -> Evaluation:
    """Score the selected checkpoint on test, once; without a test split, or with --no-test, on validation again."""
    job = this.job
    folder = run_log.resolve_checkpoint(this.log.checkpoints, job.config.select)
    step = int(collectives.broadcast_from_rank0(lambda: checkpoint.verify(folder)["step"]))
    checkpoint.load_weights(partial(job.load, job.model), folder / "model.safetensors")
    if job.test is None or not job.config.test:
        return _score(this, job.model, job.val, job.val_rows, "val")
    scored = _score(this, job.model, job.test, job.test_rows, "test")
    this.log.metrics(step=step, epoch=job.epoch(step), **scored.summary())
    if job.ema is not None:
        checkpoint.load_weights(partial(job.load, job.ema.module), folder / "ema" / "model.safetensors")
        averaged = _score(this, job.ema.module, job.test, job.test_rows, "test_ema")
        this.log.metrics(step=step, epoch=job.epoch(step), **averaged.summary())
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
