"""`samtune eval RUN --dataset OTHER`: every picture of other data is scored once, its classes by their names."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from samtune.runs import run_log
from samtune.train.eval_checkpoint import evaluate_checkpoint
from tests.conftest import image_bytes, samtune, write_image_folder

CLASSES = ("cat", "dog", "owl")
SMALL = ("--model", "test_resnet", "--no-pretrained", "--img-size", 32, "--epochs", 2, "--lr", 0.01, "--workers", 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on folders of three classes."""
    root = tmp_path_factory.mktemp("trained")
    data = write_image_folder(root / "data", {"train": 12, "test": 4}, CLASSES)
    done = samtune("run", *SMALL, "--dataset", data, "--output", root / "r")
    assert done.returncode == 0, done.stderr
    return root / "r"


def score(run, dataset, split=None, selection=None):
    scored, about = evaluate_checkpoint(
        run, name=None, split=split, dataset=str(dataset), selection=selection, progress=lambda *_: None
    )
    return scored, about


def of_class(scored, name):
    """What was predicted of the images of a class."""
    return scored.predictions[scored.labels == CLASSES.index(name)].tolist()


# What the other data holds -> how many are scored, and as which split.
OTHERS = {
    "a test split alone": ({"test": 6}, CLASSES, 18, "test"),
    "no split": ({".": 5}, CLASSES, 15, "all"),
    "train and validation": ({"train": 4, "val": 2}, CLASSES, 18, "train+validation"),
    "train alone": ({"train": 5}, CLASSES, 15, "all"),
    "fewer classes": ({"train": 3, "test": 6}, ("owl",), 6, "test"),
    "one class, and no split": ({".": 4}, ("dog",), 4, "all"),
    "a folder around it": ({"photos/all": 3}, CLASSES, 9, "all"),
    "other names of the split": ({"test_set": 4, "training_set": 2}, CLASSES, 12, "test"),
}


def test_a_run_from_before_a_change_of_the_evaluation_is_scored_with_a_note(trained, tmp_path, monkeypatch, capsys):
    other = write_image_folder(tmp_path / "other", {"test": 1}, CLASSES)
    score(trained, other)
    assert "another rule" not in capsys.readouterr().err
    monkeypatch.setattr(run_log, "EVALUATION_VERSION", "3")
    score(trained, other)
    assert "resized pictures by another rule: its own scores may differ" in capsys.readouterr().err


@pytest.mark.parametrize("name", OTHERS)
def test_every_picture_is_scored_once_whatever_the_splits(name, trained, tmp_path):
    folders, classes, n, split = OTHERS[name]
    scored, about = score(trained, write_image_folder(tmp_path / "other", folders, classes))
    assert (len(scored.rows), scored.split) == (n, split)
    assert {CLASSES[label] for label in scored.labels} == set(classes)
    assert about["unknown_classes"] == {}
    assert about["dataset"] == str(tmp_path / "other")


def test_test_rows_of_a_list_are_scored_alone_and_that_is_said(trained, tmp_path):
    pictures = sorted(write_image_folder(tmp_path / "pictures", {".": 4}, CLASSES).rglob("*.png"))
    values = ["train", "test", "unlabeled", "test"]
    rows = [f"{path},{path.parent.name},{values[i % 4]}" for i, path in enumerate(pictures)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,subset", *rows]))
    scored, _ = score(trained, tmp_path / "list.csv")
    assert (len(scored.rows), scored.split) == (6, "test")
    done = samtune("eval", trained, "--dataset", tmp_path / "list.csv")
    assert "scored: split test of list; --split takes another: train" in done.stderr
    assert "3 of 12 rows are in no split and left out" in done.stderr


def test_other_data_without_any_label_is_no_defect(trained, tmp_path):
    path = next(iter(sorted(write_image_folder(tmp_path / "pictures", {".": 1}, CLASSES).rglob("*.png"))))
    (tmp_path / "list.csv").write_text(f"path,label,split\n{path},,test")
    done = samtune("eval", trained, "--dataset", tmp_path / "list.csv")
    assert (done.returncode, "has no labelled pictures" in done.stderr) == (3, True)
    assert "its labels are hidden" in done.stderr


def test_unknown_classes_of_all_splits_are_counted_together(trained, tmp_path):
    other = write_image_folder(tmp_path / "other", {"train": 2, "val": 3}, ("cat", "zebra"))
    scored, about = score(trained, other)
    assert (len(scored.rows), about["unknown_classes"]) == (5, {"zebra": 5})
    done = samtune("eval", trained, "--dataset", other)
    assert "scored: all splits of other, train+validation;" in done.stderr


def test_a_split_that_is_asked_for_is_whole(trained, tmp_path):
    other = write_image_folder(tmp_path / "other", {"train": 10, "val": 3, "test": 2}, CLASSES)
    for split, n in (("train", 30), ("val", 9), ("validation", 9), ("test", 6)):
        assert len(score(trained, other, split)[0].rows) == n
    done = samtune("eval", trained, "--dataset", other, "--split", "extra")
    assert done.returncode == 2
    assert "--split train, test, validation" in done.stderr


def test_classes_are_matched_by_name_in_any_order_and_form(trained, tmp_path):
    """As folders, and as a list whose classes come in another order: the same pictures, the same answers."""
    folder = write_image_folder(tmp_path / "other", {"test": 4}, CLASSES)
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name},test" for path in sorted(folder.rglob("*.png"))]
    (tmp_path / "other.csv").write_text("\n".join(["path,label,split", *reversed(lines)]))
    direct, _ = score(trained, folder)
    listed, _ = score(trained, tmp_path / "other.csv")
    for name in CLASSES:
        assert of_class(direct, name) == of_class(listed, name)[::-1]
    assert sum(direct.nats) == pytest.approx(sum(listed.nats))


def test_classes_that_the_model_does_not_know_are_left_out_counted_and_named(trained, tmp_path):
    other = write_image_folder(tmp_path / "other", {"test": 2}, ("cat", "zebra", "yak"))
    (other / "test" / "yak" / "more.png").write_bytes(image_bytes(1))
    scored, about = score(trained, other)
    assert len(scored.rows) == 2
    assert about["unknown_classes"] == {"yak": 3, "zebra": 2}
    done = samtune("eval", trained, "--dataset", other)
    assert done.returncode == 0, done.stderr
    assert "yak (3), zebra (2)" in done.stdout
    assert "split test: 5 rows are of unknown classes and left out" in done.stderr
    shutil.rmtree(other / "test" / "cat")
    done = samtune("eval", trained, "--dataset", other)
    assert done.returncode == 3
    assert "yak (3)" not in done.stdout
    assert "the model's: cat, dog, owl" in done.stderr


def test_unlabelled_pictures_beside_labelled_ones_are_left_out(trained, tmp_path):
    other = write_image_folder(tmp_path / "other", {"test": 2}, CLASSES)
    (other / "test" / "stray.png").write_bytes(image_bytes(1))
    assert len(score(trained, other)[0].rows) == 6


def test_the_runs_own_data_found_elsewhere_keeps_its_parts(trained, tmp_path):
    """The part that the run validated on is that of its own data alone: other data of the same form are whole."""
    own = tmp_path / "moved"
    shutil.copytree(trained.parent / "data", own)
    for split, n in (("train", 33), ("val", 3), ("test", 12)):
        assert len(score(trained, own, split)[0].rows) == n
    (own / "train" / "cat" / "0.png").write_bytes(image_bytes(7))
    assert len(score(trained, own, "train")[0].rows) == 36


def test_the_runs_path_with_other_data_in_its_place_is_refused(trained, tmp_path):
    """A relative path that is read elsewhere, or a folder whose pictures were changed: neither is the run's data."""
    write_image_folder(tmp_path / "there" / "data", {"train": 8, "test": 3}, CLASSES)
    (tmp_path / "there").joinpath("elsewhere").mkdir()
    made = samtune("run", *SMALL, "--dataset", "data", "--output", "r", cwd=tmp_path / "there")
    assert made.returncode == 0, made.stderr
    assert samtune("eval", "r", cwd=tmp_path / "there").returncode == 0
    gone = samtune("eval", "../r", cwd=tmp_path / "there" / "elsewhere")
    assert gone.returncode == 3
    assert "data set data of the run is not there" in gone.stderr
    assert "--dataset PATH says where it is now" in gone.stderr
    write_image_folder(tmp_path / "there" / "elsewhere" / "data", {"train": 8, "test": 5}, CLASSES)
    for options in ([], ["--split", "val"], ["--temperature"]):
        other = samtune("eval", "../r", *options, cwd=tmp_path / "there" / "elsewhere")
        assert other.returncode == 3
        assert "data set data is not the one that the run was made with" in other.stderr
    asked_for = samtune("eval", "../r", "--dataset", "data", "--json", cwd=tmp_path / "there" / "elsewhere")
    assert json.loads(asked_for.stdout)["n"] == 15


def test_how_other_data_is_read_is_said_by_flags(trained, tmp_path):
    pictures = write_image_folder(tmp_path / "pictures", {".": 2}, ("0", "1"))
    files = enumerate(pictures.rglob("*.png"))
    rows = [f"{path.parent.name}/{path.stem},{'cat' if i % 2 else 'owl'},x" for i, path in files]
    (tmp_path / "list.csv").write_text("\n".join(["name of it,seen,more", *rows]))
    flags = ("--image-key", "name of it", "--label-key", "seen", "--image-root", pictures, "--image-suffix", ".png")
    done = samtune("eval", trained, "--dataset", tmp_path / "list.csv", *flags, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 4
    done = samtune("eval", trained, *flags)
    assert done.returncode == 2
    assert "without --dataset" in done.stderr


def test_a_run_from_before_class_folders_were_ordered_as_numbers_keeps_its_order(tmp_path):
    """Its checkpoint says 0, 1, 10, 2: eval and resume go by these names."""
    names = ("0", "1", "10", "2")
    data = write_image_folder(tmp_path / "data", {"train": 8, "test": 4}, names)
    done = samtune("run", *SMALL, "--dataset", data, "--output", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    new, _ = score(tmp_path / "r", data)
    manifest = json.loads((tmp_path / "r/checkpoints/last/manifest.json").read_text())
    assert manifest["class_names"] == ["0", "1", "2", "10"]
    old = renamed(tmp_path / "r", names)
    scored, _ = score(old, data)
    order = [("0", "1", "2", "10").index(name) for name in names]
    assert [order[label] for label in scored.labels] == new.labels.tolist()
    # The weights are those of the new order, so that the answers are by position.
    assert scored.predictions.tolist() == new.predictions.tolist()
    assert np.array_equal(scored.rows, new.rows)


def renamed(run, names):
    """The run, as if its classes had another order."""
    folder = run / "checkpoints" / "last"
    manifest = json.loads((folder / "manifest.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = list(names)
    content = json.dumps(config).encode()
    (folder / "config.json").write_bytes(content)
    manifest["files"]["config.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"class_names": list(names)}))
    return run
