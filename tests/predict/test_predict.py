"""`samtune predict` and `Predictor`: any pictures, decoded and computed as the run's own evaluation did it."""

import csv
import io
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import timm
import torch
from PIL import Image

from samtune import Predictor
from samtune.data import inputs
from samtune.data.decode import DecodeRule, decode, from_pillow
from samtune.data.split_roles import DataSelection
from samtune.errors import DataError, UsageError
from samtune.models.head import features_and_logits
from samtune.models.timm_format import load_checkpoint
from samtune.predict.predictor import predict
from tests.conftest import SMALL_MODEL, image_bytes, samtune, write_image_folder

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, whose test pictures need several batches, the last of them smaller."""
    root = tmp_path_factory.mktemp("trained")
    data = write_image_folder(root / "data", {"train": 12, "test": 13}, CLASSES)
    arguments = ("--epochs", 2, "--lr", 0.01, "--batch-size", 8, "--model-ema")
    done = samtune("run", *SMALL_MODEL, *arguments, "--dataset", data, "--output", root / "r")
    assert done.returncode == 0, done.stderr
    return root / "r"


@pytest.fixture(scope="module")
def photos(trained):
    """The pictures that the run was tested on."""
    return trained.parent / "data" / "test"


@pytest.fixture(scope="module")
def predictor(trained):
    return Predictor(trained)


def rows_of(done):
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(io.StringIO(done.stdout)))


def files_of(photos):
    return [str(path) for name in CLASSES for path in sorted((photos / name).iterdir())]


# ------------------------------------------------------------------------------------------------------------- equality


def test_pictures_are_computed_in_the_arithmetic_of_the_run(predictor, photos, monkeypatch):
    asked = []
    monkeypatch.setattr("samtune.predict.predictor.set_float32_arithmetic", lambda *given: asked.append(given))
    predictor(files_of(photos)[:2])
    assert asked == [(torch.device("cpu"), "float32")]


def test_predictions_of_a_runs_test_images_are_those_of_the_run_to_the_last_bit(trained, photos):
    rows = rows_of(samtune("predict", trained, photos))
    stored = pq.read_table(trained / "predictions.parquet").to_pydict()
    assert [row["path"] for row in rows] == files_of(photos)
    assert [CLASSES.index(row["class"]) for row in rows] == stored["prediction"]
    said = [np.float32(row["probability"]) for row in rows]
    assert said == [np.float32(value) for value in stored["probability"]]


def test_averaged_weights_and_other_checkpoints_are_those_of_eval(trained, photos):
    for flags in (("--ema",), ("--checkpoint", "best")):
        scored = json.loads(samtune("eval", trained, "--json", *flags).stdout)
        rows = rows_of(samtune("predict", trained, photos, *flags))
        assert sum(row["class"] != row["path"].split(os.sep)[-2] for row in rows) == scored["wrong"]


def test_the_library_says_what_the_command_says(predictor, trained, photos):
    paths = files_of(photos)
    rows = rows_of(samtune("predict", trained, photos, "--top", 2, "--all"))
    found = predictor(paths)
    for row, one in zip(rows, found, strict=True):
        assert (row["class"], np.float32(row["probability"])) == (one.class_name, np.float32(one.probability))
        assert one.probabilities.shape == (len(CLASSES),)
        assert one.probabilities.sum() == pytest.approx(1, abs=1e-6)
        assert [np.float32(row[f"p_{name}"]) for name in CLASSES] == one.probabilities.tolist()
        second = row["class_2"], float(np.float32(row["probability_2"]))
        assert one.top(2) == [(row["class"], one.probability), second]
        assert [name for name, _ in one.top(9)] == [CLASSES[i] for i in np.argsort(-one.probabilities)]


def test_paths_pil_images_and_arrays_are_the_same_pictures(predictor, photos):
    paths = files_of(photos)[:5]
    images = [Image.open(path) for path in paths]
    expected = [one.probabilities.tolist() for one in predictor(paths)]
    arrays = [np.asarray(image) for image in images]
    for pictures in (images, arrays, [paths[0], images[1], *arrays[2:]]):
        assert [one.probabilities.tolist() for one in predictor(pictures)] == expected
    assert predictor(paths[0])[0].class_name == predictor(paths[:1])[0].class_name
    assert predictor([]) == []


@pytest.mark.parametrize(
    "picture", [7, np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)], ids=str
)
def test_what_is_no_picture_is_refused(predictor, picture):
    with pytest.raises(UsageError, match="is no picture"):
        predictor([picture])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("turn", [1, 6])
def test_an_image_in_memory_is_decoded_as_its_file(mode, turn):
    image = Image.open(io.BytesIO(image_bytes(3, (70, 50)))).convert("L" if mode in ("I;16", "F") else mode)
    if mode in ("I;16", "F"):
        values = np.asarray(image)
        image = Image.fromarray(values / np.float32(255) if mode == "F" else values.astype(np.uint16) * 257)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turn
    image.save(file, "PNG" if mode in ("RGBA", "LA", "P") else "TIFF", exif=exif)
    opened = Image.open(io.BytesIO(file.getvalue()))
    for rule in (DecodeRule(), DecodeRule(min_side=12)):
        assert torch.equal(from_pillow(opened, rule), decode(file.getvalue(), str, rule))


def test_an_image_stays_the_callers(predictor):
    file = io.BytesIO()
    Image.new("RGB", (2000, 1500), "red").save(file, "JPEG")
    image = Image.open(file)
    predictor([image])
    assert image.size == (2000, 1500)


# --------------------------------------------------------------------------------------------------------------- inputs


def names_of(found):
    return [one.path for one in found]


def test_folders_globs_and_paths_name_the_same_pictures(photos):
    expected = files_of(photos)
    (photos.parent / "nested" / "a" / "b").mkdir(parents=True)
    for argument in ([str(photos)], [str(photos / "*")], [str(photos / "**" / "*.png")], expected):
        found = inputs.find(argument, DataSelection())
        assert (names_of(found), found.count()) == (expected, len(expected))
    found = inputs.find([str(photos / "owl"), expected[0]], DataSelection())
    assert names_of(found)[-2:] == [expected[-1], expected[0]]


def test_hidden_files_and_links_in_a_circle_are_passed_over_and_other_files_too(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x10.png", "x9.png", ".hidden.png", "notes.txt", "a/b/Y.PNG"):
        (tmp_path / name).write_bytes(image_bytes(1))
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path, target_is_directory=True)
    found = names_of(inputs.find([str(tmp_path)], DataSelection()))
    assert [os.path.relpath(path, tmp_path) for path in found] == ["x10.png", "x9.png", "a/b/Y.PNG"]


def test_lists_need_no_labels(photos, tmp_path):
    paths = files_of(photos)
    relative = [os.path.relpath(path, photos) for path in paths]
    (tmp_path / "one.csv").write_text("\n".join(["file", *paths]))
    (tmp_path / "more.tsv").write_text("\n".join(["id\tfilename", *(f"{i}\t{p}" for i, p in enumerate(paths))]))
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps({"image": path, "n": 1}) for path in relative))
    stems = [os.path.splitext(path)[0] for path in relative]
    (tmp_path / "ids.csv").write_text("\n".join(["id,cat,dog", *(f"{stem},0,0" for stem in stems)]))
    root = DataSelection(image_root=str(photos))
    for name, wanted in (
        ("one.csv", DataSelection()),
        ("more.tsv", DataSelection()),
        ("some.jsonl", root),
        ("ids.csv", DataSelection(image_root=str(photos), image_suffix="png")),
        ("ids.csv", root),
    ):
        assert names_of(inputs.find([str(tmp_path / name)], wanted)) == paths


@pytest.mark.parametrize("form", ["struct", "binary", "paths", "named"])
def test_tables_are_read_in_parts(form, photos, tmp_path):
    paths = files_of(photos)
    encoded = [Path(path).read_bytes() for path in paths]
    cells = {
        "struct": [{"bytes": one, "path": None} for one in encoded],
        "binary": encoded,
        "paths": [os.path.relpath(path, tmp_path) for path in paths],
        "named": [{"bytes": one, "path": path} for one, path in zip(encoded, paths, strict=True)],
    }[form]
    pq.write_table(pa.table({"n": range(len(paths)), "image": cells}), tmp_path / "test.parquet")
    for argument in (tmp_path / "test.parquet", tmp_path):
        found = inputs.find([str(argument)], DataSelection())
        assert found.count() == len(paths)
        assert [one.read() for one in found] == encoded
    if form in ("struct", "binary"):
        assert names_of(found)[:2] == [f"{tmp_path}/test.parquet:0", f"{tmp_path}/test.parquet:1"]
    if form == "named":
        assert names_of(found) == paths


def test_stdin_gives_paths_by_lines_or_zero_bytes_in_any_encoding(tmp_path):
    latin = os.fsdecode("schön.png".encode("latin-1"))
    stdin = io.BytesIO(b"a b.png\r\n\n" + os.fsencode(latin) + b"\nc\0d\0")
    found = list(inputs.find(["-"], DataSelection(), stdin))
    assert [one.path for one in found] == ["a b.png", "schön.png", "c", "d"]
    assert [one.file for one in found] == ["a b.png", latin, "c", "d"]


def test_no_picture_is_read_before_its_turn(predictor, photos):
    """However many there are, a few batches are in memory."""
    handed_out = 0
    paths = files_of(photos)

    def endless():
        nonlocal handed_out
        for path in itertools.cycle(paths):
            handed_out += 1
            yield inputs.Input(path, path)

    size, done = predictor.batch_size, 0
    for batch in itertools.islice(predict(predictor, endless(), workers=1), 6):
        done += len(batch.inputs)
        assert handed_out <= done + 2 * size
    assert (done, size) == (6 * 16, 16)


def test_it_ends_when_nobody_reads_on(predictor, photos):
    source = (inputs.Input(path, path) for path in itertools.cycle(files_of(photos)))
    batches = []
    for batch in predict(predictor, source, is_enough=lambda: bool(batches)):
        batches.append(batch)
    assert len(batches) == 3  # those that were asked for


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.fixture
def mixed(photos, tmp_path):
    """Pictures, and among them files that are none."""
    shutil.copytree(photos, tmp_path / "mixed")
    (tmp_path / "mixed" / "cat" / "5.png").write_bytes(b"no picture")
    (tmp_path / "mixed" / "dog" / "0.png").write_bytes(image_bytes(1)[:60])
    (tmp_path / "mixed" / "owl" / "raw.cr2").write_bytes(b"raw")
    return tmp_path / "mixed"


def test_bad_pictures_are_named_and_all_others_are_written(trained, mixed, tmp_path):
    done = samtune("predict", trained, mixed, "--output", tmp_path / "p.csv")
    assert done.returncode == 3
    assert "3 pictures cannot be decoded" in done.stderr
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert len(rows) == 39 - 2
    assert not any(name in row["path"] for name in ("cat/5.png", "dog/0.png", "raw.cr2") for row in rows)
    done = samtune("predict", trained, mixed, "--on-bad-image", "skip", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert [os.path.relpath(one["path"], mixed) for one in found["bad_images"]] == [
        "cat/5.png", "dog/0.png", "owl/raw.cr2",
    ]  # fmt: skip
    assert (found["images"], len(found["predictions"])) == (37, 37)
    assert done.stderr.count("left out: ") == 3


def test_a_list_keeps_its_paths_and_a_dash_is_stdout(trained, photos, tmp_path):
    (tmp_path / "l.csv").write_text("path\nphotos/cat/0.png\n./photos/dog/1.png\n")
    (tmp_path / "photos").symlink_to(photos)
    done = samtune("predict", trained, "l.csv", "--output", "-", cwd=tmp_path)
    assert [row["path"] for row in rows_of(done)] == ["photos/cat/0.png", "./photos/dog/1.png"]
    assert not (tmp_path / "-").exists()


def test_the_library_raises_for_a_bad_picture(predictor, mixed):
    with pytest.raises(DataError, match=r"5\.png cannot be decoded"):
        predictor([mixed / "cat" / "5.png"])
    with pytest.raises(DataError, match=r"nowhere\.png cannot be read"):
        predictor(["nowhere.png"])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.jpg"], 3, "nowhere.jpg is not there"),
        (["empty"], 3, "folder empty holds no pictures"),
        (["*.jpg"], 3, "glob *.jpg matches nothing"),
        (["list.csv"], 3, "no column of pictures or paths"),
        (["list.csv", "--image-key", "name"], 2, "no such column"),
        (["damaged.parquet"], 3, "damaged.parquet cannot be read"),
        (["-", "-"], 2, "- is given twice"),
        ([], 2, "Missing argument"),
        (["a.png", "--top", 0], 2, "--top"),
        (["a.png", "--format", "xml"], 2, "--format xml"),
        (["a.png", "--output", "a.txt"], 2, "a.txt: ends in no format"),
        (["a.png", "--output", "a.csv"], 2, "a.csv is there already"),
        (["a.png", "--output", "a.png", "--format", "csv", "--force"], 2, "a.png is a picture, a file of a run, or"),
        (["full.csv", "--output", "full.csv", "--force"], 2, "full.csv is a picture, a file of a run, or read here"),
        (["a.png", "--output", "r/report.json", "--force"], 2, "report.json is a picture, a file of a run"),
        (["r"], 2, "IMAGES r is a run"),
        (["paths.txt"], 3, "samtune predict RUN - < paths.txt"),
        (["a.png", "--json", "--format", "csv"], 2, "both say what stdout is"),
        (["a.png", "--embeddings", "e.txt"], 2, "must end in .safetensors or .npy"),
        (["a.png", "--html", "empty"], 2, "empty is a folder"),
        (["a.png", "--html", "x", "--output", "x", "--format", "csv"], 2, "name one file"),
        (["a.png", "--tta", "all"], 2, "--tta"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_computed(arguments, code, said, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("x,y\n1,2\n")
    (tmp_path / "a.csv").write_text("kept")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    (tmp_path / "full.csv").write_text("path\na.png\n")
    (tmp_path / "paths.txt").write_text("a.png\n")
    (tmp_path / "r").symlink_to(trained)
    done = samtune("predict", trained, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in " ".join(done.stderr.split())
    assert (tmp_path / "a.csv").read_text() == "kept"


def test_a_checkpoint_that_is_damaged_or_missing(trained, photos, tmp_path):
    copy = tmp_path / "r"
    shutil.copytree(trained, copy, symlinks=True)
    weights = copy / "checkpoints" / "last" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for folder, said in ((copy, "is damaged"), (tmp_path / "none", "there is no run or checkpoint")):
        done = samtune("predict", folder, photos)
        assert (done.returncode, done.stdout) == (5, "")
        assert said in done.stderr


def test_the_data_set_may_be_gone(trained, photos, tmp_path):
    before = rows_of(samtune("predict", trained, photos / "cat"))
    shutil.copytree(trained, tmp_path / "moved" / "r", symlinks=True)
    shutil.copytree(photos / "cat", tmp_path / "pictures")
    hidden = trained.parent / "hidden"
    (trained.parent / "data").rename(hidden)
    try:
        after = rows_of(samtune("predict", tmp_path / "moved" / "r", tmp_path / "pictures"))
    finally:
        hidden.rename(trained.parent / "data")
    assert [row["probability"] for row in after] == [row["probability"] for row in before]


# -------------------------------------------------------------------------------------------------------------- outputs


def test_all_formats_say_the_same(trained, photos, tmp_path):
    rows = rows_of(samtune("predict", trained, photos, "--top", 2, "--all"))
    for ending in ("jsonl", "json", "parquet"):
        done = samtune("predict", trained, photos, "--top", 2, "--all", "--output", tmp_path / f"p.{ending}")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for stored, row in zip(pq.read_table(tmp_path / "p.parquet").to_pylist(), rows, strict=True):
        assert {key: str(np.float32(v)) if isinstance(v, float) else v for key, v in stored.items()} == row
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "p.json").read_text())["predictions"] == lines
    for row, one in zip(rows, lines, strict=True):
        assert (one["path"], one["class"], str(one["probability"])) == (row["path"], row["class"], row["probability"])
        assert [each["class"] for each in one["top"]] == [row["class"], row["class_2"]]
        assert {f"p_{name}": str(p) for name, p in one["probabilities"].items()}.items() <= row.items()
    done = samtune("predict", trained, photos, "--output", tmp_path / "p.json", "--force", "--json")
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["bad_images"], "predictions" in summary) == (39, [], False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.jsonl", "p.parquet"]


def test_the_head_turns_embeddings_into_the_predictions(trained, predictor, photos, tmp_path):
    for ending in ("npy", "safetensors"):
        rows = rows_of(samtune("predict", trained, photos, "--all", "--embeddings", tmp_path / f"e.{ending}"))
    found = np.load(tmp_path / "e.npy")
    stored = safetensors.numpy.load_file(tmp_path / "e.safetensors")
    assert np.array_equal(found, stored["embeddings"])
    assert found.dtype == np.float32
    assert np.array_equal(found, predictor.embed(files_of(photos)))
    model, _ = load_checkpoint(predictor.folder)
    with torch.inference_mode():
        probabilities = model.get_classifier()(torch.from_numpy(found)).softmax(1).numpy()
    said = np.array([[float(row[f"p_{name}"]) for name in CLASSES] for row in rows])
    assert np.abs(said - probabilities).max() < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npy", "e.safetensors"]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_features_and_logits_are_those_of_the_forward_pass(name):
    model = timm.create_model(name, num_classes=5).eval()
    images = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    with torch.inference_mode():
        features, logits = features_and_logits(model, images)
        assert torch.equal(logits, model(images))
        assert features.shape == (2, model.head_hidden_size)


def test_tta_is_the_mean_over_a_picture_and_its_mirror_image(trained, predictor, photos):
    loaded = [predictor.load(one) for one in inputs.inputs_of(files_of(photos)[:7])]
    averaged = Predictor(trained, tta="hflip").classify(loaded, embeddings=True)
    plain = predictor.classify(loaded, embeddings=True)
    mirrored = predictor.classify([image.flip(-1) for image in loaded], embeddings=True)
    for mean, one, other in zip(averaged, plain, mirrored, strict=True):
        assert np.array_equal(mean, (one + other) / 2)
        assert not np.array_equal(mean, one)


def test_several_ranks_write_the_same_rows_in_the_same_order(trained, mixed, tmp_path):
    """And leave out the same pictures, which are an error at the end."""
    arguments = ("predict", trained, mixed, "--all", "--embeddings")
    threads = {"OMP_NUM_THREADS": "1"}  # as many in a rank as without ranks: sums depend on it in the last digit
    alone = samtune(*arguments, tmp_path / "a.npy", env=threads)
    ranks = samtune(*arguments, tmp_path / "b.npy", "--processes", 2, env=threads)
    assert (alone.returncode, ranks.returncode) == (3, 3)
    assert ranks.stdout == alone.stdout
    assert len(ranks.stdout.splitlines()) == 1 + 37
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    assert ranks.stderr.count("3 pictures cannot be decoded") == 1


def test_a_pipe_or_a_device_is_written_to_and_never_replaced(trained, photos, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = {}
    for kind in ("csv", "parquet"):
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # the pipe has room for all
        done = samtune("predict", trained, photos, "--output", pipe, "--format", kind)
        assert done.returncode == 0, done.stderr
        content[kind] = os.read(reader, 2**16)
        os.close(reader)
    assert content["csv"].decode() == samtune("predict", trained, photos).stdout
    assert pq.read_table(io.BytesIO(content["parquet"])).num_rows == len(content["csv"].splitlines()) - 1
    assert pipe.is_fifo()
    null = tmp_path / "null"
    null.symlink_to(os.devnull)
    for force in ([], ["--force"]):
        assert samtune("predict", trained, photos, "--output", null, *force).returncode == 0
    assert Path(os.devnull).is_char_device()
    for flag in ("--html", "--embeddings"):
        refused = samtune("predict", trained, photos, flag, null, "--force")
        assert (refused.returncode, "is a device or a pipe" in refused.stderr) == (2, True)
    assert samtune("export", trained, "--to", "onnx", "--output", null, "--force").returncode == 2


def test_the_page_shows_the_least_certain_first(trained, mixed, tmp_path):
    page = tmp_path / "p.html"
    done = samtune("predict", trained, mixed, "--on-bad-image", "skip", "--html", page)
    rows = sorted(rows_of(done), key=lambda row: float(row["probability"]))
    text = page.read_text()
    assert text.count('<img src="data:image/') == len(rows)
    places = [text.index(f'alt="{row["path"]}: {row["class"]}"') for row in rows]
    assert places == sorted(places)
    assert "raw.cr2" in text


def test_rows_of_a_stopped_command_are_kept(trained, photos, tmp_path):
    faults = [{"at": "classify", "call": 2, "do": "SIGINT"}]
    done = samtune("predict", trained, photos, "--output", tmp_path / "p.csv", faults=faults)
    assert done.returncode == 130
    assert f"is in {tmp_path / 'p.csv.part'}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv.part"]
    rows = list(csv.DictReader((tmp_path / "p.csv.part").read_text().splitlines()))
    assert [row["path"] for row in rows] == files_of(photos)[:16]
