"""What is wrong with data, weights or settings: a run tells it before it begins, or does the documented thing."""

import json
import os
import pickle
import re
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from samtune.data import source
from samtune.data.cache import Images, decode_into_cache
from tests.conftest import Bomb, encode, image_bytes, png_header, samtune, write_image_folder
from tests.support.fault_matrix import row

NET = ("--model", "test_resnet")
SHORT = ("--img-size", 32, "--epochs", "2 steps", "--batch-size", 8, "--lr", 0.01, "--workers", 0)
RANDOM = (*NET, "--no-pretrained", *SHORT)


def command(*arguments):
    """The command line in a process of its own."""
    done = samtune(*arguments)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folder(tmp_path):
    """Of the run that a test starts."""
    return tmp_path / "run"


def lines_of(error):
    """Message, cause and hint of the error at the end of what a command said; "" for no cause."""
    found = re.search(r"(?:\A|\n)error: (.+)\n(?:  cause: (.+)\n)?  hint:  (.+)\n\Z", error)
    assert found is not None, error
    return found[1], found[2] or "", found[3]


def refusal(done, code, folder):
    """The lines of the error that ended a run before there was anything of it."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert not folder.exists()
    return lines_of(done.stderr)


def report_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -------------------------------------------------------------------------------------------------------------- images

# File -> its bytes, and why it is no image.
DAMAGED = {
    "truncated.jpg": (image_bytes(0, (400, 300), "JPEG")[:9000], "truncated"),
    "header.jpg": (image_bytes(0, kind="JPEG")[:20], "no image"),
    "empty.png": (b"", "it is empty"),
    "text.jpg": (b"this is no picture\n", "it is no image"),
    "page.png": (b"<!doctype html><title>404</title>", "it is no image"),
    "paper.jpg": (b"%PDF-1.7\n1 0 obj\n", "it is no image"),
    "bomb.png": (png_header(30_000, 20_000), "more than 500 megapixels"),
}


@pytest.fixture
def damaged_data(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 8, "test": 4})
    for name, (content, _) in DAMAGED.items():
        (data / "train" / "cat" / name).write_bytes(content)
    (data / "test" / "dog" / "text.jpg").write_bytes(b"this is no picture either")
    # By its ending another kind of image than by its content: decoded by what it is.
    (data / "train" / "cat" / "png.jpg").write_bytes(image_bytes(1))
    (data / "train" / "dog" / "jpeg.png").write_bytes(image_bytes(2, kind="JPEG"))
    return data


def damaged_files(data):
    return {str(data / "train" / "cat" / name): why for name, (_, why) in DAMAGED.items()} | {
        str(data / "test" / "dog" / "text.jpg"): "it is no image"
    }


@row(15)
def test_one_look_names_every_damaged_image_of_every_split_with_its_reason_before_the_run(damaged_data, folder):
    done = command("run", *RANDOM, "--dataset", damaged_data, "--output", folder)
    what, why, hint = refusal(done, 3, folder)
    assert what == "8 images cannot be decoded"
    named = {path: reason for _, path, reason in re.findall(r"image (\d+) of split \w+ \((.+?)\): (.+?)(?:; |$)", why)}
    expected = damaged_files(damaged_data)
    assert named.keys() == expected.keys()
    for path, reason in expected.items():
        assert reason in named[path]
    assert "--on-bad-image skip" in hint


@row(15)
def test_skip_leaves_out_the_same_images_in_run_and_eval_and_the_report_lists_them(damaged_data, folder):
    skip = ("--dataset", damaged_data, "--on-bad-image", "skip")
    report = report_of(command("run", *RANDOM, *skip, "--output", folder, "--json"))
    listed = {re.search(r"\((.+)\)", image["where"])[1]: image["reason"] for image in report["bad_images"]}
    expected = damaged_files(damaged_data)
    assert listed.keys() == expected.keys()
    assert all(reason in listed[path] for path, reason in expected.items())
    assert report["dataset"]["train"] + report["dataset"]["val"] == 8 + 8 + 2
    assert report["test"]["n"] == 8
    for split, scored in (("test", report["test"]), ("val", report["val"])):
        again = json.loads(command("eval", folder, "--split", split, "--json").stdout)
        assert (again["n"], again["loss"]) == (scored["n"], scored["loss"])
    without = report_of(command("run", *RANDOM, *skip, "--output", f"{folder}-2", "--json", "--cache-limit", 0))
    assert without["bad_images"] == report["bad_images"]
    assert without["test"] == report["test"]


@row(15)
def test_images_that_are_not_kept_decoded_end_the_run_at_the_first_damaged_one(damaged_data, folder):
    done = command("run", *RANDOM, "--dataset", damaged_data, "--output", folder, "--cache-limit", 0, "--epochs", 1)
    assert done.returncode == 3
    what, why, _ = lines_of(done.stderr)
    path = re.search(r"image \d+ of split \w+ \((.+)\) cannot be decoded", what)[1]
    assert damaged_files(damaged_data)[path] in why
    assert json.loads((folder / "status.json").read_text())["exit_code"] == 3


@row(15)
def test_pictures_under_an_ending_that_is_no_pictures_are_said_to_be_passed_over(tmp_path, folder):
    data = write_image_folder(tmp_path / "data", {"train": 8})
    for name in ("9.dat", "10"):
        (data / "train" / "cat" / name).write_bytes(image_bytes(5))
    (data / "train" / "cat" / "Thumbs.db").write_bytes(b"")
    (data / "labels.txt").write_text("cat\ndog\n")
    done = command("run", *RANDOM, "--dataset", data, "--output", folder, "--json")
    assert report_of(done)["dataset"]["train"] == 14
    said = f"2 files of {data} passed over: by the ending no picture, as {data / 'train' / 'cat' / '10'}"
    assert said in done.stderr.splitlines()
    assert said in (folder / "log.txt").read_text()
    assert f"odd: {said}" in command("data", "check", data, "--workers", 0).stdout.splitlines()


def turned(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


def palette_with_a_hole():
    """Two colours, of which the first is transparent."""
    image = Image.new("P", (30, 20), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (15, 0, 30, 20))
    return encode(image, transparency=0)


FRAMES = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
GREY16 = Image.fromarray(np.full((20, 30), 30000, np.uint16))

# File -> its bytes, and what it is: width, height, colour of its first pixel.
ODD = {
    "cmyk.tif": (encode(Image.new("CMYK", (30, 20), (0, 255, 255, 0)), "TIFF"), (30, 20), (255, 0, 0)),
    "clear.png": (encode(Image.new("RGBA", (30, 20), (255, 0, 0, 0))), (30, 20), (255, 255, 255)),
    "half.png": (encode(Image.new("RGBA", (30, 20), (255, 0, 0, 128))), (30, 20), (255, 127, 127)),
    "palette.png": (palette_with_a_hole(), (30, 20), (255, 255, 255)),
    "sixteen.png": (encode(GREY16), (30, 20), (117, 117, 117)),
    "sixteen.tif": (encode(GREY16, "TIFF"), (30, 20), (117, 117, 117)),
    "grey.png": (encode(Image.new("L", (30, 20), 100)), (30, 20), (100, 100, 100)),
    "line.png": (encode(Image.new("1", (30, 20), 1)), (30, 20), (255, 255, 255)),
    "upright.jpg": (encode(Image.new("RGB", (30, 20), "white"), "JPEG", exif=turned(6)), (20, 30), (255, 255, 255)),
    "moving.gif": (encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), (30, 20), (255, 0, 0)),
    "dot.png": (encode(Image.new("RGB", (1, 1), "lime")), (1, 1), (0, 255, 0)),
    "wide.png": (encode(Image.new("RGB", (20000, 4), "blue")), (20000, 4), (0, 0, 255)),
}


def odd_data(root):
    """Splits of nothing but odd images, the same ones in each."""
    for split in ("train", "validation", "test"):
        for number, name in enumerate(ODD):
            place = root / split / ("cat" if number % 2 else "dog")
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(ODD[name][0])
    return root


@row(16)
def test_each_odd_image_becomes_what_is_documented_kept_decoded_or_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMTUNE_CACHE", str(tmp_path / "cache"))
    for split in source.open_source(str(odd_data(tmp_path / "data"))).splits.values():
        rows = np.arange(len(split))
        kept = decode_into_cache(split, rows, limit=10**9, threads=2, progress=lambda *_: None)
        assert kept.pixels is not None
        assert not kept.bad
        for number in rows:
            _, (width, height), colour = ODD[os.path.basename(split.path(number))]
            for images in (kept, Images(split)):
                assert images[number].dtype == torch.uint8
                assert images[number].shape == (3, height, width)
                assert tuple(images[number][:, 0, 0].tolist()) == colour


@row(16)
def test_a_run_on_nothing_but_odd_images_sees_the_same_in_training_and_evaluation(tmp_path, folder):
    """With the cache and without; validation and test hold the same images, and eval reads each split anew."""
    data = odd_data(tmp_path / "data")
    reports = []
    for limit in (1, 0):
        output = f"{folder}-{limit}"
        run = (*RANDOM, "--dataset", data, "--output", output, "--cache-limit", limit, "--json")
        reports.append(report_of(command("run", *run)))
        for split in ("train", "val", "test"):
            again = json.loads(command("eval", output, "--split", split, "--json").stdout)
            assert again["n"] == len(ODD)
            assert again["loss"] == reports[0]["test"]["loss"]
    assert reports[0]["val"]["loss"] == reports[1]["val"]["loss"] == reports[0]["test"]["loss"]


# -------------------------------------------------------------------------------------------------------------- labels


def write_list(root, name, labels):
    """A list of as many pictures as labels; text is a line of csv, anything else a value of jsonl."""
    (root / "photos").mkdir(exist_ok=True)
    for i in range(len(labels)):
        (root / "photos" / f"{i}.png").write_bytes(image_bytes(i))
    if name.endswith(".csv"):
        lines = ["path,label", *(f"photos/{i}.png,{label}" for i, label in enumerate(labels))]
    else:
        lines = [json.dumps({"path": f"photos/{i}.png", "label": label}) for i, label in enumerate(labels)]
    (root / name).write_text("\n".join(lines) + "\n")
    return root / name


def write_table(root, labels, names=None, split="train"):
    """Parquet in the hub's layout. Positions are written as they are: nobody checks them there."""
    label = pa.array(labels)
    kind = datasets.ClassLabel(names=names) if names else datasets.Value(str(label.type))
    images = pa.array([{"bytes": image_bytes(i), "path": None} for i in range(len(labels))])
    schema = datasets.Features({"image": datasets.Image(), "label": kind}).arrow_schema
    (root / "data").mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": images, "label": label}).replace_schema_metadata(schema.metadata)
    pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    return root


NAN = float("nan")
# Name -> how the labels are written, the labels, and what is said of the third.
NO_CLASSES = {
    "missing from a csv file": ("l.csv", ["oak", "elm", "", "elm"], "row 2 of split train has the label ''"),
    "missing from a jsonl file": ("l.jsonl", [0, 1, None, 1], "row 2 of split train has the label None"),
    "missing from a table": (None, [0, 1, None, 1], "row 2 of split train has the label None"),
    "out of range": (["oak", "elm"], [0, 1, 7, 1], "row 2 of split train has the label 7"),
    "negative, of two classes": (["oak", "elm"], [0, 1, -1, 1], "row 2 of split train has the label -1"),
    "negative in a table": (None, [0, 1, -3, 1], "row 2 of split train has the label -3"),
    "negative in a csv file": ("l.csv", [0, 1, -3, 1], "row 2 of split train has the label -3"),
    "NaN in a table": (None, [0.0, 1.0, NAN, 1.0], "row 2 of split train has the label nan"),
    "NaN in a csv file": ("l.csv", [0, 1, "nan", 1], "row 2 of split train has the label None"),
    "NaN in a jsonl file": ("l.jsonl", [0, 1, NAN, 1], "line 3 of .* has the label nan"),
    "a fraction": ("l.jsonl", [0, 1, 0.5, 1], "line 3 of .* has the label 0.5"),
    "a list": ("l.jsonl", [0, 1, [1], 1], r"line 3 of .* has the label \[1\]"),
}


@row(17)
@pytest.mark.parametrize("name", NO_CLASSES)
def test_a_label_that_is_no_class_ends_the_run_with_its_row(name, tmp_path, folder):
    how, labels, said = NO_CLASSES[name]
    data = write_list(tmp_path, how, labels) if isinstance(how, str) else write_table(tmp_path / "d", labels, how)
    what, why, hint = refusal(command("run", *RANDOM, "--dataset", data, "--output", folder), 3, folder)
    assert re.search(said, what), what
    assert "which is no class" in what
    assert why
    assert "fix or remove the" in hint


@row(17)
def test_text_labels_are_mapped_and_the_map_is_stored_with_the_weights(tmp_path, folder):
    words = ["oak", "elm", "ash"]
    data = write_list(tmp_path, "trees.csv", [words[i % 3] for i in range(24)])
    report_of(command("run", *RANDOM, "--dataset", data, "--output", folder, "--json"))
    last = folder / "checkpoints" / "last"
    assert json.loads((last / "manifest.json").read_text())["class_names"] == ["ash", "elm", "oak"]
    assert json.loads((last / "config.json").read_text())["label_names"] == ["ash", "elm", "oak"]
    stored = pq.read_table(folder / "predictions.parquet").to_pydict()
    assert [words[row % 3] for row in stored["index"]] == [["ash", "elm", "oak"][i] for i in stored["label"]]


@row(18)
def test_splits_are_aligned_by_the_names_of_their_classes(tmp_path, folder):
    """Another order in validation; a class that test lacks; and the weights remember the order of train."""
    write_table(tmp_path / "d", [0, 1, 2] * 6, ["ash", "elm", "oak"])
    write_table(tmp_path / "d", [0, 1, 2], ["oak", "ash", "elm"], "validation")
    data = write_table(tmp_path / "d", [0, 1, 1], ["oak", "elm"], "test")
    report = report_of(command("run", *RANDOM, "--dataset", data, "--output", folder, "--json"))
    assert report["dataset"]["classes"] == 3
    assert pq.read_table(folder / "predictions.parquet")["label"].to_pylist() == [2, 1, 1]
    report_of(command("run", *RANDOM, "--dataset", data, "--output", f"{folder}-2", "--json", "--no-test"))
    assert pq.read_table(f"{folder}-2/predictions.parquet")["label"].to_pylist() == [2, 0, 1]


@row(18)
def test_a_class_folder_that_test_lacks_moves_no_other_class(tmp_path, folder):
    data = write_image_folder(tmp_path / "data", {"train": 8, "test": 4}, classes=("ash", "elm", "oak"))
    shutil.rmtree(data / "test" / "ash")
    report_of(command("run", *RANDOM, "--dataset", data, "--output", folder, "--json"))
    assert pq.read_table(folder / "predictions.parquet")["label"].to_pylist() == [1] * 4 + [2] * 4


@row(18)
def test_without_a_test_split_the_run_says_so_and_reports_validation(tmp_path, folder):
    data = write_image_folder(tmp_path / "data", {"train": 12})
    done = command("run", *RANDOM, "--dataset", data, "--output", folder, "--json")
    report = report_of(done)
    assert "no test split" in done.stderr
    assert report["test"] is None
    assert report["val"]["n"] == 2


@row(18)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_class_that_train_lacks_ends_the_run_with_its_folder(split, tmp_path, folder):
    data = write_image_folder(tmp_path / "data", {"train": 8, split: 2})
    (data / split / "zebra").mkdir()
    (data / split / "zebra" / "0.png").write_bytes(image_bytes(5))
    what, why, _ = refusal(command("run", *RANDOM, "--dataset", data, "--output", folder), 3, folder)
    assert what == f"class folder zebra of split {split} is no class of train"
    assert "cat, dog" in why


# --------------------------------------------------------------------------------------------------------------- sizes


@row(19)
def test_a_data_set_smaller_than_a_batch_trains_on_all_of_it_in_each_step(tmp_path, folder):
    data = write_image_folder(tmp_path / "data", {"train": 2, "test": 1})
    more = ("--batch-size", 64, "--epochs", 3)
    done = command("run", *RANDOM, *more, "--dataset", data, "--output", folder, "--json")
    report = report_of(done)
    assert "steps   3 of 2 images (3 epochs)" in done.stderr
    assert report["steps"] == 3
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["n"] for row in rows if row["split"] == "train"] == [2, 2, 2]
    assert (report["val"]["n"], report["test"]["n"]) == (2, 2)


@row(19)
def test_a_last_batch_of_one_image_counts_as_one_image(tmp_path, folder):
    """17 images in batches of 16, 8 and 34: the same answers and the same means."""
    data = write_image_folder(tmp_path / "data", {"train": 9, "test": 8})
    (data / "test" / "dog" / "last.png").write_bytes(image_bytes(99))
    report = report_of(command("run", *RANDOM, "--dataset", data, "--output", folder, "--json"))
    assert report["test"]["n"] == 17
    whole = pq.read_table(folder / "predictions.parquet").to_pydict()
    assert whole["index"] == list(range(17))
    (data / "test" / "dog" / "last.png").unlink()
    without = json.loads(command("eval", folder, "--dataset", data, "--json").stdout)
    last = whole["prediction"][16] != whole["label"][16]
    assert without["n"] == 16
    assert report["test"]["wrong"] == without["wrong"] + last
    loss_of_the_last = 17 * report["test"]["loss"] - 16 * without["loss"]
    if not last:
        assert np.exp(-loss_of_the_last) == pytest.approx(whole["probability"][16], rel=1e-3)


@row(19)
def test_one_training_image_a_step_trains(tmp_path, folder):
    data = write_image_folder(tmp_path / "data", {"train": 3})
    one = ("--batch-size", 1, "--epochs", 1)
    assert report_of(command("run", *RANDOM, *one, "--dataset", data, "--output", folder, "--json"))["steps"] == 4


@row(20)
def test_images_of_train_that_are_in_test_too_are_listed_by_the_check_and_warned_of_by_a_run(tmp_path, folder):
    data = write_image_folder(tmp_path / "data", {"train": 12, "test": 4})
    for cat, dog in ((0, 3), (1, 5)):
        shutil.copy(data / "train" / "dog" / f"{dog}.png", data / "test" / "cat" / f"{cat}.png")
    checked = command("data", "check", data, "--workers", 0)
    assert checked.returncode == 0
    found = [line for line in checked.stdout.splitlines() if "across splits" in line and "dog" in line]
    assert [set(re.findall(r"\w+/\w+/\w+\.png", line)) for line in found] == [
        {"train/dog/3.png", "test/cat/0.png"},
        {"train/dog/5.png", "test/cat/1.png"},
    ]
    done = command("run", *RANDOM, "--dataset", data, "--output", folder, "--json")
    assert any("2 test images are in train too" in warning for warning in report_of(done)["warnings"])
    assert "warning: 2 test images are in train too" in done.stderr


# ------------------------------------------------------------------------------------------------- models and weights


@row(21)
@pytest.mark.parametrize(
    ("model", "said", "nearest"),
    [
        ("efficientnet_b77", "unknown model 'efficientnet_b77'", "efficientnet_b7 (tf_efficientnet_b7.ra_in1k)"),
        ("resnet5O", "unknown model 'resnet5O'", "resnet50"),
        ("tf_efficientnet_b0.in2k", "no weights 'in2k'", "ns_jft_in1k"),
        ("efficientnet_cc_b0_4e", "no pretrained weights", "tf_efficientnet_cc_b0_4e"),
    ],
)
def test_a_model_that_cannot_be_meant_brings_the_nearest_pretrained_ones(model, said, nearest, tmp_path, folder):
    data = write_image_folder(tmp_path / "data", {"train": 4})
    done = command("run", "--model", model, "--dataset", data, "--output", folder, *SHORT)
    what, why, hint = refusal(done, 4, folder)
    assert said in what
    assert nearest in re.findall(r"[\w.]+(?: \([\w.]+\))?", f"{why} {hint}")


@pytest.fixture
def data(tmp_path):
    return write_image_folder(tmp_path / "data", {"train": 8, "test": 2})


@row(22)
@pytest.mark.parametrize("outputs", [1000, 2, 0])
def test_weights_with_another_head_or_none_get_a_new_one_with_a_note(outputs, data, tmp_path, folder):
    donor = timm.create_model("test_resnet", num_classes=outputs)
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    given = (*NET, *SHORT, "--weights", tmp_path / "w.safetensors", "--dataset", data, "--output", folder)
    done = command("run", *given, "--json")
    assert report_of(done)["model"]["weights"] == f"file:{tmp_path / 'w.safetensors'}"
    old = f"has a head of {outputs} outputs, which is left out" if outputs else "has no head"
    assert f"w.safetensors {old}; a new head of 2 starts at zero\n" in done.stderr


OTHERS = {
    "other channels": (("test_resnet", {"in_chans": 1}), "1 of 90", r"conv1\.0\.weight is \(16, 1,"),
    "other architecture": (("resnet18", {}), "tensors differ", r"conv1\.0\.weight is missing"),
}


@row(22)
@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_something_else_are_refused_with_their_first_keys(name, data, tmp_path, folder):
    (model, options), count, first = OTHERS[name]
    save_file(timm.create_model(model, **options).state_dict(), tmp_path / "w.safetensors")
    done = command("run", *NET, *SHORT, "--weights", tmp_path / "w.safetensors", "--dataset", data, "--output", folder)
    what, why, hint = refusal(done, 5, folder)
    assert what == f"weights file:{tmp_path / 'w.safetensors'} do not fit the model"
    assert count in why
    assert re.search(f"first: {first}", why), why
    assert "--model" in hint


@row(22)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_weights_are_refused_by_name(damage, kind, data, tmp_path, folder):
    path = tmp_path / f"w.{kind}"
    (save_file if kind == "safetensors" else torch.save)(timm.create_model("test_resnet").state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not found\n"}[damage])
    done = command("run", *NET, *SHORT, "--weights", path, "--dataset", data, "--output", folder)
    what, why, _ = refusal(done, 5, folder)
    assert what == f"weights {path} cannot be read"
    assert why


@row(23)
@pytest.mark.parametrize(
    ("model", "dataset", "repository"),
    [
        ("tf_efficientnet_b0", None, "timm/tf_efficientnet_b0.ns_jft_in1k"),
        ("test_resnet", "flowers102", "--repo-type dataset dpdl-benchmark/oxford_flowers102"),
    ],
)
def test_offline_with_an_empty_cache_the_error_names_the_cache_and_the_command_that_fills_it(
    model, dataset, repository, data, folder
):
    done = command("run", "--model", model, "--dataset", dataset or data, "--output", folder, *SHORT)
    what, why, hint = refusal(done, 4, folder)
    assert repository.rpartition(" ")[2] in what
    assert "HF_HUB_OFFLINE is set" in why
    assert f"(cache: {os.environ['HF_HOME']}/hub)" in why
    assert f"`hf download {repository}`" in hint
    assert ("--dataset" if dataset else "--weights") in hint


@row(26)
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.tar", "w.safetensors", "w.npz"])
@pytest.mark.parametrize("kind", ["pickle", "archive", "old archive"])
def test_weights_with_code_in_them_are_refused_and_none_of_it_runs(kind, name, data, tmp_path, folder):
    mark = tmp_path / "exploded"
    bomb = {"state_dict": {"conv1.0.weight": torch.ones(3), "more": Bomb(mark)}}
    if kind == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, tmp_path / name, _use_new_zipfile_serialization=kind == "archive")
    done = command("run", *NET, *SHORT, "--weights", tmp_path / name, "--dataset", data, "--output", folder)
    what, why, hint = refusal(done, 5, folder)
    assert what == f"weights {tmp_path / name} cannot be read"
    assert "weights_only=False" not in why  # torch's own advice
    assert "tensors only" in hint
    assert not mark.exists()
    if kind != "pickle" and name == "w.pth":  # it is a bomb
        torch.load(tmp_path / name, weights_only=False)
        assert mark.exists()


# ------------------------------------------------------------------------------------------------------------ settings

# A line of a recipe -> what is said of it: message, the range, and a hint.
SETTINGS = {
    "bath_size = 3": ("unknown key bath_size", "", "did you mean batch_size?"),
    "label_nose = 0.1": ("unknown key label_nose", "", "did you mean label_noise?"),
    'lr = "1e-4"': ("lr = '1e-4'.*valid number", "a number, more than 0", "write lr = 1e-4 without quotes"),
    'micro_batch = "16"': ("micro_batch = '16'.*valid integer", "whole number, at least 1", "micro_batch = 16 without"),
    "micro_batch = 1.5": ("micro_batch = 1.5.*valid integer", "whole number, at least 1", "images that pass"),
    "batch_size = 1.5": ("batch_size = 1.5.*whole number from 1 on.*auto", "", "images per step"),
    'batch_size = "all"': ("batch_size = 'all'.*whole number from 1 on.*auto", "", "images per step"),
    "rho = -0.1": ("rho = -0.1.*greater than or equal to 0", "a number, at least 0", "radius"),
    "rho = nan": ("rho = nan.*finite", "a number, at least 0", "radius"),
    "lr = inf": ("lr = inf.*finite", "a number, more than 0", "peak"),
    "momentum = 1": ("momentum = 1.*less than 1", "at least 0 and less than 1", "momentum"),
    "epochs = 0": ("epochs = 0.*more than 0 epochs or steps", "", "5000 steps"),
    "epochs = nan": ("epochs = nan.*must be epochs", "", "5000 steps"),
    "p = 0.5": ("p = 0.5.*from 1 on", "", "from 1 to inf"),
    "p = nan": ("p = nan.*from 1 on", "", "from 1 to inf"),
    "adaptive = 1": ("adaptive = 1.*valid boolean", "", "ASAM"),
    'opt = "sdg"': ("opt = 'sdg'.*'sgd' or 'adamw'", "", "sgd"),
    "seed = 18446744073709551616": ("less than 9223372036854775808", "whole number, at least 0", "order"),
}


@row(27)
@pytest.mark.parametrize("line", SETTINGS)
def test_a_setting_that_cannot_be_meant_is_named_with_key_origin_range_and_mend(line, data, tmp_path, folder):
    said, allowed, mended = SETTINGS[line]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"{line}\n")
    what, why, hint = refusal(command("run", recipe, *NET, "--dataset", data, "--output", folder), 2, folder)
    assert re.search(said, what), what
    assert f"in recipe {recipe}" in what
    assert allowed in why
    assert mended in hint


@row(27)
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--bath-size", 3), r"--bath-size .*--batch-size"),
        (("--lr", "small"), r"--lr.*valid number"),
        (("--rho", -1), r"--rho -1.0: must be greater than or equal to 0"),
        (("--rho", "nan"), r"--rho nan: must be a finite number"),
        (("--epochs", 0), r"--epochs 0: must be more than 0 epochs or steps"),
        (("--p", 0.5), r'--p 0.5: must be a number from 1 on, at most 1e\+06, or "inf"'),
        (("--seed", 2**64), r"--seed 18446744073709551616: must be less than"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_named_with_its_range(flags, said, data, folder):
    what, _, hint = refusal(command("run", *NET, "--dataset", data, "--output", folder, *flags), 2, folder)
    assert re.search(said, what), what
    assert hint


# ------------------------------------------------------------------------------------------------------------- devices


@row(28)
def test_without_a_gpu_to_be_seen_a_run_takes_the_cpu_and_says_so(data, folder):
    """The build of torch for CUDA too, with no driver or none of its devices allowed."""
    done = samtune("run", *RANDOM, "--dataset", data, "--output", folder, "--json", env={"CUDA_VISIBLE_DEVICES": ""})
    report = report_of(done)
    assert "Traceback" not in done.stderr
    (named,) = re.findall(r"^device  (cpu \(\d+ threads?\)), float32; 0 data workers$", done.stderr, re.M)
    assert report["devices"] == [named]
    assert report["precision"] == "float32"
