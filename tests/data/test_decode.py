"""Encoded bytes to pixels, and the file that keeps them."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from samtune.data import cache, source
from samtune.data.cache import decode_into_cache, drop_undecodable, raise_if_undecodable, undecodable_rows
from samtune.data.decode import decode
from samtune.errors import DataError
from tests.conftest import image_bytes, write_image_folder


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK"])
def test_every_mode_decodes_to_three_channels(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(image_bytes(0, kind=kind, mode=mode), str).shape == (3, 20, 24)


def test_what_is_transparent_is_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    assert (decode(buffer.getvalue(), str) == 255).all()


def test_an_image_is_turned_upright():
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.new("RGB", (24, 20)).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue(), str).shape == (3, 24, 20)


@pytest.mark.parametrize("broken", [b"", b"no image", image_bytes(0)[:200], image_bytes(0, kind="JPEG")[:300]])
def test_bytes_that_are_no_image_are_named_by_their_place(broken):
    with pytest.raises(DataError, match="image 7 of split train cannot be decoded"):
        decode(broken, lambda: "image 7 of split train")


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_fast_decoder_gives_the_pixels_of_the_general_one(shared_data):
    split = source.open_source(str(shared_data / "oxford_flowers102")).splits["train"]
    for row in range(20):
        encoded = split.image_bytes(row)
        expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        assert torch.equal(decode(encoded, str), torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = decode(encode(Image.fromarray(ramp)), str)
    assert torch.equal(pixels[0].flatten().int(), torch.arange(256, dtype=torch.int32))


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    pixels = decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), str)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


def test_a_grey_and_a_cmyk_photograph_are_rgb():
    grey = decode(encode(Image.new("L", (5, 4), 100), "JPEG"), str)
    assert (grey == 100).all()
    assert decode(encode(Image.new("CMYK", (5, 4)), "JPEG"), str).shape == (3, 4, 5)


def test_one_pixel_and_a_very_wide_picture_decode():
    assert decode(encode(Image.new("RGB", (1, 1))), str).shape == (3, 1, 1)
    assert decode(encode(Image.new("RGB", (20000, 2))), str).shape == (3, 2, 20000)


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def split(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))
    return source.open_source(str(write_image_folder(tmp_path / "data", {"train": 10}))).splits["train"]


def look(split, limit=10**9, **options):
    return decode_into_cache(split, np.arange(len(split)), limit=limit, threads=2, progress=lambda *_: None, **options)


def counting(monkeypatch):
    calls = []
    monkeypatch.setattr(cache, "decode", lambda *arguments: calls.append(1) or decode(*arguments))
    return calls


def test_cached_pixels_are_the_decoded_ones_and_are_decoded_once(split, monkeypatch):
    calls = counting(monkeypatch)
    for _ in range(2):
        images = look(split)
        for row in range(len(split)):
            assert torch.equal(images[row], decode(split.image_bytes(row), str))
    assert len(calls) == len(split)


def test_rows_that_were_not_asked_for_are_not_looked_at_and_decode_when_they_are_needed(split, monkeypatch):
    calls = counting(monkeypatch)
    images = decode_into_cache(split, np.array([7, 3, 3]), limit=10**9, threads=2, progress=lambda *_: None)
    assert len(calls) == 2
    for row in (3, 7, 11):
        assert torch.equal(images[row], decode(split.image_bytes(row), str))


def test_what_is_done_to_pixels_is_not_written_to_the_file(split):
    look(split)[0].zero_()
    assert look(split)[0].any()


def test_the_file_is_named_by_the_content_of_the_images(split, tmp_path):
    first = look(split).pixels.file
    copy = source.open_source(str(write_image_folder(tmp_path / "copy", {"train": 10}))).splits["train"]
    assert look(copy).pixels.file == first
    (tmp_path / "copy" / "train" / "cat" / "3.png").write_bytes(image_bytes(77))
    changed = source.open_source(str(tmp_path / "copy")).splits["train"]
    assert look(changed).pixels.file != first


def test_what_does_not_fit_is_not_kept_and_what_was_not_used_for_longest_goes(split, tmp_path):
    size = 20 * 24 * 20 * 3  # images x width x height x channels
    assert look(split, limit=size - 1).pixels is None
    assert look(split, limit=0).pixels is None
    kept = look(split, limit=size)
    first = kept.pixels.file
    other = write_image_folder(tmp_path / "other", {"train": 10}, classes=("dog", "cat", "hen"))
    second = look(source.open_source(str(other)).splits["train"], limit=2 * size).pixels.file
    assert second.exists()
    assert not first.exists()
    assert torch.equal(kept[5], decode(split.image_bytes(5), str))  # who holds it goes on


@pytest.mark.parametrize("damage", ["truncate", "remove index"])
def test_a_damaged_file_is_made_again(split, damage):
    file = look(split).pixels.file
    if damage == "truncate":
        os.truncate(file, 100)
    else:
        (file.parent / "index.npz").unlink()
    assert torch.equal(look(split)[19], decode(split.image_bytes(19), str))


def test_a_cache_that_cannot_be_written_is_done_without(split, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    images = look(split)
    assert images.pixels is None
    assert torch.equal(images[0], decode(split.image_bytes(0), str))


def odd_folder(root, good=4):
    """Good images of two classes, and every oddity in one of them."""
    folder = write_image_folder(root, {"train": good, "test": 2})
    cats = folder / "train" / "cat"
    whole = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)), "JPEG")
    (cats / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (cats / "text.jpg").write_text("this is no image")
    (cats / "empty.jpg").write_bytes(b"")
    (cats / "cmyk.jpg").write_bytes(encode(Image.new("CMYK", (30, 20)), "JPEG"))
    (cats / "sixteen.png").write_bytes(encode(Image.fromarray(np.full((20, 30), 30000, np.uint16))))
    exif = Image.Exif()
    exif[0x0112] = 6
    (cats / "rotated.jpg").write_bytes(encode(Image.new("RGB", (30, 20)), "JPEG", exif=exif))
    (cats / "palette.png").write_bytes(encode(Image.new("P", (30, 20))))
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    (cats / "animated.gif").write_bytes(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    return folder


def test_of_a_folder_with_oddities_only_the_damaged_ones_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))
    odd = source.open_source(str(odd_folder(tmp_path / "odd"))).splits["train"]
    for limit, always in ((10**9, False), (0, True)):
        images = look(odd, limit=limit, always=always)
        rows = np.arange(len(odd))
        bad = undecodable_rows(images, rows)
        named = {os.path.basename(item["where"]).rstrip(")") for item in bad}
        assert named == {"truncated.jpg", "text.jpg", "empty.jpg"}
        assert len(drop_undecodable(images, rows)) == len(odd) - 3
        with pytest.raises(DataError, match="3 images cannot be decoded") as error:
            raise_if_undecodable(bad)
        assert error.value.cause.count(".jpg") == 3
    raise_if_undecodable([])
