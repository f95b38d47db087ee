"""Encoded bytes to pixels, and the file that keeps them."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from samtune.data import cache
from samtune.data.cache import decode_into_cache, drop_undecodable, raise_if_undecodable, undecodable_rows
from samtune.data.decode import decode
from samtune.errors import DataError
from tests.conftest import encode, image_bytes, write_image_folder
from tests.support.data_sets import look, train_of


@pytest.mark.parametrize("broken", [b"", b"no image", image_bytes(0)[:200], image_bytes(0, kind="JPEG")[:300]])
def test_bytes_that_are_no_image_are_named_by_their_place(broken):
    with pytest.raises(DataError, match="image 7 of split train cannot be decoded"):
        decode(broken, lambda: "image 7 of split train")


def test_the_fast_decoder_gives_the_pixels_of_the_general_one(shared_data):
    split = train_of(shared_data / "oxford_flowers102")
    for row in range(20):
        encoded = split.image_bytes(row)
        expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        assert torch.equal(decode(encoded, str), torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = decode(encode(Image.fromarray(ramp)), str)
    assert torch.equal(pixels[0].flatten().int(), torch.arange(256, dtype=torch.int32))


def test_a_grey_and_a_cmyk_photograph_are_rgb():
    grey = decode(encode(Image.new("L", (5, 4), 100), "JPEG"), str)
    assert (grey == 100).all()
    assert decode(encode(Image.new("CMYK", (5, 4)), "JPEG"), str).shape == (3, 4, 5)


# --------------------------------------------------------------------------------------------------------------- cache


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
    copy = train_of(write_image_folder(tmp_path / "copy", {"train": 10}))
    assert look(copy).pixels.file == first
    (tmp_path / "copy" / "train" / "cat" / "3.png").write_bytes(image_bytes(77))
    changed = train_of(tmp_path / "copy")
    assert look(changed).pixels.file != first


def test_what_does_not_fit_is_not_kept_and_what_was_not_used_for_longest_goes(split, tmp_path):
    size = 20 * 24 * 20 * 3  # images x width x height x channels
    assert look(split, limit=size - 1).pixels is None
    assert look(split, limit=0).pixels is None
    kept = look(split, limit=size)
    first = kept.pixels.file
    other = write_image_folder(tmp_path / "other", {"train": 10}, classes=("dog", "cat", "hen"))
    second = look(train_of(other), limit=2 * size).pixels.file
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


def test_damaged_images_alone_are_named_whether_pixels_are_kept_or_not(split, tmp_path):
    cut = image_bytes(0, (60, 40), "JPEG")[:900]
    for name, content in {"cut.jpg": cut, "text.jpg": b"this is no image", "empty.jpg": b""}.items():
        (tmp_path / "data" / "train" / "cat" / name).write_bytes(content)
    damaged = train_of(tmp_path / "data")
    for limit, always in ((10**9, False), (0, True)):
        images = look(damaged, limit=limit, always=always)
        rows = np.arange(len(damaged))
        bad = undecodable_rows(images, rows)
        named = {os.path.basename(item["where"]).rstrip(")") for item in bad}
        assert named == {"cut.jpg", "text.jpg", "empty.jpg"}
        assert len(drop_undecodable(images, rows)) == len(split)
        with pytest.raises(DataError, match="3 images cannot be decoded") as error:
            raise_if_undecodable(bad)
        assert error.value.cause.count(".jpg") == 3
    raise_if_undecodable([])
