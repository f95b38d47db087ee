"""Image operations for training and evaluation. They take and give uint8 tensors.

Crops and flips are drawn for a whole batch at once; policies come from torchvision, evaluation follows timm.
Normalisation is not part of them: it runs on the device (`model_input`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import timm.data
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.autoaugment import AutoAugmentPolicy

from samtune.config.run_config import RunConfig
from samtune.data.splits import Indices

Transform = Callable[[torch.Tensor], torch.Tensor]
Boxes = npt.NDArray[np.int64]  # (n, 4): top, left, height, width
Draws = npt.NDArray[np.float64]  # (n, ...) in [0, 1)
Pictures = Sequence[torch.Tensor] | torch.Tensor  # (3, h, w) uint8 each; (n, 3, h, w) where they have one shape
Flags = npt.NDArray[np.bool_]  # (n,)

POLICIES: Mapping[str, Callable[[], Transform]] = {
    "none": lambda: _same,
    "imagenet": lambda: v2.AutoAugment(AutoAugmentPolicy.IMAGENET),
    "cifar10": lambda: v2.AutoAugment(AutoAugmentPolicy.CIFAR10),
    "svhn": lambda: v2.AutoAugment(AutoAugmentPolicy.SVHN),
    "rand": v2.RandAugment,
    "trivial": v2.TrivialAugmentWide,
}
_ATTEMPTS = 10  # to find a crop of the wanted area and shape inside the image
_RATIO = (3 / 4, 4 / 3)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LONGEST = 16  # length over width of what evaluation resizes; a central crop needs a part about as long as it is wide


@dataclass(frozen=True)
class TrainTransform:
    """Images of an epoch -> an augmented batch.

    size: (height, width) of the result. interpolation: "bilinear" or "bicubic". mean: per channel in [0, 1], which is
    what erased and empty places hold: 0 after normalisation.
    crop: "resized" takes a random resized crop with an area in [scale, 1] of the image and a ratio in [3/4, 4/3]
    (Szegedy et al. 2015); "pad" pads each side by an eighth, takes a random crop of the image's own size and resizes it
    (for 32 px: pad 4). hflip: chance of a flip. aa: name of a policy (POLICIES). color_jitter: strength of brightness,
    contrast and saturation. cutout: side of a square at a random centre that is erased, as a share of the size (DeVries
    and Taylor 2017); erase: chance that a random rectangle is erased (Zhong et al. 2020).
    """

    size: tuple[int, int]
    interpolation: str
    mean: tuple[float, ...]
    crop: str = "resized"
    scale: float = 0.35
    hflip: float = 0.5
    aa: str = "none"
    color_jitter: float = 0.0
    cutout: float = 0.0
    erase: float = 0.0

    def __call__(
        self, images: Pictures, seed: int, epoch: int, rows: Indices, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(3, h, w) uint8 each -> (n, 3, height, width) uint8, channels last in memory.

        rows: the images' numbers: what is done to one depends on (seed, epoch, row) alone. out: where the result goes,
        of its shape and memory layout; None: new memory. The global generator of torch, from which torchvision's
        operations draw, is left as it was.
        """
        draws = uniform(seed, epoch, rows, 4 + (2 if self.crop == "pad" else 4 * _ATTEMPTS))
        batch = empty_batch(len(images), self.size) if out is None else out
        crop = self._padded_crop if self.crop == "pad" else self._resized_crop
        crop(images, draws[:, 4:], draws[:, 0] < self.hflip, batch)
        if self.photometric:
            self._change_colours(batch, draws[:, 1])
        if self.cutout > 0:
            self._cut_out(batch, draws[:, 2:4])
        return batch

    def _resized_crop(self, images: Pictures, draws: Draws, flipped: Flags, out: torch.Tensor) -> None:
        # NumPy's views: those of torch cost several times as much, during which Python's lock is held.
        together = images.permute(0, 2, 3, 1).numpy() if isinstance(images, torch.Tensor) else None
        pixels = list(together) if together is not None else [image.permute(1, 2, 0).numpy() for image in images]
        boxes = resized_crop_boxes(np.array([image.shape[:2] for image in pixels]), draws, self.scale).tolist()
        for i, ((top, left, height, width), flip) in enumerate(zip(boxes, flipped.tolist(), strict=True)):
            resized = self._resize(_as_batch(pixels[i][top : top + height, left : left + width]))
            out[i : i + 1] = resized.flip(-1) if flip else resized

    def _padded_crop(self, images: Pictures, draws: Draws, flipped: Flags, out: torch.Tensor) -> None:
        if not isinstance(images, torch.Tensor):
            if len({image.shape for image in images}) > 1:  # only images of one shape can be moved in one go
                for i, image in enumerate(images):
                    one = slice(i, i + 1)
                    self._padded_crop(image[None], draws[one], flipped[one], out[one])
                return
            images = torch.stack(list(images))
        (n, _, height, width) = images.shape
        pad = (math.ceil(height / 8), math.ceil(width / 8))
        room = np.empty((n, height + 2 * pad[0], width + 2 * pad[1], 3), np.uint8)
        room[:] = self._fill
        room[:, pad[0] : pad[0] + height, pad[1] : pad[1] + width] = images.permute(0, 2, 3, 1).numpy()
        top, left = ((draws[:, i] * (2 * pad[i] + 1)).astype(np.int64) for i in (0, 1))
        batch = out if (height, width) == self.size else empty_batch(n, (height, width))
        moved = batch.permute(0, 2, 3, 1).numpy()
        for i, (y, x) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
            moved[i] = room[i, y : y + height, x : x + width]
        batch[torch.from_numpy(flipped)] = batch[torch.from_numpy(flipped)].flip(-1)
        if batch is not out:
            out.copy_(self._resize(batch))

    def _resize(self, images: torch.Tensor) -> torch.Tensor:
        return _resize(images, self.size, self.interpolation)

    @property
    def _fill(self) -> npt.NDArray[np.uint8]:
        fill: npt.NDArray[np.uint8] = np.rint(255 * np.array(self.mean)).astype(np.uint8)
        return fill

    @property
    def photometric(self) -> bool:
        """Whether torchvision's operations take part, which draw from torch's global generator."""
        return self.aa != "none" or self.color_jitter > 0 or self.erase > 0

    def _change_colours(self, batch: torch.Tensor, draws: Draws) -> None:
        """Torchvision's operations, one image after the other, each with a seed of its own."""
        jitter = self.color_jitter
        change = v2.Compose(
            [
                POLICIES[self.aa](),
                v2.ColorJitter(jitter, jitter, jitter) if jitter > 0 else _same,
                v2.RandomErasing(self.erase, value=self._fill.tolist()) if self.erase > 0 else _same,
            ]
        )
        with torch.random.fork_rng(devices=[]):  # in the main process dropout draws from it too
            for i, draw in enumerate(draws):
                torch.default_generator.manual_seed(int(draw * 2**53))
                batch[i] = change(batch[i])

    def _cut_out(self, batch: torch.Tensor, draws: Draws) -> None:
        height, width = self.size
        half = self.cutout * min(height, width) / 2
        fill = torch.from_numpy(self._fill).view(3, 1, 1)
        for i, (y, x) in enumerate(draws * (height, width)):
            top, left = max(0, round(y - half)), max(0, round(x - half))
            batch[i, :, top : max(0, round(y + half)), left : max(0, round(x + half))] = fill


def resized_crop_boxes(shapes: Boxes, draws: Draws, scale: float) -> Boxes:
    """Crops with an area in [scale, 1] of the image, log-uniform in ratio: the first of ten that fits into the image.

    shapes: (n, 2) heights and widths. draws: (n, 40) in [0, 1). If none fits, the largest central crop whose ratio is
    in range, as in torchvision.
    """
    n = len(shapes)
    height, width = shapes[:, :1].astype(np.float64), shapes[:, 1:].astype(np.float64)
    u = draws.reshape(n, _ATTEMPTS, 4)
    area = height * width * (scale + (1 - scale) * u[:, :, 0])
    low, high = np.log(_RATIO)
    ratio = np.exp(low + (high - low) * u[:, :, 1])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    chosen = np.arange(n), fits.argmax(1)
    h, w, u = h[chosen], w[chosen], u[chosen]
    top = np.floor(u[:, 2] * (height[:, 0] - h + 1))
    left = np.floor(u[:, 3] * (width[:, 0] - w + 1))
    boxes = np.stack([top, left, h, w], 1).astype(np.int64)
    for i in np.flatnonzero(~fits.any(1)):
        boxes[i] = _central(int(shapes[i, 0]), int(shapes[i, 1]))
    return boxes


def _central(height: int, width: int) -> tuple[int, int, int, int]:
    h = min(height, max(1, round(width / _RATIO[0])))
    w = min(width, max(1, round(height * _RATIO[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def uniform(seed: int, epoch: int, rows: Indices, count: int) -> npt.NDArray[np.float64]:
    """(n, count) numbers in [0, 1) for n rows: a function of (seed, epoch, row, place) alone.

    The counter-based form of SplitMix64 (Steele, Lea and Flood 2014): a whole batch in a few array operations, where a
    generator for each image would cost more than cropping it.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        key = _mix(_mix(np.uint64(seed) * _GOLDEN + np.uint64(1)) + np.uint64(epoch) * _GOLDEN)
        of_row = _mix(key + rows.astype(np.uint64) * _GOLDEN)
        bits = _mix(of_row[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    drawn: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return drawn


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _same(image: torch.Tensor) -> torch.Tensor:
    return image


def train_transform(data_config: Mapping[str, Any], config: RunConfig) -> TrainTransform:
    """The augmentation of a run, at the size and with the interpolation and mean of the weights."""
    return TrainTransform(
        size=tuple(data_config["input_size"][1:]),
        interpolation=data_config["interpolation"] if data_config["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(data_config["mean"]),
        crop=config.crop,
        scale=config.scale,
        hflip=config.hflip,
        aa=config.aa,
        color_jitter=config.color_jitter,
        cutout=config.cutout,
        erase=config.reprob,
    )


def mix(
    images: torch.Tensor, labels: torch.Tensor, classes: int, *, mixup: float, cutmix: float, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a normalised batch, one of them by chance if both.

    (batch, 3, h, w), (batch,) -> the same images mixed in pairs, (batch, classes) shares. mixup, cutmix: alpha of each;
    with 0 for both nothing changes. What is drawn depends on (seed, step) alone.
    """
    kinds = [kind(alpha=a, num_classes=classes) for kind, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a > 0]
    if not kinds:
        return images, labels
    draws = uniform(seed, step, np.zeros(1, np.int64), 2)[0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(draws[0] * 2**53))
        mixed: tuple[torch.Tensor, torch.Tensor] = kinds[int(draws[1] * len(kinds))](images, labels)
    return mixed


class EvalTransform:
    """A picture, resized and cropped as the pretrained weights were evaluated: by timm's rule, crop share and mode.

    Pictures are resized as uint8, as Pillow does and with it timm's own evaluation: most values are the same, the
    others at most 2 of 255 apart. timm's transform of a tensor goes through float32, which takes several times as long;
    values are at most 1 of 255 apart, but further where bicubic overshoots black or white, which uint8 cuts off.
    What uint8 cannot do (nearest, lanczos) is timm's transform.

    Of a very long picture the ends, which the central crop leaves out, are cut off before it is resized: that would
    make a picture of 6000 x 10 pixels one of 134,400 x 224.

    size: (height, width) of the result.
    """

    def __init__(self, data_config: Mapping[str, Any]) -> None:
        self.size: tuple[int, int] = tuple(data_config["input_size"][1:])
        self._interpolation: str = data_config["interpolation"]
        self._crop_mode: str = data_config["crop_mode"]
        self._resized = tuple(math.floor(side / data_config["crop_pct"]) for side in self.size)
        # "border" shows the whole picture, on a ground of the mean colour; the others are black beside a small one.
        mean = data_config["mean"] if self._crop_mode == "border" else (0, 0, 0)
        self._ground = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)
        self._timm: Transform | None = None
        if self._interpolation not in ("bilinear", "bicubic"):
            settings = {key: data_config[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode")}
            self._timm = timm.data.create_transform(**settings, is_training=False, normalize=False)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(3, h, w) uint8 -> (3, height, width) uint8."""
        if self._crop_mode not in ("squash", "border"):  # these keep the ends
            image = _without_ends(image)
        if self._timm is not None:
            return self._timm(image)
        size = self._resized_size(*image.shape[1:])
        return self._centre(_resize(_as_batch(image.permute(1, 2, 0).numpy()), size, self._interpolation)[0])

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        """What a picture becomes before it is cropped; rounded as torchvision and timm do."""
        if self._crop_mode == "squash":
            return self._resized
        if self._crop_mode != "border" and self.size[0] == self.size[1]:
            short, side = min(height, width), self._resized[0]
            return int(side * height / short), int(side * width / short)
        ratios = height / self._resized[0], width / self._resized[1]
        ratio = max(ratios) if self._crop_mode == "border" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def _centre(self, image: torch.Tensor) -> torch.Tensor:
        """The middle of an image, with room around it where it is smaller than that."""
        to, of = zip(*map(_overlap, self.size, image.shape[1:]), strict=True)
        seen = image[:, *of]
        if seen.shape[1:] == self.size:
            return seen
        framed = self._ground.repeat(*self.size, 1).permute(2, 0, 1)
        framed[:, *to] = seen
        return framed


def _overlap(room: int, length: int) -> tuple[slice, slice]:
    """Where in the room, and what of the length, lies what is seen of it when the middles meet; halves as timm does."""
    if length < room:
        start = (room - length) // 2
        return slice(start, start + length), slice(None)
    start = round((length - room) / 2)
    return slice(None), slice(start, start + room)


def _as_batch(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """(h, w, 3) -> (1, 3, h, w), channels last in memory: to resize a view, torch takes it apart into planes."""
    return torch.from_numpy(np.ascontiguousarray(pixels).reshape(1, *pixels.shape)).permute(0, 3, 1, 2)


def _resize(images: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """(n, 3, h, w) uint8, channels last in memory -> (n, 3, *size), with antialiasing."""
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode=interpolation, antialias=True, align_corners=False)


def empty_batch(n: int, size: tuple[int, int], *, pin_memory: bool = False) -> torch.Tensor:
    """(n, 3, *size) uint8, not filled, channels last in memory. pin_memory: a GPU can copy from it by itself."""
    return torch.empty((n, *size, 3), dtype=torch.uint8, pin_memory=pin_memory).permute(0, 3, 1, 2)


def _without_ends(image: torch.Tensor) -> torch.Tensor:
    """The central part, at most LONGEST times as long as it is wide. (3, h, w) -> (3, h', w')."""
    height, width = image.shape[1:]
    most = LONGEST * min(height, width)
    if max(height, width) <= most:
        return image
    top, left = max(0, height - most) // 2, max(0, width - most) // 2
    return image[:, top : top + most, left : left + most]


def min_side(data_config: Mapping[str, Any], config: RunConfig) -> int:
    """Pixels of a picture's shorter side from which on more would not be seen, in training or in evaluation.

    Twice what evaluation resizes it to, and as much as the smallest training crop needs to fill the input.
    """
    size: int = max(data_config["input_size"][1:])
    smallest_crop = math.sqrt(config.scale * _RATIO[0]) if config.crop == "resized" else 1.0
    crop_share: float = data_config["crop_pct"]
    return math.ceil(max(2 * size / crop_share, size / smallest_crop))


def model_input(images: torch.Tensor, data_config: Mapping[str, Any], channels_last: bool) -> torch.Tensor:
    """(batch, 3, h, w) uint8 -> float32, normalised, channels last in memory or not; float images are ready already."""
    if images.is_floating_point():
        return images
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return normalize(images, data_config).contiguous(memory_format=layout)


def normalize(images: torch.Tensor, data_config: Mapping[str, Any]) -> torch.Tensor:
    """(batch, 3, h, w) uint8 -> float32 with the weights' own mean and standard deviation (stated for [0, 1]).

    The result is channels last in memory. Rows of pixels meet mean and deviation repeated along a row: with three
    values at a time a CPU would take six times as long.
    """
    n, channels, height, width = images.shape
    mean, std = (_along_a_row(tuple(data_config[key]), width, images.device) for key in ("mean", "std"))
    rows = images.permute(0, 2, 3, 1).reshape(n * height, width * channels)
    return (rows - mean).div_(std).view(n, height, width, channels).permute(0, 3, 1, 2)


@cache  # to copy three numbers to a GPU, the thread that launches kernels would wait for all those before
@torch.inference_mode(False)  # an evaluation may be the first to ask, and training can use none of its tensors
def _along_a_row(of_channels: tuple[float, ...], width: int, device: torch.device) -> torch.Tensor:
    """Values of the channels, stated for [0, 1], for uint8, repeated along a row: (3 x width,)."""
    return (torch.tensor(of_channels, device=device) * 255).repeat(width)
