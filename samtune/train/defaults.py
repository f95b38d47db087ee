"""Derived defaults: what a config leaves open follows from data, model and device."""

import torch

from samtune.config.run_config import RunConfig
from samtune.distributed import device
from samtune.errors import plural
from samtune.models.timm_format import ModelInfo
from samtune.train.batch_plan import BatchPlan

# Peak learning rates of the body for a batch of 32; they trained every data set we tried (recipes/README.md). They grow
# with the square root of the batch: where the gradient is clipped, a larger batch makes a step surer but not longer.
_BASE_LR = {"sgd": 0.004, "adamw": 1e-4}
_BASE_LR_FROM_SCRATCH = {"sgd": 0.07, "adamw": 1e-3}  # random weights have far to go
_BASE_BATCH = 32

# Weight decay is 1/n for n images: against the mean loss, a prior of constant strength. It binds the new head, which a
# few hundred images fit in many ways; for 50,000 images it is near the paper's 1e-5. Clipping shrinks the gradient but
# not the decay, so that more than this takes over.
_MAX_WEIGHT_DECAY = 0.002
# From random weights the decay does not follow the number of images: it is that of the SAM paper's networks, which have
# 50,000 images.
_WEIGHT_DECAY_FROM_SCRATCH = 5e-4


def peak_lr(config: RunConfig, batch: BatchPlan) -> float:
    """Peak learning rate of the body; with --lr-base-batch scaled by the square root of the batch."""
    assert config.lr is not None
    if config.lr_base_batch is None:
        return config.lr
    return float(f"{config.lr * (batch.nominal / config.lr_base_batch) ** 0.5:.3g}")


def resolve_amp_dtype(config: RunConfig, target: torch.device) -> RunConfig:
    """Fill in --amp-dtype. Raises UsageError for arithmetic that the device does not have."""
    device.check_dtype(target, config.amp_dtype)
    return config.derive("amp_dtype", *device.best_dtype(target)) if config.amp_dtype == "auto" else config


def resolve_auto(
    config: RunConfig, target: torch.device, info: ModelInfo, train_images: int, batch: BatchPlan, cores: int
) -> RunConfig:
    """Fill in what the config leaves open, with the reason as origin. cores: of each rank."""
    if config.batch_size != batch.part:
        config = config.derive("batch_size", batch.part, "global_batch_size over the devices")
    if config.lr is None:
        base = (_BASE_LR if config.pretrained else _BASE_LR_FROM_SCRATCH)[config.opt]
        lr = base * (batch.nominal / _BASE_BATCH) ** 0.5
        reason = f"{base:g} x sqrt({plural(batch.nominal, 'image')} a step / {_BASE_BATCH})"
        reason += "" if config.pretrained else ", from scratch"
        config = config.derive("lr", float(f"{lr:.3g}"), reason)
    if config.weight_decay is None and not config.pretrained and config.opt == "sgd":
        reason = "from scratch: as the SAM paper's networks on CIFAR"
        config = config.derive("weight_decay", _WEIGHT_DECAY_FROM_SCRATCH, reason)
    if config.weight_decay is None:
        decay = min(_MAX_WEIGHT_DECAY, 1 / train_images)
        config = config.derive(
            "weight_decay", float(f"{decay:.3g}"), f"1 / {train_images} training images, at most {_MAX_WEIGHT_DECAY:g}"
        )
    if config.workers is None:
        config = config.derive("workers", *device.loading_workers(target, cores))
    if config.img_size is None:
        config = config.derive("img_size", info.img_size, f"size of the weights {info.resolved}")
    return config
