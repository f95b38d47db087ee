"""Models whose state is spread over ranks: the same step as one process takes, and checkpoints as it writes them."""

import math

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F

from samtune import SAM
from samtune.distributed import fsdp
from samtune.models.training import train_mode
from samtune.sam.perturbation import Perturbation
from tests.conftest import SmallNet
from tests.support.rank_processes import Ranks
from tests.support.small_models import assert_same, make_step, sgd, state
from tests.support.uneven_batches import SIZES, bad_loss, bad_values, joined_batch, my_share

RHO = 0.5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with Ranks(2, tmp_path_factory.mktemp("ranks")) as group:
        yield group


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    with Ranks(4, tmp_path_factory.mktemp("ranks")) as group:
        yield group


def small():
    torch.manual_seed(0)
    return SmallNet(drop=0.0).double()


def resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=3, pretrained=False).double()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def make(build, group=None):
    """On one rank, or in one process where there are no others."""
    model = build()
    if dist.is_initialized():
        model = fsdp.shard(model, CPU, group)
    train_mode(model, freeze_bn=True)
    return model


def train(build, optimizer, options, steps=3, group=None, loss=F.cross_entropy):
    """Some updates; the whole weights and optimizer state (of rank 0), and the results of the steps."""
    model = make(build, group)
    alone = not dist.is_initialized()
    step = make_step(
        model, optimizer(model), loss=loss, **({"rho": RHO, "m": "device" if alone else "global"} | options)
    )
    results = [step(*my_share(i)) for i in range(steps)]
    if alone:
        return model.state_dict(), step.optimizer.state_dict()["state"], results
    return fsdp.full_state_dict(model), fsdp.full_optimizer_state(step.optimizer), results


def assert_close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


VARIANTS = {f"p={p:g}": {"p": p} for p in (2, 1, 4, math.inf)}
VARIANTS |= {
    "adaptive": {"adaptive": True},
    "adaptive p=4": {"adaptive": True, "p": 4},
    "norm": {"perturb": "norm"},
    "factors": {"rho_factors": {"^fc": 2.0, "^bn": 0.0}},
    "ascent": {"ascent_steps": 2, "ascent_fraction": 1.0},
    "clipped": {"clip_grad": 0.05},
    "rho=0": {"rho": 0.0},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_sharded_model_takes_the_steps_of_one_process_on_the_joined_batch(pair, optimizer, options):
    expected, slots, alone = train(small, optimizer, options)
    (weights, state, results), (nothing, no_state, other_results) = pair(train, small, optimizer, options)
    assert_close(weights, expected)
    for index, values in slots.items():
        assert_close(
            {key: torch.as_tensor(x) for key, x in state[index].items()},
            {key: torch.as_tensor(x) for key, x in values.items()},
        )
    assert not nothing
    assert not no_state
    for a, b, c in zip(alone, results, other_results, strict=True):
        assert b == c
        assert (b.wrong, b.n, b.passes) == (a.wrong, a.n, a.passes)
        assert (b.loss, b.grad_norm) == (pytest.approx(a.loss, rel=1e-10), pytest.approx(a.grad_norm, rel=1e-10))


@pytest.mark.parametrize(("optimizer", "options"), [(sgd, {}), (adamw, {"p": 4, "adaptive": True}), (sgd, {"p": 1})])
def test_a_sharded_timm_model_takes_the_steps_of_one_process(pair, optimizer, options):
    expected, _, _ = train(resnet, optimizer, options)
    (weights, _, _), _ = pair(train, resnet, optimizer, options)
    assert_close(weights, expected)


# --------------------------------------------------------------------------------------------- who perturbs with whom


def gradient_here(m, group=None, build=small, **options):
    """The whole gradient, and its like from a second call that adds to the first."""
    model = make(build, group)
    sam = SAM(model, RHO, m=fsdp.shards_of(model).group if m == "group" else m, **options)
    images, labels, weight = my_share()
    found = []
    for _ in range(2):
        sam.backward(lambda x, y: weight * F.cross_entropy(model(x), y), images, labels)
        found.append({name: w.grad.full_tensor() for name, w in model.named_parameters()})
    return found


def gradient_alone(images, labels, build=small, **options):
    model = make(build)
    SAM(model, RHO, **options).backward(lambda x, y: F.cross_entropy(model(x), y), images, labels)
    return {name: w.grad for name, w in model.named_parameters()}


def mean_over_groups(world, group):
    """Of the SAM gradients of the groups' batches, each with a perturbation of its own."""
    images, labels = joined_batch(world)
    sizes = [sum(SIZES[world][i : i + group]) for i in range(0, world, group)]
    parts = zip(images.split(sizes), labels.split(sizes), strict=True)
    grads = [gradient_alone(*part) for part in parts]
    return {name: sum(n * g[name] for n, g in zip(sizes, grads, strict=True)) / sum(sizes) for name in grads[0]}


def test_with_groups_of_ranks_each_group_has_a_perturbation_of_its_own(four):
    expected = mean_over_groups(4, 2)
    together = gradient_alone(*joined_batch(4))
    for found, twice in four(gradient_here, "group", 2):
        assert_close(found, expected)
        assert_close(twice, {name: 2 * g for name, g in expected.items()})
    for found, _ in four(gradient_here, "global", 2):
        assert_close(found, together)
    assert not torch.allclose(together["fc.weight"], expected["fc.weight"], rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"micro_batch": 1}, {"rho": 0.0}], ids=str)
def test_a_model_in_groups_takes_the_steps_of_one_process(four, options):
    expected, _, _ = train(small, sgd, {key: x for key, x in options.items() if key != "micro_batch"})
    assert_close(four(train, small, sgd, options, 3, 2)[0][0], expected)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_give_the_gradient_of_all_at_once(pair, micro_batch):
    """Of 1 or 2 images; the ranks have 4 and 3, and meet in every pass."""
    expected = gradient_alone(*joined_batch(2))
    for found, twice in pair(gradient_here_in_micro_batches, micro_batch):
        assert_close(found, expected)
        assert_close(twice, {name: 2 * g for name, g in expected.items()})


def gradient_here_in_micro_batches(micro_batch):
    return gradient_here("global", micro_batch=micro_batch)


def refused():
    model = make(small)
    texts = []
    each_alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    for m in ("device", 2, each_alone[dist.get_rank()]):
        with pytest.raises(ValueError, match="a sharded model") as error:
            SAM(model, m=m)
        texts.append(str(error.value))
    with pytest.raises(ValueError, match="penalty"):
        make_step(model, sgd(model), m="global", penalty=lambda: 0)
    with pytest.raises(ValueError, match="groups of 3 ranks"):
        fsdp.shard(small(), CPU, 3)
    return texts


def test_a_perturbation_of_one_rank_alone_is_refused_in_one_line(pair):
    for texts in pair(refused):
        assert not any("\n" in text for text in texts)


def moved(cuts, values, p):
    """This rank's part of e for a gradient of so many tensors, each cut between the ranks at its place."""
    rank = dist.get_rank()
    parts = [
        torch.tensor(v, dtype=torch.float64).tensor_split([cut])[rank] for v, cut in zip(values, cuts, strict=True)
    ]
    params = [torch.zeros_like(part) for part in parts]
    with Perturbation(params, p=p, norms=fsdp.ShardedNorms(dist.group.WORLD)).perturbed(parts, 1.0):
        return [w.tolist() for w in params]


@pytest.mark.parametrize(
    ("cuts", "values", "expected"),
    [
        ([1, 1], [[1, -3], [3, 3]], [[0, -1], [0, 0]]),  # rank 1's in the first tensor, before rank 0's in the second
        ([1, 1], [[-3, 3], [3, 3]], [[-1, 0], [0, 0]]),  # two ranks in one tensor
        ([0, 0], [[1, 2], [2, 1]], [[0, 1], [0, 0]]),  # rank 0 has nothing
        ([1, 1], [[0, 0], [0, 0]], [[0, 0], [0, 0]]),
        ([2, 0], [[1, 2], [2, 1]], [[0, 1], [0, 0]]),  # each rank has one tensor whole
    ],
)
def test_with_p_1_all_of_rho_falls_on_the_first_of_equally_large_gradients_of_all_ranks(pair, cuts, values, expected):
    a, b = pair(moved, cuts, values, 1)
    assert [x + y for x, y in zip(a, b, strict=True)] == expected


@pytest.mark.parametrize("p", [1, 2, 4, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_value_makes_all_parts_of_the_perturbation_nan(pair, p, bad):
    for part in pair(moved, [1, 0], [[1, 2], [bad, 1]], p):
        assert all(math.isnan(x) for tensor in part for x in tensor)


# ---------------------------------------------------------------------------------------------- weights, and what fails


def parts(model):
    with torch.no_grad():
        return [w.to_local() for w in model.parameters()]


def restored(p, fails):
    """What was found wrong with the weights of this rank in pass 2 and after it, and the gradient of the next step."""
    model = make(small)
    local = parts(model)
    before, places = [w.clone() for w in local], [w.data_ptr() for w in local]
    sam = SAM(model, RHO, p=p, m="global")
    images, labels, weight = my_share()
    moved = []

    def inside(*_):
        """Where the last layer begins, while its weights are whole."""
        if sam.perturbed:
            moved.append(not all(torch.equal(w, b) for w, b in zip(local, before, strict=True)))
            if fails:
                raise KeyboardInterrupt

    model.fc.register_forward_pre_hook(inside)

    def loss(x, y):
        return weight * F.cross_entropy(model(x), y)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            sam.backward(loss, images, labels)
    else:
        sam.backward(loss, images, labels)
    same = all(torch.equal(w, b) for w, b in zip(parts(model), before, strict=True))
    same_places = [w.data_ptr() for w in parts(model)] == places
    model.zero_grad()
    fails = False
    sam.backward(loss, images, labels)
    return moved, same and same_places, {name: w.grad.full_tensor() for name, w in model.named_parameters()}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("p", [2, 4])
def test_weights_come_back_bit_for_bit_in_their_own_storage(pair, p, fails):
    expected = gradient_alone(*joined_batch(2), p=p)
    results = pair(restored, p, fails)
    assert all(came_back for _, came_back, _ in results)
    assert all(any(moved[i] for moved, _, _ in results) for i in range(2))
    for _, _, afterwards in results:
        assert_close(afterwards, expected)


def train_with_a_bad_value(bad_pass, change, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    loss = bad_loss(dist.get_rank() == 1, bad_pass, change)
    weights, _, results = train(small, sgd, {"scaler": scaler}, loss=loss)
    return weights, [result.applied for result in results], scaler and scaler.get_scale()


def good_steps():
    """The first update and the third."""
    model = make(small)
    step = make_step(model, sgd(model), rho=RHO)
    for i in (0, 2):
        step(*my_share(i))
    return model.state_dict()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("bad_pass", "change"), bad_values)
def test_a_bad_value_on_one_rank_skips_the_same_update_on_all(pair, bad_pass, change, scaled):
    results = pair(train_with_a_bad_value, bad_pass, change, scaled)
    for _, applied, scale in results:
        assert applied == [True, False, True]
        assert scale == (512.0 if scaled else None)
    assert_close(results[0][0], good_steps())


# --------------------------------------------------------------------------------------------------- whole, and back


def through_a_checkpoint(build, optimizer, group):
    """Four steps; and two, a checkpoint, two more by another model."""
    model = make(build, group)
    step = make_step(model, optimizer(model), rho=RHO, m="global")
    for i in range(2):
        step(*my_share(i))
    saved = fsdp.full_state_dict(model), fsdp.full_optimizer_state(step.optimizer)
    for i in (2, 3):
        step(*my_share(i))
    other = make(build, group)
    with torch.no_grad():
        for w in other.parameters():
            w.zero_()
    again = make_step(other, optimizer(other), rho=RHO, m="global")
    fsdp.load_full_state_dict(other, saved[0])
    fsdp.load_full_optimizer_state(again.optimizer, saved[1])
    for i in (2, 3):
        again(*my_share(i))
    same = all(torch.equal(a, b) for a, b in zip(parts(model), parts(other), strict=True))
    return same, saved, fsdp.full_state_dict(model)


def assert_goes_on_anywhere(results, build, optimizer):
    """Bit for bit where it was saved, and in one process to 1e-10."""
    assert all(same for same, _, _ in results)
    (weights, slots), end = results[0][1:]
    assert all(saved == ({}, {}) for _, saved, _ in results[1:])
    model = make(build)
    model.load_state_dict(weights)
    step = make_step(model, optimizer(model), rho=RHO)
    step.optimizer.load_state_dict(step.optimizer.state_dict() | {"state": slots})
    for i in (2, 3):
        step(*joined_batch(len(results), i))
    assert_close(model.state_dict(), end)


@pytest.mark.parametrize(("build", "optimizer"), [(small, sgd), (resnet, adamw)])
def test_a_checkpoint_is_an_ordinary_one_and_the_run_goes_on_from_it(pair, build, optimizer):
    assert_goes_on_anywhere(pair(through_a_checkpoint, build, optimizer, None), build, optimizer)


def test_a_checkpoint_of_groups_is_an_ordinary_one_too(four):
    assert_goes_on_anywhere(four(through_a_checkpoint, small, sgd, 2), small, sgd)


def round_trip(build):
    model = make(build)
    return fsdp.full_state_dict(model)


@pytest.mark.parametrize("build", [small, resnet])
def test_whole_weights_are_those_of_the_model_before_it_was_sharded(pair, build):
    whole, nothing = pair(round_trip, build)
    assert_same(whole, state(build()))
    assert nothing == {}


def load_wrong(change):
    model = make(small)
    weights = small().state_dict()
    weights = (
        weights | {"fc.weight": weights["fc.weight"][:1]} if change == "shape" else {"fc.weight": weights["fc.weight"]}
    )
    with pytest.raises(RuntimeError, match="do not fit"):
        fsdp.load_full_state_dict(model, weights if dist.get_rank() == 0 else None)
    return fsdp.full_state_dict(model)


@pytest.mark.parametrize("change", ["shape", "names"])
def test_weights_of_another_model_are_refused_by_all_ranks(pair, change):
    assert_same(pair(load_wrong, change)[0], state(small()))


def held(build, group=None):
    """Elements of weights, gradients, momentum and the copy of w on this rank; names of the blocks."""
    model = make(build, group)
    step = make_step(model, sgd(model), rho=RHO, m="global")
    step(*my_share())
    tensors = {
        "weights": parts(model),
        "gradients": [w.grad.to_local() for w in model.parameters()],
        "momentum": [values["momentum_buffer"].to_local() for values in step.optimizer.state.values()],
        "copy": step.sam._perturbation._backup,
    }
    names = [name for name, module in model.named_modules() if module in fsdp.shards_of(model).blocks]
    return {key: sum(t.numel() for t in value) for key, value in tensors.items()}, names


def test_ranks_hold_the_model_once_between_them(pair):
    total = sum(w.numel() for w in resnet().parameters())
    (a, blocks), (b, _) = pair(held, resnet)
    assert {key: a[key] + b[key] for key in a} == dict.fromkeys(a, total)
    assert max(a["weights"], b["weights"]) < 0.51 * total
    assert blocks == ["", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", [f"blocks.{i}" for i in range(12)]),
        ("convnext_atto", ["stages.0", "stages.1", *(f"stages.2.blocks.{i}" for i in range(6)), "stages.3.blocks.0"]),
        ("efficientnet_b0", ["blocks.2.0", "blocks.2.1"]),
    ],
)
def test_blocks_are_what_is_called_one_by_one(name, expected):
    model = timm.create_model(name, pretrained=False)
    names = {id(module): name for name, module in model.named_modules()}
    blocks = fsdp._blocks(model)
    found = [names[id(block)] for block in blocks]
    assert set(expected) <= set(found)
    assert not any(a != b and a.startswith(b + ".") for a in found for b in found)
    total = sum(w.numel() for w in model.parameters())
    assert sum(w.numel() for block in blocks for w in block.parameters()) > 0.6 * total


def evaluated_first():
    model = make(small)
    with torch.inference_mode():
        model(my_share()[0])
    step = make_step(model, sgd(model), rho=RHO, m="global")
    step(*my_share())
    with torch.inference_mode():
        scores = model(my_share()[0])
    return fsdp.full_state_dict(model), scores


def test_a_model_that_was_scored_before_it_was_trained_trains_and_is_scored_as_it_is_then(pair):
    expected, _, _ = train(small, sgd, {}, steps=1)
    (weights, scores), _ = pair(evaluated_first)
    assert_close(weights, expected)
    model = make(small)
    model.load_state_dict(weights)
    torch.testing.assert_close(scores, model(joined_batch(2)[0][:4]).detach(), rtol=1e-10, atol=1e-10)


def updating_statistics():
    model = make(resnet)
    train_mode(model, freeze_bn=False)
    step = make_step(model, sgd(model), rho=RHO, m="global")
    step(*my_share(size=32))
    return [(name, value.clone()) for name, value in model.named_buffers()]


def test_batch_norm_statistics_are_updated_once_and_are_the_same_on_all_ranks(pair):
    first, second = pair(updating_statistics)
    assert all(value == 1 for name, value in first if "num_batches" in name)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
