"""Fixtures of the tests of images and their cache."""

import pytest

from tests.conftest import write_image_folder
from tests.support.data_sets import train_of


@pytest.fixture
def split(tmp_path, monkeypatch):
    """The 20 training images of a folder, with an empty cache beside it."""
    monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))
    return train_of(write_image_folder(tmp_path / "data", {"train": 10}))
