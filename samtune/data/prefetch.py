"""Batches on their way to a GPU: each is copied while the one before it is computed with."""

from collections import deque

import torch

from samtune.data.loader import Batch, Batches


def prefetch(batches: Batches, target: torch.device) -> Batches:
    """The same batches on the device, copied one ahead on a side stream; for a CPU the iterator itself.

    batches: in pinned memory, else the copies hold up this thread. What goes wrong with a batch is raised when it is
    asked for, not while the one before it is.
    """
    return _copied_ahead(batches, target) if target.type == "cuda" else batches


def _copied_ahead(batches: Batches, target: torch.device) -> Batches:
    stream = torch.cuda.Stream(target)
    ahead: deque[tuple[Batch, torch.cuda.Event]] = deque()  # batches and the ends of their copies
    used: deque[torch.cuda.Event] = deque()  # ends of the work with batches that were delivered

    def copy_next() -> Exception | None:
        """Start to copy the next batch, if there is one. Returns the error with which the loader ended instead."""
        try:
            batch = next(batches, None)
        except Exception as error:
            return error
        if batch is not None:
            with torch.cuda.stream(stream):
                images, labels = (part.to(target, non_blocking=True) for part in batch)
                ahead.append(((images, labels), stream.record_event()))
        return None

    def arrived() -> Batch:
        batch, copied = ahead.popleft()
        computing = torch.cuda.current_stream(target)
        computing.wait_event(copied)  # the GPU waits, this thread goes on
        for part in batch:
            part.record_stream(computing)  # else the next copies might get its memory while it is still in use
        return batch

    try:
        failed = copy_next()
        while ahead:
            failed = copy_next()
            yield arrived()
            if failed is not None:
                break
            used.append(torch.cuda.current_stream(target).record_event(torch.cuda.Event(blocking=True)))
            # An evaluation reads nothing from the GPU until its end: all its batches might come to lie there.
            if len(used) > 1 and not (before := used.popleft()).query():
                before.synchronize()
        if failed is not None:
            raise failed
    finally:
        batches.close()
