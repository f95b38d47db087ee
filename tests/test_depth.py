"""Deep pictures: which of their values become black and white, the same in training, evaluation and the check."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from samtune.data import depth, source
from samtune.data.decode import DecodeRule, decode
from tests.conftest import samtune

SMALL = ("--model", "test_resnet", "--no-pretrained", "--img-size", 32, "--epochs", "2 steps", "--workers", 0)


def tiff(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    return buffer.getvalue()


def png(values):
    """16 bits of grey or colour, which Pillow cannot write."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def ramp(low, high, dtype):
    """From low in one corner to high in the other."""
    return np.linspace(low, high, 256).reshape(16, 16).astype(dtype)


def write(root, encoded, ending):
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.{ending}").write_bytes(encoded)
    return root


# How an image is stored -> its bytes, ending, mode, and the values that become black and white.
STORED = {
    "12 bits in 16": (tiff(ramp(0, 4000, np.uint16)), "tif", "I;16", (0, 4095)),
    "12 bits in a PNG": (png(ramp(5, 4095, np.uint16)[:, :, None]), "png", "I;16", (0, 4095)),
    "16 bits": (tiff(ramp(0, 65535, np.uint16)), "tif", "I;16", (0, 65535)),
    "14 bits": (tiff(ramp(0, 4096, np.uint16)), "tif", "I;16", (0, 16383)),
    "8 bits in 16": (tiff(ramp(0, 255, np.uint16)), "tif", "I;16", (0, 255)),
    "integers with negative values": (tiff(ramp(-1024, 3071, np.int32)), "tif", "I", (-1024, 3071)),
    "integers beyond 16 bits": (tiff(ramp(0, 10**6, np.int32)), "tif", "I", (0, 10**6)),
    "between 0 and 1": (tiff(ramp(0.05, 0.9, np.float32)), "tif", "F", (0, 1)),
    "between -1 and 1": (tiff(ramp(-0.5, 0.9, np.float32)), "tif", "F", (-1, 1)),
    "0 to 255 as floating point": (tiff(ramp(0, 240, np.float32)), "tif", "F", (0, 255)),
    "other floating point": (tiff(ramp(-300, 20, np.float32)), "tif", "F", (-300, 20)),
    "12 bits of colour": (png(np.repeat(ramp(0, 4000, np.uint16)[:, :, None], 3, 2)), "png", "RGB;16", (0, 4095)),
}


@pytest.mark.parametrize("name", STORED)
def test_the_range_of_the_training_images_becomes_black_to_white(name, tmp_path):
    encoded, ending, mode, (low, high) = STORED[name]
    train = source.open_source(str(write(tmp_path, encoded, ending))).splits["train"]
    ranges = depth.value_ranges(train, train.labelled)
    assert ranges == {mode: (low, high)}
    pixels = decode(encoded, str, DecodeRule(ranges=ranges))
    values = np.asarray(Image.open(io.BytesIO(encoded))) if mode != "RGB;16" else ramp(0, 4000, np.uint16)
    expected = np.rint((values.astype(float) - low) / (high - low) * 255)
    assert (pixels.numpy() == expected).all()
    assert len({*pixels.flatten().tolist()}) > 60  # neither black nor a few steps
    assert (depth.words(ranges) == []) == (ranges == {"I;16": (0, 65535)})


def test_other_values_are_cut_off_and_what_is_no_number_is_black():
    values = np.array([[-5.0, 0.0], [2.0, np.nan]], np.float32)
    pixels = decode(tiff(values), str, DecodeRule(ranges={"F": (0, 1)}))
    assert pixels[0].tolist() == [[0, 0], [255, 0]]


def test_what_is_transparent_in_16_bits_is_white():
    values = np.full((4, 4, 4), 4095, np.uint16)
    values[:2, :, 3] = 0
    values[2:, :, 3] = 65535
    values[2:, :, :3] = 0
    pixels = decode(png(values), str, DecodeRule(ranges={"RGB;16": (0, 4095)}))
    assert pixels[0, :, 0].tolist() == [255, 255, 0, 0]


def test_images_of_8_bits_have_no_range_and_are_not_read(tmp_path, monkeypatch):
    train = source.open_source(str(write(tmp_path, b"\xff\xd8 the rest is not looked at", "jpg"))).splits["train"]
    monkeypatch.setattr("PIL.Image.open", None)
    assert depth.value_ranges(train, train.labelled) == {}


def test_run_and_eval_see_the_same_the_rule_is_said_and_empty_pictures_are_named(tmp_path):
    data = write(tmp_path / "data", tiff(ramp(0, 4000, np.uint16)), "tif")
    for i, name in enumerate(("cat", "dog")):
        for split in ("train", "test"):
            for path in (data / split / name).iterdir():
                path.write_bytes(tiff(ramp(2000 * i, 2000 * i + 2000, np.uint16)))
    (data / "test" / "dog" / "empty.tif").write_bytes(tiff(np.full((16, 16), 7, np.uint16)))
    done = samtune("run", *SMALL, "--dataset", data, "--output", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    said = "16-bit grey pictures: 0 is black and 4095 is white, by the range of the training images"
    assert said in done.stderr.splitlines()
    report = json.loads(done.stdout)
    assert report["dataset"]["decode"]["ranges"] == {"I;16": [0, 4095]}
    assert any("1 picture shows one colour" in warning and "empty.tif" in warning for warning in report["warnings"])
    # The run's rule, though the data that is scored has another range of its own.
    for path in data.glob("train/*/*.tif"):
        path.unlink()
    again = json.loads(samtune("eval", tmp_path / "r", "--dataset", data, "--json").stdout)
    assert {key: again[key] for key in ("n", "wrong", "loss")} == {
        key: report["test"][key] for key in ("n", "wrong", "loss")
    }


def test_the_check_says_the_rule_and_names_empty_pictures(tmp_path):
    data = write(tmp_path / "data", tiff(ramp(0, 4000, np.uint16)), "tif")
    (data / "train" / "dog" / "empty.tif").write_bytes(tiff(np.full((16, 16), 7, np.uint16)))
    done = samtune("data", "check", data, "--workers", 0, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [image["path"] for image in result["one_colour"]] == [str(data / "train" / "dog" / "empty.tif")]
    assert any("4095 is white" in oddity for oddity in result["oddities"])
