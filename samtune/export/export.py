"""Trained models for other programs: a folder for timm, an ONNX file, a torch.export program.

What is written is loaded again and compared with the checkpoint's model on pictures, before it takes its name: a file
that gives other logits is never left behind.
"""

import contextlib
import importlib.util
import json
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from samtune import __version__, console
from samtune.config.run_config import RunConfig
from samtune.data.cache import Images
from samtune.data.splits import open_run_splits
from samtune.data.transforms import eval_transform, normalize
from samtune.errors import CheckpointError, DataError, MachineError, ModelError, SamtuneError, UsageError, first_line
from samtune.export import onnx_file
from samtune.export.onnx_file import quiet
from samtune.export.preprocessing import WithPreprocessing
from samtune.models import pretrained
from samtune.runs import checkpoint
from samtune.text import plural
from samtune.train.temperature import read as read_temperature

Format = Literal["timm", "onnx", "torch"]
TOLERANCE = 1e-4  # of a logit, in float32
_PICTURES = 32
_BATCH = 8
_TIMM_FILES = ("config.json", "model.safetensors")
# Pixels whose value lies halfway between two levels may be rounded to the other one: by one level, and this share.
_ROUNDED = 1e-3


@dataclass(frozen=True)
class Original:
    """A checkpoint that is exported. weights: the folder of its model.safetensors; base: where exports go."""

    folder: Path
    weights: Path
    base: Path
    manifest: Mapping[str, Any]
    config: RunConfig
    ema: bool

    @property
    def temperature(self) -> float | None:
        """What the logits are divided by, where `samtune eval --temperature` has fitted it for these weights."""
        fitted = read_temperature(self.weights)
        return None if fitted is None else fitted.temperature

    def default_output(self, to: Format, *, with_preprocessing: bool) -> Path:
        """RUN/export/timm, model.onnx or model.pt2; of other weights, or with preprocessing, under another name."""
        start, end = {"timm": ("timm", ""), "onnx": ("model", ".onnx"), "torch": ("model", ".pt2")}[to]
        which = ("_ema" if self.ema else "") + ("_with_preprocessing" if with_preprocessing else "")
        return self.base / "export" / f"{start}{which}{end}"


@dataclass(frozen=True)
class Pictures:
    """What an export is compared on. pixels: (3, h, w) uint8 each. origin: where they are from, in words."""

    pixels: list[torch.Tensor]
    origin: str


def export(
    path: Path,
    to: Format,
    *,
    output: Path | None = None,
    name: str | None = None,
    ema: bool = False,
    with_preprocessing: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Export a run's checkpoint, or a checkpoint folder; returns what was written and how it compares.

    output: the file, or for timm the folder; None: in the folder `export` of the run. name: "last" or "best" of a run;
    None takes the one that the run's report scored. ema: the averaged weights. with_preprocessing (ONNX): pictures in,
    probabilities out. force: what is at `output` is replaced.

    Raises:
        UsageError: something is at `output`, or it cannot be called so; no averaged weights.
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

    model, data_config = pretrained.load_checkpoint(original.weights)
    module = WithPreprocessing(model, data_config, temperature or 1.0).eval() if with_preprocessing else model
    about = _metadata(original, data_config, temperature)
    console.info(f"exporting {about['architecture']} of {original.folder} --to {to}")
    pictures = find_pictures(original)
    with _taking_its_name(output) as unfinished:
        _write(unfinished, to, original.weights, module, data_config, about)
        if with_preprocessing:
            compared = _compare_with_preprocessing(unfinished, model, data_config, temperature, pictures, progress)
            _refuse_a_difference(compared, to)
            onnx_file.keep_outputs(unfinished, 1)
            _check_probabilities(unfinished, pictures, compared)
        else:
            compared = _compare(load(unfinished, to), model, data_config, pictures, progress)
            _refuse_a_difference(compared, to)
        written = sum(file.stat().st_size for file in (unfinished, *unfinished.glob("*")) if file.is_file())
    return {
        "checkpoint": str(original.folder),
        "step": original.manifest["step"],
        "ema": ema,
        "to": to,
        "with_preprocessing": with_preprocessing,
        "temperature": temperature if with_preprocessing else None,
        "output": str(output),
        "bytes": written,
        "pictures": pictures.origin,
        **{key: value for key, value in compared.items() if not key.startswith("_")},
    }


# ----------------------------------------------------------------------------------------------------- finding, writing


def find(path: Path, name: str | None, *, ema: bool) -> Original:
    """The checkpoint of a run, or a checkpoint folder itself, with its bytes verified."""
    is_run = (path / "checkpoints").is_dir()
    folder = checkpoint.locate(path, name)
    manifest = checkpoint.verify(folder)
    config = checkpoint.run_config(manifest)
    weights = checkpoint.weights(folder, config, ema=ema)
    inside = not is_run and path.absolute().parent.name == "checkpoints"
    base = path if is_run else path.absolute().parents[1] if inside else path.absolute().parent
    return Original(folder, weights, base, manifest, config, ema)


def check_output(output: Path, to: Format, *, force: bool) -> None:
    """Raise UsageError for a path that exists; with force, for one whose loss nobody can have meant.

    And for a name that torch.export would complain of.
    """
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
def _taking_its_name(output: Path) -> Iterator[Path]:
    """A path beside `output`, which takes its name at the end, and is gone if there was an error.

    Raises MachineError where nothing can be written.
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
    about: Mapping[str, str],
) -> None:
    """Write one format. weights: the folder that holds those of module, which is a model, or one WithPreprocessing."""
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
        torch.export.save(program, unfinished, extra_files={"samtune.json": json.dumps(about)})
    else:
        onnx_file.write(program, unfinished, inputs={name: sizes}, outputs=outputs, metadata=about)


def _metadata(original: Original, data_config: Mapping[str, Any], temperature: float | None) -> dict[str, str]:
    """What somebody who has only the file needs to know."""
    config = json.loads((original.weights / "config.json").read_text(encoding="utf-8"))
    about = {
        "architecture": config["architecture"],
        "class_names": json.dumps(list(original.manifest["class_names"]), ensure_ascii=False),
        **{key: json.dumps(list(data_config[key])) for key in ("input_size", "mean", "std")},
        **{key: str(data_config[key]) for key in ("interpolation", "crop_pct", "crop_mode")},
        "samtune_version": __version__,
    }
    return about | ({} if temperature is None else {"temperature": repr(temperature)})


def trace(module: nn.Module, example: torch.Tensor, sizes: Mapping[int, str]) -> torch.export.ExportedProgram:
    """A torch.export program of a module with one input, some of whose sizes vary.

    Raises ModelError with the layer that cannot be traced.
    """
    dynamic = {axis: torch.export.Dim(size, min=1) for axis, size in sizes.items()}
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes=(dynamic,))
    except Exception as error:  # torch.export has a family of errors, and the model's own come through
        raise ModelError(
            f"the model cannot be exported: {_layer(error, module)}", first_line(error), "--to timm can always be had"
        ) from None
    for node in program.graph.nodes:  # the paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _layer(error: BaseException, module: nn.Module) -> str:
    """The innermost layer that was at work when an error was raised."""
    names = {id(layer): name for name, layer in module.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        if isinstance(layer, nn.Module) and names.get(id(layer)):
            found = f"layer {names[id(layer)]} ({type(layer).__name__})"
    return found or "in no layer that could be told"


# ------------------------------------------------------------------------------------------------------------- checking


def find_pictures(original: Original) -> Pictures:
    """32 of the run's validation images, of the test images if it has none, or parts of a photograph if both are gone.

    Pictures that cannot be decoded are left out.
    """
    try:
        parts = open_run_splits(original.config, classes=original.manifest["class_names"])
        for name, split, rows in (("validation", parts.val, parts.val_rows), ("test", parts.test, parts.test_rows)):
            if split is None:
                continue
            images = Images(split, checkpoint.decode_rule(original.manifest))
            found = []
            for i in np.unique(np.linspace(0, len(rows) - 1, min(_PICTURES, len(rows))).astype(int)):
                with contextlib.suppress(DataError):
                    found.append(images[int(rows[i])])
            if found:
                return Pictures(found, f"{plural(len(found), f'{name} image')} of {parts.data.name}")
    except SamtuneError as error:
        console.info(f"the run's data set is not here ({error.message})")
    found = _parts_of_a_photograph()
    return Pictures(found, f"{len(found)} parts of a photograph that comes with Matplotlib")


def _parts_of_a_photograph() -> list[torch.Tensor]:
    """Of many sizes and shapes, always the same: (3, h, w) uint8 each."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    photograph = Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    try:
        pixels = np.array(Image.open(BytesIO(photograph.read_bytes())).convert("RGB"))
    except OSError as error:
        raise DataError(
            f"no picture to compare on: {photograph} cannot be read",
            first_line(error),
            "put the run's data set back, or install matplotlib again by pip",
        ) from None
    draw = np.random.default_rng(0)
    found = []
    for _ in range(_PICTURES):
        height, width = (int(draw.integers(side // 6, side + 1)) for side in pixels.shape[:2])
        top, left = int(draw.integers(pixels.shape[0] - height + 1)), int(draw.integers(pixels.shape[1] - width + 1))
        part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        found.append(torch.from_numpy(part).permute(2, 0, 1))
    return found


Compute = Callable[[torch.Tensor], torch.Tensor]  # (batch, 3, size, size) float32 -> logits (batch, classes)


def load(written: Path, to: Format) -> Compute:
    """What was written, as whoever gets it would load it."""
    if to == "timm":
        return pretrained.load_checkpoint(written)[0]
    if to == "torch":
        module: Compute = torch.export.load(written).module()
        return module
    session = onnx_file.Session(written)
    return lambda images: torch.from_numpy(session(images)[0])


@torch.no_grad()
def _compare(
    exported: Compute,
    model: nn.Module,
    data_config: Mapping[str, Any],
    pictures: Pictures,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Largest difference of logits, and in how many pictures the class is the same."""
    transform = eval_transform(data_config)
    images = normalize(torch.stack([transform(pixels) for pixels in pictures.pixels]), data_config).contiguous()
    largest, same, done, n = 0.0, 0, 0, len(images)
    for batch in (images[:1], *images[1:].split(_BATCH)):  # one alone: the size of a batch is free
        expected, found = model(batch), exported(batch)
        largest = _larger(largest, (found - expected).abs().max())
        same += int((found.argmax(1) == expected.argmax(1)).sum())
        done += len(batch)
        progress("comparing", done, n)
    return {"n": n, "largest_difference": largest, "same_class": same}


@torch.no_grad()
def _compare_with_preprocessing(
    written: Path,
    model: nn.Module,
    data_config: Mapping[str, Any],
    temperature: float | None,
    pictures: Pictures,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """As `_compare`, from decoded pictures on; and how far pixels and probabilities are from the original's.

    The logits are compared on the same pixels: one of them that is rounded otherwise may change a logit by more than
    the arithmetic does.
    """
    session, transform = onnx_file.Session(written), eval_transform(data_config)
    difference = probability_difference = level = 0.0
    same = otherwise = values = 0
    probabilities = []
    for i, pixels in enumerate(pictures.pixels):
        found = [torch.from_numpy(output) for output in session(pixels.permute(1, 2, 0))]
        seen = transform(pixels)
        expected = model(normalize(seen[None], data_config))[0]
        expected_of_it = model(normalize(found[2].to(torch.uint8)[None], data_config))[0]
        difference = _larger(difference, (found[1] - expected_of_it).abs().max())
        expected_probabilities = (expected / (temperature or 1.0)).softmax(0)
        probability_difference = _larger(probability_difference, (found[0] - expected_probabilities).abs().max())
        levels = (found[2] - seen.float()).abs()
        level = _larger(level, levels.max())
        otherwise, values = otherwise + int((levels > 0).sum()), values + levels.numel()
        same += int(found[0].argmax() == expected.argmax())
        probabilities.append(found[0])
        progress("comparing", i + 1, len(pictures.pixels))
    return {
        "n": len(pictures.pixels),
        "largest_difference": difference,
        "same_class": same,
        "largest_probability_difference": probability_difference,
        "values": values,
        "values_rounded_otherwise": otherwise,
        "_level": level,
        "_probabilities": probabilities,
    }


def _larger(one: float, other: torch.Tensor) -> float:
    """The larger one; NaN where either is."""
    return float(torch.maximum(torch.tensor(one, dtype=torch.float64), other.double()))


def _check_probabilities(written: Path, pictures: Pictures, compared: Mapping[str, Any]) -> None:
    """The file as it will be, without the outputs that were there for the comparison, gives the same probabilities."""
    session = onnx_file.Session(written)
    for pixels, expected in zip(pictures.pixels, compared["_probabilities"], strict=True):
        (found,) = session(pixels.permute(1, 2, 0))
        difference = float(np.abs(found - expected.numpy()).max())
        if not difference <= TOLERANCE:
            raise CheckpointError("the exported file gives other probabilities", f"by up to {difference:.1e}")


def _refuse_a_difference(compared: Mapping[str, Any], to: Format) -> None:
    difference = compared["largest_difference"]
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the export --to {to} gives other logits than the checkpoint: by up to {difference:.1e}",
            f"at most {TOLERANCE:g} in float32 is allowed; {compared['same_class']} of {compared['n']} classes agree",
            "nothing was written; try another format",
        )
    if compared.get("_level", 0) > 1 or compared.get("values_rounded_otherwise", 0) > _ROUNDED * compared.get(
        "values", 1
    ):
        raise CheckpointError(
            "the preprocessing in the export gives other pixels than the evaluation: "
            f"{compared['values_rounded_otherwise']} of {compared['values']}, by up to {compared['_level']:.0f} levels",
            hint="nothing was written; export without --with-preprocessing",
        )
