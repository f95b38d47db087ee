"""A plan as tables for the terminal."""

from collections.abc import Mapping
from typing import Any

from samtune.errors import plural
from samtune.report import run_report


def tables(plan: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """One table per topic: title -> rows of name and value."""
    return {
        "Model": _model_rows(plan),
        "Data": _data_rows(plan),
        "Settings": _settings_rows(plan),
        "Memory": _memory_rows(plan),
        "Speed": _speed_rows(plan),
        "Time": _time_rows(plan),
        "Disk": _disk_rows(plan),
    }


def _model_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    model = plan["model"]
    macs = model["multiply_accumulates"]
    return {
        "model": f"{model['resolved']}, weights {model['weights']}",
        "parameters": f"{model['parameters']:,}, {model['trainable_parameters']:,} of them train",
        "multiply-accumulates": f"{macs / 1e6:,.4g} million for the forward pass of an image of {model['img_size']} px "
        "(convolutions and products of matrices)",
    }


def _data_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    data = plan["dataset"]
    state = data["decoded"]
    each, size = data["decode_seconds_per_image"], format_bytes(data["pixel_bytes"])
    if state == "kept":
        decoding = f"done before: {size} in the cache"
    elif state == "once":
        limit = format_bytes(data["cache_limit_bytes"])
        decoding = f"{_duration(data['decode_seconds'])} before the first step ({1000 * each:.3g} ms an image), "
        decoding += f"{size} of at most {limit} in the cache"
    else:
        decoding = f"in every epoch, in the time of the steps: {size} do not fit into --cache-limit "
        decoding += format_bytes(data["cache_limit_bytes"])
    return {
        "data": f"{data['name']} ({data['source']}), {data['classes']} classes",
        "images": f"train {data['train']}, val {data['val']}, test {data['test']}",
        "decoding": decoding,
    }


def _settings_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    length, batch = plan["length"], plan["batch"]
    rows = {
        "steps": f"{length['steps']} of {plural(batch['images'], 'image')}, {length['steps_per_epoch']} an epoch; "
        f"warm-up {length['warmup_steps']}",
        "SAM": f"{run_report.sam_words(plan['sam'], length['steps'])}; in {plural(length['sam_steps'], 'step')}",
        "passes": ("at most " if plan["sam"]["when"] else "")
        + f"{length['passes']:,.0f} forward and backward, {length['passes'] / length['steps']:.3g} times SGD's"
        + (", in two trainings (bootstrap)" if length["trainings"] > 1 else ""),
    }
    for key, setting in plan["settings"].items():
        value = setting["value"]
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        rows[key.replace("_", "-")] = f"{shown}  ({setting['origin'].removeprefix('derived: ')})"
    return rows


def _memory_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    memory, batch, device = plan["memory"], plan["batch"], plan["device"]
    named = {
        "weights": "weights",
        "gradients": "gradients",
        "weights_copy": "copy of the weights (SAM)",
        "optimizer": "optimizer",
        "ema": "averaged weights",
        "activations": f"activations of {plural(memory['at_once'], 'image')}",
    }
    rows = {words: format_bytes(memory[key]) for key, words in named.items() if memory[key] > 0}
    peak = "allocated at most" if device["name"].split()[0] != "cpu" else "at most in this process, libraries included"
    rows["sum"] = f"{format_bytes(memory['total'])} of {format_bytes(device['memory_bytes'])} on {device['name']}"
    rows["measured"] = f"{format_bytes(memory['measured_peak'])} {peak}"
    fits = batch["fits"]
    rows["batch that fits"] = (
        batch["fits_why"] if fits is None else f"{plural(fits, 'image')} at once ({batch['fits_why']})"
    )
    return rows


def _speed_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    for kind, name in (("sam", "step of SAM"), ("sgd", "plain step")):
        step = plan["step"][kind]
        if step is None:
            continue
        low, high = (1000 * value for value in step["quartiles"])
        rows[name] = (
            f"{1000 * step['seconds']:.4g} ms (half of {step['measured']} between {low:.4g} and {high:.4g}), "
            f"{step['images_per_second']:.0f} images/s, data wait {100 * step['data_wait']:.0f} %"
        )
    rows["cost against SGD"] = f"{plan['step']['cost_against_sgd']:.2f} times, measured"
    rows["evaluation"] = f"{plan['evaluation']['images_per_second']:.0f} images/s"
    return rows


def _time_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    parts, length = plan["time"], plan["length"]
    named = {
        "start": "start",
        "decode": "decoding",
        "warm_up": "what the first step takes longer",
        "steps": plural(length["steps"], "step"),
        "validation": plural(length["validations"], "validation"),
        "checkpoints": f"{length['checkpoints']} checkpoints at most",
        "test": "scoring at the end, at most",
        "first_training": "the first training (bootstrap), and its predictions",
    }
    rows = {words: _duration(parts[key]) for key, words in named.items() if parts.get(key, 0) > 0}
    rows["whole run"] = f"about {_duration(parts['total'])}; {_duration(parts['total_with_sgd'])} without SAM"
    return rows


def _disk_rows(plan: Mapping[str, Any]) -> dict[str, str]:
    disk = plan["disk"]
    return {
        "checkpoint": f"{format_bytes(disk['checkpoint_bytes'])}, saved in {_duration(disk['checkpoint_seconds'])}",
        "kept": f"{disk['kept']}: {format_bytes(disk['kept'] * disk['checkpoint_bytes'])}",
        "needed at once": f"{format_bytes(disk['at_once_bytes'])}, and {format_bytes(disk['free_bytes'])} are free",
    }


def format_bytes(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 1000 else f"{count:,.0f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.3g} minutes"
    return f"{seconds / 3600:.3g} hours"
