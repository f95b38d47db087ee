"""RunConfig: all settings of a run, with the origin of each value.

A field here is a flag of `samtune run` and a key of a recipe, under one name (`batch_size`, `--batch-size`); its
description is the flag's help.
"""

import json
import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from samtune.config import types
from samtune.config.duration import Duration
from samtune.errors import MachineError

MOST_PROCESSES = 1024
LARGEST = 10**9
"""The largest number of a setting that has no limit of its own: products of such numbers are still float32."""
Affects = Literal["rows", "images", "update", "results", "nothing"]
"""What another value of a setting changes:

rows      how the data set is read, and which of its rows are validation and test
images    which images are trained on, and how they are decoded
update    what a step computes, but not how long it takes
results   any other number of the run
nothing   no number: only devices, speed, memory, disk or display
"""


def _option(
    panel: str, affects: Affects, description: str, default: Any = None, *, fixed: bool | None = None, **limits: Any
) -> Any:
    """A setting; its default is ... where it must be given.

    fixed: a resumed run keeps it, because weights, order or splits depend on it; by default if it affects the rows.
    """
    if limits and not {"le", "lt"} & limits.keys():
        limits["le"] = LARGEST
    metadata: dict[str, Any] = {
        "panel": panel,
        "affects": affects,
        "fixed": affects == "rows" if fixed is None else fixed,
    }
    return Field(default, description=description, json_schema_extra=metadata, **limits)


_model, _data, _optimizer, _sam, _device, _run = (
    partial(_option, panel) for panel in ("Model", "Data", "Optimizer", "SAM", "Devices", "Run")
)


class RunConfig(BaseModel):
    """All settings of one run. Frozen; unknown keys, text for numbers, and numbers that are not finite are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    model: str = _model(
        "images",
        "timm model name, an alias such as efficientnet_b7, hf-hub:USER/NAME, or local-dir:FOLDER",
        ...,
        fixed=True,
    )
    weights: types.PathField | None = _model(
        "images",
        "pretrained weights from a file (.safetensors, or .pth without code), a run or a checkpoint, instead of a "
        "package or the hub",
        fixed=True,
    )
    pretrained: bool = _model(
        "results", "start from pretrained weights; --no-pretrained starts at random", True, fixed=True
    )
    img_size: int | None = _model(
        "images",
        "side of the square input in pixels; by default the size that the weights were trained for",
        ge=16,
        le=16384,
        fixed=True,
    )
    drop: float = _model("update", "dropout before the classifier; 0 with --no-pretrained", 0.2, ge=0, lt=1)
    drop_path: float = _model("update", "stochastic depth (drop-connect)", 0.0, ge=0, lt=1)
    freeze_bn: bool = _model(
        "results",
        "normalise with the pretrained batch-norm statistics and keep them; gamma and beta train either way",
        True,
    )
    sync_bn: bool = _model(
        "results", "with --no-freeze-bn: batch norm over the batches of all devices together (GPUs only)", False
    )
    grad_checkpointing: bool = _model(
        "nothing", "keep fewer activations and compute them again for the gradient: less memory, more time", False
    )
    channels_last: bool = _model("results", "memory layout of images and weights; the faster one", True)

    dataset: str = _data(
        "rows",
        "a name of `samtune datasets`, the path of a folder or of a list (.csv, .jsonl, .parquet), or user/name on the "
        "hub; a configuration follows a colon: user/name:config",
        ...,
        fixed=False,
    )
    dataset_config: str | None = _data("rows", "configuration of a data set that has several")
    image_key: str | None = _data("rows", "column of the images; by default it is found")
    label_key: str | None = _data(
        "rows", "column of the labels, or several that are a class each (cat,dog); by default found"
    )
    split_key: str | None = _data(
        "rows", "column that tells the split of each row; by default one whose values are names of splits"
    )
    image_root: str | None = _data(
        "rows",
        "folder from which the paths of a list are seen, or below which their ends lie; by default that of the list",
        fixed=False,
    )
    image_suffix: str = _data("rows", 'what the names in a list lack, as ".jpg"', "")
    class_folders: Literal["first", "deepest"] = _data(
        "rows",
        "of folders in folders of a split, which one is the class: the first below the split, or the deepest, named by "
        "its path",
        "first",
    )
    train_split: str | None = _data(
        "rows", 'split to train on, or several, as "train+validation"; by default it is found by its name'
    )
    val_split: str | None = _data(
        "rows", "split to choose on, never the test split; by default validation, else a part of train"
    )
    test_split: str | None = _data("rows", "split to score once, at the end; by default test")
    train_fraction: float = _data(
        "images", "share of the training images that is used, every class in proportion", 1.0, gt=0, le=1, fixed=True
    )
    max_train: int | None = _data(
        "images", "at most so many training images, every class in proportion: for smoke runs", ge=1, fixed=True
    )
    max_eval: int | None = _data(
        "rows", "at most so many images of validation, and of test, every class in proportion: for smoke runs", ge=1
    )
    batch_size: types.BatchSize = _data(
        "results",
        "images per step on each device; auto: the largest power of two that fits a GPU, found at the start; 16 on a "
        "CPU",
        16,
        fixed=True,
    )
    global_batch_size: int | None = _data(
        "results",
        "images per step on all devices together, whatever their number; each computes its share in parts of "
        "--batch-size with a perturbation for each part, or, if that is not given, at once",
        ge=1,
        fixed=True,
    )
    micro_batch: int | None = _data(
        "results",
        "images that pass through the model at once, which changes memory and time but not the algorithm; by default "
        "the batch, and less where memory runs out",
        ge=1,
    )
    workers: int | None = _data(
        "nothing",
        "data-loading threads (processes with --aa, --color-jitter or --reprob); 0 loads between steps; by default 1, "
        "with a GPU one less than the cores of its rank, at most 16",
        ge=0,
        le=MOST_PROCESSES,
    )
    val_fraction: float = _data(
        "rows",
        "share of train that is held out for validation where the data set has no validation split",
        0.1,
        gt=0,
        lt=1,
    )
    val: bool = _data(
        "images",
        "hold images out to validate on; --no-val trains on them too, for a last fit when everything is chosen",
        True,
        fixed=True,
    )
    split_seed: types.Seed = _data(
        "rows", "seed of that split and of subsets; it does not follow --seed, so that runs compare", 0
    )
    scale: float = _data(
        "images", "random resized crop: least share of the image's area (1 takes nearly all of it)", 0.35, gt=0, le=1
    )
    hflip: types.Share = _data("results", "chance of a horizontal flip", 0.5)
    crop: Literal["resized", "pad"] = _data(
        "images",
        "resized: random resized crop; pad: pad by an eighth and crop at random, as usual for CIFAR",
        "resized",
    )
    aa: Literal["none", "imagenet", "cifar10", "svhn", "rand", "trivial"] = _data(
        "results", "AutoAugment with the policy of a data set, RandAugment, or TrivialAugment", "none"
    )
    color_jitter: types.Share = _data("results", "strength of random brightness, contrast and saturation", 0.0)
    cutout: types.Share = _data("results", "side of an erased square as a share of the image (0.5 for CIFAR-10)", 0.0)
    reprob: types.Share = _data("results", "chance that a random rectangle is erased", 0.0)
    mixup: types.Alpha = _data("results", "alpha of mixup, at least 0.01; 0 does not mix", 0.0, ge=0)
    cutmix: types.Alpha = _data(
        "results", "alpha of CutMix, as of --mixup; with both, one of them by chance", 0.0, ge=0
    )
    on_bad_image: Literal["error", "skip"] = _data(
        "rows", "what to do with images that cannot be decoded: name them and end, or train without them", "error"
    )
    on_unlabelled: Literal["error", "skip"] = _data(
        "rows",
        "what to do with rows whose label is missing (none, blank, -1): name the first and end, or leave out",
        "error",
    )
    max_megapixels: float = _data(
        "rows", "a larger picture is one that cannot be decoded: it would fill the memory", 500.0, gt=0, le=1e6
    )
    cache_limit: float = _data(
        "nothing",
        "GiB of disk for decoded images ($SAMTUNE_CACHE, else ~/.cache/samtune); 0 decodes in every epoch",
        8.0,
        ge=0,
    )
    label_noise: types.Share = _data(
        "update",
        "share of the training labels to flip; validation, held out of train or not, and test keep clean labels",
        0.0,
        fixed=True,
    )
    noise_kind: Literal["symmetric", "pair"] = _data(
        "update",
        "a flipped label becomes any of the other classes (symmetric), or the next one (pair)",
        "symmetric",
        fixed=True,
    )
    noise_seed: types.SeedOrAuto = _data(
        "update",
        "seed of the flips: a number, so that runs with any --seed have the same wrong labels; or auto, which is "
        "--seed, so that each seed has its own",
        0,
        fixed=True,
    )
    train_labels: types.PathField | None = _data(
        "results",
        "labels to train on, from a file (.parquet, .csv, .jsonl): one for each row of train in its order, or in any "
        "order with a column `index`; validation and test keep the data set's own",
        fixed=True,
    )
    train_labels_key: str = _data("results", "column of that file: class names, or numbers from 0", "label", fixed=True)
    bootstrap: bool = _data(
        "update",
        "train twice: first on the labels as they are, then again from the same start on the labels that the first "
        "model predicts for the training images",
        False,
        fixed=True,
    )

    opt: Literal["sgd", "adamw"] = _optimizer("results", "sgd has Nesterov momentum", "sgd", fixed=True)
    lr: float | None = _optimizer(
        "update",
        "peak learning rate of the body; by default a base for the optimizer times sqrt(images per step / 32)",
        gt=0,
    )
    lr_base_batch: int | None = _optimizer(
        "update",
        "images per step that --lr is meant for: it is multiplied by sqrt(images per step / this); by default --lr is "
        "taken as it is",
        ge=1,
    )
    head_lr_factor: float = _optimizer("update", "learning rate of the new head over that of the body", 35.0, gt=0)
    momentum: float = _optimizer("update", "momentum of sgd", 0.9, ge=0, lt=1)
    weight_decay: float | None = _optimizer(
        "update",
        "decay of weights (not of biases and norm parameters); by default 1 / training images, at most 0.002; "
        "0.0005 with --no-pretrained and sgd",
        ge=0,
    )
    l2_in_loss: bool = _optimizer(
        "results",
        "weight decay as an L2 term in the loss of both passes, as the paper's code has it, not in the optimizer",
        False,
    )
    epochs: types.RunLength = _optimizer("update", 'length of the run: 8, or "5000 steps"', Duration(10, "epochs"))
    warmup_epochs: types.DurationField = _optimizer(
        "update",
        'the body\'s learning rate and rho rise from 0 for so long, the head learns at once: 1, "100 steps" or "5%"',
        Duration(20, "%"),
    )
    clip_grad: float = _optimizer(
        "update",
        "largest global norm of the final gradient, which the default rates belong to; 5 with --no-pretrained; 0 does "
        "not clip",
        1.0,
        ge=0,
    )
    smoothing: float = _optimizer("update", "label smoothing; 0 with --no-pretrained", 0.1, ge=0, lt=1)

    rho: float = _sam("update", "radius of the perturbation in weight units; 0 is the plain optimizer", 0.05, ge=0)
    p: types.NormOrder = _sam("results", "norm of that radius, from 1 to inf", 2.0)
    adaptive: bool = _sam(
        "results", "ASAM: radius of each weight in units of |weight| + eta; it wants about ten times the rho", False
    )
    eta: float = _sam("update", "eta of --adaptive, in weight units", 0.01, ge=0)
    m: types.Samples = _sam(
        "results",
        "images that share a perturbation: device (the batch of each), global (the batches of all devices), group:4 "
        "(those of 4 devices), or a number, which cuts the batch into pieces that are computed one after the other "
        "(gradient accumulation)",
        "device",
    )
    perturb: types.Pattern = _sam(
        "results",
        "what is perturbed: all, norm (normalisation layers alone: a cheaper first pass), no-norm, or a regular "
        "expression for the names of parameters",
        "all",
    )
    perturb_from: str | None = _sam(
        "results",
        "perturb only the network from a module on, as blocks.5, and compute what is before it once for both passes: "
        "SAM at a fraction of its cost. Or a share: 40% is the stage from which on a pass takes nearest to 40 % of its "
        "multiplications; auto is 25%. It has a rho of its own",
        None,
    )
    head_rho_factor: float = _sam("update", "rho of the new head over that of the body", 1.0, ge=0)
    sam_schedule: str | None = _sam(
        "update",
        "in which steps SAM is on, in place of the next three: always, late 25% (of the run), early 50%, every 5, or "
        "several: late 25% every 2",
        None,
    )
    sam_start: types.DurationField = _sam(
        "update", 'SAM begins after so much of the run: "50%", 5 (epochs) or "100 steps"', Duration(0, "%")
    )
    sam_end: types.DurationField = _sam("update", "SAM ends after so much of the run", Duration(100, "%"))
    sam_every: int = _sam("update", "SAM in every k-th step only, the plain optimizer between", 1, ge=1)
    sam_when: types.When | None = _sam(
        "results",
        "experimental: gradient:1 perturbs only where the squared norm of the gradient is so many standard deviations "
        "above its moving mean (AE-SAM); a step costs one pass or two; on one device",
        None,
    )
    rho_schedule: Literal["constant", "linear", "cosine", "lr"] = _sam(
        "update",
        "rho after the warm-up: constant, from rho to --rho-final along a line or a cosine, or in proportion to lr",
        "constant",
    )
    rho_final: float = _sam("update", "rho at the end of a linear or cosine schedule", 0.0, ge=0)
    ascent_fraction: float = _sam(
        "results",
        "share of the batch that the first pass uses; loss and error of training are those of this share",
        1.0,
        gt=0,
        le=1,
    )
    ascent_steps: int = _sam("results", "passes that look for the perturbation, of rho / n each", 1, ge=1)
    ascent: Literal["gradient", "random", "momentum", "previous"] = _sam(
        "results",
        "direction of the perturbation: the gradient of the first pass; or random, a Gaussian direction of norm rho, "
        "for comparison (the first pass is then a forward pass only). Experimental, at the cost of a plain step: "
        "momentum, against the optimizer's average of gradients (Momentum-SAM; published results are close to SAM's, "
        "here it is not yet measured); or previous, the gradient of the step before. Loss and error of training are "
        "then those of the perturbed weights",
        "gradient",
    )
    second_order: bool = _sam(
        "results",
        "add the term of the gradient that SAM leaves out, by the derivative of the perturbation; a step then costs "
        "five plain ones, and more memory; needs one device and p 2",
        False,
    )

    gpus: types.Gpus = _device(
        "nothing",
        'auto: one GPU if there is one, else the CPU; all; a number of GPUs; or a list of them, as "0,2"',
        "auto",
    )
    processes: int | None = _device("nothing", "so many ranks on the CPU, in place of GPUs", ge=1, le=MOST_PROCESSES)
    nnodes: int = _device("nothing", "machines that run this command together, each with as many devices", 1, ge=1)
    node_rank: int = _device("nothing", "which of them this one is; 0 is where they meet", 0, ge=0)
    rdzv_endpoint: types.Endpoint | None = _device(
        "nothing", "where they meet: host:port of the first one, a port that is free there"
    )
    shard: bool = _device(
        "results",
        "keep a part of the model, its gradients and the optimizer's state on each device (FSDP), for models that do "
        "not fit one; a perturbation is then shared by all devices (--m global), or by groups that hold the model "
        "together (--m group:8)",
        False,
    )
    graphs: Literal["auto", "on", "off"] = _device(
        "nothing",
        "record the passes of a step as CUDA graphs and replay them, which saves time where a GPU waits for kernels to "
        "be launched (small models or batches); auto: on one GPU, where it is possible; on: fail where it is not",
        "auto",
    )
    compile: bool = _device(
        "results",
        "translate the blocks of the model into fewer, larger kernels (torch.compile) that read and write less memory; "
        "the first steps are slow, and results differ in the last digits",
        False,
        fixed=True,
    )
    max_restarts: int = _device(
        "nothing", "how often all ranks begin again from the newest checkpoint when one is lost", 0, ge=0
    )

    amp_dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = _run(
        "results",
        "arithmetic of the forward pass (weights stay float32; tf32 rounds what a GPU multiplies to 10 bits; float16 "
        "scales the loss); auto: bfloat16, on older GPUs float16, on a CPU float32",
        "auto",
    )
    variant: str | None = _run(
        "nothing",
        "variant of a recipe: at most one option of each axis (cutout,cifar100); an axis without one takes its first "
        "option; `samtune recipes show` lists all",
    )
    seed: types.Seed = _run("results", "seed of order, augmentation and dropout", 0, fixed=True)
    eval_every: types.Interval = _run(
        "results", 'how often to validate: 1, "500 steps" or "5%" of the run', Duration(1, "epochs")
    )
    save_every: types.SaveInterval = _run(
        "nothing",
        'how often to save, besides where validation is better than ever and at the end: "10 minutes", "200 steps", 1',
        Duration(10, "minutes"),
    )
    keep_at: types.Durations | None = _run(
        "nothing", 'points whose checkpoints are saved and kept, for `samtune sharpness`: "1 epochs,50%,100%"'
    )
    keep_checkpoints: int = _run("nothing", "how many of the newest checkpoints stay, besides the best", 2, ge=1)
    average_tail: types.Interval | None = _run(
        "results",
        'average the weights of all steps of the last part of the run, too, each step counting once: "25%", 2 (epochs) '
        'or "500 steps"; the average is scored and saved beside the last weights',
        fixed=True,
    )
    model_ema: bool = _run(
        "results",
        "average the weights over the steps exponentially, too; scored and saved as that of --average-tail, which it "
        "excludes",
        False,
        fixed=True,
    )
    model_ema_decay: float = _run(
        "update", "decay of that average; in the first steps less, 1 - step^(-2/3)", 0.9998, gt=0, lt=1
    )
    on_nan: Literal["stop", "skip", "rollback"] = _run(
        "results",
        "where loss or gradient are not finite: stop with the weights from before; skip the step, 20 in a row at most; "
        "or go back to the newest checkpoint and leave out the batches since then, 3 times at most",
        "stop",
    )
    deterministic: bool = _run(
        "results", "only operations whose result is the same every time; a CPU's are anyway, a GPU gets slower", False
    )
    step_timeout: float = _run(
        "nothing",
        "minutes without a step, or a batch of an evaluation, after which the run is ended; 0 waits",
        30.0,
        ge=0,
    )
    test: bool = _run(
        "results",
        "score the test split at the end: the last checkpoint, and the one that is best on validation, each once",
        True,
    )
    select: Literal["last", "best", "average"] = _run(
        "results",
        "the weights whose scores are the result: the last, the best on validation, or the average at the end "
        "(--average-tail, --model-ema)",
        "last",
    )
    track: types.TrackerNames = _run(
        "nothing",
        "hand metrics on to tensorboard, to wandb (offline, unless WANDB_MODE says otherwise), or to both: "
        '"tensorboard,wandb"; their files are in the run folder',
        "none",
    )
    html: bool = _run("nothing", "draw the page of the run, report.html, when it is done", True)
    output: types.PathField | None = _run("nothing", "run folder; by default a new one under runs/")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origins(self) -> Mapping[str, str]:
        """Where each value came from: "flag", "recipe FILE", "data set NAME", "default" or "derived: REASON"."""
        return self._origins

    @classmethod
    def metadata(cls, key: str) -> Mapping[str, Any]:
        """A field's panel (its group in the help), affects (see Affects) and fixed (see _option)."""
        metadata: Any = cls.model_fields[key].json_schema_extra
        return dict(metadata)

    @classmethod
    def settings(cls, **metadata: Any) -> frozenset[str]:
        """The keys whose fields have this metadata, such as affects="rows" or fixed=True."""
        return frozenset(key for key in cls.model_fields if metadata.items() <= cls.metadata(key).items())

    @property
    def device_batch(self) -> int:
        """batch_size as a number. Only before a run has chosen it is it "auto"."""
        assert self.batch_size != "auto"
        return self.batch_size

    @property
    def averages_weights(self) -> bool:
        """Whether the run averages its weights, in one way or the other."""
        return self.model_ema or self.average_tail is not None

    @property
    def selected_checkpoint(self) -> Literal["last", "best"]:
        """The checkpoint that holds the weights whose scores are the result."""
        return "best" if self.select == "best" else "last"

    @property
    def averaged_checkpoint(self) -> Literal["last", "best"]:
        """The checkpoint whose averaged weights are scored on test: a tail is whole only at the end."""
        return self.selected_checkpoint if self.average_tail is None else "last"

    @property
    def stages(self) -> int:
        """How many trainings the run has, each of --epochs."""
        return 2 if self.bootstrap else 1

    @property
    def flip_seed(self) -> int:
        """noise_seed as a number. "auto" stays in the settings, so that a repeated recipe follows its own --seed."""
        return self.seed if self.noise_seed == "auto" else self.noise_seed

    def derive(self, key: str, value: Any, reason: str) -> "RunConfig":
        """A copy with a derived value for a setting, with the reason as its origin."""
        copy = self.model_copy(update={key: value})
        copy._origins = {**self._origins, key: f"derived: {reason}"}
        return copy

    def with_output(self) -> "RunConfig":
        """With a new run folder, named after time, model, data set, rho and seed, if none is given.

        It is made here, so that runs that start in the same second get one each. Raises MachineError.
        """
        if self.output is not None:
            return self
        parts = (self.model, Path(self.dataset).name, f"rho{self.rho:g}", f"seed{self.seed}")
        name = re.sub(r"[^\w.-]+", "-", "-".join((time.strftime("%Y%m%d-%H%M%S"), *parts)))
        number, folder = 1, Path("runs") / name
        while True:
            try:
                folder.parent.mkdir(exist_ok=True)
                folder.mkdir()
                return self.derive("output", folder, "time, model, data set, rho, seed")
            except OSError as error:
                if not folder.exists():
                    reason, hint = error.strerror or "", "give another by --output"
                    raise MachineError(f"run folder {folder} cannot be made", reason, hint) from None
            number += 1
            folder = folder.with_name(f"{name}-{number}")

    def to_toml(self) -> str:
        """The resolved config as a recipe that repeats the run elsewhere, with the origins as comments."""
        lines = []
        for key, value in self.model_dump(mode="json").items():
            origin = self.origins.get(key, "default")
            # A JSON string, number or boolean is the same in TOML; TOML has no null, so an open value is left out.
            line = f"# {key} is open" if value is None else f"{key} = {json.dumps(value, ensure_ascii=False)}"
            if key == "output" and value is not None:
                line = f"# {line}"  # taken by the run itself
            lines.append(f"{line:<44} # {origin}")
        return "\n".join(lines) + "\n"


def flag_name(key: str) -> str:
    """The flag of a config key: batch_size -> --batch-size."""
    return "--" + key.replace("_", "-")
