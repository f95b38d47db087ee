"""What a run will do and take: sizes, steps, memory, time and disk, measured on this machine.

Nothing is kept: the run is set up without its folder, and a few of its steps are measured.
"""

import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.distributed import collectives, device, environment, launch
from samtune.errors import UsageError, first_line, plural
from samtune.models.build import multiply_accumulates
from samtune.plan import measure
from samtune.plan.measure import Evaluating, Steps
from samtune.plan.sample import Decoding, Sampler, rows_with_pixels
from samtune.plan.tables import format_bytes
from samtune.train import batch_search, checkpointing, provenance
from samtune.train.setup import Setup, build_setup

SCHEMA_VERSION = 1
# The settings that a plan shows, with the origin of each.
_SHOWN = ("lr", "weight_decay", "rho", "batch_size", "epochs", "warmup_epochs", "img_size", "amp_dtype", "workers")


def plan(config: RunConfig) -> dict[str, Any]:
    """What a run with these settings does and takes, schema version 1. Times are in seconds, sizes in bytes.

    It reads, decodes and computes as the run does, in one process: of several ranks it measures the part of one,
    without communication. A few images are decoded into a folder that is removed afterwards.

    Of a run with --bootstrap it measures one training, and counts two.

    Raises what a run raises before its first step, and UsageError for a model that is sharded.
    """
    world = _world(config)
    stages, config = config.stages, config.derive("bootstrap", False, "a plan measures one training")
    if config.shard:
        raise UsageError(
            "--shard cannot be planned", "one process cannot measure a shard of a model", "leave --shard out"
        )
    cores = max(1, device.available_cpus() // world.local_size)
    if world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)  # as in each rank
    with tempfile.TemporaryDirectory(prefix="samtune-plan-") as folder:
        sampler = Sampler(Path(folder), cores)
        setup = build_setup(config, decode=sampler.look, world=world)
        start = max(0.0, _seconds_since_start() - sampler.spent)
        images = plural(setup.update.sam.effective_micro_batch(setup.batch.per_device), "image")
        images += f" of {setup.info.img_size} px"
        with device.oom_as_user_error(images):
            return _measure(setup, sampler.found, start, stages)


def _world(config: RunConfig) -> collectives.World:
    rank_info = environment.rank_info()
    if rank_info is not None and rank_info.world_size > 1:
        raise UsageError(
            f"samtune plan in one of {rank_info.world_size} ranks",
            f"{environment.launcher_variables()} says that a launcher has started them",
            f"plan in one process, with --gpus or --processes: {environment.command_without_launcher()}",
        )
    local = launch.local_rank_count(config.gpus, config.processes)
    return collectives.World(local * config.nnodes, local)


def _seconds_since_start() -> float:
    started = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _measure(setup: Setup, decoding: list[Decoding], start: float, stages: int) -> dict[str, Any]:
    """Measure the run, and return the plan. start: seconds that the set-up took. stages: number of trainings."""
    config, name = setup.config, device.describe(setup.device)
    about, length, asked = provenance.describe(setup), _length(setup, stages), setup.update.sam.micro_batch
    kinds = [config.rho, 0.0] if config.rho > 0 else [0.0]
    console.info(f"measuring steps of {'SAM and ' if config.rho > 0 else ''}the plain optimizer on {name} ...")
    with console.RunProgress() as progress:
        with device.uncompiled():
            macs = multiply_accumulates(setup.model.eval(), setup.info.data_config["input_size"])
        steps = measure.steps(setup, rows_with_pixels(setup.train, setup.train_rows), kinds, progress.count)
        peak = device.peak_memory_bytes(setup.device)
        scored, rows = (setup.val, setup.val_rows) if config.val else (setup.test, setup.test_rows)
        assert scored is not None  # without validation there is a test split
        evaluating = measure.evaluation(setup, scored, rows_with_pixels(scored, rows), len(rows), progress.count)
        memory = measure.memory(setup)
        console.info("measuring a checkpoint ...")
        checkpoint_bytes, checkpoint_seconds, warnings = _checkpoint(setup)
        fits, why_fits = _fits(setup, progress.count)
    sam, plain = steps[config.rho] if config.rho > 0 else None, steps[0.0]
    needed, free, folder = checkpointing.needed_bytes(setup, config.output or Path("runs"))
    needed *= stages  # the checkpoints of the first training stay
    if free < needed:
        sizes = f"{format_bytes(free)} free, and the run's checkpoints need {format_bytes(needed)}"
        warnings.append(f"{folder} has {sizes}: it would refuse to begin")
    if setup.update.sam.micro_batch != asked:
        less = plural(setup.update.sam.micro_batch or 0, "image")
        warnings.append(f"no memory for the batch at once: {less}, with the same update")
    if setup.batch.devices > 1:
        left_out = "what they send each other, and that they share a machine"
        warnings.append(f"the time of {setup.batch.devices} devices leaves out {left_out}")
    time_parts = _time(setup, length, decoding, start, steps, evaluating, checkpoint_seconds)
    at_once = measure.images_per_pass(setup)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": about["model"]
        | {
            "trainable_parameters": sum(w.numel() for w in setup.model.parameters() if w.requires_grad),
            "multiply_accumulates": macs,
        },
        "dataset": {key: about["dataset"][key] for key in ("name", "source", "train", "val", "test", "classes")}
        | _data(setup, decoding),
        "device": {
            "name": name,
            "count": setup.batch.devices,
            "precision": config.amp_dtype,
            "memory_bytes": device.memory_bytes(setup.device),
        },
        "settings": {
            key: {"value": setup.lr if key == "lr" else _plain(getattr(config, key)), "origin": config.origins[key]}
            for key in _SHOWN
        }
        | {"head_lr": {"value": about["optimizer"]["head_lr"], "origin": f"lr x {config.head_lr_factor:g}"}},
        "optimizer": about["optimizer"],
        "sam": about["sam"],
        "batch": {
            "images": setup.batch.total,
            "per_device": setup.batch.part,
            "devices": setup.batch.devices,
            "micro_batches": setup.batch.parts,
            "at_once": at_once,
            "fits": fits,
            "fits_why": why_fits,
        },
        "length": length,
        "memory": memory | {"measured_peak": peak, "at_once": at_once},
        "step": {
            "sam": None if sam is None else _step(sam, setup.batch.total),
            "sgd": _step(plain, setup.batch.total),
            "cost_against_sgd": 1.0 if sam is None else sam.mean / plain.mean,
        },
        "evaluation": {"images_per_second": setup.batch.devices / evaluating.per_image},
        "disk": {
            "checkpoint_bytes": checkpoint_bytes,
            "checkpoint_seconds": checkpoint_seconds,
            "kept": stages * min(checkpointing.most_at_once(setup) - 1, length["checkpoints"]),
            "at_once_bytes": needed,
            "free_bytes": free,
        },
        "time": time_parts,
        "warnings": warnings,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else str(value)


def _checkpoint(setup: Setup) -> tuple[int, float, list[str]]:
    """(bytes, seconds, warnings)."""
    try:
        return *measure.checkpoint(setup), []
    except OSError as error:
        where = f"into {tempfile.gettempdir()} ({first_line(error)})"
        size = checkpointing.needed_bytes(setup, Path("runs"))[0] // checkpointing.most_at_once(setup)
        return size, 0.0, [f"no checkpoint could be written {where}: its time is left out"]


def _fits(setup: Setup, progress: measure.Progress) -> tuple[int | None, str]:
    """(images that fit in one pass or None, how that was found or why not)."""
    if setup.device.type != "cuda":
        return None, "searched on a GPU only"
    if isinstance(setup.update.sam.m, int):
        return None, f"--m {setup.config.m} decides how many images pass at once"
    most = len(setup.train_rows) // setup.batch.devices
    with device.uncompiled():
        found = batch_search.largest_batch(
            setup.model,
            setup.config,
            setup.info,
            most,
            lambda images, _: progress("searching the batch that fits: so far", images, most),
        )
    return found.images, "the largest power of two" + (" within the training images" if 2 * found.images > most else "")


def _length(setup: Setup, stages: int) -> dict[str, int | float]:
    """Number of steps, passes, validations, and of checkpoints if each validation is the best so far.

    They are of one training, except the passes, which are of all trainings.
    """
    config, total = setup.config, setup.total_steps
    validated = _validated(setup)
    saved = validated | {total} | checkpointing.kept_steps(setup)
    if config.save_every.unit != "minutes":
        between = max(1, config.save_every.steps(setup.steps_per_epoch, total))
        saved |= {*range(between, total + 1, between)}
    return {
        "epochs": total / setup.steps_per_epoch,
        "steps_per_epoch": setup.steps_per_epoch,
        "steps": total,
        "warmup_steps": setup.warmup_steps,
        "sam_steps": len(setup.rho.sam_steps),
        "trainings": stages,
        "passes": stages * setup.passes,
        "validations": len(validated),
        "checkpoints": len(saved),
    }


def _validated(setup: Setup) -> set[int]:
    """The steps after which the run validates."""
    total = setup.total_steps
    every = max(1, setup.config.eval_every.steps(setup.steps_per_epoch, total))
    return {*range(every, total + 1, every), total} if setup.config.val else set()


def _data(setup: Setup, decoding: list[Decoding]) -> dict[str, Any]:
    """State, time and size of the decoded images."""
    sampled = [part for part in decoding if part.seconds_per_image is not None]
    images = sum(part.images for part in sampled)
    each = sum((part.seconds_per_image or 0) * part.images for part in sampled) / images if images else None
    order = ("every epoch", "once", "kept")
    return {
        "decoded": min((part.state for part in decoding), key=order.index),
        "decode_seconds": sum(part.seconds for part in decoding),
        "decode_seconds_per_image": each,
        "pixel_bytes": sum(part.pixel_bytes for part in decoding),
        "cache_limit_bytes": int(setup.config.cache_limit * 2**30),
    }


def _step(steps: Steps, images: int) -> dict[str, Any]:
    return {
        "seconds": steps.mean,
        "median": steps.median,
        "quartiles": [*steps.quartiles],
        "measured": len(steps.seconds),
        "images_per_second": images / steps.mean,
        "data_wait": steps.data_wait,
    }


def _time(
    setup: Setup,
    length: Mapping[str, Any],
    decoding: list[Decoding],
    start: float,
    steps: Mapping[float, Steps],
    evaluating: Evaluating,
    save: float,
) -> dict[str, float]:
    """Seconds of each part of the run. train_seconds: from the first step to the last, as in the report.

    first_training: a whole training with --bootstrap, and the prediction of the labels.
    """
    config, devices = setup.config, setup.batch.devices
    plain, sam = steps[0.0], steps.get(config.rho, steps[0.0])
    sam_steps, total = length["sam_steps"], setup.total_steps
    scored = 1 if setup.average is None else 2  # the averaged weights, too
    pass_over_val = evaluating.per_image * math.ceil(len(setup.val_rows) / devices)
    one_validation = scored * pass_over_val
    averaged = 0 if config.model_ema else setup.tail_start  # from the next step on there is an average
    passes_over_val = length["validations"] + (scored - 1) * sum(step > averaged for step in _validated(setup))
    has_test = setup.test is not None and config.test
    test_rows = setup.test_rows if has_test else setup.val_rows
    tests = scored + (has_test and config.val)  # the last checkpoint, and the best where that is another
    parts = {
        "start": start,
        "decode": sum(part.seconds for part in decoding),
        "warm_up": max(0.0, *(kind.first - kind.mean for kind in steps.values())),
        "steps": sam_steps * sam.mean + (total - sam_steps) * plain.mean,
        "validation": passes_over_val * pass_over_val + (evaluating.first if length["validations"] else 0.0),
        "checkpoints": length["checkpoints"] * save,
        "test": tests * evaluating.per_image * math.ceil(len(test_rows) / devices),
    }
    if config.save_every.unit == "minutes":  # counted from the newest one
        between = (parts["steps"] + parts["validation"]) / max(1, length["checkpoints"])
        parts["checkpoints"] += length["checkpoints"] * (between // (60 * config.save_every.amount)) * save
    after = one_validation + save if length["validations"] else save  # what comes after the last step
    during = parts["warm_up"] + parts["steps"] + parts["validation"] + parts["checkpoints"]
    training, stages = max(0.0, during - after), length["trainings"]
    if stages > 1:
        scored_images = len(setup.train_rows) + len(setup.val_rows)  # to predict labels, and in the place of test
        parts["first_training"] = during + evaluating.per_image * math.ceil(scored_images / devices)
    whole = sum(parts.values())
    with_sgd = whole - stages * (parts["steps"] - total * plain.mean)
    return parts | {"total": whole, "train_seconds": stages * training, "total_with_sgd": with_sgd}
