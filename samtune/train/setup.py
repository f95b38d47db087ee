"""Config -> job: the data, model, optimizer and schedule of a run, before anything is written."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from samtune import console
from samtune.config.run_config import RunConfig
from samtune.data import depth, noise
from samtune.data.cache import (
    Images,
    concat_images,
    count_shared_images,
    decode_into_cache,
    drop_undecodable,
    of_one_colour,
    raise_if_undecodable,
    undecodable_rows,
)
from samtune.data.decode import DecodeRule
from samtune.data.loader import steps_per_epoch
from samtune.data.noise import LabelNoise
from samtune.data.source import LabelledDataset, Split
from samtune.data.splits import Indices, RunSplits, open_run_splits
from samtune.data.transforms import min_side
from samtune.distributed import collectives, device, fsdp
from samtune.errors import UsageError
from samtune.models import pretrained
from samtune.models.pretrained import ModelInfo
from samtune.sam.gradient import SAM
from samtune.sam.losses import cross_entropy, l2_penalty
from samtune.sam.step import Step
from samtune.train.batch_plan import BatchPlan, group_size
from samtune.train.schedule import RhoSchedule

# Peak learning rates of the body for a batch of 32; they trained every data set we tried (recipes/README.md). They grow
# with the square root of the batch: where the gradient is clipped, a larger batch makes a step surer but not longer.
_BASE_LR = {"sgd": 0.004, "adamw": 1e-4}
_BASE_LR_FROM_SCRATCH = {"sgd": 0.07, "adamw": 1e-3}  # random weights have far to go
_BASE_BATCH = 32
# Weight decay is 1/n for n images: against the mean loss, a prior of constant strength. It binds the new head, which a
# few hundred images fit in many ways; for 50,000 images it is near the paper's 1e-5. Clipping shrinks the gradient but
# not the decay, so that more than this takes over.
_MAX_WEIGHT_DECAY = 0.002


# Of a config, (split, rows) each and a rule: the images, decoded as far as they shall be.
Look = Callable[[RunConfig, Iterable[tuple[Split, Indices]], DecodeRule], list[Images]]


@dataclass(frozen=True)
class Resolved:
    """What a run that goes on has settled when it began.

    model: what its provenance says of the model. classes: their names, in its order. rule: how it decodes.
    """

    model: Mapping[str, Any]
    classes: Sequence[str]
    rule: DecodeRule


@dataclass
class RunData:
    """The images of a run."""

    data: LabelledDataset
    rule: DecodeRule
    train: Images  # with the labels to train on
    train_rows: Indices
    noise: LabelNoise | None  # what differs in them from the data set's own
    val: Images
    val_rows: Indices
    test: Images | None
    test_rows: Indices
    bad_images: list[dict[str, Any]]  # left out of the rows
    seen_test_images: int  # of the test rows, those that are in train too
    one_colour: list[str]  # places of pictures that show nothing


@dataclass(frozen=True)
class TrainingLength:
    """How many steps a run takes, and at which of them SAM perturbs by which radius."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    rho: RhoSchedule

    @classmethod
    def of(cls, config: RunConfig, batch: BatchPlan, train_images: int) -> "TrainingLength":
        """As the settings have it. Raises UsageError where they leave SAM no step."""
        per_epoch = steps_per_epoch(train_images, batch.total)
        total_steps = max(1, config.epochs.steps(per_epoch))
        warmup_steps = config.warmup_epochs.steps(per_epoch, total_steps)
        return cls(per_epoch, total_steps, warmup_steps, _rho_schedule(config, per_epoch, total_steps, warmup_steps))


@dataclass(kw_only=True)
class Setup(RunData):
    """All that a run needs, built before anything is written."""

    config: RunConfig  # nothing left open
    device: torch.device
    model: nn.Module
    ema: pretrained.Average | None
    info: ModelInfo
    optimizer: torch.optim.Optimizer
    update: Step
    rho: RhoSchedule
    batch: BatchPlan
    lr: float  # peak rate of the body
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_batch: int | None = None  # images of an evaluation at once; None: not tried yet

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a part of the model alone; what makes it whole, or computes with it, all ranks do."""
        return self.update.sam.shards is not None

    def weights(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        """The state_dict of the run's model or of its average, whole on rank 0."""
        return fsdp.full_state_dict(model) if self.is_sharded else model.state_dict()

    def load(self, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """The same, the other way. Raises RuntimeError where they are not those of the model."""
        if self.is_sharded:
            fsdp.load_full_state_dict(model, weights)
        else:
            model.load_state_dict(weights)

    def optimizer_state(self) -> Mapping[int, Any]:
        """What the optimizer remembers, whole on rank 0. Rates, decay and the like follow from settings and step."""
        if self.is_sharded:
            return fsdp.full_optimizer_state(self.optimizer)
        state: Mapping[int, Any] = self.optimizer.state_dict()["state"]
        return state

    def load_optimizer_state(self, state: Mapping[int, Any]) -> None:
        """The same, the other way."""
        if self.is_sharded:
            fsdp.load_full_optimizer_state(self.optimizer, state)
        else:
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that a step (from 1) belongs to."""
        return (step - 1) // self.steps_per_epoch + 1


def build_setup(
    config: RunConfig,
    settled: Resolved | None = None,
    *,
    look: Look | None = None,
    world: collectives.World | None = None,
) -> Setup:
    """Read the data's table of contents, build the model, settle what the config leaves open but for the run folder.

    settled: of a run that goes on; the caller will load its weights. look: decodes the images, by default all of them
    into the cache. world: the ranks that the job is divided among, by default those that are running. Raises DataError,
    ModelError or CheckpointError.
    """
    device.deterministic(config.deterministic)
    target = device.select_device(config.gpus, config.processes)
    pretrained.resolve(config.model)  # a misspelt name need not wait for the data
    if settled is None and config.img_size is not None:
        pretrained.check_size(config.model, config.weights, config.img_size)
    collectives.init(target)
    torch.manual_seed(config.seed)
    with collectives.local_main_process_first():
        read = load_run_data(config, settled, look)
        console.info(f"loading model {config.model} ...")
        model, info = pretrained.build(
            config.model,
            classes=len(read.data.class_names),
            weights=config.weights if settled is None else None,
            pretrained=config.pretrained and settled is None,
            img_size=config.img_size,
            drop=config.drop,
            drop_path=config.drop_path,
        )
    if settled is not None:
        info = replace(info, **_kept(settled.model))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    with device.oom_as_user_error(f"the weights of {info.resolved}"):
        model = model.to(device=target, memory_format=layout)  # type: ignore[call-overload]
    if config.sync_bn:
        model = pretrained.synchronised(model, target)
    if not config.freeze_bn:
        pretrained.allow_single_values(model)
    if config.grad_checkpointing:
        pretrained.checkpoint_activations(model)

    ema = pretrained.average(model, config.model_ema_decay) if config.model_ema else None
    if config.shard:
        group = group_size(config.m) if isinstance(config.m, str) and config.m != "global" else None
        for part in (model, *([ema.module] if ema else [])):
            _shard(part, target, group)
        if ema is not None:
            ema.foreach = False  # torch's loops over lists mix parts with whole buffers

    world = world or collectives.world()
    batch = BatchPlan.of(config, world.size, len(read.train_rows))
    config = _resolve_auto(
        config, target, info, len(read.train_rows), batch, device.available_cpus() // world.local_size
    )
    lr = _peak_lr(config, batch)
    length = TrainingLength.of(config, batch, len(read.train_rows))
    optimizer, penalty = _optimizer(model, config, lr)
    update = Step(
        _sam(model, config, batch),
        optimizer,
        partial(cross_entropy, smoothing=config.smoothing),
        clip_grad=config.clip_grad,
        autocast=device.autocast(target, config.amp_dtype),
        scaler=device.loss_scaler(target, config.amp_dtype),
        penalty=penalty,
    )
    return Setup(
        **vars(read),
        config=config,
        device=target,
        model=model,
        ema=ema,
        info=info,
        optimizer=optimizer,
        update=update,
        batch=batch,
        lr=lr,
        **vars(length),
    )


def _kept(model: Mapping[str, Any]) -> dict[str, Any]:
    """What provenance.json says of a model that its weights do not, where it says so."""
    kept = {key: model[key] for key in ("requested", "weights", "pretraining", "data_config") if key in model}
    if "data_config" in kept:
        kept["data_config"] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept["data_config"].items()}
    return kept


def load_run_data(config: RunConfig, settled: Resolved | None = None, look: Look | None = None) -> RunData:
    """The images of a run, decoded into the cache as far as they are not there. Raises DataError or UsageError.

    settled: of a run that goes on. look: decodes the images, in place of `look_at_data`.
    """
    look = look or decode_splits
    console.info(f"reading data set {config.dataset} ...")
    parts = open_run_splits(config, classes=settled.classes if settled else None)
    rule = settled.rule if settled else decode_rule(config, parts.data)
    data = replace(
        parts.data, notes=(*parts.data.notes, *depth.words(rule.ranges), *depth.beyond(rule, parts.data.splits))
    )
    for note in data.notes:
        console.info(note)
    test_part = [(parts.test, parts.test_rows)] if parts.test else []
    used = [(parts.train, parts.train_rows), (parts.val, parts.val_rows), *test_part]
    looked_at = [decode_train(config, parts, rule, look), *look(config, used[1:], rule)]
    bad = [item for images, (_, rows) in zip(looked_at, used, strict=True) for item in undecodable_rows(images, rows)]
    if config.on_bad_image == "error":
        raise_if_undecodable(bad)
    train, val, *tested = looked_at
    test = tested[0] if tested else None
    train_rows, val_rows = drop_undecodable(train, parts.train_rows), drop_undecodable(val, parts.val_rows)
    test_rows = drop_undecodable(test, parts.test_rows) if test else parts.test_rows
    noisy, wrong = _add_label_noise(config, parts, train_rows)
    return RunData(
        data=data,
        rule=rule,
        train=replace(train, split=noisy),
        train_rows=train_rows,
        noise=wrong,
        val=val,
        val_rows=val_rows,
        test=test,
        test_rows=test_rows,
        bad_images=bad,
        seen_test_images=count_shared_images(train, train_rows, test, test_rows) if test else 0,
        one_colour=[
            place for images, (_, rows) in zip(looked_at, used, strict=True) for place in of_one_colour(images, rows)
        ],
    )


def decode_rule(config: RunConfig, data: LabelledDataset) -> DecodeRule:
    """How a run decodes its images: as large as its model needs them, deep ones by the range of the training images."""
    data_config = pretrained.look_up(config.model, config.weights).data_config(config.img_size)
    train = data.splits["train"]
    ranges = depth.value_ranges(train, train.labelled)
    return DecodeRule(min_side(data_config, config), config.max_megapixels, ranges)


def decode_train(config: RunConfig, parts: RunSplits, rule: DecodeRule, look: Look | None = None) -> Images:
    """The images to train on; with --no-val through the cached files of both parts, that other runs have, too."""
    looked_at = (look or decode_splits)(config, parts.sources or [(parts.train, parts.train_rows)], rule)
    return concat_images(parts.train, *looked_at) if parts.sources else looked_at[0]


def decode_splits(config: RunConfig, parts: Iterable[tuple[Split, Indices]], rule: DecodeRule) -> list[Images]:
    """The images of (split, rows) each, decoded into the cache as far as the config allows."""
    with console.RunProgress() as progress:
        return [
            decode_into_cache(
                split,
                rows,
                rule=rule,
                limit=int(config.cache_limit * 2**30),
                threads=max(1, device.available_cpus() // collectives.local_world_size()),
                progress=progress.count,
                always=config.on_bad_image == "skip",
            )
            for split, rows in parts
        ]


def _add_label_noise(config: RunConfig, parts: RunSplits, rows: Indices) -> tuple[Split, LabelNoise | None]:
    """The train split with the labels to train on; another split object than the one that validation may share."""
    train, class_names = parts.train, parts.data.class_names
    if config.train_labels is not None:
        labelled = len(parts.data.splits["train"])
        file, key = config.train_labels, config.train_labels_key
        return noise.from_file(train, rows, class_names, path=file, key=key, labelled=labelled)
    if config.label_noise > 0:
        return noise.flip(
            train, rows, class_names, fraction=config.label_noise, kind=config.noise_kind, seed=config.noise_seed
        )
    return train, None


def _peak_lr(config: RunConfig, batch: BatchPlan) -> float:
    assert config.lr is not None
    if config.lr_base_batch is None:
        return config.lr
    return float(f"{config.lr * (batch.nominal / config.lr_base_batch) ** 0.5:.3g}")


def _optimizer(
    model: nn.Module, config: RunConfig, lr: float
) -> tuple[torch.optim.Optimizer, Callable[[], torch.Tensor] | None]:
    """The base optimizer, and the L2 term that takes the place of its weight decay, if it is asked for."""
    assert config.weight_decay is not None
    in_optimizer = 0.0 if config.l2_in_loss else config.weight_decay
    groups = pretrained.parameter_groups(model, lr=lr, head_lr=lr * config.head_lr_factor, weight_decay=in_optimizer)
    penalty = None
    if config.l2_in_loss:
        decayed = [w for w in model.parameters() if w.requires_grad and w.ndim > 1]
        penalty = partial(l2_penalty, decayed, config.weight_decay)
    if config.opt == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0), penalty
    return torch.optim.AdamW(groups), penalty


def _sam(model: nn.Module, config: RunConfig, batch: BatchPlan) -> SAM:
    batch.sharing(config.m)  # whether it can be
    m: Any = config.m
    micro_batch = config.micro_batch
    if batch.parts > 1 and m == "device":
        m = batch.part  # a part has the perturbation that it would have on a device of its own
    elif batch.parts > 1 and isinstance(m, str):
        micro_batch = min(micro_batch or batch.part, batch.part)
    if isinstance(m, str) and m.startswith("group:"):
        m = collectives.new_subgroup(group_size(m)) if collectives.world_size() > 1 else "device"
    head = "|".join(rf"^{re.escape(name)}\." for name in pretrained.head_names(model))
    if not config.shard:
        model = collectives.data_parallel(model, next(model.parameters()).device)
    try:
        return SAM(
            model,
            config.rho,
            p=config.p,
            adaptive=config.adaptive,
            eta=config.eta,
            perturb=config.perturb,
            rho_factors={head: config.head_rho_factor},
            m=m,
            micro_batch=micro_batch,
            ascent_fraction=config.ascent_fraction,
            ascent_steps=config.ascent_steps,
        )
    except ValueError as error:  # what only the model can tell
        raise UsageError(
            f"--perturb {config.perturb}", str(error), f"its names begin with {_first_names(model)}"
        ) from None


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


def _rho_schedule(config: RunConfig, per_epoch: int, total_steps: int, warmup_steps: int) -> RhoSchedule:
    start, end = (duration.steps(per_epoch, total_steps) for duration in (config.sam_start, config.sam_end))
    if config.rho > 0 and not start < min(end, total_steps):
        raise UsageError(
            f"--sam-start {config.sam_start} and --sam-end {config.sam_end} leave SAM no step",
            f"they are steps {start} and {end} of {total_steps}",
            "let it begin earlier, or switch it off with --rho 0",
        )
    return RhoSchedule(
        peak=config.rho,
        final=config.rho_final,
        shape=config.rho_schedule,
        start=start,
        end=min(end, total_steps),
        every=config.sam_every,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
    )


def _resolve_auto(
    config: RunConfig, target: torch.device, info: ModelInfo, train_images: int, batch: BatchPlan, cores: int
) -> RunConfig:
    """Settle what the config leaves open, with the reason as origin. cores: of each rank."""
    if config.batch_size != batch.part:
        config = config.derive("batch_size", batch.part, "global_batch_size over the devices")
    if config.lr is None:
        base = (_BASE_LR if config.pretrained else _BASE_LR_FROM_SCRATCH)[config.opt]
        lr = base * (batch.nominal / _BASE_BATCH) ** 0.5
        reason = f"{base:g} x sqrt({batch.nominal} images a step / {_BASE_BATCH})"
        reason += "" if config.pretrained else ", from scratch"
        config = config.derive("lr", float(f"{lr:.3g}"), reason)
    if config.weight_decay is None:
        decay = min(_MAX_WEIGHT_DECAY, 1 / train_images)
        config = config.derive(
            "weight_decay", float(f"{decay:.3g}"), f"1 / {train_images} training images, at most {_MAX_WEIGHT_DECAY:g}"
        )
    if config.workers is None:
        workers = device.loading_workers(target, cores)
        config = config.derive("workers", workers, f"for {cores} cores and device {target.type}")
    if config.amp_dtype == "auto":
        config = config.derive("amp_dtype", device.best_dtype(target), f"best on device {target.type}")
    if config.img_size is None:
        config = config.derive("img_size", info.img_size, f"size of the weights {info.resolved}")
    return config
