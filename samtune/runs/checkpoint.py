"""Checkpoints: immutable folders that appear whole or not at all, load in timm, and let a run resume.

    checkpoints/step-000123/model.safetensors   weights
                            config.json         what timm needs to build the model around them
                            ema/                the same two files for the averaged weights, if there are any
                            state.pt            optimizer, random numbers and step: what a resumed run needs
                            manifest.json       sha256 and size of each file, step, run config, versions; written last
    checkpoints/{last,best}                     relative links to one of these folders; on a disk without links, files
                                                that name it

A folder is written under a temporary name, every file synced, then renamed; then a link moves. So a link never points
to half a checkpoint, and an older one is deleted only after the new one was read back and found to be as written. Only
the sums show whether bytes have changed since: a flipped bit loads silently from either format. A copy of a run whose
links have become folders can be read.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from samtune.config.run_config import RunConfig
from samtune.data.decode import DecodeRule
from samtune.errors import CheckpointError, UsageError, first_line, shorten
from samtune.runs.folder import resolve_checkpoint, to_json
from samtune.runs.hashed_file import HashedFile, write_safetensors

Name = Literal["last", "best"]
_NAMES: tuple[Name, ...] = ("last", "best")
# What a file system says that syncs no folders, such as a network share.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}


def save(
    checkpoints: Path,
    weights: Mapping[str, torch.Tensor],
    step: int,
    *,
    timm_config: Mapping[str, Any],
    about: Mapping[str, Any],
    ema: Mapping[str, torch.Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
    check_cut_off: Callable[[], object] = lambda: None,
) -> Path:
    """Write the checkpoint of a step, read it back, and return its folder.

    weights, ema: state_dicts of the model and of its average. about: further entries of the manifest: the run's config,
    class_names, versions. state: tensors, numbers and texts in dicts and lists, which load without executing anything.
    check_cut_off: called between files; it raises to end the save there, which leaves what a kill leaves.

    Raises OSError, as on a full disk; then nothing of it stays behind.
    """
    folder = checkpoints / f"step-{step:06d}"
    unfinished = checkpoints / f".{folder.name}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        files = {}
        for name, write in _writers(weights, ema, timm_config, state):
            check_cut_off()
            files[name] = _write(unfinished / name, write)
        check_cut_off()
        _write(unfinished / "manifest.json", _text(to_json({"step": step, "files": files, **about})))
        for path in (unfinished, *(path for path in unfinished.iterdir() if path.is_dir())):
            _sync(path)
        check_cut_off()
        try:
            verify(unfinished)
        except CheckpointError as error:
            raise OSError(errno.EIO, f"what was written is not what is read: {error.cause}") from None
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    check_cut_off()
    shutil.rmtree(folder, ignore_errors=True)  # of this step, but damaged: a valid one would have been used
    unfinished.rename(folder)
    _sync(checkpoints)
    return folder


def _writers(
    weights: Mapping[str, torch.Tensor],
    ema: Mapping[str, torch.Tensor] | None,
    timm_config: Mapping[str, Any],
    state: Mapping[str, Any] | None,
) -> Iterator[tuple[str, Callable[[HashedFile], object]]]:
    """Name of each file, and what writes it."""
    for folder, values in (("", weights), ("ema/", ema)):
        if values is not None:
            yield f"{folder}model.safetensors", partial(write_safetensors, values)
            yield f"{folder}config.json", _text(to_json(timm_config))
    if state is not None:
        yield "state.pt", partial(torch.save, dict(state))


def _text(text: str) -> Callable[[HashedFile], object]:
    return lambda file: file.write(text.encode())


def update_link(checkpoints: Path, name: Name, folder: Path) -> None:
    """Point last or best to this folder."""
    link = checkpoints / f".{name}.part"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(folder.name, target_is_directory=True)
    except OSError:  # a disk without links
        _write(link, _text(f"{folder.name}\n"))
    link.replace(checkpoints / name)
    _sync(checkpoints)


def find(run: Path, name: str | None = None) -> Path:
    """The checkpoint of a run folder by name: last, best, or None for the one that the run's report scored.

    Where a copy has lost the links, last is the checkpoint of the latest step, and best the one that its state names.
    Raises CheckpointError for a run without one.
    """
    checkpoints = run / "checkpoints"
    by_step = steps(checkpoints)
    last = resolve_checkpoint(checkpoints, "last")
    if not _is_whole(last) and by_step:
        last = by_step[max(by_step)]
    if not last.is_dir():
        raise CheckpointError(f"run {run} has no checkpoint yet", "it ended before its first validation")
    name = name or run_config(verify(last)).selected_checkpoint
    checkpoint = last if name == "last" else resolve_checkpoint(checkpoints, name)
    if name == "best" and not _is_whole(checkpoint):
        step = load_state(last).get("position", {}).get("best_step")
        if step not in by_step:
            raise CheckpointError(
                f"run {run} has no best checkpoint",
                "it has not validated" if step is None else f"that of step {step} is not there",
                "take the last one: --checkpoint last",
            )
        return by_step[step]
    return checkpoint


def _is_whole(folder: Path) -> bool:
    """Whether the manifest, which is written last, is there."""
    return (folder / "manifest.json").is_file()


def locate(path: Path, name: str | None = None) -> Path:
    """The checkpoint folder of a path, which is a run, where `find` looks for `name`, or a checkpoint.

    Raises CheckpointError if it is neither.
    """
    if path.is_file():  # last or best on a disk without links
        path = resolve_checkpoint(path.parent, path.name)
    if not path.is_dir():
        raise CheckpointError(f"there is no run or checkpoint {path}", hint="give a folder that `samtune run` made")
    if path.name == "checkpoints":
        path = path.parent
    if (path / "checkpoints").is_dir():
        return find(path, name)
    if _is_whole(path):
        return path
    runs = sorted(config.parent.name for config in path.glob("*/config.toml"))
    if runs:
        raise CheckpointError(f"{path} is a folder of runs", shorten(runs), "name one of them")
    if (path / "config.json").is_file():
        why = "it is what timm loads, without settings and classes of a run"
        raise CheckpointError(f"{path} is no checkpoint of a run", why, "give the run, or its checkpoint")
    return path


def adopt_copies(checkpoints: Path) -> None:
    """Turn last and best into links again where a copy of the run has made them folders.

    Such a folder is deleted if the checkpoint of its step exists, and becomes it otherwise.
    """
    for name in _NAMES:
        copy = checkpoints / name
        if copy.is_symlink() or not copy.is_dir():
            continue
        try:
            manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
            folder = checkpoints / f"step-{int(manifest['step']):06d}"
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(copy)  # of an unknown step
            continue
        if folder.is_dir():
            shutil.rmtree(copy)
        else:
            copy.rename(folder)
        update_link(checkpoints, name, folder)


def prune(checkpoints: Path, newest: Path, keep: int, kept_steps: Collection[int] = ()) -> list[Path]:
    """Delete checkpoints, except the `keep` newest up to `newest`, last, best and those of kept_steps.

    Returns the deleted folders.

    Those newer than `newest` are deleted too: they were damaged, or the run went back to before them.
    """
    by_step = steps(checkpoints)
    kept = {by_step[step] for step in sorted(step for step in by_step if step <= _step(newest))[-keep:]}
    kept |= {by_step[step] for step in kept_steps if step in by_step and step <= _step(newest)}
    kept |= {resolve_checkpoint(checkpoints, name).resolve() for name in _NAMES}
    deleted = [path for path in by_step.values() if path not in kept and path.resolve() not in kept]
    for path in deleted:
        shutil.rmtree(path)
    return deleted


def steps(checkpoints: Path) -> dict[int, Path]:
    """The checkpoint folders, valid or not, by their step."""
    return {_step(path): path for path in checkpoints.glob("step-*") if path.name.removeprefix("step-").isdigit()}


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[CheckpointError]]:
    """The valid checkpoint of the latest step, whatever the links say, and the errors of newer ones."""
    damage: list[CheckpointError] = []
    for _, folder in sorted(steps(checkpoints).items(), reverse=True):
        try:
            verify(folder)
            return folder, damage
        except CheckpointError as error:
            damage.append(error)
    return None, damage


def remove_leftovers(checkpoints: Path) -> list[Path]:
    """Delete what an interrupted save left; returns the deleted paths."""
    leftovers = list(checkpoints.glob(".*.part"))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return leftovers


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError, which names the damage, if a file differs from its sum."""
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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {folder} has no valid manifest", first_line(error)) from None
    return manifest


def load_state(folder: Path) -> dict[str, Any]:
    """The state that `save` was given, on the CPU. Raises CheckpointError for a file that holds code."""
    try:
        state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {folder} has no state to resume from", f"state.pt: {error.strerror}", "start a new run"
        ) from None
    except Exception as error:  # pickle, zip and torch have a family of errors each
        raise CheckpointError(
            f"the state in checkpoint {folder} cannot be read",
            f"state.pt holds more than tensors, numbers and texts: {first_line(error)}",
            "nothing of it was executed; start a new run",
        ) from None
    return state


def load_weights(load: Callable[[Mapping[str, torch.Tensor]], object], file: Path) -> None:
    """Load a model.safetensors by a model's load_state_dict. Raises CheckpointError if the names or shapes differ."""
    try:
        load(safetensors.torch.load_file(file))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"weights {file} do not fit the model", first_line(error)) from None


def run_config(manifest: Mapping[str, Any]) -> RunConfig:
    """The config of the run that wrote a checkpoint. Raises CheckpointError if the manifest has none."""
    try:
        return RunConfig.model_validate(manifest["config"])
    except (KeyError, ValueError) as error:
        raise CheckpointError("the checkpoint does not say how it was made", first_line(error)) from None


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was verified. weights: the folder of its weights, or with ema of its averaged weights."""

    folder: Path
    manifest: Mapping[str, Any]
    config: RunConfig
    weights: Path
    ema: bool


def open_weights(path: Path, name: str | None = None, *, ema: bool | None = None) -> Opened:
    """The weights of a run or a checkpoint. path, name: as in `locate`. ema: whether to take the averaged ones.

    None takes the averaged weights only of a run whose report scored them (--select average), unless a checkpoint is
    named. Raises CheckpointError, and UsageError if there are no averaged weights.
    """
    folder = locate(path, name)
    manifest = verify(folder)
    config = run_config(manifest)
    why = "--select average" if ema is None else "--ema"
    if ema is None:
        is_run = path.name == "checkpoints" or (path / "checkpoints").is_dir()
        ema = is_run and name is None and config.select == "average"
    if ema and not config.averages_weights:
        raise UsageError(
            f"{why}: {folder} has no averaged weights", hint="train with --average-tail 25%, or with --model-ema"
        )
    if ema and not (folder / "ema").is_dir():
        raise UsageError(
            f"{why}: {folder} has no averaged weights yet",
            f"step {manifest['step']} is before the last part of the run, --average-tail {config.average_tail}",
            "take the last one: --checkpoint last"
            if why == "--ema"
            else "let the run go on, or give the path of a checkpoint, whose own weights are taken",
        )
    return Opened(folder, manifest, config, folder / "ema" if ema else folder, ema)


def decode_rule(manifest: Mapping[str, Any]) -> DecodeRule:
    """How the run that wrote a checkpoint decodes images; in full size if the manifest does not say."""
    return DecodeRule.of(manifest["decode"]) if "decode" in manifest else DecodeRule()


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _write(path: Path, write: Callable[[HashedFile], object]) -> dict[str, Any]:
    """Write a file and sync it; returns its entry in the manifest."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        hashed = HashedFile(file)
        write(hashed)
        if hashed.error is not None:
            raise hashed.error
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": hashed.sha256(), "size": hashed.size}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Sync a folder's entries to disk, where the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
