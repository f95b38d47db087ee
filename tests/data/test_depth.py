"""Deep pictures: which of their values become black and white, the same in training, evaluation and the check."""

import io
import itertools
import json
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from samtune.config import loading
from samtune.data import depth
from samtune.data.decode import PLAIN, DecodeRule, decode, decode_pixels
from samtune.errors import DataError
from samtune.train import run_data
from tests.conftest import encode, samtune
from tests.support.data_sets import train_of

SMALL = ("--model", "test_resnet", "--no-pretrained", "--img-size", 32, "--epochs", "2 steps", "--workers", 0)


def tiff(values):
    return encode(Image.fromarray(values), "TIFF")


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
    train = train_of(write(tmp_path, encoded, ending))
    ranges = depth.value_ranges(train, train.labelled)
    assert ranges == {mode: (low, high)}
    pixels = decode(encoded, str, DecodeRule(ranges=ranges))
    values = np.asarray(Image.open(io.BytesIO(encoded))) if mode != "RGB;16" else ramp(0, 4000, np.uint16)
    expected = np.rint((values.astype(float) - low) / (high - low) * 255)
    assert (pixels.numpy() == expected).all()
    assert len({*pixels.flatten().tolist()}) > 60  # neither black nor a few steps
    assert (depth.range_notes(ranges) == []) == (ranges == {"I;16": (0, 65535)})


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
    train = train_of(write(tmp_path, b"\xff\xd8 the rest is not looked at", "jpg"))
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
    assert all(again[key] == report["test"][key] for key in ("n", "wrong", "loss"))


def test_the_check_says_the_rule_and_names_empty_pictures(tmp_path):
    data = write(tmp_path / "data", tiff(ramp(0, 4000, np.uint16)), "tif")
    (data / "train" / "dog" / "empty.tif").write_bytes(tiff(np.full((16, 16), 7, np.uint16)))
    done = samtune("data", "check", data, "--workers", 0, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [image["path"] for image in result["one_colour"]] == [str(data / "train" / "dog" / "empty.tif")]
    assert any("4095 is white" in oddity for oddity in result["oddities"])


# ------------------------------------------------------------------------------------------------------- kinds of TIFF


def odd_tiff(values, order="<", photometric=1, planes=1, compressed=False, extra=()):
    """A TIFF of (height, width, channels), in two strips, of any kind of number, in any order of bytes."""
    height, width, channels = values.shape
    code, formats = values.dtype.kind, {"u": 1, "i": 2, "f": 3}
    half = height // 2
    parts = [values[:half], values[half:]]
    if planes == 2:
        parts = [part[..., channel : channel + 1] for channel in range(channels) for part in parts]
    strips = [part.astype(values.dtype.newbyteorder(order)).tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    tags = {
        256: [width],
        257: [height],
        258: [8 * values.dtype.itemsize] * channels,
        259: [8 if compressed else 1],
        262: [photometric],
        273: [0] * len(strips),
        277: [channels],
        278: [half],
        279: [len(strip) for strip in strips],
        284: [planes],
        **({338: list(extra)} if extra else {}),
        339: [formats[code]] * channels,
    }
    end = 8 + 2 + 12 * len(tags) + 4
    where = end + sum(4 * len(numbers) for numbers in tags.values() if len(numbers) > 1)
    for number, strip in enumerate(strips):
        tags[273][number] = where
        where += len(strip)
    entries, more = b"", b""
    for tag, numbers in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers))
        entries += packed if len(numbers) == 1 else struct.pack(f"{order}I", end + len(more))
        more += packed if len(numbers) > 1 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + b"\0\0\0\0" + more + b"".join(strips)


def numbers_of(dtype, channels):
    """Numbers of the type's whole range; of 16 bits, those of 12."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(0)
    shape = (6, 5, channels)
    if dtype.kind == "f":
        return rng.random(shape).astype(dtype)
    low, high = (0, 4095) if dtype == np.uint16 else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return rng.integers(low, high, shape, dtype, endpoint=True)


def expected_pixels(values, photometric, extra, black_and_white):
    low, high = black_and_white
    colours = 1 if photometric < 2 else 3
    scaled = (values[..., :colours].astype(float) - low) / (high - low)
    scaled = 1 - scaled if photometric == 0 else scaled
    if extra[:1] in ((1,), (2,)):
        alpha = values[..., colours : colours + 1].astype(float) / np.iinfo(values.dtype).max
        scaled = scaled * alpha + 1 - alpha
    return np.broadcast_to(scaled * 255, (*values.shape[:2], 3)).clip(0, 255)


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ((0, 4000), (0, 65535), "hold 0 to 65535, and 0 is black and 4095 white, as in train: what is outside becomes"),
        ((0, 65535), (0, 4000), "hold 0 to 4000, and 0 is black and 65535 white, as in train: they are nearly black"),
        ((0, 255), (0, 4000), "0 is black and 255 white"),
        ((0, 4000), (100, 3000), None),
        ((0, 4000), (0, 4100), None),
    ],
)
def test_a_split_whose_values_do_not_fit_the_range_of_train_is_told(train, test, said, tmp_path):
    write(tmp_path, tiff(ramp(*train, np.uint16)), "tif")
    for file in (tmp_path / "test").rglob("*.tif"):
        file.write_bytes(tiff(ramp(*test, np.uint16)))
    checked = samtune("data", "check", tmp_path, "--json", "--workers", 0)
    found = [note for note in json.loads(checked.stdout)["oddities"] if "pictures of test" in note]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_a_split_that_does_not_fit_8_bits_of_train_is_told_in_a_run(tmp_path):
    write(tmp_path, tiff(ramp(0, 255, np.uint8)), "tif")
    for file in (tmp_path / "test").rglob("*.tif"):
        file.write_bytes(tiff(ramp(0, 4000, np.uint16)))
    flags = {"dataset": str(tmp_path), "model": "test_resnet", "pretrained": False, "img_size": 32, "cache_limit": 0.0}
    notes = run_data.load_run_data(loading.load(None, flags)).data.notes
    assert any("16-bit grey pictures of test hold 0 to 4000" in note for note in notes)


# (kind of number, photometric interpretation, other channels) that are read rightly, if channels are interleaved.
READ = {
    *((dtype, 1, ()) for dtype in ("u1", "u2", "i2", "i4", "f4")),
    *((dtype, 0, ()) for dtype in ("u1", "f4")),
    *((dtype, 2, extra) for dtype in ("u1", "u2") for extra in ((), (0,), (2,))),
    *(("u1", photometric, extra) for photometric, extra in ((1, (0,)), (1, (2,)), (2, (0, 0)), (2, (2, 0)))),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "zlib"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"])
def test_every_kind_of_tiff_is_read_rightly_or_refused_by_what_it_is(dtype, compressed, order):
    for photometric, extra, planes in itertools.product((0, 1, 2), ((), (0,), (2,), (0, 0), (2, 0), (0, 0, 0)), (1, 2)):
        values = numbers_of(dtype, (1 if photometric < 2 else 3) + len(extra))
        encoded = odd_tiff(values, order, photometric, planes, compressed, extra)
        colours = values[..., : 1 if photometric < 2 else 3].astype(float)
        range_ = (0, 255) if dtype == "u1" else (0, 1) if dtype == "f4" else (colours.min(), colours.max())
        rule = DecodeRule(ranges=dict.fromkeys(("I;16", "RGB;16", "I", "F"), range_))
        case = f"{photometric} {extra} {planes}"
        try:
            pixels = decode_pixels(encoded, str, rule)
        except DataError as refused:
            pixels, why = None, refused.cause
        if pixels is not None:
            assert np.abs(pixels - expected_pixels(values, photometric, extra, range_)).max() <= 1.5, case
            continue
        said = rf"it is a TIFF of {values.shape[2]} channel.* of {8 * values.dtype.itemsize} bits \(.*converts it: "
        assert re.search(said, why), f"{case}: {why}"
        assert planes == 2 or (dtype, photometric, extra) not in READ, f"{case}: {why}"


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,)])
def test_all_bits_of_16_bits_of_colour_are_read(extra, compressed, order):
    values = numbers_of("u2", 3 + len(extra))
    if extra and extra != (0,):
        values[..., 3] = 65535
    encoded = odd_tiff(values, order, 2, 1, compressed, extra)
    pixels = decode_pixels(encoded, str, DecodeRule(ranges={"RGB;16": (0, 4095)}))
    assert (pixels == np.rint(values[..., :3] / (4095 / 255))).all()


def test_what_was_multiplied_by_alpha_in_16_bits_is_laid_over_white():
    values = np.array([[[1000, 0, 500, 32768], [0, 0, 0, 0]]] * 2, np.uint16)
    pixels = decode_pixels(odd_tiff(values, "<", 2, 1, False, (1,)), str, DecodeRule(ranges={"RGB;16": (0, 4000)}))
    assert pixels[0].tolist() == [[191, 127, 159], [255, 255, 255]]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_bits_of_a_png_of_16_bits_are_read(channels, tmp_path):
    values = numbers_of("u2", channels)
    if channels in (2, 4):
        values[..., -1] = 65535
    train = train_of(write(tmp_path, png(values), "png"))
    ranges = depth.value_ranges(train, train.labelled)
    assert ranges == {"I;16" if channels < 3 else "RGB;16": (0, 4095)}
    colours = values[..., : 1 if channels < 3 else 3]
    assert (decode_pixels(png(values), str, DecodeRule(ranges=ranges)) == np.rint(colours / (4095 / 255))).all()


@pytest.mark.parametrize(("white", "high"), [(65535, 4095), (4095, 65535)])
def test_all_bits_of_a_ppm_are_read(white, high):
    values = numbers_of("u2", 3)
    encoded = b"P6\n5 6\n%d\n" % white + values.astype(">u2").tobytes()
    pixels = decode_pixels(encoded, str, DecodeRule(ranges={"RGB;16": (0, high)}))
    assert np.abs(pixels - values / (4095 / 255)).max() < 1


@pytest.mark.parametrize("compressed", [False, True])
def test_integers_of_32_bits_without_a_sign_stay_positive(compressed, tmp_path):
    values = ramp(0, 2**32 - 1, np.uint32)[:, :, None]
    encoded = odd_tiff(values, compressed=compressed)
    train = train_of(write(tmp_path, encoded, "tif"))
    ranges = depth.value_ranges(train, train.labelled)
    assert ranges == {"I": (0, 2**32 - 1)}
    assert decode_pixels(encoded, str, DecodeRule(ranges=ranges))[..., 0].ravel().tolist() == list(range(256))


@pytest.mark.parametrize(
    ("values", "options", "what", "command"),
    [
        (
            numbers_of("u2", 5),
            {"photometric": 2, "extra": (0, 0)},
            "5 channels of 16 bits (unsigned",
            "-b 1 -b 2 -b 3 -ot",
        ),
        (numbers_of("f8", 1), {}, "1 channel of 64 bits (floating-point numbers", "-ot Float32"),
        (numbers_of("f2", 1), {}, "1 channel of 16 bits (floating-point numbers", "-ot Float32"),
        (numbers_of("f4", 3), {"photometric": 2}, "3 channels of 32 bits (floating-point", "-scale MIN MAX 0 65535"),
        (numbers_of("i1", 1), {}, "1 channel of 8 bits (signed integers)", "-ot Int32"),
        (numbers_of("u2", 3), {"photometric": 2, "planes": 2}, "in separate planes", "INTERLEAVE=PIXEL"),
        (numbers_of("u2", 1), {"photometric": 0, "order": ">"}, "most significant byte first", "magick"),
    ],
)
def test_a_tiff_that_cannot_be_read_is_described_with_what_converts_it(values, options, what, command):
    with pytest.raises(DataError) as error:
        decode(odd_tiff(values, **options), lambda: "a.tif", PLAIN)
    assert what in error.value.cause
    assert command in error.value.cause


@pytest.mark.parametrize("length", [4, 8, 30, 120])
def test_a_damaged_tiff_is_no_image(length):
    with pytest.raises(DataError, match=r"a.tif cannot be decoded") as error:
        decode(odd_tiff(numbers_of("u2", 3), photometric=2)[:length], lambda: "a.tif")
    assert "\n" not in error.value.cause
