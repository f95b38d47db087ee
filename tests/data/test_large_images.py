"""Photographs and scans: decoded as large as they are needed, in little memory, and not again at the next start."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from samtune.config import loading
from samtune.data import source
from samtune.data.cache import Images, decode_into_cache
from samtune.data.decode import DecodeRule, decode
from samtune.data.transforms import EvalTransform, min_side, resized_crop_boxes
from samtune.errors import DataError
from tests.conftest import encode, png_header, samtune, write_image_folder
from tests.support.data_sets import look, train_of

DATA_CONFIG = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}


def photograph(width, height, mode="RGB"):
    """Smooth, as what a camera takes."""
    small = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


# ------------------------------------------------------------------------------------------------------------ reduction


@pytest.mark.parametrize(
    ("size", "least", "by"),
    [((400, 300), 150, 2), ((400, 300), 151, 1), ((400, 300), 75, 4), ((400, 300), 10, 16), ((301, 401), 75, 4)],
)
def test_a_picture_is_reduced_by_powers_of_two_as_long_as_its_shorter_side_suffices(size, least, by):
    rule = DecodeRule(least)
    assert rule.reduction(*size) == by
    assert DecodeRule().reduction(*size) == 1
    for kind in ("JPEG", "PNG"):
        pixels = decode(encode(photograph(*size), kind), str, rule)
        assert (pixels.shape[2], pixels.shape[1]) == rule.reduced(*size) == (-(-size[0] // by), -(-size[1] // by))
        assert min(pixels.shape[1:]) >= least


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P", "1", "LA"])
def test_a_reduced_picture_is_the_mean_of_its_pixels(kind, mode):
    if (kind, mode) in (("PNG", "CMYK"), *(("JPEG", other) for other in ("RGBA", "P", "1", "LA"))):
        pytest.skip("there is no such file")
    encoded = encode(photograph(333, 250, mode), kind)
    whole = decode(encoded, str)
    expected = Image.fromarray(whole.permute(1, 2, 0).numpy()).reduce(4)
    pixels = decode(encoded, str, DecodeRule(60))
    difference = np.abs(np.asarray(expected).astype(int) - pixels.permute(1, 2, 0).numpy())
    assert pixels.shape == (3, 63, 84)
    assert difference.mean() <= 1  # libjpeg reduces frequencies, not pixels
    assert kind == "JPEG" or difference.max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_pictures_are_turned_upright_too(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(photograph(400, 300), "JPEG", exif=exif)
    whole = decode(encoded, str)
    expected = Image.fromarray(whole.permute(1, 2, 0).numpy()).reduce(4)
    pixels = decode(encoded, str, DecodeRule(75)).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(expected).astype(int) - pixels).mean() <= 1


@pytest.mark.parametrize("flags", [{}, {"scale": 0.08}, {"crop": "pad"}, {"img_size": 64}])
def test_training_and_evaluation_enlarge_no_picture_that_was_reduced(flags):
    settings = loading.load(None, {"model": "test_resnet", "dataset": "d"} | flags)
    size = flags.get("img_size", 32)
    data_config = DATA_CONFIG | {"input_size": (3, size, size), "mean": (0.5,) * 3}
    least = min_side(data_config, settings)
    assert least >= 2 * size / data_config["crop_pct"]
    shapes = np.full((2000, 2), least)
    boxes = resized_crop_boxes(shapes, np.random.default_rng(0).random((2000, 40)), settings.scale)
    assert settings.crop == "pad" or boxes[:, 2:].min() >= size - 1


def test_what_evaluation_sees_of_a_reduced_photograph_is_what_it_sees_of_the_whole():
    encoded = encode(photograph(1600, 1200), "JPEG", quality=95)
    transform = EvalTransform(DATA_CONFIG)
    whole = transform(decode(encoded, str)).float()
    reduced = transform(decode(encoded, str, DecodeRule(74))).float()
    assert (whole - reduced).abs().mean() < 1  # of 255


def test_long_pictures_are_evaluated_as_timm_does_and_without_their_ends():
    for width, height in ((500, 40), (40, 500), (90, 60)):
        image = torch.from_numpy(np.array(photograph(width, height))).permute(2, 0, 1)
        config_ = {key: DATA_CONFIG[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode")}
        as_timm = timm.data.create_transform(**config_, is_training=False, normalize=False)
        assert (EvalTransform(DATA_CONFIG)(image).int() - as_timm(image).int()).abs().max() <= 1


def peak_memory(code, *arguments):
    """Of a process with that code, in MB, more than it had when its libraries were there."""
    script = (
        "import resource, sys\nimport numpy as np\nfrom samtune.data import cache, source\n"
        "from samtune.data.decode import DecodeRule, decode\nfrom samtune.data.cache import Images, decode_into_cache\n"
        "from samtune.data.loader import eval_batches, train_batches\n"
        "from samtune.data.transforms import TrainTransform, EvalTransform\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"{code}\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_very_long_picture_takes_little_memory_in_evaluation():
    code = (
        "import io, torch\nfrom PIL import Image\n"
        "image = torch.zeros((3, 10, 6000), dtype=torch.uint8)\n"
        "config = {'input_size': (3, 224, 224), 'interpolation': 'bicubic', 'crop_pct': 0.875, 'crop_mode': 'center'}\n"
        "assert EvalTransform(config)(image).shape == (3, 224, 224)"
    )
    assert peak_memory(code) < 150


@pytest.fixture
def photographs(tmp_path):
    """40 of 12 megapixels each, of two classes, all different."""
    encoded = encode(photograph(4000, 3000), "JPEG")
    for i in range(40):
        path = tmp_path / "photos" / "train" / ("cat" if i % 2 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded + bytes([i]))
    return tmp_path / "photos"


LOOK = """
split = source.open_source(sys.argv[1]).splits["train"]
rule, rows = DecodeRule(int(sys.argv[2])), np.arange(len(split))
limit = int(float(sys.argv[3]) * 2**20)
images = decode_into_cache(split, rows, rule=rule, limit=limit, threads=2, progress=lambda *_: None, always=True)
assert (images.pixels is not None) == (limit > 0)
config = {'input_size': (3, 224, 224), 'interpolation': 'bicubic', 'crop_pct': 0.875, 'crop_mode': 'center'}
options = {'batch_size': 20, 'workers': 2, 'pin_memory': False}
assert sum(len(labels) for _, labels in eval_batches(images, rows, EvalTransform(config), **options)) == len(rows)
train = TrainTransform((224, 224), 'bicubic', (0.5, 0.5, 0.5))
assert len(list(train_batches(images, rows, train, seed=0, total_steps=2, **options))) == 2
"""


@pytest.mark.parametrize("limit", [10_000, 0])
def test_memory_does_not_grow_with_the_number_of_photographs(limit, photographs, tmp_path, monkeypatch):
    """40 of them in full size would be 1.4 GB."""
    monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))
    assert peak_memory(LOOK, photographs, 512, limit) < 350


def test_a_file_of_pixels_that_is_too_large_to_be_mapped_is_read_and_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))
    for sizes in ((24, 24), (24, 30)):
        folder = tmp_path / f"data{sizes[1]}"
        for i, size in enumerate(sizes):
            path = folder / "train" / "ab"[i] / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(encode(photograph(size, 24)))
        split = train_of(folder)
        rows = np.array([1, 0])
        options = {"limit": 2**20, "threads": 1, "progress": lambda *_: None}
        mapped = decode_into_cache(split, rows, **options).take(rows)
        monkeypatch.setattr("samtune.data.pixels._MAPPED", 0)
        read = decode_into_cache(split, rows, **options)
        assert all((a == b).all() for a, b in zip(mapped, read.take(rows), strict=True))
        assert all((a == read[row]).all() for a, row in zip(mapped, rows.tolist(), strict=True))
        assert isinstance(read.take(rows), torch.Tensor) == (sizes[1] == 24)
        monkeypatch.undo()
        monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------------------ the limit


def test_pictures_beyond_the_limit_are_refused_by_their_header_with_the_flag_that_allows_them():
    with pytest.raises(DataError, match="cannot be decoded") as error:
        decode(png_header(30_000, 20_000), str)
    assert "more than 500 megapixels" in error.value.cause
    assert "--max-megapixels" in error.value.hint
    with pytest.raises(DataError) as error:
        decode(png_header(30_000, 20_000), str, DecodeRule(max_megapixels=601))
    assert "megapixels" not in error.value.cause


def test_a_scan_is_read_and_a_run_has_the_limit_that_it_is_given(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 4})
    (data / "train" / "cat" / "scan.png").write_bytes(encode(Image.new("L", (9500, 9500))))
    small = ("--model", "test_resnet", "--no-pretrained", "--img-size", 32, "--epochs", "1 steps", "--workers", 0)
    done = samtune("run", *small, "--dataset", data, "--output", tmp_path / "a", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bad_images"] == []
    done = samtune("run", *small, "--dataset", data, "--output", tmp_path / "b", "--max-megapixels", 90)
    assert done.returncode == 3
    assert "more than 90 megapixels" in done.stderr


# ----------------------------------------------------------------------------------------------------- the second start


def counting_reads(monkeypatch):
    read = []
    image_bytes_of = source.Split.image_bytes
    monkeypatch.setattr(source.Split, "image_bytes", lambda *a: read.append(a[1]) or image_bytes_of(*a))
    return read


@pytest.mark.parametrize(("limit", "always"), [(10**9, False), (10**9, True), (1000, True), (1000, False)])
def test_the_second_start_reads_no_image_whether_they_fit_or_not(limit, always, split, monkeypatch):
    first = look(split, limit, always=always)
    read = counting_reads(monkeypatch)
    again = look(split, limit, always=always)
    assert read == []
    assert (again.pixels is None) == (first.pixels is None) == (limit < 10**9)
    assert (again.bad, again.digest, again.constant) == (first.bad, first.digest, first.constant)


def test_what_does_not_fit_is_not_read_at_the_first_start_either(split, monkeypatch):
    read = counting_reads(monkeypatch)
    assert look(split, 1000).pixels is None
    assert read == []


def test_bad_images_of_a_set_that_does_not_fit_are_known_at_the_second_start(split, tmp_path, monkeypatch):
    path = tmp_path / "data" / "train" / "dog" / "3.png"
    path.write_bytes(b"no image")
    assert list(look(split, 1000, always=True).bad) == [13]
    read = counting_reads(monkeypatch)
    assert list(look(split, 1000, always=True).bad) == [13]
    assert read == []
    path.write_bytes(encode(photograph(24, 20)))  # mended
    assert list(look(split, 1000, always=True).bad) == []
    assert look(split, always=True).pixels is not None


def test_a_file_that_changes_without_another_size_is_seen(split, tmp_path):
    before = look(split)
    path = tmp_path / "data" / "train" / "cat" / "3.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    found = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    after = look(split)
    assert after.digest[3] != before.digest[3]


def test_the_rule_is_part_of_the_name(split):
    files = {look(split, rule=rule).pixels.file for rule in (DecodeRule(), DecodeRule(5), DecodeRule(6))}
    assert len(files) == 3
    for rule in (DecodeRule(), DecodeRule(5)):
        images = look(split, rule=rule)
        assert (images[7] == Images(split, rule)[7]).all()
