"""A run folder has one writer: real processes that hold the lock, look at it, and die."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from samtune.errors import MachineError
from samtune.runs import lock
from tests.conftest import ROOT

HOLD = """
import os, sys
from pathlib import Path
from samtune.runs import lock

held = lock.acquire(Path(sys.argv[1]))
child = 0
if "fork" in sys.argv:
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begins, b"x")
        sys.stdin.read()
        os._exit(0)
    os.read(begun, 1)
print(os.getpid(), child, flush=True)
sys.stdin.readline()
held.release()
print("released", flush=True)
sys.stdin.read()
"""

ASK = "import sys; from pathlib import Path; from samtune.runs import lock; print(lock.holder(Path(sys.argv[1])))"


@contextmanager
def another_process(folder, *more):
    """A process that has taken the folder; it releases it at a line on its stdin and ends with it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, *more], cwd=ROOT, stdin=-1, stdout=-1, text=True, bufsize=1
    )
    try:
        yield process, *map(int, process.stdout.readline().split())
    finally:
        process.kill()
        process.communicate()


def asked_elsewhere(folder):
    """What another process finds out."""
    asked = [sys.executable, "-c", ASK, folder]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_folder_that_another_process_writes_is_refused_with_its_pid_and_host(tmp_path):
    assert lock.holder(tmp_path) is None
    with another_process(tmp_path) as (_, pid, _):
        who = f"process {pid} on host {socket.gethostname()}"
        assert lock.holder(tmp_path) == who
        with pytest.raises(MachineError) as error:
            lock.acquire(tmp_path)
    assert str(error.value).splitlines() == [
        f"run folder {tmp_path} is in use",
        f"  cause: {who} writes it",
        "  hint:  wait for it, or give another --output",
    ]
    assert error.value.exit_code == 8


def test_a_released_folder_is_free_though_its_writer_lives(tmp_path):
    with another_process(tmp_path) as (process, pid, _):
        process.stdin.write("\n")
        assert process.stdout.readline() == "released\n"
        assert lock.holder(tmp_path) is None
        held = lock.acquire(tmp_path)
        assert asked_elsewhere(tmp_path) == f"process {os.getpid()} on host {socket.gethostname()}"
        assert is_alive(pid)
        held.release()
    assert asked_elsewhere(tmp_path) == "None"


def test_a_killed_writer_leaves_the_folder_free_at_once_though_its_forked_child_lives(tmp_path):
    with another_process(tmp_path, "fork") as (_, pid, child):
        assert lock.holder(tmp_path) is not None
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert is_alive(child)
        assert lock.holder(tmp_path) is None
        lock.acquire(tmp_path).release()


def test_a_folder_can_be_taken_only_if_it_is_free(tmp_path):
    with another_process(tmp_path):
        assert lock.try_acquire(tmp_path) is None
    held = lock.try_acquire(tmp_path)
    assert held.is_locked
    assert lock.try_acquire(tmp_path) is None
    held.release()
    with pytest.raises(MachineError, match="cannot be written"):
        lock.try_acquire(tmp_path / "nowhere")


def test_to_ask_does_not_end_the_own_lock(tmp_path):
    held = lock.acquire(tmp_path)
    try:
        who = f"process {os.getpid()} on host {socket.gethostname()}"
        (tmp_path / "alias").symlink_to(tmp_path)
        assert lock.holder(tmp_path) == lock.holder(tmp_path / "alias") == who
        with pytest.raises(MachineError, match="is in use"):
            lock.acquire(tmp_path / "alias")
        assert asked_elsewhere(tmp_path) == who
    finally:
        held.release()


def test_a_forked_child_can_neither_release_the_lock_nor_take_it_for_its_own(tmp_path):
    held = lock.acquire(tmp_path)
    who = lock.holder(tmp_path)
    child = os.fork()
    if child == 0:
        held.release()
        os._exit(0 if lock.holder(tmp_path) == who and not held.is_locked else 1)
    _, status = os.waitpid(child, 0)
    try:
        assert status == 0
        assert asked_elsewhere(tmp_path) == who
    finally:
        held.release()


def test_a_writer_that_begins_while_somebody_asks_is_not_refused(tmp_path):
    """The asker is stopped for a moment between its lock and its unlock."""
    with (tmp_path / ".lock").open("w") as asker:
        fcntl.flock(asker, fcntl.LOCK_SH)
        assert asked_elsewhere(tmp_path) == "None"
        threading.Timer(0.3, asker.close).start()
        held = lock.acquire(tmp_path)
        assert asker.closed
    held.release()


def test_a_folder_that_may_only_be_read_can_be_asked_and_not_taken(tmp_path, monkeypatch):
    """Permissions do not stop root, who may run the tests."""
    opened = os.open

    def only_to_read(path, flags, *mode):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *mode)

    with another_process(tmp_path) as (_, pid, _):
        monkeypatch.setattr("os.open", only_to_read)
        assert lock.holder(tmp_path) == f"process {pid} on host {socket.gethostname()}"
    with pytest.raises(MachineError, match="cannot be written") as error:
        lock.acquire(tmp_path)
    assert error.value.cause == "Permission denied"


def test_a_folder_that_is_not_there_has_no_writer_and_cannot_be_taken(tmp_path):
    assert lock.holder(tmp_path / "none") is None
    with pytest.raises(MachineError, match="cannot be written"):
        lock.acquire(tmp_path / "none")


def test_on_a_file_system_without_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    held = lock.acquire(tmp_path)
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err
    held.release()
    assert lock.holder(tmp_path) is None
