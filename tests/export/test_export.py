"""`samtune export`: what other programs load gives the logits of the checkpoint, or is not there."""

import io
import json
import shutil
from dataclasses import asdict

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from samtune.data.decode import decode
from samtune.data.transforms import EvalTransform, normalize
from samtune.errors import CheckpointError, MachineError, ModelError, UsageError
from samtune.export import compare, onnx_file
from samtune.export import export as exporting
from samtune.export.preprocessing import WithPreprocessing
from samtune.models.timm_format import load_checkpoint
from samtune.train.temperature import Temperature
from tests.conftest import SMALL_MODEL, SmallNet, image_bytes, samtune, write_image_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with averaged weights, whose validation has 12 images."""
    root = tmp_path_factory.mktemp("trained")
    data = write_image_folder(root / "data", {"train": 20, "val": 6, "test": 4})
    settings = (*SMALL_MODEL, "--epochs", 2, "--lr", 0.05, "--model-ema", "--batch-size", 8)
    done = samtune("run", *settings, "--dataset", data, "--output", root / "r")
    assert done.returncode == 0, done.stderr
    return root / "r"


@pytest.fixture(scope="module")
def plain_onnx(run, tmp_path_factory):
    """(file, what the export said), of the averaged weights."""
    file = tmp_path_factory.mktemp("onnx") / "m.onnx"
    return file, exporting.export(run, "onnx", output=file, ema=True)


@pytest.fixture(scope="module")
def seen_through(run, tmp_path_factory):
    """An ONNX file of the run's model with preprocessing, before the outputs for the comparison are taken out."""
    file = tmp_path_factory.mktemp("onnx") / "m.onnx"
    model, data_config = load_checkpoint(weights_folder(run))
    module = WithPreprocessing(model, data_config, temperature=2.0).eval()
    exporting._write(file, "onnx", weights_folder(run), module, data_config, {})
    return file, model, data_config


def weights_folder(run, ema=False):
    return (run / "checkpoints" / "last").resolve() / ("ema" if ema else "")


def images_of(n, size=32):
    return torch.randn((n, 3, size, size), generator=torch.Generator().manual_seed(n))


def session(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def smooth_picture(seed, height, width):
    """Colours that change as in a photograph, (height, width, 3) uint8."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("ema", [False, True])
def test_timm_itself_loads_the_folder_and_gives_equal_logits(ema, run, tmp_path):
    result = exporting.export(run, "timm", output=tmp_path / "pets", ema=ema)
    assert sorted(path.name for path in (tmp_path / "pets").iterdir()) == ["config.json", "model.safetensors"]
    found = timm.create_model(f"local-dir:{tmp_path / 'pets'}", pretrained=True).eval()
    expected, _ = load_checkpoint(weights_folder(run, ema))
    with torch.no_grad():
        assert torch.equal(found(images_of(4)), expected(images_of(4)))
    assert found.pretrained_cfg["label_names"] == ["cat", "dog"]
    assert (result["largest_difference"], result["same_class"], result["n"]) == (0, 12, 12)
    assert result["pictures"] == "12 validation images of data"


def test_averaged_weights_are_others(run, tmp_path):
    """A mix-up of the two would be seen."""
    for ema in (False, True):
        exporting.export(run, "timm", output=tmp_path / str(ema), ema=ema)
    plain, averaged = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("False", "True"))
    assert plain != averaged


def test_onnx_gives_the_logits_of_the_model_for_batches_of_any_size(run, plain_onnx):
    file, result = plain_onnx
    model, _ = load_checkpoint(weights_folder(run, ema=True))
    runs = session(file)
    assert [(each.name, each.shape) for each in (*runs.get_inputs(), *runs.get_outputs())] == [
        ("images", ["batch", 3, 32, 32]),
        ("logits", ["batch", 2]),
    ]
    for n in (1, 3, 32):
        images = images_of(n)
        (found,) = runs.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, model(images).numpy(), atol=1e-5)
    assert result["same_class"] == 12
    assert 0 <= result["largest_difference"] < 1e-5


def test_an_onnx_file_says_what_it_needs_to_be_used(run, plain_onnx):
    said = session(plain_onnx[0]).get_modelmeta().custom_metadata_map
    _, data_config = load_checkpoint(weights_folder(run))
    assert json.loads(said["class_names"]) == ["cat", "dog"]
    for key in ("input_size", "mean", "std"):
        assert tuple(json.loads(said[key])) == data_config[key]
    for key in ("interpolation", "crop_mode"):
        assert said[key] == data_config[key]
    assert float(said["crop_pct"]) == data_config["crop_pct"]
    assert said["architecture"] == "test_resnet"
    onnx.checker.check_model(str(plain_onnx[0]), full_check=True)


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_a_file_does_not_tell_where_it_was_made(to, run, plain_onnx, tmp_path):
    file = plain_onnx[0] if to == "onnx" else tmp_path / "m.pt2"
    if to == "torch":
        exporting.export(run, "torch", output=file)
    content = file.read_bytes()
    for path in (torch.__file__, timm.__file__, str(file)):
        assert path.rpartition("/")[0].encode() not in content


def test_a_torch_program_gives_equal_logits_for_batches_of_any_size(run, tmp_path):
    exporting.export(run, "torch", output=tmp_path / "m.pt2")
    model, _ = load_checkpoint(weights_folder(run))
    said = {"samtune.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=said).module()
    for n in (1, 3, 32):
        with torch.no_grad():
            torch.testing.assert_close(program(images_of(n)), model(images_of(n)), rtol=0, atol=1e-6)
    assert json.loads(json.loads(said["samtune.json"])["class_names"]) == ["cat", "dog"]


def write_onnx(model, file, size):
    program = exporting.trace(model, torch.zeros((2, 3, size, size)), {0: "batch"})
    onnx_file.write(program, file, inputs={"images": {0: "batch"}}, outputs=["logits"], metadata={})
    return program


def check_formats(name, tmp_path, size, **arguments):
    """ONNX and torch of a model with random weights against itself, batches of 1 and 5."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    file = tmp_path / "m.onnx"
    program = write_onnx(model, file, size)
    runs = session(file)
    for n in (1, 5):
        images = images_of(n, size)
        with torch.no_grad():
            expected = model(images)
            torch.testing.assert_close(program.module()(images), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(runs.run(None, {"images": images.numpy()})[0], expected.numpy(), atol=1e-4)


def test_padding_as_in_tensorflow_is_exported(tmp_path):
    """An odd size, where "same" padding differs on the two sides."""
    check_formats("test_efficientnet", tmp_path, 65, pad_type="same")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("tf_efficientnet_lite0", 65, {}),
        ("vit_tiny_patch16_224", 64, {"img_size": 64}),
        ("efficientnet_b0", 65, {}),
        ("convnext_atto", 64, {}),
    ],
)
def test_other_architectures_are_exported(name, size, arguments, tmp_path):
    check_formats(name, tmp_path, size, **arguments)


# ------------------------------------------------------------------------------------------------------- preprocessing


SHAPES = (
    *((300, 200), (201, 333), (32, 32), (36, 37), (20, 11), (3, 2), (1, 1), (1, 40), (900, 30), (64, 96), (7, 701)),
    (333, 500),
)
CROPS = (("center", 0.875), ("center", 1.0), ("squash", 1.0), ("squash", 0.9), ("center", 1.15))


def check_pixels(data_config, compute):
    """compute(picture), (height, width, 3) uint8 -> pixels (3, size, size), gives exactly what the evaluation gives."""
    transform = EvalTransform(data_config)
    for seed, (height, width) in enumerate(SHAPES):
        picture = smooth_picture(seed, height, width)
        expected = transform(torch.from_numpy(picture).permute(2, 0, 1))
        np.testing.assert_array_equal(compute(picture), expected.numpy().astype(np.float32), str((height, width)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", CROPS)
def test_preprocessing_gives_the_pixels_of_the_evaluation(interpolation, crop):
    settings = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    data_config = {**settings, "interpolation": interpolation, "crop_mode": crop[0], "crop_pct": crop[1]}
    module = WithPreprocessing(SmallNet().eval(), data_config).eval()
    with torch.no_grad():
        check_pixels(data_config, lambda picture: module(torch.from_numpy(picture))[2].numpy())


def test_preprocessing_in_onnx_takes_pictures_of_any_shape(seen_through):
    file, model, data_config = seen_through
    runs = session(file)
    check_pixels(data_config, lambda picture: runs.run(None, {"image": picture})[2])
    for height, width in SHAPES:
        probabilities, logits, pixels = runs.run(None, {"image": smooth_picture(9, height, width)})
        with torch.no_grad():
            of_it = model(normalize(torch.from_numpy(pixels).to(torch.uint8)[None], data_config))[0]
        np.testing.assert_allclose(logits, of_it.numpy(), atol=1e-5)
        np.testing.assert_allclose(probabilities, (of_it / 2.0).softmax(0).numpy(), atol=1e-6)


def fitted(temperature: float) -> str:
    """What `samtune eval --temperature` stores."""
    return json.dumps(asdict(Temperature(temperature, "val", 9, 1.0, 0.5, 0.2, 0.1)))


def test_a_decoded_picture_in_and_probabilities_out_with_the_temperature_of_the_checkpoint(run, tmp_path):
    copy, file = tmp_path / "r", tmp_path / "p.onnx"
    shutil.copytree(run, copy, symlinks=True)
    (weights_folder(copy) / "temperature.json").write_text(fitted(0.25))
    result = exporting.export(copy, "onnx", output=file, with_preprocessing=True)
    runs = session(file)
    assert [(each.name, each.shape, each.type) for each in (*runs.get_inputs(), *runs.get_outputs())] == [
        ("image", ["height", "width", 3], "tensor(uint8)"),
        ("probabilities", [2], "tensor(float)"),
    ]
    assert runs.get_modelmeta().custom_metadata_map["temperature"] == "0.25"
    model, data_config = load_checkpoint(weights_folder(run))
    for seed, size in enumerate(((90, 50), (33, 200), (24, 20))):
        encoded = image_bytes(seed, size, "JPEG")
        (found,) = runs.run(None, {"image": np.array(Image.open(io.BytesIO(encoded)))})
        pixels = decode(encoded, lambda: "")
        with torch.no_grad():
            logits = model(normalize(EvalTransform(data_config)(pixels)[None], data_config))[0]
        np.testing.assert_allclose(found, (logits / 0.25).softmax(0).numpy(), atol=5e-3)
    assert result["temperature"] == 0.25
    assert result["same_class"] == result["n"] == 12
    assert result["largest_difference"] < 1e-5
    assert result["values_rounded_otherwise"] <= 1e-3 * result["values"]


def test_a_temperature_belongs_to_its_weights_and_is_above_0(run, tmp_path):
    shutil.copytree(run, tmp_path / "r", symlinks=True)
    file = weights_folder(tmp_path / "r") / "temperature.json"
    file.write_text(fitted(1.5))
    assert exporting.find(tmp_path / "r", None, ema=False).temperature == 1.5
    assert exporting.find(tmp_path / "r", None, ema=True).temperature is None
    for wrong in (fitted(0.0), fitted(float("nan")), "{}", "1.5", ""):
        file.write_text(wrong)
        with pytest.raises(CheckpointError, match=r"temperature.json cannot be read"):
            exporting.export(tmp_path / "r", "timm", output=tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("other", [{"crop_mode": "border"}, {"interpolation": "lanczos"}, {"input_size": (3, 32, 64)}])
def test_preprocessing_that_is_not_known_is_refused(other):
    known = {"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_mode": "center", "crop_pct": 1.0}
    with pytest.raises(ModelError, match="leave --with-preprocessing out"):
        WithPreprocessing(SmallNet(), {**known, "mean": (0.5,) * 3, "std": (0.5,) * 3, **other})


# ------------------------------------------------------------------------------------------------------- the comparison


def test_without_the_data_set_an_export_is_compared_on_parts_of_a_photograph(run, tmp_path):
    shutil.copytree(run, tmp_path / "r", symlinks=True)
    moved = run.parent / "elsewhere"
    (run.parent / "data").rename(moved)
    try:
        done = samtune("export", tmp_path / "r", "--to", "timm", "--json")
    finally:
        moved.rename(run.parent / "data")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["pictures"] == "32 parts of a photograph that comes with Matplotlib"
    assert (result["n"], result["largest_difference"]) == (32, 0)
    assert "the run's data set is not here" in done.stderr


@pytest.mark.parametrize("off_by", [2e-4, float("nan")])
@pytest.mark.parametrize("to", ["timm", "torch", "onnx"])
def test_an_export_with_other_logits_is_refused_and_leaves_nothing(
    to, off_by, run, seen_through, tmp_path, monkeypatch
):
    """What is written is right, and the model that it is compared with a little off, which is the same."""
    load, write = load_checkpoint, exporting._write

    def load_another(folder):
        model, data_config = load(folder)
        if folder == run / "checkpoints" / "last":
            with torch.no_grad():
                model.fc.bias[0] += off_by
        return model, data_config

    def write_right(unfinished, to, weights, module, data_config, about):
        if to == "onnx":
            shutil.copyfile(seen_through[0], unfinished)
        else:
            write(unfinished, to, weights, load(weights)[0], data_config, about)

    monkeypatch.setattr(exporting, "load_checkpoint", load_another)
    monkeypatch.setattr(exporting, "_write", write_right)
    with pytest.raises(CheckpointError, match=r"other logits than the checkpoint: by up to (2\.0e-04|nan)"):
        exporting.export(run, to, output=tmp_path / "new" / "m.pt2", with_preprocessing=to == "onnx")
    assert list((tmp_path / "new").iterdir()) == []


def test_preprocessing_with_other_pixels_is_refused_and_leaves_nothing(run, seen_through, tmp_path, monkeypatch):
    """The crop of the evaluation moves by a pixel."""
    transform = EvalTransform(seen_through[2])
    monkeypatch.setattr(exporting, "_write", lambda unfinished, *_: shutil.copyfile(seen_through[0], unfinished))
    monkeypatch.setattr(compare, "EvalTransform", lambda _: lambda pixels: transform(pixels).roll(1, -1))
    with pytest.raises(CheckpointError, match="other pixels than the evaluation"):
        exporting.export(run, "onnx", output=tmp_path / "new" / "m", with_preprocessing=True)
    assert list((tmp_path / "new").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_path_that_exists_is_refused_without_force(run, tmp_path):
    file, folder, other = tmp_path / "m.pt2", tmp_path / "timm", tmp_path / "other"
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"m\.pt2 exists"):
        exporting.export(run, "torch", output=file)
    assert file.read_text() == "mine"
    exporting.export(run, "torch", output=file, force=True)
    assert file.stat().st_size > 1000
    exporting.export(run, "timm", output=folder)
    with pytest.raises(UsageError, match="exists"):
        exporting.export(run, "timm", output=folder)
    exporting.export(run, "timm", output=folder, ema=True, force=True)
    assert (folder / "model.safetensors").read_bytes() == (weights_folder(run, True) / "model.safetensors").read_bytes()
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for to in ("timm", "onnx"):
        with pytest.raises(UsageError, match="is a folder"):
            exporting.export(run, to, output=other, force=True)
    with pytest.raises(UsageError, match="is a file"):
        exporting.export(run, "timm", output=file, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt2", "other", "timm"]
    assert (other / "thesis.txt").read_text() == "mine"


def test_a_damaged_checkpoint_is_exit_5(run, tmp_path):
    shutil.copytree(run, tmp_path / "r", symlinks=True)
    for name in ("model.safetensors", "ema/model.safetensors"):
        file = weights_folder(tmp_path / "r") / name
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    for more in ((), ("--ema",)):
        done = samtune("export", tmp_path / "r", "--to", "timm", *more)
        assert done.returncode == 5
        assert "is damaged" in done.stderr
    assert not (tmp_path / "r" / "export").exists()


# Arguments -> exit code, and what is said. RUN is the run.
WRONG = {
    "no such run": (("nowhere", "--to", "timm"), 5, "no run or checkpoint nowhere"),
    "no such format": (("RUN", "--to", "tflite"), 2, "tflite"),
    "no format": (("RUN",), 2, "--to"),
    "no such checkpoint": (("RUN", "--to", "timm", "--checkpoint", "first"), 2, "not one of 'last', 'best'"),
    "preprocessing elsewhere": (("RUN", "--to", "torch", "--with-preprocessing"), 2, "only ONNX takes it"),
    "a name that torch does not like": (("RUN", "--to", "torch", "--output", "m.pt"), 2, "must end in .pt2"),
    "a place that cannot be": (("RUN", "--to", "timm", "--output", "/dev/null/m"), 8, "cannot be written"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_told(name, run, tmp_path):
    arguments, code, said = WRONG[name]
    done = samtune("export", *(run if word == "RUN" else word for word in arguments), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_without_averaged_weights_ema_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "r", symlinks=True)
    file = weights_folder(tmp_path / "r") / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["config"]["model_ema"] = False
    file.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="no averaged weights"):
        exporting.export(tmp_path / "r", "timm", output=tmp_path / "t", ema=True)


def test_missing_packages_are_named_with_the_extra(run, tmp_path, monkeypatch):
    find_spec = onnx_file.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "onnxscript" else find_spec(name, *rest)
    )
    with pytest.raises(MachineError, match=r"needs onnxscript(.|\n)*pip install 'samtune\[onnx\]'"):
        exporting.export(run, "onnx", output=tmp_path / "m.onnx")


class Exponential(nn.Module):
    def forward(self, x):
        return torch.linalg.matrix_exp(x)


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(("layer", "said"), [(Exponential(), "linalg_matrix_exp in layer 1"), (Branch(), "layer 1")])
def test_a_model_that_cannot_be_exported_is_refused_with_the_layer(layer, said, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer).eval()
    with pytest.raises(ModelError) as error:
        write_onnx(model, tmp_path / "m", 8)
    assert said in str(error.value)
    assert type(layer).__name__ in str(error.value)
    assert error.value.exit_code == 4


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_into_the_run_and_says_what_it_compared(run, tmp_path):
    shutil.copytree(run, tmp_path / "r", symlinks=True)
    done = samtune("export", tmp_path / "r", "--to", "onnx")
    assert done.returncode == 0, done.stderr
    assert "12 of 12" in done.stdout
    assert "warning" not in done.stderr.lower()
    assert len(done.stderr.splitlines()) <= 3
    last = tmp_path / "r" / "checkpoints" / "last"
    done = samtune("export", last, "--to", "torch", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "r" / "export" / "model.pt2")
    written = sorted(path.name for path in (tmp_path / "r" / "export").iterdir())
    assert written == ["model.onnx", "model.pt2"]
    done = samtune("eval", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
