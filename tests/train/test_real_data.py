"""Every real data set that is there trains for a short epoch, from its own files to a report."""

import pytest

from samtune.config import loading
from samtune.train import loop

SETS = {
    "cifar10": {"crop": "pad", "img_size": 32},
    "oxford_flowers102": {},
    "stanford_cars": {},
    "oxford_iiit_pet": {},
    "pets_3breeds": {},
    "fashion_mnist": {"hflip": 0.0},  # grey, 28 px
    "dtd_10classes": {"aa": "trivial"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_real_data_set_trains_for_a_short_epoch(name, shared_data, tmp_path):
    given = {"model": "resnet10t", "pretrained": False, "dataset": str(shared_data / name)}
    given |= {"output": str(tmp_path / "r")}
    given |= {"img_size": 48, "epochs": 1, "max_train": 256, "max_eval": 128, "batch_size": 32, "workers": 0}
    result = loop.run(loading.load(None, given | SETS[name]))
    assert result["steps"] == min(256, result["dataset"]["train"]) // 32
    assert result["test"]["n"] == min(128, result["dataset"]["test"])
    assert result["skipped_steps"] == 0
    assert result["bad_images"] == []
