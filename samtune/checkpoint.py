"""Checkpoints: immutable folders that appear whole or not at all, and load in timm.

    checkpoints/step-000123/model.safetensors   weights
                            config.json         what timm needs to build the model around them
                            manifest.json       sha256 and size of each file, step, run config, versions; written last
    checkpoints/{last,best}                     relative links to one of these folders

A folder is written beside its place, every file synced, then renamed; then a link moves. So a link never points to half
a checkpoint, and the one before it is deleted only after that.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import nn

from samtune.config import RunConfig
from samtune.errors import CheckpointError, first_line

Name = Literal["last", "best"]


def save(
    checkpoints: Path, model: nn.Module, step: int, *, timm_config: Mapping[str, Any], about: Mapping[str, Any]
) -> Path:
    """Write the model's weights as checkpoint of a step, verify what is on disk, and return its folder.

    about: what the manifest says besides sums and step: the run's config, class_names, versions.
    """
    folder = checkpoints / f"step-{step:06d}"
    unfinished = checkpoints / f".{folder.name}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, unfinished / "model.safetensors")
    _write_json(unfinished / "config.json", timm_config)
    files = {path.name: {"sha256": _sha256(path), "size": path.stat().st_size} for path in sorted(unfinished.iterdir())}
    _write_json(unfinished / "manifest.json", {"step": step, "files": files, **about})
    for path in (*unfinished.iterdir(), unfinished):
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    _sync(checkpoints)
    verify(folder)
    return folder


def point(checkpoints: Path, name: Name, folder: Path) -> None:
    """Let last or best mean this folder from now on, and delete the folders that nothing means any more."""
    link = checkpoints / f".{name}.part"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    link.replace(checkpoints / name)
    _sync(checkpoints)
    meant = {path.resolve() for path in checkpoints.iterdir() if path.is_symlink()}
    for path in checkpoints.glob("step-*"):
        if path.resolve() not in meant:
            shutil.rmtree(path)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as they were written.

    Raises CheckpointError that names the damage.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            if _sha256(folder / name) != expected["sha256"]:
                raise CheckpointError(
                    f"checkpoint {folder} is damaged",
                    f"{name} differs from the sum in its manifest",
                    "use the run's other checkpoint (last, best), or train again",
                )
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} is not complete", f"{error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} has no valid manifest", str(error)) from None
    return manifest


def run_config(manifest: Mapping[str, Any]) -> RunConfig:
    """The config of the run that wrote a checkpoint. Raises CheckpointError if it is not one of ours."""
    try:
        return RunConfig.model_validate(manifest["config"])
    except (KeyError, ValueError) as error:
        raise CheckpointError("the checkpoint does not say how it was made", first_line(error)) from None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
