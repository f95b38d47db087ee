"""The images of a run: which rows of the data set, decoded, with the labels to train on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data import cache, depth, noise
from samtune.data.cache import Images
from samtune.data.decode import DecodeRule
from samtune.data.noise import LabelNoise
from samtune.data.source import LabelledDataset, Split
from samtune.data.splits import Indices, RunSplits, open_run_splits
from samtune.data.transforms import min_side
from samtune.distributed import collectives, device
from samtune.models.timm_format import look_up
from samtune.runs.folder import BOOTSTRAP, BOOTSTRAP_LABELS

# (config, pairs of split and rows, rule) -> the images of each pair
DecodeFunction = Callable[[RunConfig, Iterable[tuple[Split, Indices]], DecodeRule], list[Images]]


@dataclass(frozen=True)
class Resolved:
    """What a run that resumes resolved when it started.

    model: the entry of its provenance. classes: their names, in order. rule: how it decodes.
    """

    model: Mapping[str, Any]
    classes: Sequence[str]
    rule: DecodeRule


@dataclass
class RunData:
    """The images of a run."""

    data: LabelledDataset
    rule: DecodeRule
    train: Images  # with the labels to train on
    train_rows: Indices
    noise: LabelNoise | None  # what differs in them from the data set's own
    val: Images
    val_rows: Indices
    test: Images | None
    test_rows: Indices
    bad_images: list[dict[str, Any]]  # left out of the rows
    seen_test_images: int  # of the test rows, those that are in train too
    one_colour: list[str]  # paths of images of one colour


def load_run_data(config: RunConfig, resolved: Resolved | None = None, decode: DecodeFunction | None = None) -> RunData:
    """Read and decode the images of a run. Raises DataError or UsageError.

    resolved: of a run that resumes. decode: replaces `decode_splits`.
    """
    decode = decode or decode_splits
    console.info(f"reading data set {config.dataset} ...")
    parts = open_run_splits(config, classes=resolved.classes if resolved else None)
    rule = resolved.rule if resolved else decode_rule(config, parts.data)
    data = replace(
        parts.data,
        notes=(*parts.data.notes, *depth.range_notes(rule.ranges), *depth.range_warnings(rule, parts.data.splits)),
    )
    for note in data.notes:
        console.info(note)
    test_part = [(parts.test, parts.test_rows)] if parts.test else []
    used = [(parts.train, parts.train_rows), (parts.val, parts.val_rows), *test_part]
    decoded = [decode_train(config, parts, rule, decode), *decode(config, used[1:], rule)]
    scanned = [(images, rows) for images, (_, rows) in zip(decoded, used, strict=True)]
    bad = [item for images, rows in scanned for item in cache.undecodable_rows(images, rows)]
    if config.on_bad_image == "error":
        cache.raise_if_undecodable(bad)
    train, val, *tested = decoded
    test = tested[0] if tested else None
    train_rows, val_rows = cache.drop_undecodable(train, parts.train_rows), cache.drop_undecodable(val, parts.val_rows)
    test_rows = cache.drop_undecodable(test, parts.test_rows) if test else parts.test_rows
    noisy, wrong = _add_label_noise(config, parts, train_rows)
    return RunData(
        data=data,
        rule=rule,
        train=replace(train, split=noisy),
        train_rows=train_rows,
        noise=wrong,
        val=val,
        val_rows=val_rows,
        test=test,
        test_rows=test_rows,
        bad_images=bad,
        seen_test_images=cache.count_shared_images(train, train_rows, test, test_rows) if test else 0,
        one_colour=[image for images, rows in scanned for image in cache.one_colour(images, rows)],
    )


def decode_rule(config: RunConfig, data: LabelledDataset) -> DecodeRule:
    """How a run decodes its images: as large as its model needs them, deep ones by the range of the training images."""
    data_config = look_up(config.model, config.weights).data_config(config.img_size)
    train = data.splits["train"]
    ranges = depth.value_ranges(train, train.labelled)
    return DecodeRule(min_side(data_config, config), config.max_megapixels, ranges)


def decode_train(config: RunConfig, parts: RunSplits, rule: DecodeRule, decode: DecodeFunction | None = None) -> Images:
    """The images to train on; with --no-val those of both parts, through the cache files that other runs use too."""
    decoded = (decode or decode_splits)(config, parts.sources or [(parts.train, parts.train_rows)], rule)
    return cache.concat_images(parts.train, *decoded) if parts.sources else decoded[0]


def decode_splits(config: RunConfig, parts: Iterable[tuple[Split, Indices]], rule: DecodeRule) -> list[Images]:
    """The images of (split, rows) each, decoded into the cache as far as the config allows."""
    with console.RunProgress() as progress:
        return [
            cache.decode_into_cache(
                split,
                rows,
                rule=rule,
                limit=int(config.cache_limit * 2**30),
                threads=max(1, device.available_cpus() // collectives.local_world_size()),
                progress=progress.count,
                always=config.on_bad_image == "skip",
            )
            for split, rows in parts
        ]


def _add_label_noise(config: RunConfig, parts: RunSplits, rows: Indices) -> tuple[Split, LabelNoise | None]:
    """The train split with the labels to train on; another split object than the one that validation may share."""
    train, class_names = parts.train, parts.data.class_names
    if config.bootstrap:
        assert config.output is not None  # its first training is there
        file = config.output / BOOTSTRAP / BOOTSTRAP_LABELS
        predicted, changes = noise.from_file(train, rows, class_names, path=file, key="label")
        return predicted, replace(changes, kind="bootstrap", source="predicted by the first training")
    if config.train_labels is not None:
        labelled = len(parts.data.splits["train"])
        file, key = config.train_labels, config.train_labels_key
        return noise.from_file(train, rows, class_names, path=file, key=key, labelled=labelled)
    if config.label_noise > 0:
        return noise.flip(
            train, rows, class_names, fraction=config.label_noise, kind=config.noise_kind, seed=config.noise_seed
        )
    return train, None
