"""The step on several ranks: what is perturbed together, what is communicated, and that nothing drifts."""

import contextlib

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from samtune import SAM
from samtune.config import loading
from samtune.data.decode import DecodeRule
from samtune.data.splits import open_run_splits
from samtune.distributed import collectives, ddp, environment
from samtune.errors import DataError
from samtune.models.build import build_model
from samtune.models.training import train_mode
from samtune.train.evaluation import evaluate
from samtune.train.run_data import decode_splits
from tests.conftest import SmallNet, image_bytes, write_image_folder
from tests.support.fault_matrix import row
from tests.support.rank_processes import Ranks
from tests.support.small_models import cross_entropy_of, gradient, make_step, sgd, state
from tests.support.uneven_batches import SIZES, bad_loss, bad_values, joined_batch, my_share, shards

RHO = 0.5


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    with Ranks(request.param, tmp_path_factory.mktemp("ranks")) as group:
        yield group


def make_model():
    torch.manual_seed(0)
    model = SmallNet(drop=0.0).double()
    train_mode(model, freeze_bn=True)
    return model


def whole(model):
    return {name: value.tolist() for name, value in state(model).items()}


def train(m, steps=1, loss=F.cross_entropy, scaled=False):
    """On one rank: updates on this rank's share of the batches; returns weights, results and the loss scale."""
    ddp = DistributedDataParallel(make_model())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    step = make_step(ddp, sgd(ddp), rho=RHO, m=m, loss=loss, scaler=scaler)
    results = [step(*my_share(i)) for i in range(steps)]
    return whole(ddp.module), results, scaler and scaler.get_scale()


def assert_close(a, b, tolerance):
    for name, value in a.items():
        torch.testing.assert_close(
            torch.tensor(value, dtype=torch.float64),
            torch.tensor(b[name], dtype=torch.float64),
            rtol=tolerance,
            atol=tolerance,
        )


def test_global_mode_equals_one_process_on_the_joined_batch(ranks):
    results = ranks(train, "global", 3)
    model = make_model()
    step = make_step(model, sgd(model), rho=RHO)
    for i in range(3):
        alone = step(*joined_batch(ranks.world, i))
        for _, steps, _ in results:
            assert steps[i].loss == pytest.approx(alone.loss, rel=1e-10)
            assert (steps[i].wrong, steps[i].n) == (alone.wrong, alone.n)
    for weights, _, _ in results:
        assert_close(weights, whole(model), 1e-10)


def mean_of_shards(model, world):
    loss = cross_entropy_of(model)
    return sum(len(s[0]) * gradient(model, loss, *s, rho=RHO) for s in shards(world)) / sum(SIZES[world])


def gradient_here(m, micro_batch=None):
    ddp = DistributedDataParallel(make_model())
    images, labels, weight = my_share()
    return gradient(
        ddp, lambda x, y: weight * F.cross_entropy(ddp(x), y), images, labels, rho=RHO, m=m, micro_batch=micro_batch
    ).tolist()


def test_device_mode_gives_the_mean_of_the_shards_gradients_and_not_the_global_one(ranks):
    expected = mean_of_shards(make_model(), ranks.world)
    for found in ranks(gradient_here, "device"):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-12, atol=1e-14)
    joined = torch.tensor(ranks(gradient_here, "global")[0], dtype=torch.float64)
    assert not torch.allclose(joined, expected, rtol=1e-3)


@pytest.mark.parametrize("m", ["device", "global"])
def test_micro_batches_on_each_rank_give_the_gradient_of_all_at_once(ranks, m):
    """Of 1 image or 2 each: ranks have different numbers of them."""
    for whole, *split in zip(ranks(gradient_here, m), *(ranks(gradient_here, m, k) for k in (1, 2)), strict=True):
        for found in split:
            assert found == pytest.approx(whole, rel=1e-10, abs=1e-13)


def test_pieces_on_one_rank_equal_as_many_ranks(ranks):
    """With even shards, since pieces of m images are all of one size but the last."""
    model = make_model()
    world = ranks.world
    m = SIZES[world][0]
    found = gradient(model, cross_entropy_of(model), *joined_batch(world), rho=RHO, m=m)
    many = torch.tensor(ranks(gradient_here, "device")[0], dtype=torch.float64)
    torch.testing.assert_close(found, many, rtol=1e-12, atol=1e-14)


def two_groups():
    """Ranks 0 and 1 share a perturbation; a third has its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    together = dist.new_group([0, 1])
    alone = dist.new_group([2]) if world == 3 else together
    return gradient_here(together if rank < 2 else alone)


def test_a_group_of_ranks_shares_a_perturbation(ranks):
    world = ranks.world
    model = make_model()
    loss = cross_entropy_of(model)
    images, labels = joined_batch(world)
    n = sum(SIZES[world][:2])
    expected = n * gradient(model, loss, images[:n], labels[:n], rho=RHO)
    if world == 3:
        expected = expected + SIZES[3][2] * gradient(model, loss, images[n:], labels[n:], rho=RHO)
    for found in ranks(two_groups):
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), expected / len(images), rtol=1e-10, atol=1e-13
        )


def random_directions(m):
    """What two calls add to the weights of this rank; ranks draw from generators of their own."""
    ddp = DistributedDataParallel(make_model())
    torch.manual_seed(dist.get_rank())
    weights = list(ddp.parameters())
    before, moves = [w.detach().clone() for w in weights], []

    def loss(images, labels):
        if sam.perturbed:
            moves.append(torch.cat([(w - b).reshape(-1) for w, b in zip(weights, before, strict=True)]).tolist())
        return F.cross_entropy(ddp(images), labels)

    sam = SAM(ddp, RHO, m=m, ascent="random")
    for _ in range(2):
        sam.backward(loss, *my_share()[:2])
    return moves


@pytest.mark.parametrize("m", ["device", "global"])
def test_ranks_that_share_a_perturbation_move_in_one_random_direction_and_others_in_their_own(ranks, m):
    first, *others = ranks(random_directions, m)
    assert torch.tensor(first, dtype=torch.float64).norm(dim=1).tolist() == pytest.approx([RHO, RHO], rel=1e-9)
    assert first[0] != first[1]
    for other in others:
        assert (other == first) == (m == "global")
        assert (other[0] == first[0]) == (m == "global")


def one_pass_steps(ascent):
    """Weights after steps on this rank's share of the batch."""
    ddp = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    sam = SAM(ddp, RHO, ascent=ascent, optimizer=optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        images, labels, weight = my_share()
        sam.backward(lambda x, y, weight=weight: weight * F.cross_entropy(ddp(x), y), images, labels)
        optimizer.step()
    return torch.cat([w.detach().reshape(-1) for w in ddp.parameters()]).tolist()


@pytest.mark.parametrize("ascent", ["momentum", "previous"])
def test_with_one_pass_ranks_take_the_steps_of_one_process_on_the_joined_batch(ranks, ascent):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sam = SAM(model, RHO, ascent=ascent, optimizer=optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        sam.backward(cross_entropy_of(model), *joined_batch(ranks.world))
        optimizer.step()
    expected = torch.cat([w.detach().reshape(-1) for w in model.parameters()])
    first, *others = ranks(one_pass_steps, ascent)
    assert all(other == first for other in others)
    torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), expected, rtol=1e-10, atol=1e-12)


def wrapped():
    """Names are those of the model inside, which refuses to be saved too."""
    ddp = DistributedDataParallel(make_model())
    sam = SAM(ddp, RHO, perturb="^fc")
    refused = []

    def loss(images, labels):
        if sam.perturbed:
            for model in (ddp, ddp.module):
                with pytest.raises(RuntimeError, match="perturbed"):
                    model.state_dict()
                refused.append(True)
        return F.cross_entropy(ddp(images), labels)

    sam.backward(loss, *my_share()[:2])
    return refused


def test_a_wrapped_model_keeps_its_names_and_refuses_to_be_saved(ranks):
    assert ranks(wrapped) == [[True, True]] * ranks.world


def long_run():
    weights, _, _ = train("device", steps=500)
    return weights


@pytest.mark.slow
def test_replicas_are_bit_identical_after_500_steps(ranks):
    first, *others = ranks(long_run)
    assert all(other == first for other in others)


def train_with_a_bad_value(bad_pass, change, scaled):
    return train("device", 3, bad_loss(dist.get_rank() == 1, bad_pass, change), scaled)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("bad_pass", "change"), bad_values)
def test_a_bad_value_on_one_rank_skips_the_same_update_on_all(ranks, bad_pass, change, scaled):
    results = ranks(train_with_a_bad_value, bad_pass, change, scaled)
    for weights, steps, scale in results:
        assert [step.applied for step in steps] == [True, False, True]
        assert weights == results[0][0]
        assert scale == (512.0 if scaled else None)


@contextlib.contextmanager
def counted_collectives():
    """The elements of each reduction, those of DistributedDataParallel's buckets included."""
    seen = []
    plain = dist.all_reduce

    def counting(tensor, *arguments, **options):
        seen.append(tensor.numel())
        return plain(tensor, *arguments, **options)

    dist.all_reduce = counting
    try:
        yield seen
    finally:
        dist.all_reduce = plain


def count(m, micro_batch):
    model = make_model()
    ddp = DistributedDataParallel(model)
    buckets = []

    def hook(_, bucket):
        buckets.append(bucket.buffer().numel())
        future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    step = make_step(ddp, sgd(ddp), rho=RHO, m=m, micro_batch=micro_batch)
    step(*my_share()[:2])  # the first builds the buckets
    buckets.clear()
    with counted_collectives() as seen:
        step(*my_share()[:2])
    return sum(w.numel() for w in model.parameters()), seen, buckets


@pytest.mark.parametrize(
    ("m", "micro_batch", "gradients"),
    [("device", None, 1), (2, None, 1), ("global", None, 2), ("device", 2, 1), (2, 1, 1), ("global", 1, 2)],
)
def test_a_step_reduces_gradients_once_and_one_more_time_for_a_global_perturbation(ranks, m, micro_batch, gradients):
    for weights, seen, buckets in ranks(count, m, micro_batch):
        assert buckets == [weights]
        assert sorted(seen) == [5] + [weights] * gradients  # 5: loss, wrong, n; out of memory, asked to end


def exchange():
    rank = dist.get_rank()
    flags = collectives.any_rank_true(rank == 1, False, True)
    sent = collectives.broadcast_from_rank0(lambda: {"rank": rank})
    with pytest.raises(DataError, match="of rank 0"):
        collectives.broadcast_from_rank0(fail_on_first)
    return flags, sent, collectives.all_gather_object(rank)


def fail_on_first():
    raise DataError("of rank 0") if dist.get_rank() == 0 else AssertionError


def test_flags_are_joined_objects_gathered_and_those_of_rank_0_broadcast(ranks):
    for result in ranks(exchange):
        assert result == ([True, False, True], {"rank": 0}, list(range(ranks.world)))


class Broken(torch.autograd.Function):
    """In whose backward memory runs out, when it is asked for."""

    @staticmethod
    def forward(ctx, x, fails):
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.fails:
            raise MemoryError("simulated")
        return gradient, None


class Wide(torch.nn.Module):
    """Whose gradients make several buckets of 1 MiB and more."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(400, 400, bias=False) for _ in range(30))
        self.fails_in = None

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(Broken.apply(x, i == self.fails_in)))
        return x[:, :3]


def without_memory(bad_rank, where, m, again):
    """Two updates; in the first, memory runs out on one rank in a pass; returns weights, results and micro_batch."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Wide().double()
    wrapped_model = ddp.data_parallel(model, torch.device("cpu"))
    step = make_step(wrapped_model, sgd(wrapped_model), rho=RHO, m=m)
    generator = torch.Generator().manual_seed(rank)
    calls = []

    def loss(logits, labels):
        if rank == bad_rank and len(logits) == 4 and len(calls) < again:
            calls.append(1)
            if where == ("forward", step.sam.perturbed):
                raise MemoryError("simulated")
        return F.cross_entropy(logits, labels)

    def forward(module, inputs):
        is_bad = len(inputs[0]) == 4 and rank == bad_rank and len(calls) < again
        model.fails_in = 4 if is_bad and where == ("backward", step.sam.perturbed) else None

    model.register_forward_pre_hook(forward)
    step.loss = loss
    batches = [torch.randn(4, 400, generator=generator, dtype=torch.float64) for _ in range(2)]
    results = [step(images, torch.arange(4) % 3) for images in batches]
    return [w.sum().item() for w in model.parameters()], results, step.sam.micro_batch


def without_memory_for_the_direction(fails):
    """Three updates along the momentum; in the second there is no memory for the direction on rank 0."""
    torch.manual_seed(0)
    model = Wide().double()
    wrapped_model = ddp.data_parallel(model, torch.device("cpu"))
    optimizer = sgd(wrapped_model)
    step = make_step(wrapped_model, optimizer, rho=RHO, ascent="momentum")
    direction, calls = step.sam._known_direction, []

    def broken():
        calls.append(1)
        if fails and dist.get_rank() == 0 and len(calls) == 2:
            raise MemoryError("simulated")
        return direction()

    step.sam._known_direction = broken
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = [torch.randn(4, 400, generator=generator, dtype=torch.float64) for _ in range(3)]
    results = [step(images, torch.arange(4) % 3) for images in batches]
    return [w.sum().item() for w in model.parameters()], [one.loss for one in results], step.sam.micro_batch


def test_where_a_rank_has_no_memory_for_a_direction_all_begin_the_step_again(ranks):
    whole, broken = ranks(without_memory_for_the_direction, False), ranks(without_memory_for_the_direction, True)
    for (weights, losses, _), (again, losses_again, micro_batch) in zip(whole, broken, strict=True):
        assert again == pytest.approx(weights, rel=1e-9)
        assert losses_again == pytest.approx(losses, rel=1e-9)
        assert micro_batch == 2


@pytest.mark.parametrize("m", ["device", "global"])
@pytest.mark.parametrize(
    "where", [("forward", False), ("forward", True), ("backward", False), ("backward", True)], ids=str
)
def test_where_memory_runs_out_on_one_rank_all_begin_the_step_again_with_half_as_many_images(ranks, m, where):
    whole = ranks(without_memory, None, where, m, 0)
    for bad_rank in (0, 1):
        for found, expected in zip(
            ranks(without_memory, bad_rank, where, m, 1 if where[1] is False else 2), whole, strict=True
        ):
            assert found[0] == pytest.approx(expected[0], rel=1e-9)
            assert [s.n for s in found[1]] == [s.n for s in expected[1]] == [4 * ranks.world] * 2
            assert found[2] == 2


def statistics_after(steps):
    torch.manual_seed(0)
    model = SmallNet(drop=0.0).double().train()
    wrapped_model = ddp.data_parallel(model, torch.device("cpu"))
    step = make_step(wrapped_model, sgd(wrapped_model), rho=RHO)
    for i in range(steps):
        step(*my_share(i)[:2])
    return model.bn.running_mean.tolist(), model.bn.running_var.tolist(), int(model.bn.num_batches_tracked)


def test_statistics_that_update_are_the_mean_over_the_ranks_and_the_same_everywhere(ranks):
    found = ranks(statistics_after, 1)
    assert all(other == found[0] for other in found)
    means = []
    for images, _ in shards(ranks.world):
        torch.manual_seed(0)
        model = SmallNet(drop=0.0).double().train()
        model(images)
        means.append(model.bn.running_mean)
    assert found[0][0] == pytest.approx(torch.stack(means).mean(0).tolist(), rel=1e-12)
    assert found[0][2] == 1
    later = ranks(statistics_after, 5)
    assert all(other == later[0] for other in later)


def without_images():
    """One image for all ranks: the others have it too, and it counts nothing there."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_model()
    wrapped_model = ddp.data_parallel(model, torch.device("cpu"))
    step = make_step(wrapped_model, sgd(wrapped_model), rho=RHO)
    images, labels = joined_batch(world)
    result = step(images[:1], labels[:1], weight=world if rank == 0 else 0)
    return whole(model), result


def test_a_rank_without_images_counts_nothing(ranks):
    model = make_model()
    step = make_step(model, sgd(model), rho=RHO)
    images, labels = joined_batch(ranks.world)
    alone = step(images[:1], labels[:1])
    for weights, result in ranks(without_images):
        assert (result.loss, result.wrong, result.n) == (pytest.approx(alone.loss, rel=1e-12), alone.wrong, 1)
        assert_close(weights, whole(model), 1e-12)


def sent_by(rho, m):
    """Calls and bytes that collectives.traffic counts for one step, and the bytes of the weights."""
    model = Wide().double()
    wrapped_model = ddp.data_parallel(model, torch.device("cpu"))
    step = make_step(wrapped_model, sgd(wrapped_model), rho=rho, m=m)
    images, labels = torch.randn(2, 400, dtype=torch.float64), torch.arange(2)
    step(images, labels)
    calls, sent = collectives.traffic.calls, collectives.traffic.bytes
    step(images, labels)
    weights = sum(8 * w.numel() for w in model.parameters())
    return collectives.traffic.calls - calls, collectives.traffic.bytes - sent, weights


def test_a_step_of_sam_sends_what_a_step_of_sgd_sends_and_a_global_one_the_gradient_twice(ranks):
    for plain, device, together in zip(
        ranks(sent_by, 0.0, "device"), ranks(sent_by, RHO, "device"), ranks(sent_by, RHO, "global"), strict=True
    ):
        assert plain == device
        calls, sent, weights = device
        assert calls > 2  # several buckets, and the decision
        assert sent == weights + 5 * 8
        assert together == (calls + 1, sent + weights, weights)


def scored_here(folder):
    settings = loading.load(None, {"model": "test_resnet", "dataset": str(folder), "batch_size": 2, "workers": 0})
    parts = open_run_splits(settings)
    (images,) = decode_splits(settings, [(parts.test, parts.test_rows)], DecodeRule())
    torch.manual_seed(0)
    model, info = build_model("test_resnet", classes=2, pretrained=False, img_size=32)
    torch.nn.init.normal_(model.fc.weight)
    found = evaluate(model, images, parts.test_rows, "test", settings, info.data_config, lambda *_: None)
    return found.summary(), found.nats.tolist(), found.predictions.tolist()


@row(19)
def test_an_evaluation_is_the_same_to_the_last_bit_for_any_number_of_ranks(ranks, tmp_path):
    """15 images in batches of 4, so that the last batch is small, and one rank of three has fewer."""
    folder = write_image_folder(tmp_path / "pets", {"train": 4, "test": 7})
    (folder / "test" / "cat" / "one_more.png").write_bytes(image_bytes(99))
    alone = scored_here(folder)
    assert alone[0]["n"] == 15
    assert 0 < alone[0]["wrong"] < 15
    assert ranks(scored_here, folder) == [alone] * ranks.world


def short_of_memory(folder, bad_rank):
    calls = []
    plain = torch.nn.Module.__call__

    def counted(self, *arguments, **options):
        if type(self).__name__ == "ResNet":
            calls.append(len(arguments[0]))
            if dist.get_rank() == bad_rank and len(arguments[0]) > 2:
                raise MemoryError("simulated")
        return plain(self, *arguments, **options)

    torch.nn.Module.__call__ = counted
    try:
        return scored_here(folder), max(calls[-2:])
    finally:
        torch.nn.Module.__call__ = plain


@row(11)
def test_an_evaluation_without_memory_on_one_rank_begins_again_on_all(ranks, tmp_path):
    folder = write_image_folder(tmp_path / "pets", {"train": 4, "test": 7})
    alone = scored_here(folder)
    for found, batch_size in ranks(short_of_memory, folder, 1):
        assert batch_size <= 2
        assert found[2] == alone[2]
        assert found[0]["wrong"] == alone[0]["wrong"]


def in_turn(path):
    rank, world = dist.get_rank(), dist.get_world_size()
    plain = environment.rank_info
    environment.rank_info = lambda: environment.RankInfo(rank, world, rank, world, 0)
    try:
        for _ in range(3):
            with collectives.local_main_process_first(), path.open("a") as file:
                file.write(f"{rank}\n")
            dist.barrier()
    finally:
        environment.rank_info = plain


def test_one_rank_of_a_machine_goes_first_and_the_others_find_what_it_has_fetched(ranks, tmp_path):
    ranks(in_turn, tmp_path / "order")
    order = (tmp_path / "order").read_text().split()
    assert len(order) == 3 * ranks.world
    assert order[:: ranks.world] == ["0"] * 3


# ------------------------------------------------------------------------------------------------------ shaken branches


def shaken_step():
    """On one rank: the coefficients of pass 1 and of pass 2 at step 3 of a run, and the weights after it."""
    torch.manual_seed(0)
    model = timm.create_model("shake26_2x96d", blocks=1, width=4).double().train()
    wrapped = ddp.data_parallel(model, torch.device("cpu"))
    seen = []

    def keep(_module, inputs, out):
        a, b = inputs
        seen.append((((out - b) * (a - b)).sum((1, 2, 3)) / ((a - b) ** 2).sum((1, 2, 3))).tolist())

    model.stages[0][0].shake.register_forward_hook(keep)
    step = make_step(wrapped, sgd(model))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step.sam.ranks.settle(lambda: step._rehearse(images, torch.arange(4)))
    seen.clear()
    collectives.seed_this_rank(7, 3)
    step(images, torch.arange(4))
    return seen, whole(model)


def test_each_rank_draws_its_own_coefficients_the_same_in_both_passes_and_again_after_a_resume(ranks):
    """A run seeds its ranks anew in each step, so that the generators of others need not be in a checkpoint."""
    results = ranks(shaken_step)
    coefficients = [seen for seen, _ in results]
    for pass_1, pass_2 in coefficients:
        assert pass_1 == pytest.approx(pass_2)
    for other, _ in coefficients[1:]:
        assert min(abs(a - b) for a, b in zip(coefficients[0][0], other, strict=True)) > 1e-6
    assert all(weights == results[0][1] for _, weights in results)
    assert ranks(shaken_step) == results
