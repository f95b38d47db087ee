"""A run whose loss or gradient is not finite: what it leaves to look into, and the error that ends it."""

import json
import math
from contextlib import suppress

from torch import nn

from samtune.data.loader import rows_of_step
from samtune.distributed import collectives
from samtune.errors import Diverged, plural
from samtune.runs.run_log import RunLog
from samtune.sam.step import StepResult
from samtune.train.setup import Setup
from samtune.train.state import TrainState


def diverged(setup: Setup, state: TrainState, log: RunLog, step: int, result: StepResult, in_a_row: int) -> Diverged:
    """Write diagnostics.json, and return the error that ends the run. in_a_row: steps without an update so far."""
    rho = setup.update.sam.rho
    where = "the loss is not finite at the weights themselves, in pass 1"
    if math.isfinite(result.loss):
        where = f"the loss is finite, its gradient is not, or not in pass 2, at the perturbed weights (rho {rho:g})"
    content = {
        "step": step,
        "epoch": setup.epoch(step),
        "where": where,
        "loss": str(result.loss),
        "grad_norm": str(result.grad_norm),
        "mean_loss_before": str(state.epoch.means()["loss"]) if state.epoch.steps else None,
        "lr": [group["lr"] for group in setup.optimizer.param_groups],
        "rho": rho,
        "weights_finite": None if setup.is_sharded else is_finite(setup.model),
        "rows": rows_of_step(setup.train_rows, setup.batch.total, setup.config.seed, step - 1).tolist(),
    }
    with suppress(OSError):
        if collectives.rank() == 0:
            text = json.dumps(content, indent=2) + "\n"
            (log.folder / "diagnostics.json").write_text(text, encoding="utf-8")
    times = f"; {in_a_row} steps in a row" if in_a_row > 1 else ""
    times += f"; went back {plural(state.rollbacks, 'time')}" if state.rollbacks else ""
    return Diverged(
        f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}",
        f"{where}{times}; the weights were not updated with it, and diagnostics.json names the images",
        "go on with --resume and a lower --lr or --rho, or --on-nan skip (--allow-change lets each differ); "
        "or start anew with these, or with --clip-grad 1",
    )


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and buffers are finite."""
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())
