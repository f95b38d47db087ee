"""One run, from its settings to its report: setup, run folder, steps, validation, checkpoints, one test."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data.cache import Images
from samtune.data.loader import Batch, train_batches
from samtune.data.prefetch import prefetch
from samtune.data.splits import Indices
from samtune.data.transforms import mix, train_transform
from samtune.distributed import collectives, ddp, device, signals
from samtune.errors import CheckpointError, SamtuneError, plural
from samtune.models.training import estimate_batch_norm, train_mode
from samtune.report import run_report
from samtune.runs import checkpoint, predictions
from samtune.runs.folder import resolve_checkpoint
from samtune.runs.metrics import best_key, collapse_warning, read_metrics
from samtune.runs.resume import Resumed
from samtune.runs.run_log import RunLog
from samtune.sam.snapshot import batch_norms, generator_states, set_generator_states
from samtune.sam.step import StepResult
from samtune.train import summary
from samtune.train.checkpointing import CheckpointSaver
from samtune.train.divergence import diverged, is_finite
from samtune.train.evaluation import Evaluation, evaluate
from samtune.train.restore import resume_run
from samtune.train.schedule import cosine, warmup
from samtune.train.setup import Setup
from samtune.train.start import recording_outcome, start_run
from samtune.train.state import StepStats, TrainState, load_state_dict
from samtune.train.trackers import Trackers
from samtune.train.watchdog import Watchdog, watch_run

_ROW_STEPS = 100  # steps between two rows of metrics, at most
# Steps in a row without an update after which a run fails. A float16 loss scale needs at most 16.
_MAX_SKIPPED = 20
_MAX_ROLLBACKS = 3
_ESTIMATION_STEPS = 50  # batches that statistics of batch norm are estimated on, at most


def run(
    config: RunConfig, resumed: Resumed | None = None, stop: signals.StopRequest | None = None
) -> dict[str, Any] | None:
    """Fine-tune as the config says, leave a run folder, and return its report and its path, "folder".

    resumed: resume that run. stop: given by a caller that listens to signals itself. Each rank of a launch calls this;
    rank 0 writes and returns the report, the others None.

    Raises a SamtuneError for what the user can fix, Stopped after a signal; status.json says so too.
    """
    with (
        signals.listening() if stop is None else nullcontext(stop) as stop,
        collectives.connection_errors(),
    ):
        opened = start_run(config) if resumed is None else resume_run(config, resumed, stop)
        setup, log, newest, state = opened
        with (
            recording_outcome(setup, log),
            Trackers(setup.config, log) as trackers,
            console.RunProgress(setup.total_steps, state.step, read_metrics(log.folder)) as progress,
            watch_run(log, 60 * config.step_timeout) as watchdog,
            CheckpointSaver(setup, log, newest) as saver,
        ):
            log.listeners.append(progress.add)
            trainer = Trainer(setup, state, log, saver, stop, progress, watchdog)
            stop.is_deferred = True
            saver.update_links(state)  # a kill may have come before the links
            trainer.train()
            try:
                trainer.score_checkpoints()
            except signals.Interrupted:
                stop.raise_stopped()
            if collectives.rank() > 0:
                return None
            result = run_report.build(log.folder)
            with log.best_effort("report"):
                run_report.write(log.folder, result)
            trackers.result = result
        # The run is done, and what is still to come can be made again.
        page = summary.write_page(setup, log.folder, result) if config.html else None
        for line in summary.lines(log.folder, result, page):
            log.info(line)
        return {"folder": str(log.folder), **result}


@dataclass(frozen=True)
class Trainer:
    """The steps of a run, with validation and checkpoints between them, and the one test at its end."""

    setup: Setup
    state: TrainState
    log: RunLog
    saver: CheckpointSaver
    stop: signals.StopRequest
    progress: console.RunProgress
    watchdog: Watchdog

    # ----------------------------------------------------------------------------------------------------------- steps

    def train(self) -> None:
        """Take all steps that are left, with validation and checkpoints between them."""
        setup, state, config = self.setup, self.state, self.setup.config
        loaded = train_batches(
            setup.train,
            setup.train_rows,
            train_transform(setup.info.data_config, config),
            batch_size=setup.batch.total,
            seed=config.seed,
            total_steps=setup.total_steps,
            workers=config.workers or 0,
            pin_memory=setup.device.type == "cuda",
            done=state.step,
            share=lambda rows: setup.batch.share(rows, collectives.rank()),
        )
        batches = prefetch(loaded, setup.device)
        base_lrs = [group["lr"] for group in setup.optimizer.param_groups]
        train_mode(setup.model, freeze_bn=config.freeze_bn)
        if config.on_nan == "rollback" and self.saver.newest is None:
            self.saver.save(state)  # to go back to
        while True:
            # The state is consistent here: log, validate and save before the next step.
            if state.evaluated_step < state.step:
                try:
                    self._log_and_validate()
                except signals.Interrupted:
                    pass  # validated when the run resumes
                except (SamtuneError, OSError):
                    if not setup.is_sharded and is_finite(setup.model):  # keep what was learned
                        self.saver.save_before_error(state)
                    raise
            last = state.step == setup.total_steps
            is_due = state.step > 0 and (state.best_step == state.step or self.saver.due(state.step))
            if is_due or last or self.stop.is_agreed:
                self.saver.save(state)
            if last or self.stop.is_agreed:
                self.saver.wait()
                self.stop.has_checkpoint = True
            if self.stop.is_agreed:
                collectives.barrier()  # none ends before rank 0 has saved
                self.stop.raise_stopped()
            if last:
                return
            self.saver.check()
            self._step(batches, base_lrs)
            # Before the last checkpoint: none that is complete has other statistics than those that are scored.
            if state.step == setup.total_steps and config.average_tail is not None and not config.freeze_bn:
                self._estimate_batch_norm()
            self._heartbeat(state.step)

    def _heartbeat(self, step: int) -> None:
        """Update status.json and reset the watchdog."""
        passes = self.setup.update.sam.runner.mode
        if passes != self.log.passes and self.setup.device.type == "cuda":
            self.log.info(f"passes  {passes}")
        self.log.passes = passes
        self.log.heartbeat(step)
        self.watchdog.heartbeat()

    def _step(self, batches: Iterator[Batch], base_lrs: list[float]) -> None:
        """One update, and its statistics."""
        setup, state, config = self.setup, self.state, self.setup.config
        step = state.step + 1
        requested = time.perf_counter()
        images, labels = next(batches)
        arrived = time.perf_counter()
        set_learning_rates(setup, base_lrs, step)
        rho = setup.update.sam.rho = setup.rho(step - 1)
        inputs, targets = to_update_inputs(setup, images, labels, step)
        collectives.seed_this_rank(config.seed, step)
        generators = generator_states(setup.device)
        micro_batch = setup.update.sam.micro_batch
        result = setup.update(inputs, targets, setup.batch.weight(collectives.rank()), self.stop.is_requested)
        self.stop.is_agreed = result.stop_requested
        if setup.update.sam.micro_batch != micro_batch:
            less = f"step {step}: no memory for {plural(micro_batch or setup.batch.per_device, 'image')} at once"
            self.log.warn(f"{less}; from now on {setup.update.sam.micro_batch}, with the same update")
        if result.applied:
            state.skipped_in_a_row = 0
        else:
            self._handle_not_finite(step, result, generators)
        state.step = step
        if setup.average is not None:
            setup.average.update(setup.model, step, applied=result.applied)
        for stats in (state.row, state.epoch):
            stats.add(result, setup.batch.total, rho, arrived - requested, time.perf_counter() - arrived)
        self.progress.train(
            step,
            **state.epoch.means(),
            lr=setup.optimizer.param_groups[0]["lr"],
            rho=rho,
            memory=lambda: device.peak_memory_bytes(setup.device),
        )

    def _handle_not_finite(self, step: int, result: StepResult, generators: list[torch.Tensor]) -> None:
        """A step that was not applied: skip it, roll back to the newest checkpoint, or end the run (--on-nan)."""
        setup, state, config = self.setup, self.state, self.setup.config
        in_a_row = state.skipped_in_a_row + 1
        # While a float16 loss scale adapts, gradients overflow though the loss is finite.
        is_adapting = setup.update.scaler is not None and math.isfinite(result.loss)
        if (config.on_nan == "skip" or is_adapting) and in_a_row < _MAX_SKIPPED:
            state.skipped_in_a_row = in_a_row
            return
        if config.on_nan == "rollback" and state.rollbacks < _MAX_ROLLBACKS and not is_adapting:
            newest = collectives.broadcast_from_rank0(self.saver.find_newest)
            if newest is None:
                raise CheckpointError(f"run {self.log.folder} has lost its checkpoints", hint="start a new run")
            back = load_state_dict(setup, newest)
            collectives.barrier()  # before rank 0 saves again, and removes it
            train_mode(setup.model, freeze_bn=config.freeze_bn)
            state.rollbacks += 1
            state.skipped_in_a_row = 0
            self.log.metrics(step=step, epoch=setup.epoch(step), split="rollback", to_step=back.step)
            text = f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}; back to the weights of step"
            self.log.warn(f"{text} {back.step}, on to the batches that come next")
            return
        set_generator_states(generators, setup.device)
        if state.step > 0:
            self.saver.save(state)
            self.saver.wait()
            self.stop.has_checkpoint = True
            collectives.barrier()
        raise diverged(setup, state, self.log, step, result, in_a_row)

    # --------------------------------------------------------------------------------------------------- between steps

    def _log_and_validate(self) -> None:
        """Write the metrics row, validation and log line that are due after a step.

        Raises Interrupted if a signal stops validation; repeated, it gives the same.
        """
        setup, state, config = self.setup, self.state, self.setup.config
        step = state.step
        last = step == setup.total_steps
        end_of_epoch = last or step % setup.steps_per_epoch == 0
        every = max(1, config.eval_every.steps(setup.steps_per_epoch, setup.total_steps))
        validating = config.val and (last or step % every == 0)
        if state.row.steps and (end_of_epoch or validating or state.row.steps == _ROW_STEPS):
            self._write_row()
        if end_of_epoch or validating:
            means = state.epoch.means()
            line = f"epoch {setup.epoch(step):>3}  step {step}/{setup.total_steps}"
            line += f"  train loss {means['loss']:.3f}, error {means['top1_error']:.1f} %"
            line += f", {plural(state.epoch.skipped, 'step')} skipped (not finite)" if state.epoch.skipped else ""
            if validating:
                validation, averaged = self._validate()
                scores = validation.summary()
                self.log.metrics(step=step, epoch=setup.epoch(step), **validation.summary())
                if averaged is not None:
                    of_average = averaged.summary() | self._averaged_steps
                    self.log.metrics(step=step, epoch=setup.epoch(step), **of_average)
                key = best_key(scores)
                if state.best is None or key < state.best:
                    state.best, state.best_step = key, step
                line += f"  val error {validation.top1_error:.2f} % ({validation.wrong}/{len(setup.val_rows)})"
                line += f", averaged weights {averaged.top1_error:.2f} %" if averaged else ""
            left = self.log.seconds() / step * (setup.total_steps - step)
            line += f"  {means['images_per_second']:.0f} images/s, data wait {100 * means['data_wait']:.0f} %"
            line += f", {left:.0f} s left"
            self.log.info(line)
        if config.perturb_from is not None and step == min(setup.steps_per_epoch, setup.total_steps):
            self._log_gradient_share()
        if step % setup.steps_per_epoch == 0:
            means = state.epoch.means()
            warning = collapse_warning(
                setup.epoch(step), means["loss"], means["top1_error"], len(setup.data.class_names)
            )
            if warning:
                self.log.warn(warning)
            state.epoch = StepStats()
        state.evaluated_step = step

    def _log_gradient_share(self) -> None:
        """Say how a radius of a part of the network compares with one of the whole."""
        sam, config = self.setup.update.sam, self.setup.config
        share = sam.gradient_share()
        if share:
            text = f"from {sam.perturb_from} on is {share:.2f} of the gradient's norm"
            if config.rho > 0 and (config.p, config.adaptive, config.ascent) == (2, False, "gradient"):
                text += f": SAM of the whole network would move it as far with rho {config.rho / share:.2g}"
            self.log.info(text)

    def _estimate_batch_norm(self) -> None:
        """Estimate the batch-norm statistics of the averaged weights, on the batches of the first steps.

        Their average is not that of the activations of averaged weights (Izmailov et al. 2018, section 3.2). Images are
        augmented as in these steps, but not mixed. Ranks divide a batch as in a step, and then average: all have the
        same statistics.
        """
        setup, config = self.setup, self.setup.config
        assert setup.average is not None
        norms = batch_norms(setup.average.module)
        if not norms:
            return
        transform, rank = train_transform(setup.info.data_config, config), collectives.rank()
        steps = min(_ESTIMATION_STEPS, setup.steps_per_epoch, setup.total_steps)
        loaded = train_batches(
            setup.train,
            setup.train_rows,
            transform,
            batch_size=setup.batch.total,
            seed=config.seed,
            total_steps=steps,
            workers=0 if transform.photometric else config.workers or 0,  # no processes: see eval_batches
            pin_memory=setup.device.type == "cuda",
            share=lambda rows: setup.batch.share(rows, rank),
        )

        def passes() -> Iterator[torch.Tensor]:
            for step, (images, _) in enumerate(prefetch(loaded, setup.device), 1):
                for (some,) in setup.update.sam.split_batch(images.to(setup.device)):
                    yield setup.update.prepare(some)
                self.progress.count("estimating batch norm", step * setup.batch.total, steps * setup.batch.total)
                self._heartbeat(self.log.step)

        with device.uncompiled(), setup.update.autocast():
            estimate_batch_norm(setup.average.module, passes())
        statistics = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
        ddp.average_over_ranks(statistics, setup.batch.weight(rank))

    def _write_row(self) -> None:
        setup, state = self.setup, self.state
        row = state.row
        self.log.metrics(
            step=state.step,
            epoch=setup.epoch(state.step),
            split="train",
            n=row.n,
            **{key: _or_null(value) for key, value in row.means().items()},
            lr=setup.optimizer.param_groups[0]["lr"],
            rho=row.rho,
            sam=row.rho > 0,
            grad_norm=_or_null(row.mean_grad_norm),
            steps=row.steps,
            passes=row.passes,
            skipped=row.skipped,
            peak_memory_bytes=device.peak_memory_bytes(setup.device),
        )
        state.row = StepStats()

    def _validate(self) -> tuple[Evaluation, Evaluation | None]:
        """Score the last weights on validation, and the averaged weights if there are any yet."""
        setup = self.setup
        try:
            validation = self._score(setup.model, setup.val, setup.val_rows, "val")
            averaged = None
            if setup.average is not None and setup.average.has_begun:
                averaged = self._score(setup.average.module, setup.val, setup.val_rows, "val_ema")
        finally:
            train_mode(setup.model, freeze_bn=setup.config.freeze_bn)
        return validation, averaged

    def _score(self, model: nn.Module, images: Images, rows: Indices, name: str) -> Evaluation:
        """Score the model on these rows. Raises Interrupted on all ranks if a signal stops one of them."""
        setup = self.setup

        def report_progress(split: str, done: int, total: int) -> None:
            self.progress.score(split, done, total)
            self._heartbeat(self.log.step)

        try:
            scored = evaluate(
                model,
                images,
                rows,
                name,
                setup.config,
                setup.info.data_config,
                report_progress,
                setup.eval_batch,
                self.stop.is_requested,
            )
        except signals.Interrupted:
            self.stop.is_agreed = True
            raise
        setup.eval_batch = scored.batch_size  # less than at first, if memory ran out
        return scored

    # ------------------------------------------------------------------------------------------------------ test, once

    def score_checkpoints(self) -> None:
        """Score on test the last checkpoint and the one that is best on validation, each once, and log the results.

        The selected one comes last; predictions.parquet has its predictions, or with --select average those of its
        averaged weights. A run that was interrupted here scores what is missing. Without a test split, or with
        --no-test, the selected weights are scored on validation again. The first training of a run with --bootstrap
        --no-val has nothing to be scored on.
        """
        setup, config = self.setup, self.setup.config
        if not config.test and not config.val:
            return
        if setup.test is None or not config.test:
            folder, _ = collectives.broadcast_from_rank0(lambda: self._checkpoint(config.selected_checkpoint))
            selected = self._load_averaged(folder) if config.select == "average" else self._load(folder)
            self._write_predictions(self._score(selected, setup.val, setup.val_rows, "val"))
            return
        for name, folder, step, missing in collectives.broadcast_from_rank0(self._checkpoints_to_test):
            row = {"step": step, "epoch": setup.epoch(step), "checkpoint": name}
            for split in ("test", "test_ema"):
                if split not in missing:
                    continue
                model = self._load_averaged(folder) if split == "test_ema" else self._load(folder)
                scored = self._score(model, setup.test, setup.test_rows, split)
                if (name, split) == self._result:  # before its row, which says that nothing is missing
                    self._write_predictions(scored)
                self.log.metrics(**row, **scored.summary(), **(self._averaged_steps if split == "test_ema" else {}))

    @property
    def _averaged_steps(self) -> dict[str, int]:
        """What a row of metrics of averaged weights says besides: the length of a tail's mean so far."""
        average = self.setup.average
        return {} if average is None or average.decay is not None else {"averaged_steps": average.count}

    @property
    def _result(self) -> tuple[str, str]:
        """Checkpoint and split of the row of metrics that is the result of the run."""
        config = self.setup.config
        return config.selected_checkpoint, "test_ema" if config.select == "average" else "test"

    def _load(self, folder: Path) -> nn.Module:
        """The model, with the weights of a checkpoint."""
        checkpoint.load_weights(partial(self.setup.load, self.setup.model), folder / "model.safetensors")
        return self.setup.model

    def _load_averaged(self, folder: Path) -> nn.Module:
        """The average, with the averaged weights of a checkpoint."""
        assert self.setup.average is not None
        model = self.setup.average.module
        checkpoint.load_weights(partial(self.setup.load, model), folder / "ema" / "model.safetensors")
        return model

    def _checkpoint(self, name: str) -> tuple[Path, int]:
        """Folder and step of the last or the best checkpoint. Only rank 0, which has written it, knows where it is."""
        folder = resolve_checkpoint(self.log.checkpoints, name)
        return folder, int(checkpoint.verify(folder)["step"])

    def _checkpoints_to_test(self) -> list[tuple[str, Path, int, set[str]]]:
        """Name, folder, step and splits to score of the last and the best checkpoint, the selected one at the end.

        A checkpoint that is both is listed once, as the selected one. Averaged weights are scored only of the selected
        one, and those of a tail only of the last one.
        """
        config = self.setup.config
        selected, split = self._result
        folder, step = self._checkpoint(selected)
        chosen: list[tuple[str, Path, int, set[str]]] = [(selected, folder, step, {"test"})]
        if config.val:
            other = "last" if selected == "best" else "best"
            try:
                folder, other_step = self._checkpoint(other)
                chosen[:0] = [(other, folder, other_step, {"test"})] if other_step != step else []
            except CheckpointError as error:  # the run has a result without it
                self.log.warn(f"the {other} checkpoint is not scored: {error.message}")
        named = (one for one in chosen if one[0] == config.averaged_checkpoint)
        _, folder, _, splits = next(named, chosen[-1])  # where the last is the best, there is one
        if (folder / "ema").is_dir():
            splits.add("test_ema")
        scored = {(row["step"], row["split"]) for row in read_metrics(self.log.folder) if "checkpoint" in row}
        if not (self.log.folder / "predictions.parquet").is_file():
            scored.discard((step, split))
        return [
            (name, folder, step, {split for split in splits if (step, split) not in scored})
            for name, folder, step, splits in chosen
        ]

    def _write_predictions(self, scored: Evaluation) -> None:
        if collectives.rank() == 0:
            with self.log.best_effort("predictions.parquet"):
                predictions.write(
                    self.log.folder / "predictions.parquet",
                    split=scored.split.removesuffix("_ema"),  # the report's result, whatever the weights
                    rows=scored.rows,
                    labels=scored.labels,
                    predicted=scored.predictions,
                    probability=scored.probability,
                )


def set_learning_rates(setup: Setup, base_lrs: list[float], step: int) -> None:
    """Give the optimizer the learning rates of a step, from 1. base_lrs: of each group."""
    # Gradients of the body are noise while the head is new, so only the head learns at the full rate at once.
    warmup_factor = warmup(step - 1, setup.warmup_steps)
    for group, base_lr in zip(setup.optimizer.param_groups, base_lrs, strict=True):
        group["lr"] = base_lr * cosine(step - 1, setup.total_steps) * (warmup_factor if group["name"] == "body" else 1)


def to_update_inputs(
    setup: Setup, images: torch.Tensor, labels: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of the loader as the update takes it: on the device, and mixed if asked for."""
    config = setup.config
    images, labels = images.to(setup.device, non_blocking=True), labels.to(setup.device, non_blocking=True)
    if not config.mixup and not config.cutmix:
        return images, labels  # each pass normalises its own: as bytes they need a quarter of the memory
    # Mixed once, so that both passes see the same images and shares.
    return mix(
        setup.update.prepare(images),
        labels,
        len(setup.data.class_names),
        mixup=config.mixup,
        cutmix=config.cutmix,
        seed=config.seed,
        step=step,
    )


def _or_null(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
