"""The search for the largest batch that fits a GPU, by forward-backward passes of SAM."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data.transforms import model_input
from samtune.distributed import collectives, device
from samtune.errors import OutOfMemory, plural
from samtune.models.timm_format import ModelInfo
from samtune.models.training import train_mode
from samtune.sam.gradient import SAM
from samtune.sam.known_direction import ONE_PASS
from samtune.sam.losses import cross_entropy
from samtune.sam.snapshot import BatchNormStats, batch_norms, generator_states, set_generator_states

SPARE = 0.1
"""Share of the free memory that stays free: a run also needs room for what the search does not see."""
_MOST = 2**16  # images

Fits = Callable[[int, float], None]  # images that fit, images per second


@dataclass(frozen=True)
class Found:
    """The largest power of two of images that fits; images is 0 if one does not fit."""

    images: int
    images_per_second: float


def resolve_batch_size(
    config: RunConfig, model: nn.Module, info: ModelInfo, train_images: int, devices: int
) -> RunConfig:
    """Fill in --batch-size auto, with the reason as origin; all ranks call it. Raises OutOfMemory if none fits.

    config: its amp_dtype is resolved. model: on its device, whole. devices: ranks of the run.
    """
    if config.batch_size != "auto":
        return config
    target = next(model.parameters()).device
    if target.type != "cuda":
        default: int = RunConfig.model_fields["batch_size"].default
        return config.derive("batch_size", default, f"the default, on device {target.type}")
    copies = (2 if config.opt == "adamw" else 1) + (devices > 1)  # its state; buffers in which ranks add up gradients
    copies += config.ascent in ONE_PASS  # the direction
    console.info(f"searching the batch that fits {device.describe(target)} ...")
    found = largest_batch(model, config, info, train_images // devices, _show, copies)
    if found.images == 0:
        raise OutOfMemory(
            f"no memory on {device.describe(target)} for one image of {info.img_size} px",
            f"--batch-size auto leaves {100 * SPARE:g} % of it free",
            "lower --img-size, or take a smaller model",
        )
    reason = f"the largest power of two for {device.describe(target)}, {found.images_per_second:.0f} images/s"
    return config.derive("batch_size", found.images, reason)


def _show(images: int, per_second: float) -> None:
    console.info(f"batch   {plural(images, 'image')} fit: {per_second:.0f} images/s")


def search(attempt: Callable[[int], float], most: int, progress: Fits) -> Found:
    """Double the number of images from 1 on, while attempt(images) returns its seconds and does not lack memory.

    most: of images. Other errors of the attempt are raised.
    """
    found, size = Found(0, 0.0), 1
    while size <= most:
        try:
            found = Found(size, size / attempt(size))
        except Exception as error:
            if not device.may_be_out_of_memory(error):
                raise
            break  # only outside of this block can memory be freed
        progress(found.images, found.images_per_second)
        size *= 2
    device.free_memory()
    return found


def largest_batch(
    model: nn.Module, config: RunConfig, info: ModelInfo, most: int, progress: Fits, copies: int = 0
) -> Found:
    """The largest batch of a GPU that leaves a tenth of its memory free; the same on all ranks, which all call it.

    It runs passes of SAM on random images, and leaves weights, statistics and generators as they were.

    most: of images. copies: how many tensors for each weight a run has beside what is allocated now.
    """
    target = next(model.parameters()).device
    generators = generator_states(target)
    train_mode(model, freeze_bn=config.freeze_bn)
    with device.limited_memory(target, SPARE), BatchNormStats(batch_norms(model)).restored():
        trial = _TrialPasses(model, config, info, copies)
        try:
            found = search(trial, min(_MOST, max(1, most)), progress)
        finally:
            del trial
            set_generator_states(generators, target)
    device.free_memory()
    return min(collectives.all_gather_object(found), key=lambda of_rank: of_rank.images)


class _TrialPasses:
    """Passes of SAM on random images, with the memory in use that a run needs beside them."""

    def __init__(self, model: nn.Module, config: RunConfig, info: ModelInfo, copies: int) -> None:
        self._model, self._config, self._info = model, config, info
        self._device = next(model.parameters()).device
        self._autocast = device.autocast(self._device, config.amp_dtype)
        self._loss = partial(cross_entropy, smoothing=config.smoothing)
        self._sam = SAM(model, config.rho, p=config.p, adaptive=config.adaptive, perturb=config.perturb)
        # The optimizer's state and the ranks' buffers, which do not exist yet.
        self._run_buffers = [torch.empty_like(w) for w in model.parameters() if w.requires_grad for _ in range(copies)]

    def __call__(self, images: int) -> float:
        """Seconds of the passes of a step, the second time."""
        channels, height, width = self._info.data_config["input_size"]
        shape = (images, channels, height, width)
        pixels = torch.randint(256, shape, dtype=torch.uint8, device=self._device)
        labels = torch.zeros(images, dtype=torch.int64, device=self._device)
        seconds = 0.0
        try:
            for _ in range(2):  # libraries choose their algorithms in the first one
                started = time.perf_counter()
                self._sam.backward(self._objective, pixels, labels).item()  # waits for the GPU
                seconds = time.perf_counter() - started
        finally:
            self._model.zero_grad(set_to_none=True)
        return seconds

    def _objective(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        images = model_input(pixels, self._info.data_config, self._config.channels_last)
        with self._autocast():
            return self._loss(self._model(images), labels)
