"""What a run was made of: names turned into weights, splits and rates. For provenance.json, and for people."""

import math
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from samtune.data.splits import split_hash
from samtune.distributed import collectives, device
from samtune.report import run_report
from samtune.runs import run_log
from samtune.train.setup import Setup


def describe(job: Setup) -> dict[str, Any]:
    """The content of provenance.json."""
    config, info, data = job.config, job.info, job.data
    optimizer: dict[str, Any] = {
        "name": config.opt,
        "lr": job.lr,
        "head_lr": max(group["lr"] for group in job.optimizer.param_groups if group["name"] == "head"),
        "weight_decay": config.weight_decay,
        "clip_grad": config.clip_grad,
        "schedule": "cosine",
        "warmup_steps": job.warmup_steps,
        "batch_size": job.batch.total,
        "batch": {"per_device": job.batch.part, "devices": job.batch.devices, "micro_batches": job.batch.parts},
        "l2_in_loss": config.l2_in_loss,
    }
    if config.opt == "sgd":
        optimizer |= {"momentum": config.momentum, "nesterov": config.momentum > 0}
    content: dict[str, Any] = {
        "command": run_log.command(),
        "started": run_log.now(),
        "versions": run_log.versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": collectives.all_gather_object(device.describe(job.device)),
        "world_size": collectives.world_size(),
        "model": {
            "requested": info.requested,
            "resolved": info.resolved,
            "weights": info.weights,
            "pretraining": info.pretraining,
            "parameters": info.parameters,
            "img_size": info.img_size,
            "data_config": info.data_config,
        },
        "dataset": {
            "name": data.name,
            "source": data.origin,
            "train": len(job.train_rows),
            "val": len(job.val_rows),
            "test": len(job.test_rows),
            "classes": len(data.class_names),
            "notes": list(data.notes),
            "decode": job.rule.to_json(),
            "fingerprint": data.fingerprint,
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
            "m_images": job.batch.sharing(config.m),
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
        "warnings": [*_warnings(job)],
        "steps_per_epoch": job.steps_per_epoch,
    }
    if job.noise is not None:
        content["dataset"]["label_noise"] = job.noise.about
    return content


def _warnings(job: Setup) -> Iterator[str]:
    if job.seen_test_images:
        yield run_report.seen_warning(job.seen_test_images)
    if job.one_colour:
        count = len(job.one_colour)
        some = "; ".join(job.one_colour[:3]) + ("; ..." if count > 3 else "")
        yield f"{count} picture{'s show' if count > 1 else ' shows'} one colour and nothing else: {some}"


def startup_lines(job: Setup, provenance: Mapping[str, Any]) -> list[str]:
    """The same in a few lines, as a run says them when it begins."""
    config, data, model = job.config, job.data, provenance["model"]
    resolved = "" if model["requested"] == model["resolved"] else f" -> {model['resolved']}"
    held_out = job.val.split.name == job.train.split.name
    own = f"a stratified {100 * config.val_fraction:g} % of train" if held_out else "its own split"
    own = own if config.val else "trained on, too"
    sizes = f"train {len(job.train_rows)}, val {len(job.val_rows)} ({own}), test {len(job.test_rows)}"
    head_lr = provenance["optimizer"]["head_lr"]
    pieces = f", {job.update.sam.micro_batch} at once" if job.update.sam.micro_batch else ""
    return [
        f"model   {model['requested']}{resolved}: pretrained on {model['pretraining']}, weights {model['weights']}, "
        f"{model['parameters'] / 1e6:.1f} M parameters, {model['img_size']} px",
        f"data    {data.name} ({data.origin}): {sizes}; {len(data.class_names)} classes",
        f"steps   {job.total_steps} of {job.batch.words()}{pieces} ({config.epochs}), "
        f"warm-up {job.warmup_steps}, cosine",
        f"update  {run_report.sam_words(provenance['sam'], job.total_steps)}",
        f"        {config.opt}, lr {job.lr:g}{_scaled(job)} (head {head_lr:g}), clip {config.clip_grad:g}",
        f"device  {_devices(provenance['devices'])}, {config.amp_dtype}; {config.workers} data workers"
        + (" each" if job.batch.devices > 1 else ""),
        f"output  {config.output}",
    ]


def _scaled(job: Setup) -> str:
    """Where the rate is not the one that was given, from what it follows."""
    base = job.config.lr_base_batch
    return "" if base is None else f" = {job.config.lr:g} x sqrt({job.batch.nominal} / {base})"


def _devices(names: Sequence[str]) -> str:
    counts = Counter(names)
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
