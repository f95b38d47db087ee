"""Setup: the data, model, optimizer and schedule of a run, built before anything is written."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data.transforms import model_input
from samtune.distributed import collectives, ddp, device, environment, fsdp
from samtune.errors import UsageError, plural
from samtune.models import compiled, training
from samtune.models.build import build_model, check_size
from samtune.models.cuts import find_cut
from samtune.models.head import head_names
from samtune.models.names import resolve
from samtune.models.timm_format import ModelInfo
from samtune.sam.gradient import SAM
from samtune.sam.gradient_rule import GradientRule
from samtune.sam.known_direction import ONE_PASS
from samtune.sam.losses import cross_entropy, l2_penalty
from samtune.sam.step import Step
from samtune.train.batch_plan import BatchPlan, group_size
from samtune.train.batch_search import resolve_batch_size
from samtune.train.defaults import peak_lr, resolve_amp_dtype, resolve_auto
from samtune.train.run_data import DecodeFunction, Resolved, RunData, load_run_data
from samtune.train.schedule import RhoSchedule, TrainingLength


@dataclass(kw_only=True)
class Setup(RunData):
    """All that a run needs, built before anything is written."""

    config: RunConfig  # nothing left open
    device: torch.device
    model: nn.Module
    average: training.WeightAverage | None
    info: ModelInfo
    optimizer: torch.optim.Optimizer
    update: Step
    rho: RhoSchedule
    batch: BatchPlan
    lr: float  # peak rate of the body
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    tail_start: int
    eval_batch: int | None = None  # images of an evaluation at once; None: not tried yet

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has only a part of the model. Methods that use it are then collective."""
        return self.update.sam.ranks.is_sharded

    @property
    def passes(self) -> float:
        """Forward-backward passes of all steps together."""
        sam_steps = len(self.rho.sam_steps)
        return sam_steps * self.update.sam.passes + (self.total_steps - sam_steps)

    def weights(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        """The state_dict of the run's model or of its average, whole on rank 0."""
        return fsdp.full_state_dict(model) if self.is_sharded else model.state_dict()

    def load(self, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """Load such a state_dict. Raises RuntimeError if it does not fit the model."""
        if self.is_sharded:
            fsdp.load_full_state_dict(model, weights)
        else:
            model.load_state_dict(weights)

    def optimizer_state(self) -> Mapping[int, Any]:
        """The optimizer's state by parameter, whole on rank 0. Learning rates and decay follow from config and step."""
        if self.is_sharded:
            return fsdp.full_optimizer_state(self.optimizer)
        state: Mapping[int, Any] = self.optimizer.state_dict()["state"]
        return state

    def load_optimizer_state(self, state: Mapping[int, Any]) -> None:
        """Load such a state."""
        if self.is_sharded:
            fsdp.load_full_optimizer_state(self.optimizer, state)
        else:
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that a step (from 1) belongs to."""
        return (step - 1) // self.steps_per_epoch + 1


def build_setup(
    config: RunConfig,
    resolved: Resolved | None = None,
    *,
    decode: DecodeFunction | None = None,
    world: collectives.World | None = None,
) -> Setup:
    """Read the data, build model, optimizer and schedule, and resolve what the config leaves open.

    The run folder stays open. resolved: of a run that resumes; the caller loads its weights. decode: decodes the
    images; by default all of them into the cache. world: the ranks that share the run, by default those that are
    running. Raises DataError, ModelError or CheckpointError.
    """
    if config.second_order and environment.rank_info() is not None:
        raise UsageError(
            "--second-order on several devices",
            "the derivative of the perturbation is computed on one device",
            "give --gpus 1, or leave out --second-order",
        )
    device.deterministic(config.deterministic)
    target = device.select_device(config.gpus, config.processes)
    obstacle = _obstacle_to_graphs(config, target)
    config = resolve_amp_dtype(config, target)
    device.set_float32_arithmetic(target, config.amp_dtype)
    if config.compile:
        compiled.check_compiler(target)
    resolve(config.model)  # a misspelt name need not wait for the data
    if resolved is None and config.img_size is not None:
        check_size(config.model, config.weights, config.img_size)
    collectives.init(target)
    torch.manual_seed(config.seed)
    with collectives.local_main_process_first():
        read = load_run_data(config, resolved, decode)
        console.info(f"loading model {config.model} ...")
        model, info = build_model(
            config.model,
            classes=len(read.data.class_names),
            weights=config.weights if resolved is None else None,
            pretrained=config.pretrained and resolved is None,
            img_size=config.img_size,
            drop=config.drop,
            drop_path=config.drop_path,
        )
    if resolved is not None:
        info = replace(info, **_kept(resolved.model))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    with device.oom_as_user_error(f"the weights of {info.resolved}"):
        model = model.to(device=target, memory_format=layout)  # type: ignore[call-overload]
    if config.sync_bn:
        model = training.convert_sync_bn(model, target)
    training.keep_inputs_of_activations(model)
    if not config.freeze_bn:
        training.allow_single_values(model)
    if config.grad_checkpointing:
        training.checkpoint_activations(model)

    with device.oom_as_user_error(f"the weights of {info.resolved} and their average"):
        decay = config.model_ema_decay if config.model_ema else None
        average = training.WeightAverage(model, decay) if config.averages_weights else None
        if config.shard:
            group = group_size(config.m) if isinstance(config.m, str) and config.m != "global" else None
            for part in (model, *([average.module] if average else [])):
                _shard(part, target, group)

    world = world or collectives.world()
    config = resolve_batch_size(config, model, info, len(read.train_rows), world.size)
    if config.compile:
        compiled.compile_blocks(model)  # the average that was copied from it stays as it is
    batch = BatchPlan.of(config, world.size, len(read.train_rows))
    config = resolve_auto(
        config, target, info, len(read.train_rows), batch, device.available_cpus() // world.local_size
    )
    lr = peak_lr(config, batch)
    length = TrainingLength.of(config, batch, len(read.train_rows))
    if average is not None:
        average.start = length.tail_start
    optimizer, penalty = _optimizer(model, config, lr, target)
    with device.oom_as_user_error(f"SAM's copy of the weights of {info.resolved}, or the buffers of the ranks"):
        sam = _sam(model, config, batch, info.data_config["input_size"], optimizer)
        if obstacle:
            sam.runner.reason = obstacle
        else:
            sam.use_cuda_graphs(required=config.graphs == "on")
    update = Step(
        sam,
        optimizer,
        partial(cross_entropy, smoothing=config.smoothing),
        clip_grad=config.clip_grad,
        autocast=device.autocast(target, config.amp_dtype),
        scaler=device.loss_scaler(target, config.amp_dtype),
        penalty=penalty,
        prepare=partial(model_input, data_config=info.data_config, channels_last=config.channels_last),
    )
    return Setup(
        **vars(read),
        config=config,
        device=target,
        model=model,
        average=average,
        info=info,
        optimizer=optimizer,
        update=update,
        batch=batch,
        lr=lr,
        **vars(length),
    )


def _kept(model: Mapping[str, Any]) -> dict[str, Any]:
    """What provenance.json knows of a model and its weights do not."""
    kept = {key: model[key] for key in ("requested", "weights", "pretraining", "data_config") if key in model}
    if "data_config" in kept:
        kept["data_config"] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept["data_config"].items()}
    return kept


def _optimizer(
    model: nn.Module, config: RunConfig, lr: float, target: torch.device
) -> tuple[torch.optim.Optimizer, Callable[[], torch.Tensor] | None]:
    """The base optimizer, and the L2 term that takes the place of its weight decay, if it is asked for."""
    assert config.weight_decay is not None
    in_optimizer = 0.0 if config.l2_in_loss else config.weight_decay
    groups = training.parameter_groups(model, lr=lr, head_lr=lr * config.head_lr_factor, weight_decay=in_optimizer)
    penalty = None
    if config.l2_in_loss:
        decayed = [w for w in model.parameters() if w.requires_grad and w.ndim > 1]
        penalty = partial(l2_penalty, decayed, config.weight_decay)
    fused = True if target.type == "cuda" and not config.shard else None  # None: torch's choice
    if config.opt == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, fused=fused), penalty
    return torch.optim.AdamW(groups, fused=fused), penalty


def _sam(
    model: nn.Module,
    config: RunConfig,
    batch: BatchPlan,
    input_size: Sequence[int],
    optimizer: torch.optim.Optimizer,
) -> SAM:
    batch.sharing(config.m)  # whether it can be
    if config.sam_when is not None and environment.rank_info() is not None:
        raise UsageError(
            f"--sam-when {config.sam_when} with {plural(batch.devices, 'rank')}",
            "each would have to decide as the others do",
            "give --gpus 1 without a launcher, or leave --sam-when out",
        )
    if config.sam_when is not None and config.amp_dtype == "float16":
        raise UsageError(
            f"--sam-when {config.sam_when} with float16",
            "a gradient's norm follows the scale of the loss",
            "give --amp-dtype float32",
        )
    m: Any = config.m
    micro_batch = config.micro_batch
    if batch.parts > 1 and m == "device" and config.ascent not in ONE_PASS:
        m = batch.part  # a part has the perturbation that it would have on a device of its own
    elif batch.parts > 1 and isinstance(m, str):
        micro_batch = min(micro_batch or batch.part, batch.part)
    if isinstance(m, str) and m.startswith("group:"):
        m = collectives.new_subgroup(group_size(m)) if collectives.world_size() > 1 else "device"
    head = "|".join(rf"^{re.escape(name)}\." for name in head_names(model))
    cut = None
    if config.perturb_from is not None:
        with device.uncompiled():
            cut = find_cut(model, config.perturb_from, input_size)
    if not config.shard:
        model = ddp.data_parallel(model, next(model.parameters()).device)
    try:
        sam = SAM(
            model,
            config.rho,
            p=config.p,
            adaptive=config.adaptive,
            eta=config.eta,
            perturb=config.perturb,
            perturb_from=None if cut is None else cut.name,
            rho_factors={head: config.head_rho_factor},
            m=m,
            micro_batch=micro_batch,
            ascent_fraction=config.ascent_fraction,
            ascent_steps=config.ascent_steps,
            ascent=config.ascent if config.rho > 0 else "gradient",  # which keeps nothing
            optimizer=optimizer,
            second_order=config.second_order,
            when=None if config.sam_when is None else GradientRule(float(config.sam_when.partition(":")[2])),
        )
    except ValueError as error:  # what only the model and the ranks can tell
        raise UsageError(
            f"--perturb {config.perturb}" + (f" --perturb-from {config.perturb_from}" if cut else ""),
            str(error),
            f"its names begin with {_first_names(model)}",
        ) from None
    sam.suffix_share = 1.0 if cut is None else cut.share
    return sam


def _obstacle_to_graphs(config: RunConfig, target: torch.device) -> str:
    """Why the passes of this run stay eager; "" if they are recorded. Raises UsageError for --graphs on."""
    obstacles = {
        "--graphs off": config.graphs == "off",
        f"device {target.type}": target.type != "cuda",
        "--shard": config.shard,
        # DistributedDataParallel reduces gradients by hooks, which a recorded pass does not call.
        "ranks of a launcher": environment.rank_info() is not None,
        # Recomputing reads and sets the generator's state, which cannot be done within a recording.
        "--grad-checkpointing": config.grad_checkpointing,
        # The second pass begins with what the first one has computed.
        "--perturb-from": config.perturb_from is not None,
        # Whether there is a second pass is decided by the first one's gradient.
        "--sam-when": config.sam_when is not None,
        # Its passes are differentiated twice.
        "--second-order": config.second_order,
        # A replay is not shown to be what the same operations give one by one, to the last bit.
        "--deterministic": config.deterministic,
    }
    obstacle = next((name for name, is_there in obstacles.items() if is_there), "")
    if obstacle and config.graphs == "on":
        raise UsageError(f"--graphs on with {obstacle}", hint="--graphs auto records where it is possible")
    return obstacle


def _shard(model: nn.Module, target: torch.device, group: int | None) -> None:
    if collectives.world_size() == 1:
        raise UsageError(
            "--shard with one device", "there is nothing to share a model with", "give --gpus or --processes"
        )
    try:
        fsdp.shard(model, target, group)
    except ValueError as error:
        raise UsageError(
            "--shard cannot divide this model", str(error), "choose another --m group, or leave it out"
        ) from None


def _first_names(model: nn.Module) -> str:
    return ", ".join(dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters()))
