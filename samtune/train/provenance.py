"""Provenance: the weights, splits, rates and versions of a run, for provenance.json and for its first log lines."""

import math
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from samtune.data.splits import split_hash
from samtune.distributed import collectives, device
from samtune.errors import plural
from samtune.report import run_report
from samtune.runs import run_log
from samtune.runs.folder import BOOTSTRAP, read_provenance
from samtune.sam.known_direction import ONE_PASS
from samtune.train.setup import Setup


def describe(setup: Setup) -> dict[str, Any]:
    """The content of provenance.json."""
    config, info, data = setup.config, setup.info, setup.data
    optimizer: dict[str, Any] = {
        "name": config.opt,
        "lr": setup.lr,
        "head_lr": max(group["lr"] for group in setup.optimizer.param_groups if group["name"] == "head"),
        "weight_decay": config.weight_decay,
        "clip_grad": config.clip_grad,
        "schedule": "cosine",
        "warmup_steps": setup.warmup_steps,
        "batch_size": setup.batch.total,
        "batch": {"per_device": setup.batch.part, "devices": setup.batch.devices, "micro_batches": setup.batch.parts},
        "l2_in_loss": config.l2_in_loss,
    }
    if config.opt == "sgd":
        optimizer |= {"momentum": config.momentum, "nesterov": config.momentum > 0}
    content: dict[str, Any] = {
        "command": run_log.command(),
        "started": run_log.now(),
        "versions": run_log.versions() | device.library_versions(setup.device),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": collectives.all_gather_object(device.describe(setup.device)),
        "arithmetic": device.arithmetic(setup.device, config.amp_dtype),
        "compiled": config.compile,
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
            "train": len(setup.train_rows),
            "val": len(setup.val_rows),
            "test": len(setup.test_rows),
            "classes": len(data.class_names),
            "notes": list(data.notes),
            "decode": setup.rule.to_json(),
            "fingerprint": data.fingerprint,
            "split_hash": split_hash(
                setup.train_rows,
                setup.train.split.labels[setup.train_rows],
                setup.val_rows,
                setup.val.split.labels[setup.val_rows],
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
            "m_images": setup.batch.sharing("global" if config.ascent in ONE_PASS else config.m),
            "perturb": config.perturb,
            "perturb_from": setup.update.sam.perturb_from,
            "suffix_share": setup.update.sam.suffix_share if setup.update.sam.shares_front else 1.0,
            "head_rho_factor": config.head_rho_factor,
            "start": setup.rho.start,
            "end": setup.rho.end,
            "every": setup.rho.every,
            "schedule": setup.rho.shape,
            "final": setup.rho.final,
            "warmup_steps": setup.rho.warmup_steps,
            "ascent_fraction": config.ascent_fraction,
            "ascent_steps": config.ascent_steps,
            "ascent": config.ascent,
            "second_order": config.second_order,
            "when": config.sam_when,
        },
        "average": _average(setup),
        "bad_images": setup.bad_images,
        "warnings": [*_warnings(setup)],
        "steps_per_epoch": setup.steps_per_epoch,
    }
    if setup.noise is not None:
        content["dataset"]["label_noise"] = setup.noise.about
    if config.bootstrap and config.output is not None:
        first = read_provenance(config.output / BOOTSTRAP)["dataset"]
        content["dataset"]["label_noise"]["first_training"] = first.get("label_noise")
    return content


def _average(setup: Setup) -> dict[str, Any] | None:
    """Which average of the weights the run has. start, steps: of a tail, the step before it and its length."""
    if setup.average is None:
        return None
    if setup.average.decay is not None:
        return {"kind": "exponential", "decay": setup.average.decay}
    return {"kind": "tail", "start": setup.tail_start, "steps": setup.total_steps - setup.tail_start}


def _warnings(setup: Setup) -> Iterator[str]:
    if setup.seen_test_images:
        yield run_report.seen_warning(setup.seen_test_images)
    if setup.one_colour:
        count = len(setup.one_colour)
        some = "; ".join(setup.one_colour[:3]) + ("; ..." if count > 3 else "")
        yield f"{count} picture{'s show' if count > 1 else ' shows'} one colour and nothing else: {some}"


def startup_lines(setup: Setup, provenance: Mapping[str, Any]) -> list[str]:
    """The first lines of a run's log. provenance: its content."""
    config, data, model = setup.config, setup.data, provenance["model"]
    resolved = "" if model["requested"] == model["resolved"] else f" -> {model['resolved']}"
    held_out = setup.val.split.name == setup.train.split.name
    val_origin = f"a stratified {100 * config.val_fraction:g} % of train" if held_out else "its own split"
    val_origin = val_origin if config.val else "trained on, too"
    sizes = f"train {len(setup.train_rows)}, val {len(setup.val_rows)} ({val_origin}), test {len(setup.test_rows)}"
    head_lr = provenance["optimizer"]["head_lr"]
    most = "at most " if config.sam_when is not None else ""
    pieces = f", {setup.update.sam.micro_batch} at once" if setup.update.sam.micro_batch else ""
    return [
        f"model   {model['requested']}{resolved}: pretrained on {model['pretraining']}, weights {model['weights']}, "
        f"{model['parameters'] / 1e6:.1f} M parameters, {model['img_size']} px",
        f"data    {data.name} ({data.origin}): {sizes}; {len(data.class_names)} classes",
        f"steps   {setup.total_steps} of {setup.batch.words()}{pieces} ({config.epochs}), "
        f"warm-up {setup.warmup_steps}, cosine",
        f"update  {run_report.sam_words(provenance['sam'], setup.total_steps)}"
        + (f"; {most}{setup.passes / setup.total_steps:.3g} passes a step" if config.rho > 0 else ""),
        f"        {config.opt}, lr {setup.lr:g}{_scaled(setup)} (head {head_lr:g}), clip {config.clip_grad:g}",
        *([f"average {run_report.average_words(provenance['average'])}"] if provenance["average"] else []),
        f"device  {_devices(provenance['devices'])}, {provenance['arithmetic']}"
        + (", compiled" if config.compile else "")
        + f"; {plural(config.workers or 0, 'data worker')}"
        + (" each" if setup.batch.devices > 1 else ""),
        f"output  {config.output}",
    ]


def _scaled(setup: Setup) -> str:
    """How the learning rate follows from --lr-base-batch, if it does."""
    base = setup.config.lr_base_batch
    return "" if base is None else f" = {setup.config.lr:g} x sqrt({setup.batch.nominal} / {base})"


def _devices(names: Sequence[str]) -> str:
    counts = Counter(names)
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
