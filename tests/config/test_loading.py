"""Settings: where they come from, what is refused, and how."""

import math
import os
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from samtune.config import loading
from samtune.config.run_config import RunConfig
from samtune.errors import UsageError
from tests.conftest import samtune, write_image_folder

NEEDED = {"model": "tf_efficientnet_lite0", "dataset": "cifar10"}


def recipe(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_flag_goes_before_the_recipe_and_the_recipe_before_the_default(tmp_path):
    path = recipe(tmp_path, 'model = "a"\ndataset = "cifar10"\nrho = 0.1\nseed = 3\n')
    got = loading.load(path, {"rho": 0.2})
    assert (got.rho, got.seed, got.momentum) == (0.2, 3, 0.9)
    assert got.origins["rho"] == "flag"
    assert got.origins["seed"] == f"recipe {path}"
    assert got.origins["momentum"] == "default"


def test_a_data_set_brings_defaults_that_flags_override():
    assert loading.load(None, NEEDED | {"dataset": "mnist5k"}).hflip == 0
    assert loading.load(None, NEEDED | {"dataset": "mnist5k"}).origins["hflip"] == "data set mnist5k"
    assert loading.load(None, NEEDED | {"dataset": "mnist5k", "hflip": 0.5}).hflip == 0.5


def test_the_resolved_config_is_a_recipe_that_gives_the_same_config(tmp_path):
    given = {"rho": 0.1, "epochs": "50 steps", "p": float("inf"), "m": 4}
    first = loading.load(None, NEEDED | given).derive("lr", 0.01, "a reason")
    again = loading.load(recipe(tmp_path, first.to_toml()))
    assert again.model_dump() == first.model_dump()
    assert "# derived: a reason" in first.to_toml()


def test_a_recipe_may_carry_its_claim(tmp_path):
    path = recipe(tmp_path, 'model = "a"\ndataset = "cifar10"\n[expected]\ntop1_error = 3.0\n')
    assert loading.load(path).model == "a"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rho", -1.0, "greater than or equal to 0"),
        ("rho", float("nan"), "finite"),
        ("lr", 0.0, "greater than 0"),
        ("lr", "1e-4", "valid number"),
        ("epochs", "0", "more than 0"),
        ("epochs", "20%", "more than 0"),
        ("epochs", "ten", "5000 steps"),
        ("batch_size", 0, "from 1 on"),
        ("batch_size", 1.5, "whole number"),
        ("batch_size", "large", 'or "auto"'),
        ("noise_seed", "other", 'or "auto"'),
        ("noise_seed", -1, "from 0 on"),
        ("noise_seed", 2**63, "less than 2.63"),
        ("opt", "sdg", "'sgd' or 'adamw'"),
        ("p", 0.5, "from 1 on"),
        ("p", "two", "from 1 on"),
        ("p", float("nan"), "from 1 on"),
        ("eta", -1.0, "greater than or equal to 0"),
        ("m", 0, "number of images"),
        ("m", "rank", "number of images"),
        ("perturb", "(", "regular expression"),
        ("sam_every", 0, "greater than or equal to 1"),
        ("ascent_fraction", 0.0, "greater than 0"),
        ("ascent_steps", 0, "greater than or equal to 1"),
        ("rho_schedule", "step", "'constant', 'linear'"),
        ("val_fraction", 1.0, "less than 1"),
        ("select", "test", "'last', 'best' or 'average'"),
        ("pretrained", "yes", "valid boolean"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name_with_the_rule(tmp_path, key, value, said):
    with pytest.raises(UsageError, match=said) as by_flag:
        loading.load(None, NEEDED | {key: value})
    assert loading.flag_name(key) in by_flag.value.message
    if value == value:  # TOML has nan too, but not by this name
        text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
        path = recipe(tmp_path, f'model = "a"\ndataset = "b"\n{key} = {text}\n')
        with pytest.raises(UsageError, match=said) as by_recipe:
            loading.load(path)
        assert key in by_recipe.value.message
        assert str(path) in by_recipe.value.message


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UsageError, match="unknown key bath_size") as error:
        loading.load(recipe(tmp_path, 'model = "a"\ndataset = "b"\nbath_size = 3\n'))
    assert "batch_size" in error.value.hint


def test_an_unknown_key_goes_before_what_is_missing_for_it(tmp_path):
    with pytest.raises(UsageError, match="unknown key modle"):
        loading.load(recipe(tmp_path, 'modle = "resnet10t"\ndataset = "x"\n'))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (NEEDED | {"weights": "w.pth", "pretrained": False}, "contradict"),
        (NEEDED | {"m": 17}, "--m 17 is more than --batch-size 16"),
        (NEEDED | {"batch_size": "auto", "global_batch_size": 64}, "auto and --global-batch-size contradict"),
        (NEEDED | {"batch_size": "auto", "micro_batch": 4}, "auto and --micro-batch contradict"),
        (NEEDED | {"batch_size": "auto", "m": 4}, "auto and --m 4 contradict"),
        (NEEDED | {"batch_size": "auto", "shard": True}, "auto and --shard contradict"),
        (NEEDED | {"compile": True, "shard": True}, "--shard and --compile contradict"),
        (NEEDED | {"ascent": "random", "ascent_steps": 2}, "--ascent random and --ascent-steps 2 contradict"),
        (NEEDED | {"ascent": "random", "second_order": True}, "--ascent random and --second-order contradict"),
        (NEEDED | {"ascent": "random", "shard": True}, "--ascent random and --shard contradict"),
        (NEEDED | {"ascent": "momentum", "ascent_steps": 2}, "--ascent momentum and --ascent-steps 2 contradict"),
        (NEEDED | {"ascent": "momentum", "ascent_fraction": 0.5}, "--ascent momentum and --ascent-fraction 0.5 contra"),
        (NEEDED | {"ascent": "momentum", "second_order": True}, "--ascent momentum and --second-order contradict"),
        (NEEDED | {"ascent": "previous", "shard": True}, "--ascent previous and --shard contradict"),
        (NEEDED | {"ascent": "previous", "perturb_from": "auto"}, "--ascent previous and --perturb-from contradict"),
        (NEEDED | {"ascent": "previous", "m": 4}, "--ascent previous and --m 4 contradict"),
        (NEEDED | {"ascent": "previous", "m": "global"}, "--ascent previous and --m global contradict"),
        (NEEDED | {"ascent": "momentum", "momentum": 0}, "--ascent momentum with --momentum 0"),
        (NEEDED | {"second_order": True, "p": "inf"}, "--second-order and --p inf contradict"),
        (NEEDED | {"second_order": True, "ascent_steps": 3}, "--second-order and --ascent-steps 3 contradict"),
        (NEEDED | {"second_order": True, "compile": True}, "--second-order and --compile contradict"),
        (NEEDED | {"second_order": True, "shard": True}, "--second-order and --shard contradict"),
        (NEEDED | {"second_order": True, "batch_size": "auto"}, "--second-order and --batch-size auto contradict"),
        ({"model": "a"}, "no dataset"),
    ],
)
def test_settings_that_contradict_each_other_or_are_missing_are_refused_by_name(given, said):
    with pytest.raises(UsageError, match=said):
        loading.load(None, given)


@pytest.mark.parametrize("text", ["rho = ", "\x00"])
def test_a_recipe_that_is_not_toml_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match="not TOML"):
        loading.load(recipe(tmp_path, text))


def test_a_resumed_run_keeps_the_batch_size_and_the_arithmetic_that_auto_chose(tmp_path):
    stored = {"model": "a", "dataset": "b", "batch_size": 128, "amp_dtype": "bfloat16"}
    given = {"batch_size": "auto", "amp_dtype": "auto"}
    now, _, changed = loading.load_over(stored, {}, None, given)
    assert (now.batch_size, now.amp_dtype, changed) == (128, "bfloat16", set())
    assert loading.load_over(stored, {}, None, {"batch_size": 64})[2] == {"batch_size"}
    assert {"batch_size", "compile"} <= RunConfig.settings(fixed=True)


def test_defaults_pass_their_own_rules():
    defaults = {
        k: f.default for k, f in RunConfig.model_fields.items() if not f.is_required() and f.default is not None
    }
    assert loading.load(None, NEEDED | defaults).model_dump() == loading.load(None, NEEDED).model_dump()


def test_the_saved_config_is_plain_toml():
    saved = tomllib.loads(loading.load(None, NEEDED).to_toml())
    assert saved["epochs"] == "10 epochs"
    assert "lr" not in saved


@pytest.mark.parametrize(("given", "read"), [("inf", math.inf), (math.inf, math.inf), ("1.5", 1.5), (4, 4.0)])
def test_the_norm_is_a_number_or_inf(tmp_path, given, read):
    assert loading.load(None, NEEDED | {"p": given}).p == read
    written = given if isinstance(given, int) else f'"{given}"'
    path = recipe(tmp_path, f'model = "a"\ndataset = "cifar10"\np = {written}\n')
    assert loading.load(path).p == read


def test_the_samples_of_a_perturbation_are_a_word_or_a_number():
    assert [loading.load(None, NEEDED | {"m": m}).m for m in ("device", "global", "8", 8)] == ["device", "global", 8, 8]


def numeric_fields():
    for key, field in RunConfig.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        if kinds & {int, float} and bool not in kinds:
            yield key, field, float if float in kinds else int


def limits(field):
    rules = {
        name: getattr(rule, name) for rule in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(rule, name)
    }
    return rules.get("ge", rules.get("gt")), rules.get("le", rules.get("lt"))


def test_every_number_has_a_least_and_a_largest_value_that_float32_holds():
    for key, field, kind in numeric_fields():
        if key in ("p", "m", "batch_size", "noise_seed"):  # they have kinds of their own
            continue
        least, largest = limits(field)
        assert least is not None, key
        assert largest is not None, key
        assert kind is int or float(largest) ** 3 < 3e38, key  # a rate times a factor times a decay, say


# Values that are too large, or too small, for the arithmetic of these settings.
BEYOND = [
    ((1e10, 1e38, 1e300), ("lr", "rho", "weight_decay", "head_lr_factor", "clip_grad", "eta", "rho_final")),
    ((10**30,), ("batch_size", "micro_batch", "max_train", "workers", "processes", "nnodes", "seed", "noise_seed")),
    ((10**30,), ("m", "keep_checkpoints", "ascent_steps")),
    (("1" * 30, "9" * 400, f"{'9' * 400} steps"), ("epochs", "warmup_epochs", "save_every", "eval_every")),
    ((1e300,), ("cache_limit", "step_timeout", "mixup", "p", "max_megapixels")),
    ((1e-300, 1e-45, 1e-30, 0.009), ("mixup", "cutmix")),
    ((10**6,), ("img_size",)),
    (("group:" + "9" * 30,), ("m",)),
]


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for values, keys in BEYOND for key in keys for value in values]
)
def test_numbers_beyond_their_arithmetic_are_refused_by_name(key, value):
    with pytest.raises(UsageError) as error:
        loading.load(None, {"model": "m", "dataset": "d", key: value})
    assert error.value.message.startswith(f"--{key.replace('_', '-')} ")
    assert len(error.value.message) < 600


@pytest.mark.parametrize(
    "key", ["lr", "rho", "weight_decay", "head_lr_factor", "clip_grad", "eta", "p", "rho_final", "head_rho_factor"]
)
def test_the_largest_numbers_end_in_words_and_not_in_a_traceback(key, tmp_path):
    """They may well diverge: exit code 7."""
    data = write_image_folder(tmp_path / "data", {"train": 6})
    largest = 1e6 if key == "p" else limits(RunConfig.model_fields[key])[1]
    small = ("--model", "resnet10t", "--no-pretrained", "--img-size", 32, "--epochs", "2 steps", "--workers", 0)
    more = ("--adaptive",) if key == "eta" else ("--rho-schedule", "linear") if key == "rho_final" else ()
    done = samtune(
        "run", *small, *more, f"--{key.replace('_', '-')}", largest, "--dataset", data, "--output", tmp_path / "r"
    )
    assert done.returncode in (0, 7), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("key", ["dataset", "output", "weights", "model"])
def test_names_that_no_report_could_hold_are_refused_with_a_way_out(key):
    name = os.fsdecode(b"caf\xe9")
    given = {"model": "m", "dataset": "d"} | {key: Path(name) if key in ("output", "weights") else name}
    with pytest.raises(UsageError, match=f"--{key} café is no valid UTF-8") as error:
        loading.load(None, given)
    assert "ln -s" in error.value.hint
