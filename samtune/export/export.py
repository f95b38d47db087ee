"""Export of trained models: a folder for timm, an ONNX file, or a torch.export program.

An export is loaded again and compared with the checkpoint's model on pictures before it gets its name, so that a file
that gives other logits is never left behind.
"""

import json
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from samtune import __version__, console
from samtune.config.run_config import RunConfig
from samtune.errors import MachineError, ModelError, UsageError, first_line
from samtune.export import compare, onnx_file
from samtune.export.onnx_file import quiet
from samtune.export.preprocessing import WithPreprocessing
from samtune.models.timm_format import load_checkpoint
from samtune.runs import checkpoint
from samtune.train.temperature import read as read_temperature

Format = Literal["timm", "onnx", "torch"]
_TIMM_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class Original:
    """The checkpoint to export. weights: the folder of its model.safetensors; base: where the folder `export` is."""

    folder: Path
    weights: Path
    base: Path
    manifest: Mapping[str, Any]
    config: RunConfig
    ema: bool

    @property
    def temperature(self) -> float | None:
        """The temperature that `samtune eval --temperature` has fitted for these weights, or None."""
        fitted = read_temperature(self.weights)
        return None if fitted is None else fitted.temperature

    def default_output(self, to: Format, *, with_preprocessing: bool) -> Path:
        """RUN/export/timm, model.onnx or model.pt2, with a suffix for averaged weights and for preprocessing."""
        stem, suffix = {"timm": ("timm", ""), "onnx": ("model", ".onnx"), "torch": ("model", ".pt2")}[to]
        stem += ("_ema" if self.ema else "") + ("_with_preprocessing" if with_preprocessing else "")
        return self.base / "export" / f"{stem}{suffix}"


def export(
    path: Path,
    to: Format,
    *,
    output: Path | None = None,
    name: str | None = None,
    ema: bool | None = None,
    with_preprocessing: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> dict[str, Any]:
    """Export a run's checkpoint, or a checkpoint folder; return what was written and how it compares.

    output: the file, or for timm the folder; None: in the folder `export` of the run. name: "last" or "best" of a run;
    None: the one that the run's report scored. ema: the averaged weights; None: where the report scored them.
    with_preprocessing (ONNX): pictures in, probabilities out. force: replace what is at `output`.

    Raises:
        UsageError: output exists or has a wrong suffix; no averaged weights.
        CheckpointError: no such checkpoint, a damaged one, or an export that differs from it.
        ModelError: a model that cannot be exported.
        MachineError: packages for ONNX are missing.
    """
    if with_preprocessing and to != "onnx":
        raise UsageError(f"--with-preprocessing --to {to}", "only ONNX takes it", "--to onnx, or leave it out")
    if output is not None:
        check_output(output, to, force=force)
    if to == "onnx":
        onnx_file.check_packages()
    original = find(path, name, ema=ema)
    temperature = original.temperature
    output = output or original.default_output(to, with_preprocessing=with_preprocessing)
    check_output(output, to, force=force)

    model, data_config = load_checkpoint(original.weights)
    module = WithPreprocessing(model, data_config, temperature or 1.0).eval() if with_preprocessing else model
    metadata = _metadata(original, data_config, temperature)
    console.info(f"exporting {metadata['architecture']} of {original.folder} --to {to}")
    pictures = compare.find_pictures(original.config, original.manifest)
    with _temporary_output(output) as unfinished:
        _write(unfinished, to, original.weights, module, data_config, metadata)
        if with_preprocessing:
            compared, probabilities = compare.with_preprocessing(
                unfinished, model, data_config, temperature, pictures, progress
            )
            compare.raise_if_different(compared, to)
            onnx_file.keep_outputs(unfinished, 1)
            compare.check_probabilities(unfinished, pictures, probabilities)
        else:
            compared = compare.logits(load(unfinished, to), model, data_config, pictures, progress)
            compare.raise_if_different(compared, to)
        written = sum(file.stat().st_size for file in (unfinished, *unfinished.glob("*")) if file.is_file())
    return {
        "checkpoint": str(original.folder),
        "step": original.manifest["step"],
        "ema": original.ema,
        "to": to,
        "with_preprocessing": with_preprocessing,
        "temperature": temperature if with_preprocessing else None,
        "output": str(output),
        "bytes": written,
        "pictures": pictures.origin,
        **{key: value for key, value in compared.items() if key != "level"},
    }


def find(path: Path, name: str | None, *, ema: bool | None) -> Original:
    """The checkpoint of a run, or a checkpoint folder itself, after verifying its bytes."""
    is_run = (path / "checkpoints").is_dir()
    opened = checkpoint.open_weights(path, name, ema=ema)
    inside = not is_run and path.absolute().parent.name == "checkpoints"
    base = path if is_run else path.absolute().parents[1] if inside else path.absolute().parent
    return Original(**vars(opened), base=base)


def check_output(output: Path, to: Format, *, force: bool) -> None:
    """Raise UsageError for a path that exists, or that --force must not replace, and for a wrong suffix."""
    if to == "torch" and output.suffix != ".pt2":
        raise UsageError(f"--output {output} --to torch: must end in .pt2", hint=f"--output {output}.pt2")
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise UsageError(f"{output} exists", hint="give another --output, or replace it by --force")
    is_folder = output.is_dir()
    if output.exists() and not (is_folder or output.is_file()):
        raise UsageError(f"--force: {output} is a device or a pipe", hint="give another --output")
    if is_folder and (to != "timm" or any(file.name not in _TIMM_FILES for file in output.iterdir())):
        raise UsageError(
            f"--force: {output} is a folder" + (" with other files" if to == "timm" else ""),
            hint="give another --output",
        )
    if to == "timm" and not is_folder:
        raise UsageError(f"--force: {output} is a file, and --to timm makes a folder", hint="give another --output")


@contextmanager
def _temporary_output(output: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `output` at the end of the block, or removed after an error.

    Raises MachineError where it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            unfinished = scratch / output.name
            yield unfinished
            if output.is_dir() and not output.is_symlink():
                output.replace(scratch / "replaced")
            unfinished.replace(output)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise MachineError(f"{output} cannot be written", first_line(error), "give another --output") from None


def _write(
    unfinished: Path,
    to: Format,
    weights: Path,
    module: nn.Module,
    data_config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> None:
    """Write one format. weights: the folder with the weights of module, which is a model or a WithPreprocessing."""
    if to == "timm":
        unfinished.mkdir()
        for file in _TIMM_FILES:
            shutil.copyfile(weights / file, unfinished / file)
        return
    name, example, sizes, outputs = "images", torch.zeros((2, *data_config["input_size"])), {0: "batch"}, ["logits"]
    if isinstance(module, WithPreprocessing):
        name, example = "image", torch.zeros((90, 70, 3), dtype=torch.uint8)
        sizes, outputs = {0: "height", 1: "width"}, ["probabilities", "logits", "pixels"]
    program = trace(module, example, sizes)
    if to == "torch":
        torch.export.save(program, unfinished, extra_files={"samtune.json": json.dumps(metadata)})
    else:
        onnx_file.write(program, unfinished, inputs={name: sizes}, outputs=outputs, metadata=metadata)


def _metadata(original: Original, data_config: Mapping[str, Any], temperature: float | None) -> dict[str, str]:
    """Classes, preprocessing and temperature, stored in the file."""
    config = json.loads((original.weights / "config.json").read_text(encoding="utf-8"))
    metadata = {
        "architecture": config["architecture"],
        "class_names": json.dumps(list(original.manifest["class_names"]), ensure_ascii=False),
        **{key: json.dumps(list(data_config[key])) for key in ("input_size", "mean", "std")},
        **{key: str(data_config[key]) for key in ("interpolation", "crop_pct", "crop_mode")},
        "samtune_version": __version__,
    }
    return metadata | ({} if temperature is None else {"temperature": repr(temperature)})


def trace(module: nn.Module, example: torch.Tensor, sizes: Mapping[int, str]) -> torch.export.ExportedProgram:
    """Trace a module with one input into a torch.export program. sizes: axis -> name of a size that may vary.

    Raises ModelError with the layer that cannot be traced.
    """
    dynamic = {axis: torch.export.Dim(size, min=1) for axis, size in sizes.items()}
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes=(dynamic,))
    except Exception as error:  # torch.export's own errors and the model's
        raise ModelError(
            f"the model cannot be exported: {_layer(error, module)}", first_line(error), "--to timm is always possible"
        ) from None
    for node in program.graph.nodes:  # it holds paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _layer(error: BaseException, module: nn.Module) -> str:
    names = {id(layer): name for name, layer in module.named_modules()}
    innermost = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        if isinstance(layer, nn.Module) and names.get(id(layer)):
            innermost = f"layer {names[id(layer)]} ({type(layer).__name__})"
    return innermost or "the layer is unknown"


def load(written: Path, to: Format) -> compare.Compute:
    """Load an export as its users would."""
    if to == "timm":
        return load_checkpoint(written)[0]
    if to == "torch":
        module: compare.Compute = torch.export.load(written).module()
        return module
    session = onnx_file.Session(written)
    return lambda images: torch.from_numpy(session(images)[0])
