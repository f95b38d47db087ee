"""pytest on another copy of the package, in a process forked from one that has loaded the libraries.

Loading them takes longer than most tests. The package itself is loaded anew in each process, from its copy.
"""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

_WAIT = """
import json, os, sys
import datasets, pytest, pytorch_optimizer, scipy.stats, timm, torch

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        asked = json.loads(line)
        os.dup2(os.open(asked["output"], os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.chdir(asked["copy"])
        os.environ["PYTHONPATH"] = asked["copy"]  # for the processes that tests start
        sys.path.insert(0, asked["copy"])
        code = pytest.main(asked["arguments"])
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _waiting() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",  # where there is no package to load by mistake
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    atexit.register(process.terminate)
    return process


def run(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run these tests, in whatever lane they are, until one fails. copy: a folder with samtune/ and tests/."""
    output = copy / "output.txt"
    options = "-q -x -n 0 -p no:cacheprovider -W ignore::pytest.PytestAssertRewriteWarning"  # plugins that are loaded
    arguments = [*options.split(), "-m", "", *(f"tests/{test}" for test in tests)]
    process = _waiting()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"copy": str(copy), "output": str(output), "arguments": arguments}) + "\n")
    process.stdin.flush()
    return subprocess.CompletedProcess(tests, int(process.stdout.readline()), output.read_text())
