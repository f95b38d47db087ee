"""`samtune` with its libraries loaded once: each command is a process of its own, forked from one that waits.

Loading them takes longer than most commands of tests. What a library reads from the environment when it is loaded is
that of the waiting process: a command that needs another environment is started afresh (tests.conftest.samtune).
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WAIT = """
import importlib, json, os, signal, sys, traceback
import datasets, matplotlib.pyplot, timm, torch, datasets.packaged_modules.parquet.parquet
import samtune.cli.main, samtune.data.check.check, samtune.hub, samtune.report.comparison, samtune.report.run_page
import samtune.sweep.run, samtune.sweep.page, samtune.train.evaluation, samtune.train.loop
import tests.support.fault_injection

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        asked = json.loads(line)
        os.dup2(os.open(asked["out"], os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(os.open(asked["err"], os.O_CREAT | os.O_WRONLY), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        sys.argv = ["samtune", *asked["arguments"]]
        try:
            if asked["faults"]:
                tests.support.fault_injection.prepare(json.dumps(asked["faults"]))
            samtune.cli.main.main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the usual end would take torch apart, which takes a second
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Preloaded:
    """The process that waits, and the commands that are forked from it, one at a time."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        """folder: for what commands say. env: in which the libraries are loaded, and commands run if not said."""
        self.folder, self.env, self.number = folder, env, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WAIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=env,
        )

    def samtune(
        self,
        *arguments: object,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        faults: Sequence[dict[str, Any]] = (),
        timeout: float = 600,
    ) -> tuple[subprocess.CompletedProcess[str], float]:
        """What came of a command line, and the seconds that it took. faults: of tests/support/fault_injection.py."""
        self.number += 1
        out, err = (self.folder / f"{self.number}.{stream}" for stream in ("out", "err"))
        assert self.process.stdin is not None
        began = time.monotonic()
        asked = {"arguments": list(map(str, arguments)), "out": str(out), "err": str(err), "faults": list(faults)}
        asked |= {"env": env or self.env, "cwd": str(cwd or os.getcwd())}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        child = int(self._line(timeout))
        try:
            code = int(self._line(timeout))
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            self._line(timeout)
            raise
        took = time.monotonic() - began
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text()), took

    def _line(self, timeout: float) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready:
            raise TimeoutError("the command does not end")
        return self.process.stdout.readline()

    def close(self) -> None:
        """End the process that waits."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
