"""Folders, lists and saved tables as data sets; splits and columns by name; subsets of them."""

import json

import datasets
import numpy as np
import pytest

from samtune.config import loading
from samtune.data import split_roles
from samtune.data.decode import decode
from samtune.data.split_roles import DataSelection
from samtune.data.splits import open_run_splits, stratified_subset
from samtune.errors import DataError, UsageError
from tests.conftest import image_bytes, samtune, write_image_folder
from tests.support.data_sets import read, sizes, table, write_tables

# --------------------------------------------------------------------------------------------------------------- splits


def test_an_eval_file_is_validation_and_not_test(tmp_path):
    data = read(write_tables(tmp_path, train=table(["a", "b"]), eval=table(["b"])))
    assert data.parts == {"train": ("train",), "validation": ("eval",)}


def test_what_is_no_picture_is_passed_over(tmp_path):
    folder = write_image_folder(tmp_path, {"train": 3})
    (folder / "train" / "cat" / "._0.png").write_bytes(b"a file of the Finder")
    (folder / "train" / "cat" / "Thumbs.db").write_bytes(b"")
    (folder / ".cache" / "dog").mkdir(parents=True)
    data = read(folder)
    assert sizes(data) == {"train": 6}
    assert data.notes == ()
    (folder / "train" / "cat" / "photo.cr2").write_bytes(b"what no decoder knows")
    assert "photo.cr2" in read(folder).notes[0]


def test_a_link_that_leads_back_is_not_followed_twice(tmp_path):
    folder = write_image_folder(tmp_path, {"train": 3})
    (folder / "train" / "cat" / "back").symlink_to(folder / "train")
    assert sizes(read(folder)) == {"train": 6}


def test_a_picture_outside_the_class_folders_is_named(tmp_path):
    folder = write_image_folder(tmp_path, {"train": 3})
    (folder / "train" / "stray.png").write_bytes(image_bytes(0))
    with pytest.raises(DataError, match=r"stray\.png lies in no class folder"):
        read(folder)


def test_splits_are_chosen_by_name_and_joined(tmp_path):
    rows = table(["a", "b", "b"])
    folder = write_tables(tmp_path, train=rows, validation=rows, test=rows, more=rows)
    both = read(folder, train_split="train+validation")
    assert sizes(both) == {"train": 6, "more": 3, "test": 3}
    other = read(folder, train_split="more", test_split="validation")
    assert other.parts == {"train": ("more",), "test": ("validation",)}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"train_split": "trian"}, "--train-split trian.*no split 'trian'(?s:.*)it has: "),
        ({"val_split": "test"}, "test is the test split"),
        ({"val_split": "validation+test"}, "test is the test split"),
        ({"val_split": "validation", "test_split": "validation"}, "chosen twice"),
        ({"train_split": "train", "val_split": "train"}, "chosen twice"),
    ],
)
def test_a_choice_of_splits_that_cannot_be_meant_is_refused(tmp_path, wanted, said):
    folder = write_tables(tmp_path, **{name: table(["a", "b"]) for name in ("train", "validation", "test")})
    with pytest.raises(UsageError, match=said):
        read(folder, **wanted)


@pytest.mark.parametrize("ending", ["", "-00000-of-00001"])
@pytest.mark.parametrize("place", [".", "data"])
def test_a_table_of_another_name_beside_splits_is_a_split_of_its_own(ending, place, tmp_path):
    (tmp_path / place).mkdir(exist_ok=True)
    for split in ("train", "test", "holdout"):
        table(["a", "b"]).to_parquet(tmp_path / place / f"{split}{ending}.parquet")
    table(["a", "b"]).remove_columns("image").to_parquet(tmp_path / place / "sizes.parquet")
    if ending:
        (tmp_path / place / "sizes.parquet").unlink()
    data = read(tmp_path)
    assert sizes(data) == {"train": 2, "test": 2, "holdout": 2}
    assert data.notes[0].startswith("split holdout is not used: 2 rows")
    assert sizes(read(tmp_path, test_split="holdout")) == {"train": 2, "test": 2}


@pytest.mark.parametrize("place", [".", "data", "assets"])
def test_a_picture_beside_tables_is_a_logo(place, tmp_path):
    folder = write_tables(tmp_path, train=table(["a", "b"]), test=table(["b"]))
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "logo.png").write_bytes(image_bytes(0))
    assert sizes(read(folder)) == {"train": 2, "test": 1}


def test_a_split_that_no_table_is_and_a_folder_or_archive_might_be_is_named(tmp_path):
    folder = write_tables(tmp_path, train=table(["a", "b"]))
    write_image_folder(tmp_path, {"test": 1}, classes=("a", "b"))
    (tmp_path / "val.zip").write_bytes(b"")
    (tmp_path / "dev").mkdir()
    notes = read(folder).notes
    assert [note.partition(" ")[0] for note in notes] == ["test", "val.zip"]


def test_a_test_split_does_not_become_validation_when_another_is_scored():
    with pytest.raises(UsageError, match="test is the test split"):
        split_roles.assign("d", ["train", "test", "final"], DataSelection(val_split="test", test_split="final"), {})


def test_two_splits_that_may_both_be_validation_are_asked_about():
    with pytest.raises(DataError, match="2 splits for validation: val, dev") as error:
        split_roles.assign("d", ["train", "val", "dev"], DataSelection(), {})
    assert "--val-split" in error.value.hint
    parts = split_roles.assign("d", ["train", "val", "dev"], DataSelection(val_split="dev"), {})
    assert parts["validation"] == ("dev",)


# --------------------------------------------------------------------------------------------------- columns and labels


def test_columns_are_found_by_their_kind_or_chosen_by_name(tmp_path):
    folder = write_tables(tmp_path, train=table([0, 1, 1], ["a", "b"], "picture", "kind"))
    assert read(folder).splits["train"].labels.tolist() == [0, 1, 1]
    two = table([0, 1, 1], ["a", "b"]).add_column("coarse", ["x", "y", "z"])
    chosen = read(write_tables(tmp_path, train=two), label_key="coarse")
    assert chosen.class_names == ("x", "y", "z")


def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    folder = write_tables(tmp_path, train=table(["a", "b"], image="picture"))
    for wanted in ({"image_key": "img"}, {"label_key": "class"}):
        with pytest.raises(UsageError, match="no such column") as error:
            read(folder, **wanted)
        assert error.value.hint == "its columns: picture, label"
    with pytest.raises(DataError, match="holds no images"):
        read(write_tables(tmp_path, train=table([0, 1], ["a", "b"])), image_key="label")


def test_splits_with_another_order_of_classes_are_aligned_by_name(tmp_path):
    train, test = table([0, 1, 2], ["ash", "elm", "oak"]), table([0, 1, 1], ["oak", "ash"])
    data = read(write_tables(tmp_path, train=train, test=test))
    assert data.class_names == ("ash", "elm", "oak")
    assert data.splits["test"].labels.tolist() == [2, 0, 0]


def test_a_declared_class_that_train_does_not_know_is_named_with_its_row(tmp_path):
    folder = write_tables(tmp_path, train=table([0, 1], ["ash", "elm"]), test=table([1, 0], ["zebra", "ash"]))
    with pytest.raises(DataError, match="row 1 of split test has the label 'zebra'") as error:
        read(folder)
    assert error.value.exit_code == 3


def test_a_class_of_which_train_has_no_image_is_named_with_its_row(tmp_path):
    names = ["ash", "elm", "oak"]
    with pytest.raises(DataError, match="images of class 'oak', and train has none") as error:
        read(write_tables(tmp_path, train=table([0, 1], names), test=table([1, 2], names)))
    assert "row 1" in error.value.cause


@pytest.mark.parametrize("hidden", [[-1, -1], [None, None]])
def test_a_test_split_with_hidden_labels_is_left_out_with_a_note(tmp_path, hidden):
    data = read(write_tables(tmp_path, train=table([0, 1], ["a", "b"]), test=table(hidden, ["a", "b"])))
    assert sizes(data) == {"train": 2}
    assert "test" in data.notes[0]
    assert "hidden" in data.notes[0]


def test_a_test_split_without_the_label_column_is_left_out_with_a_note(tmp_path):
    bare = table([0, 1], ["a", "b"]).remove_columns("label")
    data = read(write_tables(tmp_path, train=table([0, 1], ["a", "b"]), test=bare))
    assert sizes(data) == {"train": 2}
    assert "hidden" in data.notes[0]


# ------------------------------------------------------------------------------------------------- lists, saved tables


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        (tmp_path / "photos" / f"{i}.png").write_bytes(image_bytes(i))
    return tmp_path


def test_a_csv_file_is_a_data_set(photos, monkeypatch):
    rows = ["path,label,split", *(f"photos/{i}.png,{'oak' if i % 2 else 'elm'},train" for i in range(4))]
    (photos / "trees.csv").write_text("\n".join([*rows, "photos/0.png,elm,Val", '"photos/1.png",oak,test', ""]))
    monkeypatch.chdir(photos.parent)  # paths are seen from the list, not from here
    data = read(photos / "trees.csv")
    assert data.name == "trees"
    assert data.class_names == ("elm", "oak")
    assert sizes(data) == {"train": 4, "validation": 1, "test": 1}
    assert decode(data.splits["test"].image_bytes(0), str).shape == (3, 20, 24)
    assert "1.png" in data.splits["test"].where(0)


def test_a_jsonl_file_is_a_data_set_and_its_columns_have_names(photos):
    rows = [{"file": f"photos/{i}.png", "kind": i % 2} for i in range(4)]
    (photos / "trees.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read(photos / "trees.jsonl", label_key="kind")
    assert data.splits["train"].labels.tolist() == [0, 1, 0, 1]


def test_numbers_in_a_csv_file_are_ordered_as_numbers(photos):
    rows = [f"photos/{i}.png,{label}" for i, label in enumerate((10, 9, 10, 100))]
    (photos / "n.csv").write_text("\n".join(["path,label", *rows]))
    assert read(photos / "n.csv").class_names == ("9", "10", "100")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "what,label\nphotos/0.png,a", "no image column"),
        ("a.csv", "path,kind,more\nphotos/0.png,a,b", "no label column"),
        ("a.csv", "path,label\nphotos/0.png,a\nphotos/1.png,b,c", "line 3 of .* more values"),
        ("a.csv", "path,label\nphotos/0.png,a\n,b", "line 3 of .* has no path"),
        ("a.csv", "path,label\nphotos/0.png,a\nphotos/1.png", "row 1 of split train has the label None"),
        ("a.csv", "path,label\n9.png,a", "9.png .* is not there"),
        ("a.csv", "path,label\n", "no rows"),
        ("a.csv", "path,label,split\nphotos/0.png,a,\nphotos/1.png,b,none", "no row of .* is in a split"),
        ("a.csv", "path,label,label\nphotos/0.png,a,b", "several columns label"),
        ("a.csv", "path,label,path\nphotos/0.png,a,b", "several columns path"),
        ("a.csv", b"\xff\xfepat", "cannot be read"),
        ("a.jsonl", '{"path": "photos/0.png", "label": 0}\n{"path"', "line 2 of .* is not JSON"),
        ("a.jsonl", "[1]", "line 1 of .* is no object"),
    ],
)
def test_a_list_that_cannot_be_meant_is_named_with_its_line(photos, name, text, said):
    (photos / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=said):
        read(photos / name)


def test_a_key_that_a_list_does_not_have_is_answered_with_its_columns(photos):
    (photos / "a.csv").write_text("path,label\nphotos/0.png,a\nphotos/1.png,b\n")
    with pytest.raises(UsageError, match="--label-key kind") as error:
        read(photos / "a.csv", label_key="kind")
    assert error.value.hint == "its columns: path, label"


def test_a_saved_table_and_a_saved_dictionary_of_tables_are_data_sets(tmp_path):
    table(["a", "b"]).save_to_disk(tmp_path / "one")
    assert sizes(read(tmp_path / "one")) == {"train": 2}
    both = datasets.DatasetDict({"train": table([0, 1], ["a", "b"]), "valid": table([0], ["b", "a"])})
    both.save_to_disk(tmp_path / "two")
    data = read(tmp_path / "two")
    assert data.splits["validation"].labels.tolist() == [1]


def test_a_real_folder_reads_the_same_through_every_form(shared_data, tmp_path):
    """Parquet, saved, and as a list of pictures: equal labels, equal images."""
    direct = read(shared_data / "pets_3breeds", train_split="test", test_split="train")
    rows = datasets.Dataset.from_parquet(str(shared_data / "pets_3breeds/data/test-00000-of-00001.parquet"))
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    saved = read(tmp_path / "saved")
    lines = ["path,label"]
    for i in range(len(direct.splits["train"])):
        (tmp_path / f"{i}.jpg").write_bytes(direct.splits["train"].image_bytes(i))
        lines.append(f"{i}.jpg,{direct.class_names[direct.splits['train'].labels[i]]}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    listed = read(tmp_path / "list.csv")
    for data in (saved, listed):
        assert data.class_names == direct.class_names
        assert data.splits["train"].labels.tolist() == direct.splits["train"].labels.tolist()
        assert data.splits["train"].image_bytes(7) == direct.splits["train"].image_bytes(7)


# -------------------------------------------------------------------------------------------------------------- subsets


def test_a_subset_keeps_every_class_in_proportion_and_lies_in_a_larger_one():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    subset = stratified_subset(labels, 20, seed=0)
    assert np.bincount(labels[subset]).tolist() == [12, 6, 2]
    assert set(subset) <= set(stratified_subset(labels, 37, seed=0))
    assert subset.tolist() == stratified_subset(labels, 20, seed=0).tolist()
    assert subset.tolist() != stratified_subset(labels, 20, seed=1).tolist()
    assert np.bincount(labels[stratified_subset(labels, 3, seed=0)]).tolist() == [1, 1, 1]
    assert len(stratified_subset(labels, 1, seed=0)) == 1


def test_subsets_are_taken_after_the_validation_split(tmp_path):
    folder = str(write_image_folder(tmp_path, {"train": 40, "test": 20}))

    def parts(**flags):
        return open_run_splits(loading.load(None, {"model": "m", "dataset": folder} | flags))

    whole = parts()
    half, few = parts(train_fraction=0.5), parts(train_fraction=0.5, max_train=6, max_eval=4)
    assert (len(whole.train_rows), len(half.train_rows), len(few.train_rows)) == (72, 36, 6)
    assert whole.val_rows.tolist() == half.val_rows.tolist()
    assert set(few.train_rows) <= set(half.train_rows) <= set(whole.train_rows)
    assert set(few.val_rows) <= set(whole.val_rows)
    assert (len(few.val_rows), len(few.test_rows)) == (4, 4)
    assert np.bincount(few.test.labels[few.test_rows]).tolist() == [2, 2]
    assert parts(max_train=10**6, max_eval=10**6).test_rows.tolist() == whole.test_rows.tolist()
    assert parts(split_seed=1, max_eval=4).test_rows.tolist() != few.test_rows.tolist()


def test_a_run_on_a_part_of_a_list_reports_its_counts_and_eval_scores_the_same_rows(tmp_path):
    data = write_image_folder(tmp_path / "data", {"train": 20, "dev": 6, "holdout": 8})
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name},{path.parts[-3]}" for path in data.glob("*/*/*.png")]
    (tmp_path / "list.csv").write_text("\n".join(["file,kind,split", *sorted(lines)]))
    flags = ["--image-key", "file", "--label-key", "kind", "--train-split", "train", "--val-split", "dev"]
    flags += ["--test-split", "holdout", "--train-fraction", 0.5, "--max-train", 16, "--max-eval", 10]
    small = ["--model", "test_resnet", "--no-pretrained", "--img-size", 32, "--epochs", 1, "--workers", 0]
    done = samtune("run", "--dataset", tmp_path / "list.csv", *small, *flags, "--output", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {key: report["dataset"][key] for key in ("train", "val", "test")} == {"train": 16, "val": 10, "test": 10}
    for split in ("val", "test"):
        again = json.loads(samtune("eval", tmp_path / "run", "--split", split, "--json").stdout)
        assert all(again[key] == report[split][key] for key in ("n", "wrong", "loss"))


def test_a_wrong_split_or_column_ends_the_command_with_2_and_an_unknown_class_with_3(tmp_path):
    data = write_image_folder(tmp_path, {"train": 4, "test": 2})
    for flags in (["--val-split", "test"], ["--train-split", "x"], ["--label-key", "x"], ["--train-fraction", 0]):
        done = samtune("run", "--model", "test_resnet", "--no-pretrained", "--dataset", data, *flags)
        assert done.returncode == 2, done.stderr
        assert flags[0] in done.stderr
