"""The command line in a process in which something breaks at a chosen place.

    python -m tests.support.fault_injection '[{"at": "perturb", "call": 3, "do": "SIGKILL"}]' run --model ...

Each fault: at: a name of POINTS. call: at which call of that function, from 1. do: a signal to the process itself, or,
as "parent SIGTERM", to its parent; "hang", or "pause" until a signal comes; "oom"; "ENOSPC" and the like, raised in the
function's place; "nan", its result becomes NaN; "wreck", the parameters of a Perturbation become NaN; "fill FILE", FILE
takes all room that its disk has left; "limit BYTES", no file may grow beyond that. when: "before" (default) or "after"
the call. again: true breaks the later calls, too. rank: of several ranks the one in which it happens, and in none that
is started again. only: what the command line must have in it, as "final-sam-seed0", to break one run of a sweep alone.
"""

import contextlib
import errno
import importlib
import json
import math
import os
import resource
import signal
import sys
import threading
from typing import Any

import torch

POINTS = {
    "perturb": "samtune.sam.perturbation:Perturbation.add_",
    "backward": "samtune.sam.runner:EagerRunner.descend",
    "train loss": "samtune.train.setup:cross_entropy",
    "gradient norm": "torch.nn.utils:get_total_norm",
    "optimizer update": "torch.optim.sgd:sgd",
    "make symlink": "pathlib:Path.symlink_to",
    "each loss": "samtune.sam.losses:cross_entropy",
    "step": "samtune.sam.step:Step.__call__",
    "step at a batch size": "samtune.sam.step:Step._attempt",
    "eval batch to device": "samtune.train.evaluation:to_device",
    "evaluate": "samtune.train.loop:evaluate",
    "predict labels": "samtune.train.eval_checkpoint:evaluate",
    "train step": "samtune.train.loop:Trainer._step",
    "preflight": "samtune.train.preflight:check_before_slow_work",
    "build setup": "samtune.train.setup:build_setup",
    "build model": "samtune.train.setup:build_model",
    "decode": "samtune.data.cache:decode",
    "read images": "samtune.data.cache:Images.take",
    "save checkpoint": "samtune.runs.checkpoint:save",
    "write checkpoint file": "samtune.runs.checkpoint:_write",
    "verify checkpoint": "samtune.runs.checkpoint:verify",
    "update link": "samtune.runs.checkpoint:update_link",
    "prune checkpoints": "samtune.runs.checkpoint:prune",
    "write run file": "samtune.runs.run_log:write_atomic",
    "build report": "samtune.report.run_report:build",
    "write rank status": "samtune.distributed.rank_status:write_status",
    "exit with launcher": "samtune.distributed.environment:exit_with_launcher",
    "classify": "samtune.predict.predictor:Predictor.classify",
    "measure sharpness": "samtune.sharpness.run:measure",
    "Hessian product": "samtune.sharpness.hessian:Hessian.__matmul__",
    "start TensorBoard": "samtune.train.trackers:_TensorBoard.__init__",
    "TensorBoard row": "samtune.train.trackers:_TensorBoard.log_row",
    "end TensorBoard": "samtune.train.trackers:_TensorBoard.finish",
}
"""Where a fault can be injected: name -> module:function, in the module whose call breaks."""


def find(point: str) -> tuple[Any, str]:
    """The module or class that holds the function of a fault point, and the function's name there."""
    module_name, _, path = POINTS[point].partition(":")
    holder: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    return holder, name


def break_at(at: str, call: int, do: str, when: str = "before", again: bool = False) -> None:
    holder, name = find(at)
    function = getattr(holder, name)
    calls = 0

    def act(*arguments: Any) -> None:
        if do.startswith("parent "):
            os.kill(os.getppid(), signal.Signals[do.removeprefix("parent ")])
        elif do.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[do])
        elif do == "hang":
            threading.Event().wait()
        elif do == "pause":
            signal.pause()
        elif do == "oom":
            raise torch.OutOfMemoryError("simulated")
        elif do.startswith("fill "):
            with contextlib.suppress(OSError), open(do.removeprefix("fill "), "ab", buffering=0) as file:
                while True:
                    file.write(bytes(2**20))
        elif do.startswith("limit "):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(do.removeprefix("limit ")),) * 2)
        elif do in errno.errorcode.values():
            raise OSError(getattr(errno, do), os.strerror(getattr(errno, do)))
        elif do == "wreck":
            with torch.no_grad():
                arguments[0].params[0].fill_(math.nan)

    def broken(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        hit = calls == call or (again and calls > call)
        if hit and when == "before":
            act(*arguments)
        result = function(*arguments, **named)
        if hit and do == "nan":
            return result * math.nan
        if hit and when == "after":
            act(*arguments)
        return result

    setattr(holder, name, broken)


def break_here(faults: list[dict[str, Any]]) -> None:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    for fault in faults:
        is_here = str(fault.pop("rank", here := os.environ.get("RANK"))) == str(here)
        if fault.pop("only", "") in " ".join(sys.argv[1:]) and is_here:
            break_at(**fault)


def prepare(faults: str) -> None:
    """Break this process, and those that it starts."""
    from samtune.distributed import launch
    from samtune.sweep import executors

    launch.COMMAND = executors.COMMAND = (sys.executable, "-m", "tests.support.fault_injection", faults)
    break_here(json.loads(faults))


if __name__ == "__main__":
    prepare(sys.argv.pop(1))
    from samtune.cli.main import main

    main()
