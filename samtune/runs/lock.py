"""A run folder has one writer at a time.

The lock is a POSIX record lock on `folder/.lock`. It belongs to the process: it ends with it, at SIGKILL too, and data
workers that were forked do not inherit it. What stands in the file only says whose lock it is; what an ended process
left there says nothing.

Two bytes of the file are locked. The first keeps writers apart. The second is for those who only ask whether there is
a writer: they may lock it for a moment themselves, and no writer that begins in that moment is refused for it.
"""

import errno
import fcntl
import os
import socket
from pathlib import Path

from samtune import console
from samtune.errors import MachineError

_WRITER, _ASKED = 0, 1  # the two bytes
_TAKEN = (errno.EACCES, errno.EAGAIN)  # POSIX allows both
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # as on Lustre that is mounted without them


class InUse(MachineError):
    """Another process writes the folder."""


class Lock:
    """The folder is written by this process, until `release` or its end."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._place, self._descriptor = _place(path), descriptor
        self._owner = os.getpid()
        _own[self._place] = self

    @property
    def held(self) -> bool:
        """False in a forked child, which has the descriptor but not the lock."""
        return self._owner == os.getpid() and _own.get(self._place) is self

    def release(self) -> None:
        """Let others write. A second call does nothing, nor does one in a forked child."""
        if self.held:
            del _own[self._place]
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)


# A process that closes any descriptor of a file loses its locks on it: the file of an own lock is never opened again.
_own: dict[tuple[int, int], Lock] = {}


def acquire(folder: Path) -> Lock:
    """Become the folder's writer. Raises MachineError, which names the process, if there is one already.

    The file stays when the lock is released: to remove it could take it from one who has just opened it.
    """
    path = folder / ".lock"
    if _is_own(path):
        raise in_use(folder, _words(os.getpid(), socket.gethostname()))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise MachineError(
            f"run folder {folder} cannot be written", error.strerror or "", "give another --output"
        ) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _WRITER)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            console.warn(f"run folder {folder} cannot be locked ({error.strerror}): let no other process write it")
            return Lock(path, descriptor)
        who = _read(descriptor)
        os.close(descriptor)
        if error.errno in _TAKEN:
            raise in_use(folder, who) from None
        raise MachineError(
            f"run folder {folder} cannot be locked", error.strerror or "", "give another --output"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, _ASKED)  # waits for those who ask, which is over at once
    return Lock(path, descriptor)


def try_acquire(folder: Path) -> Lock | None:
    """The same; None if there is a writer already."""
    try:
        return acquire(folder)
    except InUse:
        return None


def holder(folder: Path) -> str | None:
    """Who writes the folder now, as "process 123 on host h"; None if nobody does, or if it cannot be told."""
    path = folder / ".lock"
    if _is_own(path):
        return _words(os.getpid(), socket.gethostname())
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, _ASKED)
    except OSError as error:
        return _read(descriptor) if error.errno in _TAKEN else None
    finally:
        os.close(descriptor)  # ends the shared lock too
    return None


def _place(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _is_own(path: Path) -> bool:
    try:
        own = _own.get(_place(path))
    except OSError:
        return False
    return own is not None and own.held


def _read(descriptor: int) -> str:
    match os.pread(descriptor, 300, 0).decode(errors="replace").split():
        case [pid, host]:
            return _words(pid, host)
    return "another process"  # it has the lock, and has not yet written so


def _words(pid: int | str, host: str) -> str:
    return f"process {pid} on host {host}"


def in_use(folder: Path, who: str) -> InUse:
    """The error for a folder that another process writes."""
    return InUse(f"run folder {folder} is in use", f"{who} writes it", "wait for it, or give another --output")
