"""A batch that ranks share unevenly, and losses that fail on one of them."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

SIZES = {1: [7], 2: [4, 3], 3: [3, 3, 1], 4: [3, 2, 1, 1]}  # images of each rank


def joined_batch(world, step=0, size=16):
    """Images and labels of all ranks together."""
    generator = torch.Generator().manual_seed(step)
    n = sum(SIZES[world])
    return torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def shards(world, step=0, size=16):
    """Images and labels of each rank."""
    return list(zip(*(t.split(SIZES[world]) for t in joined_batch(world, step, size)), strict=True))


def my_share(step=0, size=16):
    """This rank's images, labels, and weight."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images, labels = shards(world, step, size)[rank]
    return images, labels, len(images) * world / sum(SIZES[world])


def bad_loss(is_bad, bad_pass, change):
    """In the second update of a bad rank the loss, or its gradient, is not finite, in pass 1, 2 or both."""
    calls = []

    def loss(logits, labels):
        calls.append(1)
        value = F.cross_entropy(logits, labels)
        if not is_bad or len(calls) not in {"first": (3,), "second": (4,), "both": (3, 4)}[bad_pass]:
            return value
        return value + math.inf if change == "value" else value * math.inf

    return loss


bad_values = [("first", "value"), ("first", "grad"), ("second", "grad"), ("both", "grad")]
