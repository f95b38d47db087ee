"""Lists of pictures as people have them: any usual names of columns, delimiters, encodings, ids, one column a class."""

import json
import os
import shlex
import unicodedata

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from samtune.errors import DataError, UsageError
from tests.conftest import image_bytes
from tests.support.data_sets import read, sizes, table, write_tables

PICTURES = [image_bytes(i) for i in range(6)]


def place(root, *names):
    """A picture under each of the names."""
    for name, picture in zip(names, PICTURES, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture)
    return root


@pytest.fixture
def folder(tmp_path):
    return place(tmp_path, *(f"photos/{i}.png" for i in range(6)))


def labels(data, role="train"):
    return [data.class_names[label] for label in data.splits[role].labels]


def pictures(data, role="train"):
    split = data.splits[role]
    return [PICTURES.index(split.image_bytes(row)) for row in range(len(split))]


def by_role(data):
    return {role: pictures(data, role) for role in data.splits}


def cells(count):
    """Pictures as they stand in a table."""
    return [{"bytes": picture, "path": None} for picture in PICTURES[:count]]


def write(folder, header, *rows, name="list.csv", encoding="utf-8"):
    (folder / name).write_bytes("\n".join([header, *rows, ""]).encode(encoding))
    return folder / name


# Header and rows of a list of pictures 0 to 3, two of a, two of b.
COLUMNS = {
    "path,label": "photos/{i}.png,{c}",
    "filepaths,labels": "photos/{i}.png,{c}",
    "File Name,Class": "photos/{i}.png,{c}",
    "image_path;species": "photos/{i}.png;{c}",
    "img\ttarget": "photos/{i}.png\t{c}",
    "ImageFile|breed": "photos/{i}.png|{c}",
    "id,variety": "photos/{i}.png,{c}",
    "path,what it shows": "photos/{i}.png,{c}",  # the only column that is left
    ",path,label": "{i},photos/{i}.png,{c}",  # a number of the row, as pandas writes it
    "Unnamed: 0,path,genus": "{i},photos/{i}.png,{c}",
    "label,path,path2": "{c},photos/{i}.png,elsewhere/{i}.png",
}


@pytest.mark.parametrize("header", COLUMNS)
def test_columns_are_found_by_their_usual_names_whatever_divides_them(header, folder):
    rows = [COLUMNS[header].format(i=i, c="aabb"[i]) for i in range(4)]
    data = read(write(folder, header, *rows))
    assert labels(data) == list("aabb")
    assert pictures(data) == [0, 1, 2, 3]


@pytest.mark.parametrize("column", ["data set", "split", "subset", "x"])
def test_a_column_of_names_of_splits_is_noticed_under_any_name(column, folder):
    rows = [
        f"photos/{i}.png,{'ab'[i % 2]},{s}" for i, s in enumerate(("train", "train", "train", "train", "valid", "Test"))
    ]
    data = read(write(folder, f"path,label,{column}", *rows))
    assert by_role(data) == {"train": [0, 1, 2, 3], "validation": [4], "test": [5]}
    told = f"column {column} tells the splits: train 4, valid 1, Test 1"
    assert data.notes == (() if column == "split" else (told,))


def test_columns_of_splits_are_chosen_by_name_where_there_are_several(folder):
    rows = [f"photos/{i}.png,{'ab'[i % 2]},train,{'test' if i == 3 else 'train'}" for i in range(4)]
    path = write(folder, "path,label,one,two", *rows)
    with pytest.raises(DataError, match="2 columns of splits: one, two") as error:
        read(path)
    assert "--split-key" in error.value.hint
    assert pictures(read(path, split_key="two"), "test") == [3]
    with pytest.raises(UsageError, match="--split-key three"):
        read(path, split_key="three")


def test_a_column_of_splits_of_other_names_is_taken_where_it_is_named(folder):
    rows = [f"photos/{i}.png,{'ab'[i % 2]},fold{i // 2}" for i in range(4)]
    flags = {"split_key": "fold", "label_key": "label", "train_split": "fold0", "test_split": "fold1"}
    data = read(write(folder, "path,label,fold", *rows), **flags)
    assert by_role(data) == {"train": [0, 1], "test": [2, 3]}


def table_of_splits(folder, kind, column, values):
    """A list, or a table, of as many pictures as there are values, of classes a and b in turn."""
    if kind == "csv":
        rows = [f"photos/{i}.png,{'ab'[i % 2]},{'' if value is None else value}" for i, value in enumerate(values)]
        return write(folder, f"path,label,{column}", *rows)
    columns = {"image": cells(len(values)), "label": list("ababab"[: len(values)]), column: list(values)}
    pq.write_table(pa.table(columns), folder / "list.parquet")
    return folder / "list.parquet"


# Column, values -> role: pictures; what is said of it
SPLITS = {
    "a competition's parts of test": (
        ("Usage", ["Training", "Training", "PublicTest", "PublicTest", "PrivateTest", "PrivateTest"]),
        {"train": [0, 1], "validation": [2, 3], "test": [4, 5]},
        "split PublicTest is used as validation",
    ),
    "one part of test": (
        ("Usage", ["Training", "Training", "Training", "Training", "PublicTest", "PublicTest"]),
        {"train": [0, 1, 2, 3], "test": [4, 5]},
        "Training 4, PublicTest 2",
    ),
    "without labels": (
        ("subset", ["train", "train", "test", "test", "unlabeled", "unlabeled"]),
        {"train": [0, 1], "test": [2, 3]},
        "2 of 6 rows are in no split and left out (subset: 'unlabeled' 2)",
    ),
    "not available": (
        ("set", ["train", "train", "NA", "test", None, "test"]),
        {"train": [0, 1], "test": [3, 5]},
        "2 of 6 rows are in no split and left out",
    ),
    "held out": (
        ("phase", ["train", "train", "val", "val", "holdout", "holdout"]),
        {"train": [0, 1], "validation": [2, 3], "test": [4, 5]},
        "split holdout is used as test",
    ),
    "train with validation": (
        ("set", ["trainval", "trainval", "trainval", "trainval", "test", "test"]),
        {"train": [0, 1, 2, 3], "test": [4, 5]},
        "trainval 4, test 2",
    ),
    "held out beside test": (
        ("split", ["train", "train", "test", "test", "holdout", "holdout"]),
        {"train": [0, 1], "test": [2, 3], "holdout": [4, 5]},
        "split holdout is not used: 2 rows",
    ),
    "words joined": (
        ("x", ["TrainSet"] * 4 + ["testSet", "NaN"]),
        {"train": [0, 1, 2, 3], "test": [4]},
        "TrainSet 4, testSet 1",
    ),
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("name", SPLITS)
def test_one_unusual_value_does_not_hide_a_column_of_splits(name, kind, folder):
    (column, values), expected, said = SPLITS[name]
    data = read(table_of_splits(folder, kind, column, values))
    assert by_role(data) == expected
    assert any(said in note for note in data.notes)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_value_that_may_mean_anything_is_shown_and_never_trained_on(kind, folder):
    path = table_of_splits(folder, kind, "set", ["train", "train", "test", "test", "gallery", "gallery"])
    with pytest.raises(DataError, match="'gallery' is the name of none") as error:
        read(path)
    assert "train 2, test 2, gallery 2" in error.value.cause
    assert "--split-key set" in error.value.hint
    assert pictures(read(path, split_key="set")) == [0, 1]
    assert pictures(read(path, train_split="train+gallery")) == [0, 1, 4, 5]
    path = table_of_splits(folder, kind, "subset", ["train", "train", "query", "query", "gallery", "gallery"])
    with pytest.raises(DataError, match=r"column subset .* 'query' is the name of none"):
        read(path)


def test_a_column_split_of_numbers_is_no_train_split(folder):
    columns = {"path": [f"photos/{i}.png" for i in range(4)], "label": ["a", "b"] * 2, "split": [0, 0, 1, 1]}
    pq.write_table(pa.table(columns), folder / "l.parquet")
    with pytest.raises(DataError, match="no train split"):
        read(folder / "l.parquet")
    assert pictures(read(folder / "l.parquet", train_split="0", test_split="1"), "test") == [2, 3]


@pytest.mark.parametrize("column", ["partition", "subset"])
def test_numbers_that_may_be_splits_are_asked_about(column, folder):
    rows = [f"photos/{i}.png,{'ab'[i % 2]},{number}" for i, number in enumerate([0, 0, 0, 0, 1, 2])]
    file = write(folder, f"path,label,{column}", *rows)
    with pytest.raises(DataError, match=f"column {column} of data set .* '0' is the name of none") as raised:
        read(file)
    assert "0 4, 1 1, 2 1" in raised.value.cause
    data = read(file, split_key=column, train_split="0", val_split="1", test_split="2")
    assert (pictures(data), pictures(data, "validation"), pictures(data, "test")) == ([0, 1, 2, 3], [4], [5])


# Columns that are called as splits are, whose values say nothing
UNNAMED = {
    "partition": [0, 0, 0, 1, 1, 2],
    "subset": [0.0, 0.0, 0.0, 1.0, 1.0, None],
    "dataset_split": [0, 0, 0, 1, 1, 2],
    "data_split": ["A", "A", "A", "A", "B", "B"],
    "set": ["T", "T", "T", "T", "V", "V"],
    "setid": [1, 1, 1, 1, 2, 3],
    "my_split": ["yes", "yes", "no", "no", "no", "no"],
    "subset-": ["trained", "trained", "tr", "tr", "te", "te"],
    "image_set": ["A", "A", "A", "", "", ""],
    "train_test": [0, 0, 0, 0, 1, 1],
    "trainOrTest": [1, 1, 1, 1, 0, 0],
    "is_train_or_val": [0, 0, 1, 1, 1, 1],
    "test set": ["A", "A", "B", "B", "B", "B"],
    "Usage": ["Public", "Public", "Public", "Private", "Private", "Private"],
    "set_": ["训练", "训练", "训练", "训练", "测试", "测试"],
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("column", UNNAMED)
def test_a_column_that_is_called_as_splits_are_is_asked_about(column, kind, folder):
    path = table_of_splits(folder, kind, column, UNNAMED[column])
    with pytest.raises(DataError, match=f"column {column} of .* is the name of none") as raised:
        read(path)
    command = shlex.split(raised.value.hint.rpartition("if it tells no splits, ")[2].removesuffix(" takes all rows"))
    assert command[::2] == ["--split-key", "--train-split"]
    assert pictures(read(path, split_key=command[1], train_split=command[3])) == [0, 1, 2, 3, 4, 5]
    first = command[3].split("+")[0]
    assert f"{first} {[str(v) for v in UNNAMED[column]].count(first)}" in raised.value.cause


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("set", [1, 2, 3, 4, 5, 6]),
        ("phase", ["new", "waxing", "full", "waning", "half", "none of them"]),
        ("subset", ["A"] * 6),
        ("growth_stage", [1, 1, 2, 2, 3, 3]),
        ("test_result", ["positive", "negative"] * 3),
        ("dataset", ["ISIC", "HAM"] * 3),
        ("site", ["eval"] * 6),
        ("note", ["test", "", "", "", "", ""]),
    ],
)
def test_a_column_that_tells_no_splits_stops_nothing(column, values, kind, folder):
    data = read(table_of_splits(folder, kind, column, values))
    assert pictures(data) == [0, 1, 2, 3, 4, 5]
    told = f"column {column} is not taken for one of splits, as it names no train (--split-key {column} takes it)"
    assert data.notes == ((told,) if column in ("site", "note") else ())


def test_classes_beside_a_column_that_may_tell_splits_are_found(folder):
    rows = [f"photos/{i}.png,{i % 2},{1 - i % 2},{int(i > 2)},{i % 3}" for i in range(6)]
    path = write(folder, "path,cat,dog,subset,stage", *rows)
    with pytest.raises(DataError, match=r"column subset of .* '0' is the name of none"):
        read(path)
    assert labels(read(path, split_key="subset", train_split="0+1")) == ["dog", "cat"] * 3


def test_tables_that_are_splits_by_name_are_not_asked_about(tmp_path):
    tables = {name: table([0, 1, 1, 0], ["a", "b"]).add_column("subset", [0, 0, 1, 1]) for name in ("train", "test")}
    data = read(write_tables(tmp_path, **tables))
    assert sizes(data) == {"train": 4, "test": 4}


@pytest.mark.parametrize("column", ["stage", "phase", "set"])
def test_a_column_that_is_called_as_splits_are_is_the_label_where_no_other_is(column, folder):
    assert labels(read(write(folder, f"path,{column}", "photos/0.png,I", "photos/1.png,II"))) == ["I", "II"]


def test_abbreviations_are_read_in_a_column_that_is_called_as_splits_are(folder):
    data = read(table_of_splits(folder, "csv", "subset", ["tr", "tr", "tr", "TR", "va", "te"]))
    assert by_role(data) == {"train": [0, 1, 2, 3], "validation": [4], "test": [5]}
    assert data.notes[0] == "column subset: TR is train, tr is train, va is validation, te is test"
    assert pictures(read(folder / "list.csv", split_key="subset", train_split="va+te")) == [4, 5]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_splits_whose_names_differ_in_case_are_one(kind, folder):
    path = table_of_splits(folder, kind, "split", ["Train", "train ", "TRAIN", "Test", "test", "test"])
    data = read(path)
    assert by_role(data) == {"train": [0, 1, 2], "test": [3, 4, 5]}
    assert "column split: Train is train, TRAIN is train, Test is test" in data.notes
    data = read(path, train_split="train+TRAIN", test_split="Train")
    assert by_role(data) == {"train": [1, 2], "test": [0]}


def test_a_list_without_train_names_the_column_that_says_so(folder):
    path = table_of_splits(folder, "csv", "subset", ["test"] * 4 + ["val"] * 2)
    with pytest.raises(DataError, match="no train split") as raised:
        read(path)
    assert "column subset tells the splits: test 4, val 2" in raised.value.cause


@pytest.mark.parametrize("blank", ["nan", "N/A", "null"])
def test_a_flag_that_is_blank_in_words_is_no(blank, folder):
    data = read(table_of_splits(folder, "csv", "is_test", ["no", "no", blank, blank, "yes", "yes"]))
    assert by_role(data) == {"train": [0, 1, 2, 3], "test": [4, 5]}


def test_none_and_nan_in_json_hide_no_column_of_splits(folder):
    values = ["train", "train", "test", "test", None, float("nan")]
    rows = [json.dumps({"path": f"photos/{i}.png", "label": "ab"[i % 2], "part": s}) for i, s in enumerate(values)]
    data = read(write(folder, *rows, name="l.jsonl"))
    assert by_role(data) == {"train": [0, 1], "test": [2, 3]}


LABELS_THAT_READ_LIKE_SPLITS = {
    "vehicles": ("path,kind,weather", ["train", "bus", "car"], {"label_key": "kind"}),
    "vehicles alone": ("path,kind", ["train", "bus", "car"], {}),
    "both words": ("path,label,labelid", ["train", "test", "val"], {}),
    "both words, asked for": ("path,word,more", ["train", "test", "val"], {"label_key": "word"}),
    "both words alone": ("path,target", ["train", "test", "val"], {}),
}


@pytest.mark.parametrize("name", LABELS_THAT_READ_LIKE_SPLITS)
def test_classes_whose_names_read_like_splits_are_classes(name, folder):
    header, classes, wanted = LABELS_THAT_READ_LIKE_SPLITS[name]
    rows = [f"photos/{i}.png,{classes[i % 3]}" + ",0" * (header.count(",") - 1) for i in range(6)]
    data = read(write(folder, header, *rows), **wanted)
    assert labels(data) == classes * 2


FLAGS = {
    "is_test": {"train": [0, 1, 2, 3], "test": [4, 5]},
    "isTest": {"train": [0, 1, 2, 3], "test": [4, 5]},
    "test": {"train": [0, 1, 2, 3], "test": [4, 5]},
    "is_val": {"train": [0, 1, 2, 3], "validation": [4, 5]},
    "is_valid": {"train": [0, 1, 2, 3], "validation": [4, 5]},
    "is_train": {"train": [4, 5], "test": [0, 1, 2, 3]},
    "train": {"train": [4, 5], "test": [0, 1, 2, 3]},
    "is_training_image": {"train": [4, 5], "test": [0, 1, 2, 3]},
    "used_for_training": {"train": [4, 5], "test": [0, 1, 2, 3]},
}


@pytest.mark.parametrize("values", ["01", (False, True), (None, 1)], ids=["01", "bool", "blank"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_tells_the_split_of_a_row(name, kind, values, folder):
    no, yes = values
    data = read(table_of_splits(folder, kind, name, [no] * 4 + [yes] * 2))
    assert by_role(data) == FLAGS[name]
    assert any(f"column {name} tells the splits" in note for note in data.notes)


def test_several_flags_tell_the_splits_together(folder):
    rows = [f"photos/{i}.png,{'ab'[i % 2]},{int(i < 2)},{int(1 < i < 4)}" for i in range(6)]
    data = read(write(folder, "path,label,is_train,is_val", *rows))
    assert by_role(data) == {"train": [0, 1], "validation": [2, 3], "test": [4, 5]}
    path = write(folder, "path,label,is_train,is_val", *rows, "photos/0.png,a,1,1")
    with pytest.raises(DataError, match=r"line 8 of .* is in 2 splits: is_train, is_val"):
        read(path)


def test_a_flag_with_other_values_is_refused_by_name(folder):
    path = write(folder, "path,label,is_test", "photos/0.png,a,0", "photos/1.png,b,2")
    with pytest.raises(DataError, match="column is_test speaks of a split, and has the value '2'"):
        read(path)


def test_a_split_asked_for_by_its_value_is_no_flag(folder):
    rows = [f"photos/{i}.png,{'ab'[i % 2]},{int(i < 4)}" for i in range(6)]
    path = write(folder, "path,label,is_x_train", *rows)
    data = read(path, split_key="is_x_train", train_split="1", test_split="0", label_key="label")
    assert by_role(data) == {"train": [0, 1, 2, 3], "test": [4, 5]}
    path = write(folder, "path,label,is_train", *rows)
    data = read(path, split_key="is_train", train_split="0", test_split="1")
    assert by_role(data) == {"train": [4, 5], "test": [0, 1, 2, 3]}


def test_pictures_that_are_sound_are_no_validation_split(folder):
    rows = [f"photos/{i}.png,{'ab'[i % 2]},{int(i != 5)}" for i in range(6)]
    assert pictures(read(write(folder, "path,label,is_valid", *rows))) == [0, 1, 2, 3, 4, 5]


# A column for each class and one more -> the classes; the splits
ONE_HOT = {
    "a flag": ("is_test", [0, 0, 0, 0, 1, 1], ["bus", "car"], ["train", "test"]),
    "a flag by its values": ("train", [1, 1, 1, 1, 0, 0], ["bus", "car"], ["train", "test"]),
    "a column of splits": ("set", ["train"] * 4 + ["test"] * 2, ["bus", "car"], ["train", "test"]),
}


@pytest.mark.parametrize("name", ONE_HOT)
def test_a_flag_beside_a_column_for_each_class_is_no_class(name, folder):
    column, values, classes, splits = ONE_HOT[name]
    rows = [f"photos/{i}.png,{i % 2},{1 - i % 2},{value}" for i, value in enumerate(values)]
    data = read(write(folder, f"image,car,bus,{column}", *rows))
    assert (list(data.class_names), list(data.splits)) == (classes, splits)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("more", "values"),
    [("age", [31, 45, 27, 60, 33, 8]), ("patient", list("uvwxyz")), ("fold", [0, 1, 2] * 2), ("source", ["x"] * 6)],
)
def test_columns_of_which_each_row_has_one_are_the_classes_beside_others(more, values, kind, folder):
    rows = {"path": [f"photos/{i}.png" for i in range(6)], "cat": [1, 0] * 3, "dog": [0, 1] * 3, more: values}
    if kind == "csv":
        path = write(folder, ",".join(rows), *(",".join(map(str, row)) for row in zip(*rows.values(), strict=True)))
    else:
        path = folder / "list.parquet"
        pq.write_table(pa.table(rows), path)
    data = read(path)
    assert labels(data) == ["cat", "dog"] * 3
    assert data.notes == (f"columns cat, dog are the classes; not used: {more}",)
    assert any("--label-key cat,dog takes each as a class" in note for note in read(path, label_key="cat").notes)


def test_columns_of_classes_are_named_where_they_cannot_be_told(folder):
    rows = [f"photos/{i}.png,{i % 2},{1 - i % 2},{int(i < 3)},{i}" for i in range(6)]
    path = write(folder, "path,cat,dog,male,age", *rows)
    with pytest.raises(DataError, match="no label column") as raised:
        read(path)
    assert "--label-key a,b where each class has a column" in raised.value.hint
    assert labels(read(path, label_key="dog,cat")) == ["dog", "cat"] * 3
    with pytest.raises(DataError, match=r"column age of .* holds other than 0 and 1"):
        read(path, label_key="cat,age")
    with pytest.raises(UsageError, match="--label-key cat,cow"):
        read(path, label_key="cat,cow")


def test_train_is_a_class_where_each_row_has_one_of_the_columns(folder):
    rows = [f"photos/{i}.png,{int(i % 3 == 0)},{int(i % 3 == 1)},{int(i % 3 == 2)}" for i in range(6)]
    assert labels(read(write(folder, "image,bus,car,train", *rows))) == ["bus", "car", "train"] * 2


def test_a_column_that_is_there_twice_stops_only_what_uses_it(folder):
    path = write(folder, "path,label,z,z", "photos/0.png,a,1,2", "photos/1.png,b,1,2")
    assert labels(read(path)) == ["a", "b"]
    path = write(folder, "path,label,set,set", "photos/0.png,a,train,test", "photos/1.png,b,train,test")
    with pytest.raises(DataError, match="several columns set"):
        read(path)


# ------------------------------------------------------------------------------------------------------------- repeats


def repeated(folder, kind, *rows):
    """A list, or a table of paths: the rows' pictures, labels and splits."""
    names = [(f"photos/{i}.png" if j % 2 else f"./photos/{i}.png", *more) for j, (i, *more) in enumerate(rows)]
    if kind == "csv":
        return write(folder, "path,label,split", *map(",".join, names))
    columns = map(list, zip(*names, strict=True))
    pq.write_table(pa.table(dict(zip(("path", "label", "split"), columns, strict=True))), folder / "l.parquet")
    return folder / "l.parquet"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_pictures_with_two_labels_are_named(split, kind, folder):
    path = repeated(folder, kind, (0, "a", "train"), (1, "b", "train"), (0, "b", split), (1, "a", split))
    with pytest.raises(DataError, match=r"2 pictures of .* several labels: .*0\.png is 'a' and 'b', .*1\.png"):
        read(path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_row_that_is_there_twice_counts_once(kind, folder):
    path = repeated(folder, kind, (0, "a", "train"), (0, "a", "train"), (1, "b", "train"), (0, "a", "train"))
    data = read(path)
    assert (pictures(data), labels(data)) == ([0, 1], ["a", "b"])
    assert "2 of 4 rows are there twice and count once" in data.notes[0]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("role", ["validation", "test", "extra"])
def test_a_picture_in_two_splits_is_told_where_both_are_used(role, kind, folder):
    notes = read(repeated(folder, kind, (0, "a", "train"), (1, "b", "train"), (1, "b", role))).notes
    (told,) = [note for note in notes if "better than it should be" in note] or [""]
    assert told.startswith("" if role == "extra" else f"1 picture of train in {role}, too")
    assert ("photos/1.png" in told) == (role != "extra")


# ---------------------------------------------------------------------------------------------------------------- paths


def test_ids_without_folder_and_ending_find_their_pictures(folder):
    path = write(folder, "id,breed", *(f"{i},{'ab'[i % 2]}" for i in range(4)))
    data = read(path)
    assert pictures(data) == [0, 1, 2, 3]
    assert "0 is " in data.notes[0]
    assert read(path, image_root="photos", image_suffix=".png").notes == ()
    assert pictures(read(path, image_root=str(folder / "photos"), image_suffix="png")) == [0, 1, 2, 3]


# Paths as another machine wrote them -> where their ends lie below the list's folder
ELSEWHERE = {
    "another disk": ("/home/other/data/{c}/{i}.png", "{c}/{i}.png"),
    "below a folder": ("/home/other/data/{c}/{i}.png", "photos/sorted/{c}/{i}.png"),
    "Windows": (r"C:\Users\x\data\{c}\{i}.png", "data/{c}/{i}.png"),
    "beside": ("../other/{c}/{i}.png", "{c}/{i}.png"),
    "a bucket, without endings": ("s3://bucket/{c}/{i}", "all/{c}/{i}.png"),
    "two disks": ("/mnt/{i}/{c}/{i}.png", "{c}/{i}.png"),
    "no folders": ("/home/other/{c}/{i}.png", "all/{i}.png"),
}


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_paths_of_another_machine_are_found_by_their_ends(name, root, tmp_path):
    there, here = ELSEWHERE[name]
    place(tmp_path / "here", *(here.format(c="ab"[i % 2], i=i) for i in range(6)))
    lists = tmp_path if root else tmp_path / "here"
    path = write(lists, "path,label", *(f"{there.format(c='ab'[i % 2], i=i)},{'ab'[i % 2]}" for i in range(6)))
    data = read(path, image_root=str(tmp_path / "here") if root else None)
    assert pictures(data) == [0, 1, 2, 3, 4, 5]
    assert data.notes[0].startswith("pictures are found by their names: ")
    assert data.notes[0].endswith(f"is {tmp_path / 'here' / here.format(c='a', i=0)}")


def test_a_picture_that_is_missing_is_not_another_one_of_its_name(tmp_path):
    """dog/1.png is gone, and cat/1.png is another picture."""
    place(tmp_path, "cat/0.png", "cat/1.png", "dog/2.png")
    for missing in (2, 0):
        rows = ["/x/cat/0.png,a", "/x/dog/2.png,b"]
        rows.insert(missing, "/x/dog/1.png,b")
        data = read(write(tmp_path, "path,label", *rows))
        with pytest.raises(DataError, match=r"/x/dog/1.png\) cannot be read"):
            data.splits["train"].image_bytes(missing)
    with pytest.raises(DataError, match="is not there") as error:
        read(write(tmp_path, "path,label", "/x/dog/1.png,b", "/x/cat/0.png,a", "/x/dog/0.png,a"))
    assert "--image-root FOLDER" in error.value.hint


def test_an_end_that_lies_right_in_the_root_goes_before_those_below(tmp_path):
    place(tmp_path, "cat/0.png", "dog/1.png", "masks/cat/0.png", "masks/dog/1.png")
    rows = ["/x/cat/0.png,a", "/x/dog/1.png,b"]
    assert pictures(read(write(tmp_path, "path,label", *rows))) == [0, 1]
    assert pictures(read(write(tmp_path, "path,label", *rows), image_root="masks")) == [2, 3]
    with pytest.raises(DataError, match="may be any of 2 files"):
        read(write(tmp_path, "path,label", "0.png,a", "1.png,b"))


@pytest.mark.parametrize(("suffix", "name"), [("_left.jpg", "{}_left.jpg"), ("-a.JPG", "{}-a.JPG"), ("jpg", "{}.jpg")])
def test_a_dot_is_put_before_an_ending_alone(suffix, name, folder):
    place(folder, name.format(0), name.format(1))
    path = write(folder, "id,breed", "0,a", "1,b")
    data = read(path, image_suffix=suffix)
    assert (pictures(data), data.notes) == ([0, 1], ())


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("name", ["photos/{}.png", "/else/where/photos/{}.png"])
def test_a_picture_that_is_missing_in_any_row_is_one_picture(name, kind, folder):
    names = [name.format(i) for i in (9, 0, 1, 2, 3)]
    pq.write_table(pa.table({"path": names, "label": list("ababa")}), folder / "list.parquet")
    write(folder, "path,label", *(f"{name},{'ab'[i % 2]}" for i, name in enumerate(names)))
    split = read(folder / f"list.{kind}").splits["train"]
    assert [PICTURES.index(split.image_bytes(row)) for row in range(1, 5)] == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"photos/9.png\) cannot be read"):
        split.image_bytes(0)


def test_endings_may_differ_in_case_and_a_like_name_is_told(folder):
    data = read(write(folder, "id_code,diagnosis", "photos/0.PNG,a", "1.Png,b"))
    assert pictures(data) == [0, 1]
    place(folder, "photos/007.png", "photos/Heron.png")
    for name, near in (("7", "photos/007.png"), ("heron.png", "photos/Heron.png"), ("herron", "photos/Heron.png")):
        with pytest.raises(DataError, match=f"{name} of list .* is not there") as raised:
            read(write(folder, "path,label", f"{name},a"))
        assert raised.value.cause.endswith(f"; the nearest is {near}")


def test_an_id_with_several_pictures_is_refused_and_a_folder_settles_it(folder):
    place(folder, "masks/0.png")
    path = write(folder, "id,breed", *(f"{i},{'ab'[i % 2]}" for i in range(4)))
    with pytest.raises(DataError, match=r"picture 0 of list .* may be any of 2 files") as error:
        read(path)
    assert "--image-root" in error.value.hint
    assert pictures(read(path, image_root="photos")) == [0, 1, 2, 3]


def test_a_folder_or_a_picture_that_is_not_there_is_named(folder):
    path = write(folder, "id,breed", "9,a", "1,b")
    with pytest.raises(DataError, match=r"9 of list .* is not there") as error:
        read(path)
    assert "--image-suffix" in error.value.hint
    with pytest.raises(DataError, match="--image-root nowhere is no folder"):
        read(path, image_root="nowhere")


def test_backslashes_and_both_unicode_forms_of_a_name_are_understood(folder):
    (folder / "photos" / unicodedata.normalize("NFD", "é.png")).write_bytes(PICTURES[4])
    rows = ["photos\\0.png,a", "photos\\1.png,b", f"{unicodedata.normalize('NFC', 'photos/é.png')},b"]
    assert pictures(read(write(folder, "path,label", *rows))) == [0, 1, 4]


def test_a_path_and_a_label_that_are_not_utf8_are_read(folder):
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(PICTURES[5])
    data = read(write(folder, "path,label", "café.png,été", "photos/0.png,b", encoding="latin-1"))
    assert pictures(data) == [5, 0]
    assert labels(data) == ["été", "b"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_of_the_encoding_are_no_part_of_the_first_column(encoding, folder):
    path = write(folder, "path,label", "photos/0.png,ä", "photos/1.png,b", encoding=encoding)
    assert labels(read(path)) == ["ä", "b"]


def test_line_characters_of_unicode_are_no_ends_of_lines_in_json(folder):
    odd = "a\u2028b\x85c\x0bd"
    rows = [json.dumps({"path": f"photos/{i}.png", "label": odd if i else "z"}, ensure_ascii=False) for i in range(2)]
    (folder / "list.jsonl").write_bytes("\r\n".join(rows).encode())
    assert labels(read(folder / "list.jsonl")) == ["z", odd]


# ----------------------------------------------------------------------------------------- lists beside their pictures


@pytest.fixture
def competition(tmp_path):
    """Folders train and test with pictures of the same names, and a form for answers."""
    place(tmp_path, *(f"train/{i}.png" for i in range(4)), "test/0.png", "test/1.png")
    write(tmp_path, "id,breed", "0,a", "1,a", name="a_sample_submission.csv")
    return tmp_path


TRAIN = ("id,breed", "0,a", "1,b", "2,a", "3,b")


@pytest.mark.parametrize("name", ["train.csv", "train_labels.CSV", "TrainSet.csv"])
def test_a_competitions_folder_is_read_by_its_list_of_train(name, competition):
    write(competition, *TRAIN, name=name)
    write(competition, "id", "0", "1", name="test.csv")
    data = read(competition)
    assert by_role(data) == {"train": [0, 1, 2, 3]}
    assert labels(data) == ["a", "b", "a", "b"]
    assert f"stand in {name};" in data.notes[0]
    assert "test.csv is left out: it has no labels" in data.notes


@pytest.mark.parametrize("header", ["id,breed", "breed,id", "more,id,breed"])
def test_a_list_of_test_with_the_labels_of_train_is_its_test_split(header, competition):
    write(competition, *TRAIN, name="train.csv")
    rows = [",".join({"id": str(i), "breed": "ba"[i], "more": "z"}[name] for name in header.split(",")) for i in (0, 1)]
    write(competition, header, *rows, name="test.csv")
    data = read(competition)
    assert by_role(data) == {"train": [0, 1, 2, 3], "test": [4, 5]}
    assert labels(data, "test") == ["b", "a"]


@pytest.mark.parametrize(
    "name", ["test_predictions", "test_sample", "sample_test", "test_pred", "my_test_output", "test_old"]
)
def test_a_list_of_guesses_or_examples_is_no_test_split(name, competition):
    write(competition, *TRAIN, name="train.csv")
    write(competition, "id,breed", "0,a", "1,a", name=f"{name}.csv")
    assert list(read(competition).splits) == ["train"]


@pytest.mark.parametrize(
    "names", ["train test", "train_labels test_labels", "birds_train birds_test", "train_df TestSet"]
)
def test_a_list_of_test_is_known_by_its_name(names, competition):
    for name, lines in zip(names.split(), (TRAIN, ("id,breed", "0,a", "1,b")), strict=True):
        write(competition, *lines, name=f"{name}.csv")
    assert list(read(competition).splits) == ["train", "test"]


def test_a_list_of_validation_beside_a_column_of_splits_is_not_dropped_without_a_word(competition):
    write(competition, "id,breed,split", "0,a,train", "1,b,train", "2,a,val", "3,b,val", name="train.csv")
    write(competition, "id,breed", "0,a", name="val.csv")
    assert "val.csv is not read: train.csv tells the split validation itself" in read(competition).notes


@pytest.mark.parametrize(
    ("name", "header", "rows"),
    [("labels.csv", "path,label", "a b"), ("_classes.csv", "filename, cat, dog", "1,0 0,1")],
)
def test_lists_in_the_folders_of_splits_are_read(name, header, rows, competition):
    for split in ("train", "test"):
        lines = [f"{i}.png,{row}" for i, row in enumerate(rows.split())]
        write(competition, header, *lines, name=f"{split}/{name}")
    data = read(competition)
    assert sizes(data) == {"train": 2, "test": 2}
    assert pictures(data, "test") == [4, 5]
    assert f"stand in train/{name}, test/{name}" in data.notes[0]


def test_the_list_with_a_column_of_labels_by_name_or_one_for_each_class_is_named(competition):
    write(competition, "image,age", "0,3", "1,4", name="Metadata.csv")
    write(competition, "image,mel,nv", "0,1.0,0.0", "1,0.0,1.0", name="GroundTruth.csv")
    with pytest.raises(DataError, match="lie in no class folders") as error:
        read(competition)
    assert f"if {competition / 'GroundTruth.csv'} lists them" in error.value.hint


def test_a_table_beside_one_folder_of_pictures_is_named(folder):
    pq.write_table(pa.table({"path": ["photos/0.png"], "label": ["a"]}), folder / "rows.parquet")
    with pytest.raises(DataError, match="only one class: photos") as error:
        read(folder)
    assert f"{folder / 'rows.parquet'} lists them" in error.value.hint


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_metadata_file_of_several_splits_names_them_by_folders(ending, competition):
    rows = [(f"{split}/{i}.png", "ab"[i % 2]) for split, count in (("train", 4), ("test", 2)) for i in range(count)]
    lines = [json.dumps({"file_name": path, "label": label}) for path, label in rows]
    if ending == "csv":
        lines = ["file_name,label", *(",".join(row) for row in rows)]
    write(competition, *lines, name=f"metadata.{ending}")
    data = read(competition)
    assert by_role(data) == {"train": [0, 1, 2, 3], "test": [4, 5]}
    assert labels(data, "test") == ["a", "b"]


def test_a_list_beside_one_folder_of_pictures_tells_their_labels(folder):
    write(folder, *TRAIN, name="train.csv")
    assert labels(read(folder)) == ["a", "b", "a", "b"]
    (folder / "train.csv").rename(folder / "labels.csv")
    with pytest.raises(DataError, match="only one class: photos") as error:
        read(folder)
    assert f"{folder / 'labels.csv'} lists them" in error.value.hint


def test_the_list_that_has_labels_is_named_and_no_form_for_answers(competition):
    with pytest.raises(DataError, match="lie in no class folders") as error:
        read(competition)
    assert "submission" not in error.value.hint
    write(competition, "id", "0", name="about.csv")
    write(competition, *TRAIN, name="labels.csv")
    with pytest.raises(DataError, match="lie in no class folders") as error:
        read(competition)
    assert f"if {competition / 'labels.csv'} lists them" in error.value.hint
    write(competition, "what,breed,more", "0,a,c", name="train.csv")
    with pytest.raises(DataError, match=r"train.csv has no image column") as error:
        read(competition)


def test_a_list_beside_class_folders_is_not_read_and_named(tmp_path):
    place(tmp_path, *(f"{'ab'[i % 2]}/{i}.png" for i in range(4)))
    write(tmp_path, *TRAIN, name="train.csv")
    (note,) = read(tmp_path).notes
    assert note.startswith(f"list {tmp_path / 'train.csv'} is not read")


# --------------------------------------------------------------------------------------------------------------- labels


def test_numbers_written_as_floats_are_ordered_as_numbers(folder):
    rows = [f"photos/{i}.png,{label}" for i, label in enumerate(("10.0", "9.0", "2."))]
    data = read(write(folder, "path,label", *rows))
    assert data.class_names == ("2", "9", "10")


def test_blanks_around_names_and_values_do_not_count(folder):
    path = write(folder, "path , label ", "photos/0.png ,cat ", "photos/1.png,cat", "photos/2.png, dog", name="l.CSV")
    data = read(path)
    assert (labels(data), pictures(data)) == (["cat", "cat", "dog"], [0, 1, 2])
    assert data.notes == (
        "column path: blanks around the values of 1 row are left out, as 'photos/0.png '",
        "column label: blanks around the values of 1 row are left out, as 'cat '",
    )


def test_blanks_around_labels_of_a_table_do_not_count(folder):
    pq.write_table(pa.table({"image": cells(3), "label": ["cat ", "cat", "dog"]}), folder / "list.parquet")
    data = read(folder / "list.parquet")
    assert labels(data) == ["cat", "cat", "dog"]
    assert data.notes == ("column label: blanks around the values of 1 row are left out, as 'cat '",)


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;\r"])
def test_a_first_line_that_tells_the_delimiter_and_blank_rows_are_no_pictures(first, folder):
    path = write(folder, first, "path;label", "photos/0.png;a,1", ";", "photos/1.png;b", " ; ", ";;")
    assert labels(read(path)) == ["a,1", "b"]
    path = write(folder, first, "path;label", "photos/0.png;a", ";b")
    with pytest.raises(DataError, match="line 4 of"):
        read(path)


def test_a_column_for_each_class_is_one_label_a_picture(folder):
    rows = ["photos/0.png,1.0,0.0,0.0", "photos/1.png,0.0,0.0,1.0", "photos/2.png,0.0,1.0,0.0"]
    data = read(write(folder, "image,MEL,NV,BCC", *rows))
    assert labels(data) == ["MEL", "BCC", "NV"]


def test_several_labels_a_picture_are_refused_by_their_names(folder):
    path = write(folder, "image,MEL,NV,BCC", "photos/0.png,1,0,0", "photos/1.png,0,1,1")
    with pytest.raises(DataError, match=r"line 3 of .* has 2 labels: NV, BCC") as error:
        read(path)
    assert error.value.cause == "several labels a picture are not supported"


def test_rows_without_a_label_are_left_out_and_counted_where_that_is_asked_for(folder):
    rows = [f"photos/{i}.png,{label}" for i, label in enumerate(("a", "", "b", "a", ""))]
    path = write(folder, "path,label", *rows)
    with pytest.raises(DataError, match="row 1 of split train has the label ''") as error:
        read(path)
    assert "--on-unlabelled skip leaves out the 2 rows" in error.value.hint
    data = read(path, on_unlabelled="skip")
    assert data.splits["train"].labelled.tolist() == [0, 2, 3]
    assert data.notes == ("split train: 2 of 5 rows have no label and are left out",)


@pytest.mark.parametrize("missing", [-1, None, ""])
def test_none_blank_and_minus_one_are_no_labels_in_a_table(missing, folder):
    known = table(["a", "b", "a", missing]) if missing == "" else table([0, 1, 0, missing], ["a", "b"])
    write_tables(folder, train=known)
    with pytest.raises(DataError, match="row 3 of split train"):
        read(folder)
    assert read(folder, on_unlabelled="skip").splits["train"].labels.tolist() == [0, 1, 0, -1]


# --------------------------------------------------------------------------------------------------------------- tables


def test_a_single_parquet_file_is_a_data_set_with_its_column_of_splits(folder):
    columns = {"picture": cells(6), "kind": ["a", "b"] * 3, "part": ["train"] * 4 + ["val", "test"]}
    pq.write_table(pa.table(columns), folder / "birds.parquet")
    data = read(folder / "birds.parquet")
    assert data.name == "birds"
    assert (pictures(data), pictures(data, "validation"), pictures(data, "test")) == ([0, 1, 2, 3], [4], [5])
    assert labels(data, "test") == ["b"]
    assert data.notes == ("column part tells the splits: train 4, val 1, test 1",)


@pytest.mark.parametrize("name", ["A.PARQUET", "data/Train.Parquet"])
def test_endings_of_tables_may_be_capitals(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    table([0, 1, 1], ["a", "b"]).to_parquet(tmp_path / name)
    assert labels(read(tmp_path / name)) == ["a", "b", "b"]
    if "/" in name:
        assert labels(read(tmp_path)) == ["a", "b", "b"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_of_paths_sees_them_from_its_folder(kind, folder, monkeypatch):
    paths = [f"photos/{i}.png" for i in range(4)]
    rows = datasets.Dataset.from_dict({"image": paths, "label": ["a", "b"] * 2})
    if kind == "parquet":
        rows.to_parquet(folder / "list.parquet")
    else:
        rows.save_to_disk(folder / "saved")
        (folder / "list.arrow").write_bytes(next((folder / "saved").glob("*.arrow")).read_bytes())
    monkeypatch.chdir(folder.parent)
    assert pictures(read(folder / f"list.{kind}")) == [0, 1, 2, 3]


def test_several_labels_a_picture_in_a_table_are_refused_by_the_column(folder):
    classes = datasets.Sequence(datasets.ClassLabel(names=["a", "b"]))
    table([[0], [0, 1]], classes).to_parquet(folder / "train.parquet")
    with pytest.raises(DataError, match=r"column label of .* holds lists of labels") as error:
        read(folder / "train.parquet")
    assert error.value.cause == "several labels a picture are not supported"


def test_a_split_that_nobody_asked_for_stops_nothing(tmp_path):
    splits = {"train": table([0, 1], ["a", "b"]), "test": table([1], ["a", "b"])}
    root = write_tables(tmp_path, **splits, test_ood=table([0, 1, 1], ["zebra", "b"]))
    data = read(root)
    assert data.splits["test_ood"].labels.tolist() == [-1, 1, 1]
    assert data.splits["test_ood"].unknown == {"zebra": 1}
    assert "zebra (1)" in data.notes[0]
    with pytest.raises(DataError, match="label 'zebra'"):
        read(root, test_split="test_ood")  # asked for, it does


README = """---
configs:
- config_name: a
  data_files: a/data/*.parquet
- config_name: b
  data_files: b/data/*.parquet
---
"""


@pytest.mark.parametrize("readme", [README, ""])
def test_configurations_are_named_in_the_error_and_chosen_by_name(readme, tmp_path):
    for name, count in (("a", 2), ("b", 4)):
        write_tables(tmp_path / name, train=table([0, 1] * (count // 2), ["x", "y"]))
    if readme:
        (tmp_path / "README.md").write_text(readme)
    with pytest.raises(UsageError, match="has 2 configurations: a, b") as error:
        read(tmp_path)
    assert f"--dataset {tmp_path}:a" in error.value.hint
    for name, count in (("a", 2), ("b", 4)):
        data = read(f"{tmp_path}:{name}")
        assert len(data.splits["train"]) == len(read(tmp_path, dataset_config=name).splits["train"]) == count
        assert data.name.endswith(f":{name}")
    with pytest.raises(UsageError, match="no configuration 'c'") as error:
        read(f"{tmp_path}:c")
    assert "a, b" in error.value.hint


def test_the_same_pictures_read_the_same_as_folder_and_as_list(tmp_path):
    lines = []
    for i in range(12):
        (tmp_path / "train" / str(i)).mkdir(parents=True)
        (tmp_path / "train" / str(i) / "0.png").write_bytes(image_bytes(i))
        lines.append(f"train/{i}/0.png,{i}")
    lists = [
        write(tmp_path, "path,label", *lines),
        write(tmp_path, "path;label", *(line.replace(",", ";") + ".0" for line in lines), name="f.csv"),
    ]
    folder = read(tmp_path)
    of_folder = {folder.splits["train"].image_bytes(row): label for row, label in enumerate(labels(folder))}
    for path in lists:
        data = read(path)
        assert data.class_names == folder.class_names
        assert {data.splits["train"].image_bytes(row): label for row, label in enumerate(labels(data))} == of_folder
    assert np.bincount(folder.splits["train"].labels).tolist() == [1] * 12
