"""A run folder has one writer at a time.

The lock is an exclusive flock on `folder/.lock`. It ends with its process, at SIGKILL too, and forked data workers do
not keep it. The text in the file says whose lock it is, and means nothing once that process has ended.
"""

import errno
import fcntl
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from samtune import console
from samtune.errors import MachineError

Lock = FileLock
_PATIENCE = 1.0  # seconds; `holder` shares the lock for an instant, which must not refuse a writer that begins then
_TAKEN = (errno.EACCES, errno.EAGAIN)  # file systems differ
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # as on Lustre that is mounted without them


class InUse(MachineError):
    """Another process writes the folder."""


def acquire(folder: Path) -> Lock:
    """Make this process the folder's writer until `release` or its end. Raises InUse, which names the other writer.

    The file stays when the lock is released: to remove it could take it from one who has just opened it.
    """
    check_unused(folder)
    lock = FileLock(
        folder / ".lock",
        timeout=_PATIENCE,
        poll_interval=0.01,
        thread_local=False,
        fallback_to_soft=False,
        preserve_lock_file=True,
        on_acquired=_write_holder,
    )
    try:
        folder.stat()  # filelock makes folders that are not there
        lock.acquire()
    except Timeout:
        raise in_use(folder, holder(folder) or "another process") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise MachineError(
                f"run folder {folder} cannot be written", error.strerror or "", "give another --output"
            ) from None
        console.warn(f"run folder {folder} cannot be locked ({error.strerror}): let no other process write it")
    return lock


def try_acquire(folder: Path) -> Lock | None:
    """The lock of a run folder; None if another process holds it."""
    try:
        return acquire(folder)
    except InUse:
        return None


def holder(folder: Path) -> str | None:
    """Who writes the folder now, as "process 123 on host h"; None if nobody does, or if it cannot be told.

    Changes nothing, and needs no more than the right to read the folder, which filelock does not offer.
    """
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _read_holder(descriptor) if error.errno in _TAKEN else None
    finally:
        os.close(descriptor)  # ends the shared lock too
    return None


def check_unused(folder: Path) -> None:
    """Raise InUse if a process writes the folder."""
    who = holder(folder)
    if who is not None:
        raise in_use(folder, who)


def in_use(folder: Path, who: str) -> InUse:
    """The error for a folder that another process writes."""
    return InUse(f"run folder {folder} is in use", f"{who} writes it", "wait for it, or give another --output")


def _write_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def _read_holder(descriptor: int) -> str:
    match os.pread(descriptor, 300, 0).decode(errors="replace").split():
        case [pid, host]:
            return f"process {pid} on host {host}"
    return "another process"  # it has the lock, and has not yet written so
