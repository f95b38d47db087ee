"""`samtune models`: what timm knows of its models, counted and shown without their weights."""

import json

import pytest
import timm
import torch

from samtune.cli.models import _list
from samtune.errors import DataError, ModelError
from samtune.models import listing
from samtune.models.build import build_on_meta, multiply_accumulates
from samtune.models.names import ALIASES
from samtune.models.timm_format import look_up
from samtune.sam import filters
from tests.conftest import samtune


def parameters(model: torch.nn.Module) -> int:
    return sum(w.numel() for w in model.parameters())


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0.in1k", "test_vit.r160_in1k", "resnet18.a1_in1k"])
def test_an_outline_has_the_parameters_and_outputs_of_the_model(name):
    built = timm.create_model(name).eval()
    about = listing.describe(name, {})
    assert about["parameters"] == parameters(built)
    assert about["perturb"]["all"] == {"tensors": len(list(built.parameters())), "parameters": parameters(built)}
    norm, other = about["perturb"]["norm"], about["perturb"]["no-norm"]
    assert norm["parameters"] + other["parameters"] == parameters(built)
    norms = torch.nn.BatchNorm2d | torch.nn.LayerNorm
    assert norm["parameters"] == sum(parameters(module) for module in built.modules() if isinstance(module, norms))
    shapes = {}
    for stage in about["stages"]:
        assert stage["parameters"] == parameters(built.get_submodule(stage["name"]))
        built.get_submodule(stage["name"]).register_forward_hook(
            lambda _module, _input, out, name=stage["name"]: shapes.__setitem__(name, list(out.shape[1:]))
        )
    built(torch.zeros(1, *about["data_config"]["input_size"]))
    assert {stage["name"]: stage["output"] for stage in about["stages"]} == shapes


def test_multiply_accumulates_are_those_of_the_layers():
    built = timm.create_model("test_resnet").eval()
    counted = []

    def count(module, inputs, output):
        counted.append(output.numel() * module.weight[0].numel())

    for module in built.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    about = listing.describe("test_resnet", {})
    size = about["data_config"]["input_size"]
    built(torch.zeros(1, *size))
    assert about["macs"] == sum(counted)
    assert about["macs"] == multiply_accumulates(built, size)


def test_a_list_of_blocks_that_is_most_of_the_model_is_shown_in_parts():
    shown = [stage["name"] for stage in listing.describe("tf_efficientnet_lite0", {})["stages"]]
    assert shown == ["conv_stem", "bn1", *(f"blocks.{n}" for n in range(7)), "conv_head", "bn2", "classifier"]
    assert "layer4" in listing.stages(build_on_meta(look_up("resnet18")))


def test_the_example_of_a_filter_perturbs_what_it_says():
    about = listing.describe("tf_efficientnet_lite0", {})
    pattern = listing.example(about).split("'")[1]
    chosen = filters.select_parameters(timm.create_model("tf_efficientnet_lite0"), pattern)
    assert {name.rpartition("blocks.6.")[0] for name in chosen} == {""}
    assert sum(w.numel() for w in chosen.values()) == about["stages"][8]["parameters"]


@pytest.mark.parametrize("name", ["cait_xxs24_224", "resnetv2_50x1_bit", "vit_pe_core_tiny_patch16_384"])
def test_models_of_other_kinds_are_described_whole(name):
    """Class attention, weight standardisation, features without a classifier."""
    about = listing.describe(name, {})
    assert about["macs"] > 1e8
    assert sum(stage["output"] is not None for stage in about["stages"]) > 0.5 * len(about["stages"])
    assert listing.description_rows(about)["parameters"]
    assert "^" in listing.example(about)


def test_patterns_are_parts_of_names_or_globs():
    found = listing.find("efficientnet_b7")
    assert set(found) >= {"efficientnet_b7", "tf_efficientnet_b7.ap_in1k"}
    assert "tf_efficientnet_b7.ra_in1k" not in found  # it is what the alias means
    assert "tf_efficientnet_b7.ra_in1k" in listing.find("tf_efficientnet_b7")
    globbed = listing.find("efficientnet_b*")
    assert "efficientnet_b7" in globbed
    assert all(name.startswith("efficientnet_b") for name in globbed)
    with pytest.raises(ModelError, match="efficientnet_b7") as caught:
        listing.find("efficientnet_bb7")
    assert caught.value.exit_code == 4


def test_the_list_names_aliases_and_where_weights_are(lite0_package):
    done = samtune("models", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["alias"] or row["name"]: row for row in json.loads(done.stdout)}
    assert ALIASES.items() <= {name: row["name"] for name, row in rows.items()}.items()
    b7, lite0 = rows["efficientnet_b7"], rows["tf_efficientnet_lite0.in1k"]
    assert (b7["img_size"], b7["pretraining"], b7["weights"], b7["top1"]) == (600, "ImageNet-1k", "hub", None)
    assert b7["parameters"] == 66_347_960  # 66 million: Tan and Le 2019, Table 2
    assert (lite0["weights"], lite0["licence"]) == ("package", "apache-2.0")


def test_weights_in_the_cache_of_the_hub_are_here(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert listing.weights_location("hub:timm/resnet10t.c3_in1k") == "hub"
    snapshot = tmp_path / "models--timm--resnet10t.c3_in1k" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    assert listing.weights_location("hub:timm/resnet10t.c3_in1k") == "cache"


def test_top1_is_what_a_table_of_timms_says(tmp_path):
    table = tmp_path / "results-imagenet.csv"
    table.write_text(
        'model,top1,top1_err,param_count\ntest_resnet.r160_in1k,41.61,58.39,0.47\neva_giant.x,89.7,10.3,"1,014.45"\n'
    )
    assert listing.top1(table)["test_resnet.r160_in1k"] == 41.61
    done = samtune("models", "test_resnet", "--results", table)
    assert "41.61" in done.stdout
    assert "41.61 %" in samtune("models", "show", "test_resnet", "--results", table).stdout
    table.write_text("name\nx\n")
    with pytest.raises(DataError, match="no table of timm"):
        listing.top1(table)


def test_a_long_list_says_how_many_more_there_are(monkeypatch, capsys):
    monkeypatch.setattr(listing, "MOST", 2)
    matching = listing.find("test_")
    _list("test_", None, False, True)
    said = capsys.readouterr()
    assert [row["name"] for row in json.loads(said.out)] == matching[:2]
    assert f"{len(matching) - 2} more: narrow" in said.err
    _list("test_", None, True, True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == matching
    assert all(row["parameters"] is None for row in rows)  # too many to be counted


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("show",), 2, "no NAME"),
        (("vit", "resnet"), 2, "samtune models show resnet"),
        (("show", "efficientnet_b77"), 4, "efficientnet_b7"),
        (("show", "resnet18", "--all"), 2, "--all"),
        (("zzz",), 4, "zzz"),
        (("test_resnet", "--results", "nowhere.csv"), 3, "nowhere.csv"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, code, said):
    done = samtune("models", *arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("columns", ["80", "60"])
def test_tables_fit_the_terminal(columns):
    for command in ("models tf_efficientnetv2_x", "models show tf_efficientnet_lite0", "recipes ls"):
        shown = samtune(*command.split(), env={"COLUMNS": columns}).stdout
        assert max((len(line) for line in shown.splitlines() if line[:1] in "┏┃┡│└"), default=0) <= int(columns)
