"""A checkpoint -> names and probabilities of pictures, decoded and computed as in the run's own evaluation.

    from samtune import Predictor

    predict = Predictor("runs/r1")
    for one in predict(["a.jpg", image]):  # paths, PIL images, arrays
        print(one.class_name, one.probability, one.top(3))

`predict` classifies any number of pictures, one batch after the other, on all ranks.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from samtune.data.decode import decode, from_pillow
from samtune.data.inputs import Input, inputs_of
from samtune.data.transforms import EvalTransform
from samtune.distributed import collectives
from samtune.distributed.device import (
    autocast,
    retry_with_smaller_batch,
    select_device,
    set_float32_arithmetic,
)
from samtune.errors import DataError, Diverged, UsageError
from samtune.models.head import features_and_logits
from samtune.models.timm_format import load_checkpoint
from samtune.predict.ranking import Floats, ranked
from samtune.runs import checkpoint
from samtune.train import temperature
from samtune.train.evaluation import to_device

Tta = Literal["hflip"]
Picture = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]
_AHEAD = 2  # batches that are decoded while the model computes another


@dataclass(frozen=True)
class Prediction:
    """The prediction for one picture. probabilities: (classes,) float32 with sum 1, in the order of `class_names`."""

    class_name: str
    probability: float
    probabilities: Floats = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k most probable classes with their probabilities, the most probable first; at most all classes."""
        return [(self.class_names[i], float(self.probabilities[i])) for i in ranked(self.probabilities[None], k)[0]]


@dataclass(frozen=True)
class Batch:
    """Predictions for some of the pictures, in order. bad: those that cannot be decoded, with the error.

    probabilities: (n, classes) of the other n. embeddings: (n, features), or None if not wanted.
    """

    inputs: Sequence[Input]
    probabilities: Floats
    embeddings: Floats | None
    bad: Sequence[tuple[Input, DataError]]


class Predictor:
    """A checkpoint that classifies pictures. Its data set is not opened.

    checkpoint_or_run: a run folder, or a checkpoint folder inside one. name: "last" or "best" of a run; None takes the
    one that the run's report scored. ema: the averaged weights; None takes them where the report scored them.
    use_temperature: whether probabilities follow the temperature that `samtune eval --temperature` has stored, if there
    is one. tta: "hflip" gives the mean over a picture and its mirror image. device: "cpu", "cuda", "cuda:1"; None takes
    the first GPU, if there is one.

    Raises:
        CheckpointError: no such run or checkpoint, or a damaged one.
        UsageError: ema where there are no averaged weights.
    """

    def __init__(
        self,
        checkpoint_or_run: str | os.PathLike[str],
        *,
        name: Literal["last", "best"] | None = None,
        ema: bool | None = None,
        use_temperature: bool = True,
        tta: Tta | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if tta not in (None, "hflip"):
            raise UsageError(f"tta {tta!r}: must be 'hflip' or None")
        opened = checkpoint.open_weights(Path(checkpoint_or_run), name, ema=ema)
        self.folder, self.manifest, self.config = opened.folder, opened.manifest, opened.config
        self.ema: bool = opened.ema
        self.temperature = temperature.read(opened.weights) if use_temperature else None
        self.class_names: tuple[str, ...] = tuple(map(str, self.manifest["class_names"]))
        self.decode_rule = checkpoint.decode_rule(self.manifest)
        self.device = torch.device(device) if device is not None else select_device()
        model, self.data_config = load_checkpoint(opened.weights)
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        self._model = model.to(device=self.device, memory_format=layout)  # type: ignore[call-overload]
        self._transform = EvalTransform(self.data_config)
        self._autocast = autocast(self.device, self.config.amp_dtype)
        self._tta = tta
        self.batch_size: int = 2 * self.config.device_batch
        """Pictures per forward pass: as in the run's own evaluation, and halved where memory runs out."""

    def __call__(self, images: Picture | Iterable[Picture]) -> list[Prediction]:
        """Classify pictures: one prediction each, in their order.

        images: paths; PIL images of any mode; uint8 arrays (height, width), (height, width, 3) RGB or 4 with alpha.
        Raises DataError for a picture that cannot be read or decoded, UsageError for what is no picture.
        """
        probabilities, _ = self._compute(images, embeddings=False)
        best = ranked(probabilities, 1)[:, 0].tolist()
        return [
            Prediction(self.class_names[i], float(row[i]), row, self.class_names)
            for i, row in zip(best, probabilities, strict=True)
        ]

    def embed(self, images: Picture | Iterable[Picture]) -> Floats:
        """The pooled features of pictures, the classifier's input: (n, features) float32. Raises as __call__ does."""
        _, embeddings = self._compute(images, embeddings=True)
        assert embeddings is not None
        return embeddings

    def _compute(self, images: Picture | Iterable[Picture], *, embeddings: bool) -> tuple[Floats, Floats | None]:
        if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
            images = [images]
        pixels = map(self._pixels, images)
        batches: list[tuple[Floats, Floats | None]] = []
        while some := list(itertools.islice(pixels, self.batch_size)):
            batches.append(self.classify(some, embeddings=embeddings))
        if not batches:
            return np.zeros((0, len(self.class_names)), np.float32), np.zeros((0, 0), np.float32)
        pooled = [features for _, features in batches if features is not None]
        return np.concatenate([p for p, _ in batches]), np.concatenate(pooled) if pooled else None

    def _pixels(self, picture: Picture) -> torch.Tensor:
        if isinstance(picture, str | os.PathLike):
            loaded = self.load(next(inputs_of([picture])))
            if isinstance(loaded, DataError):
                raise loaded
            return loaded
        if isinstance(picture, np.ndarray):
            picture = _of_array(picture)
        if not isinstance(picture, Image.Image):
            hint = "give a path, a PIL image or a uint8 array"
            raise UsageError(f"a {type(picture).__name__} is no picture", hint=hint)
        return self._transform(from_pillow(picture, self.decode_rule))

    def load(self, one: Input) -> torch.Tensor | DataError:
        """A picture as the model's input, (3, size, size) uint8, or the error for one that cannot be decoded."""
        try:
            return self._transform(decode(one.read(), lambda: one.path, self.decode_rule))
        except DataError as error:
            return error

    def classify(self, images: Sequence[torch.Tensor], *, embeddings: bool) -> tuple[Floats, Floats | None]:
        """(3, size, size) uint8 each -> probabilities (n, classes), and (n, features) or None; on this rank only.

        Where memory runs out, the batch size is halved for this and all later calls.

        Raises:
            Diverged: NaN or inf.
            OutOfMemory: one image does not fit.
        """

        def attempt(size: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
            outputs = [self._forward(images[i : i + size], embeddings) for i in range(0, len(images), size)]
            self.batch_size = min(self.batch_size, size) if size < len(images) else self.batch_size
            return outputs

        set_float32_arithmetic(self.device, self.config.amp_dtype)
        outputs = retry_with_smaller_batch(attempt, self.batch_size, self.data_config["input_size"])
        probabilities = torch.cat([p for p, _ in outputs]).numpy()
        if not np.isfinite(probabilities).all():
            raise Diverged(
                "the model's output is not finite",
                f"{int((~np.isfinite(probabilities)).any(axis=1).sum())} of {len(probabilities)} pictures",
                "take another checkpoint of the run (last, best)",
            )
        pooled = [features for _, features in outputs if features is not None]
        return probabilities, torch.cat(pooled).numpy() if pooled else None

    @torch.inference_mode()
    def _forward(self, images: Sequence[torch.Tensor], embeddings: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch = torch.stack(list(images))
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        plain = self._forward_once(batch, embeddings)
        if self._tta is None:
            return plain
        mirrored = self._forward_once(batch.flip(-1), embeddings)
        pooled = None if plain[1] is None or mirrored[1] is None else (plain[1] + mirrored[1]) / 2
        return (plain[0] + mirrored[0]) / 2, pooled

    def _forward_once(self, batch: torch.Tensor, embeddings: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        pooled = None
        with self._autocast():
            moved = to_device(batch, self.device, self.data_config, self.config.channels_last)
            if embeddings:
                pooled, logits = features_and_logits(self._model, moved)
            else:
                logits = self._model(moved)
        logits = logits.float()
        if self.temperature is not None:
            logits = logits / self.temperature.temperature
        return logits.softmax(1).cpu(), None if pooled is None else pooled.float().cpu()


def _of_array(array: npt.NDArray[Any]) -> Image.Image:
    channels = array.shape[2:] or (1,)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in ((1,), (3,), (4,)) or 0 in array.shape:
        hint = "give uint8 (height, width), (height, width, 3) RGB, or 4 with alpha"
        raise UsageError(f"an array of {array.dtype} {array.shape} is no picture", hint=hint)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if channels == (1,) and array.ndim == 3 else array))


# -------------------------------------------------------------------------------------------------------- on all ranks


def predict(
    predictor: Predictor,
    inputs: Iterable[Input],
    *,
    workers: int = 0,
    embeddings: bool = False,
    is_enough: Callable[[], bool] = bool,
) -> Iterator[Batch]:
    """Classify any number of pictures, in order, on all ranks. Only rank 0 gets batches; all must exhaust the iterator.

    inputs: only those of rank 0 are used. Batches go to the ranks in turn, and only a few are in memory. workers:
    threads that decode, on each rank; 0: this thread. is_enough: called on rank 0; True ends the iteration early.

    Raises what `Predictor.classify` and the iteration over inputs raise.
    """
    source, world, rank = iter(inputs), collectives.world_size(), collectives.rank()
    size = predictor.batch_size
    with _loading(predictor, workers) as load:
        ahead: deque[tuple[list[Input], list[Callable[[], torch.Tensor | DataError]]]] = deque()

        def look_ahead() -> bool:
            block = collectives.broadcast_from_rank0(
                lambda: [] if is_enough() else list(itertools.islice(source, size * world))
            )
            if block:
                part = block[rank * size : (rank + 1) * size]
                ahead.append((part, [load(one) for one in part]))
            return bool(block)

        more = all(look_ahead() for _ in range(_AHEAD))
        while ahead:
            part, results = ahead.popleft()
            more = more and look_ahead()
            classified = _classify(predictor, part, [result() for result in results], embeddings)
            batches = collectives.all_gather_object(classified)
            yield from (batch for batch in batches if batch is not None and rank == 0)


def _classify(
    predictor: Predictor, inputs: Sequence[Input], loaded: Sequence[torch.Tensor | DataError], embeddings: bool
) -> Batch | None:
    if not inputs:
        return None
    pairs = list(zip(inputs, loaded, strict=True))
    bad = [(one, error) for one, error in pairs if isinstance(error, DataError)]
    images = [image for image in loaded if isinstance(image, torch.Tensor)]
    good = [one for one, image in pairs if isinstance(image, torch.Tensor)]
    if not images:
        return Batch([], np.zeros((0, len(predictor.class_names)), np.float32), None, bad)
    return Batch(good, *predictor.classify(images, embeddings=embeddings), bad)


@contextmanager
def _loading(predictor: Predictor, workers: int) -> Iterator[Callable[[Input], Callable[[], torch.Tensor | DataError]]]:
    """A function that starts to load a picture and returns a function that waits for the result."""
    if workers == 0:
        yield lambda one: partial(predictor.load, one)
        return
    torch.get_num_threads()  # fixes this thread's number before the pool sets its own
    with ThreadPoolExecutor(workers, "loader", torch.set_num_threads, (1,)) as pool:
        try:
            yield lambda one: pool.submit(predictor.load, one).result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
