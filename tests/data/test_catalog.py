"""The data sets that have a name, and what `samtune datasets` tells of them and of any other."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from samtune.config import loading
from samtune.config.dataset_defaults import DATASET_DEFAULTS
from samtune.data import describe, source
from samtune.data.catalog import CATALOG
from samtune.data.split_roles import DataSelection
from samtune.errors import DataError, ModelError, UsageError
from tests.conftest import image_bytes, samtune, write_image_folder
from tests.support.data_sets import sizes
from tests.support.hub_server import COMMIT


@pytest.fixture
def hub_cache():
    """Leaves in the cache what a download of a data set leaves there: a snapshot of its files; classes a and b."""
    places = set()

    def fill(hub_id, configs, label="label", revision="main"):
        place = Path(constants.HF_HUB_CACHE) / f"datasets--{hub_id.replace('/', '--')}"
        snapshot = place / "snapshots" / COMMIT
        reference = place / "refs" / revision
        reference.parent.mkdir(parents=True)
        reference.write_text(COMMIT)
        features = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(names=["a", "b"])})
        card = ["---", "configs:"]
        for name, splits in configs.items():
            card += [f"- config_name: {name}", "  data_files:"]
            for split, labels in splits.items():
                images = [{"bytes": image_bytes(i), "path": None} for i in range(len(labels))]
                file = snapshot / name / split / "0000.parquet"
                file.parent.mkdir(parents=True)
                datasets.Dataset.from_dict({"image": images, label: labels}, features=features).to_parquet(file)
                card += [f"  - split: {split}", f"    path: {name}/{split}/*.parquet"]
        if revision == "main":  # a converted repository has no card
            (snapshot / "README.md").write_text("\n".join([*card, "---", ""]))
        places.add(place)

    yield fill
    for place in places:
        shutil.rmtree(place)


# ---------------------------------------------------------------------------------------------------------------- rows


def test_the_names_that_the_papers_use_are_there():
    assert set(CATALOG) == {
        *("flowers102", "cars", "pets", "cifar10", "cifar100", "svhn", "svhn_extra", "fashion_mnist", "aircraft"),
        *("food101", "birdsnap", "dtd", "imagenet", "imagenette", "mnist5k"),
    }


@pytest.mark.parametrize("row", CATALOG.values(), ids=lambda row: row.name)
def test_a_row_is_whole_and_its_defaults_are_settings(row):
    assert row.image
    assert row.label
    assert row.classes >= 10
    assert row.licence
    assert len(row.citation) > len("not stated")
    assert row.counts.keys() <= {"train", "validation", "test"}
    assert not row.splits or set(row.counts) <= set(row.splits)
    settings = loading.load(None, {"model": "m", "dataset": row.name})
    assert all(getattr(settings, key) == value for key, value in DATASET_DEFAULTS.get(row.name, {}).items())


@pytest.mark.parametrize("row", CATALOG.values(), ids=lambda row: row.name)
def test_no_test_split_is_validation_in_any_row(row):
    test = set(row.splits.get("test", "").split("+"))
    assert not test & set(row.splits.get("validation", "none").split("+"))
    assert not test & set(row.splits.get("train", "none").split("+"))


def test_what_publications_score_is_the_test_split_whatever_the_hub_calls_it():
    for name in ("food101", "imagenet", "imagenette"):
        assert CATALOG[name].splits == {"train": "train", "test": "validation"}
    assert "test" not in CATALOG["birdsnap"].splits


def test_digits_and_clothes_are_not_mirrored():
    for name in ("mnist5k", "svhn", "svhn_extra", "fashion_mnist"):
        assert loading.load(None, {"model": "m", "dataset": name}).hflip == 0
    assert loading.load(None, {"model": "m", "dataset": "flowers102"}).hflip == 0.5


def test_the_mean_per_class_convention_is_named_where_it_is_the_custom():
    assert {row.name for row in CATALOG.values() if row.metric != "top-1"} == {"flowers102", "pets", "aircraft"}


# ------------------------------------------------------------------------------------------------------- from the cache


def test_the_hubs_validation_split_of_food101_is_read_as_test(hub_cache):
    hub_cache("ethz/food101", {"default": {"train": [0, 1, 0, 1], "validation": [1, 0, 1]}})
    data = source.open_source("food101")
    assert sizes(data) == {"train": 4, "test": 3}
    with pytest.raises(UsageError, match="validation is the test split of data set food101"):
        source.open_source("food101", DataSelection(val_split="validation"))


def test_svhn_extra_trains_on_train_and_extra(hub_cache):
    splits = {"train": [0, 1], "test": [1, 0, 1], "extra": [1, 1, 0, 0]}
    hub_cache("ufldl-stanford/svhn", {"cropped_digits": splits, "full_numbers": {"train": [0]}})
    assert source.open_source("svhn_extra").splits["train"].labels.tolist() == [0, 1, 1, 1, 0, 0]
    data = source.open_source("svhn")
    assert sizes(data) == {"train": 2, "test": 3}


def test_a_converted_repository_is_read_by_config_split_and_revision(hub_cache):
    splits = {"train": [0, 1], "validation": [1], "test": [0]}
    hub_cache("HuggingFaceM4/FGVC-Aircraft", {"default": splits}, "variant", "refs/convert/parquet")
    data = source.open_source("aircraft")
    assert {role: split.labels.tolist() for role, split in data.splits.items()} == splits
    hub_cache("frgfm/imagenette", {"320px": splits, "full_size": {"train": [0]}}, revision="refs/convert/parquet")
    data = source.open_source("imagenette")  # whose validation is what publications score
    assert {role: split.labels.tolist() for role, split in data.splits.items()} == {"train": [0, 1], "test": [1]}


def test_what_a_converted_repository_lacks_in_the_cache_is_named_with_its_revision():
    with pytest.raises(ModelError, match="frgfm/imagenette") as error:
        source.open_source("imagenette")
    assert "hf download --repo-type dataset --revision refs/convert/parquet frgfm/imagenette" in error.value.hint


def test_any_id_of_the_hub_is_a_data_set(hub_cache):
    hub_cache("nobody/tiny_things", {"default": {"training": [0, 1, 1, 0], "dev": [1, 0]}}, "kind")
    data = source.open_source("nobody/tiny_things")
    assert data.origin == "hub:nobody/tiny_things"
    assert data.parts == {"train": ("training",), "validation": ("dev",)}


def test_a_path_that_was_misspelt_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="data/pats is not there"):
        source.locate("data/pats")
    with pytest.raises(DataError, match=r"lists/train\.csv is not there"):
        source.locate("lists/train.csv")


# ------------------------------------------------------------------------------------------------------------- commands


def test_datasets_lists_every_name_with_its_counts():
    rows = json.loads(samtune("datasets", "--json").stdout)
    assert [row["name"] for row in rows] == list(CATALOG)
    assert rows[0] == {
        **{"name": "flowers102", "classes": 102, "train": 1020, "validation": 1020, "test": 6149},
        **{"licence": "not stated", "source": "hub:dpdl-benchmark/oxford_flowers102"},
    }
    shown = samtune("datasets", env={"COLUMNS": "160"})
    assert shown.returncode == 0
    for row in CATALOG.values():
        assert row.name in shown.stdout
    assert "\x1b" not in shown.stdout


def test_show_tells_a_name_that_is_not_here_from_the_catalog():
    about = json.loads(samtune("datasets", "show", "food101", "--json").stdout)
    assert about["here"] is False
    assert about["splits"] == {"train": 75750, "test": 25250}
    assert "test: its split validation" in about["split_policy"]
    assert "Bossard" in about["citation"]
    assert about["class_names"] is None


def test_show_opens_a_folder_and_a_data_set_in_the_cache(tmp_path, hub_cache):
    folder = write_image_folder(tmp_path / "photos", {"train": 3, "test": 2})
    shown = samtune("datasets", "show", folder, env={"COLUMNS": "200"})
    assert shown.returncode == 0, shown.stderr
    for said in ("photos", "train 6, test 4", "cat, dog", "a stratified part of train"):
        assert said in shown.stdout
    hub_cache("nobody/tiny", {"default": {"train": [0, 1], "test": [1]}})
    about = describe.describe("nobody/tiny")
    assert about["here"]
    assert about["class_names"] == ["a", "b"]


def test_show_of_what_is_no_data_set_ends_with_3():
    done = samtune("datasets", "show", "flower102")
    assert done.returncode == 3
    assert "flowers102" in done.stderr
