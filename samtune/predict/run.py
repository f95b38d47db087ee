"""Pictures -> files of predictions, embeddings and a page: `samtune predict`, without its command line."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from samtune import console
from samtune.console import stdio
from samtune.data.inputs import Inputs
from samtune.distributed import collectives, device
from samtune.errors import DataError, plural, shorten
from samtune.predict import writers
from samtune.predict.page import Gallery
from samtune.predict.predictor import Predictor, Tta, predict

_NAMED = 10  # bad pictures in the error message; a warning names each


def run(
    checkpoint_or_run: Path,
    inputs: Inputs,
    *,
    name: Literal["last", "best"] | None,
    ema: bool | None,
    use_temperature: bool,
    tta: Tta | None,
    kind: str,
    output: Path | None,
    top: int,
    every: bool,
    embeddings: Path | None,
    html: Path | None,
    workers: int | None,
    gpus: str,
    processes: int | None,
    on_bad_image: Literal["error", "skip"],
    progress: console.RunProgress,
) -> dict[str, Any]:
    """Classify all inputs on all ranks, and write what is asked for on rank 0; returns the summary.

    output: None for stdout. workers: threads that decode, on each rank; None: as many as a run takes. The other
    arguments are those of Predictor, `writers.writer` and the command.

    Raises DataError for pictures that cannot be decoded, after all others are written, unless on_bad_image is "skip".
    """
    target = device.select_device(gpus, processes)
    collectives.init(target)
    with collectives.local_main_process_first():
        predictor = Predictor(
            checkpoint_or_run, name=name, ema=ema, use_temperature=use_temperature, tta=tta, device=target
        )
    if collectives.rank() == 0 and predictor.temperature is not None:
        console.info(f"temperature {predictor.temperature.temperature:.3g} (--no-temperature leaves it out)")
    if workers is None:
        workers, _ = device.loading_workers(target, device.available_cpus() // collectives.local_world_size())
    batches = predict(
        predictor,
        inputs,
        workers=workers,
        embeddings=embeddings is not None,
        is_enough=lambda: output is None and embeddings is None and html is None and stdio.reader_is_gone(),
    )
    if collectives.rank() > 0:
        for _ in batches:
            pass
        return collectives.broadcast_from_rank0(dict)  # an error of rank 0 is raised here, too
    with ExitStack() as stack:
        file = stack.enter_context(writers.opened(output))
        rows = writers.writer(kind, file, predictor.class_names, top=top, every=every)
        pooled = writers.Embeddings(embeddings) if embeddings is not None else None
        if pooled is not None:
            stack.callback(pooled.discard)
        gallery = Gallery(predictor) if html is not None else None
        n, bad, started, total = 0, [], time.monotonic(), inputs.count()
        for batch in batches:
            rows.write([one.path for one in batch.inputs], batch.probabilities)
            if pooled is not None and batch.embeddings is not None:
                pooled.write(batch.embeddings)
            if gallery is not None:
                gallery.add(batch)
            for one, error in batch.bad:
                bad.append({"path": one.path, "reason": error.cause or error.message})
                console.warn("left out: {path}: {reason}".format(**bad[-1]))
            n += len(batch.inputs)
            progress.count("predicting", n + len(bad), total, n / (time.monotonic() - started))
        summary = {
            "images": n,
            "bad_images": bad,
            "checkpoint": str(predictor.folder),
            "step": predictor.manifest["step"],
            "ema": predictor.ema,
            "temperature": predictor.temperature.temperature if predictor.temperature is not None else None,
            "tta": tta,
            "images_per_second": n / max(time.monotonic() - started, 1e-9),
        }
        rows.close(summary)
        if pooled is not None:
            pooled.close({"checkpoint": str(predictor.folder), "step": str(predictor.manifest["step"])})
        if gallery is not None and html is not None:
            gallery.write(html)
    written = ", ".join(str(path) for path in (output, embeddings, html) if path is not None)
    left_out = f", {len(bad)} left out" if bad else ""
    speed = f"{plural(n, 'picture')}, {summary['images_per_second']:.0f} images/s"
    console.info(f"{speed}{left_out}{f'; written: {written}' if written else ''}")
    collectives.broadcast_from_rank0(lambda: _raise_for_bad(bad, on_bad_image))
    return summary


def _raise_for_bad(bad: Sequence[dict[str, str]], on_bad_image: str) -> dict[str, Any]:
    if bad and on_bad_image == "error":
        raise DataError(
            f"{plural(len(bad), 'picture')} cannot be decoded",
            shorten([f"{one['path']}: {one['reason']}" for one in bad], _NAMED, "; "),
            "all others are predicted; fix or remove these, or give --on-bad-image skip",
        )
    return {}
