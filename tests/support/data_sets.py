"""Small data sets of any form, and what `open_source` makes of them."""

import datasets
import numpy as np

from samtune.data import source
from samtune.data.cache import decode_into_cache
from samtune.data.split_roles import DataSelection
from tests.conftest import image_bytes


def read(path, **wanted):
    return source.open_source(str(path), DataSelection(**wanted))


def train_of(path):
    return read(path).splits["train"]


def look(split, limit=10**9, **options):
    """All images of a split, decoded into the cache."""
    return decode_into_cache(split, np.arange(len(split)), limit=limit, threads=2, progress=lambda *_: None, **options)


def sizes(data):
    return {role: len(split) for role, split in data.splits.items()}


def table(labels, names=None, image="image", label="label", first=0):
    """Images with these labels: positions in names, or of the kind that is given in their place; else text."""
    feature = datasets.ClassLabel(names=names) if isinstance(names, list) else names or datasets.Value("string")
    images = [{"bytes": image_bytes(first + i), "path": None} for i in range(len(labels))]
    features = datasets.Features({image: datasets.Image(), label: feature})
    return datasets.Dataset.from_dict({image: images, label: labels}, features=features)


def write_tables(folder, **splits):
    """Parquet files in the hub's layout."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder
