"""What training changes about a model: batch norm, activation checkpoints, parameter groups, averaged weights."""

import copy
from collections.abc import Iterable
from typing import Any

import timm.layers
import torch
from torch import nn

from samtune.errors import MachineError, ModelError, first_line
from samtune.models.head import head_parameters

# Activations whose derivative needs the input, by the names of torch's and timm's classes.
_NEED_THE_INPUT = {"SiLU", "Swish", "Mish", "HardMish", "Hardswish", "HardSwish"}


def train_mode(model: nn.Module, *, freeze_bn: bool) -> None:
    """Set training mode. With freeze_bn, the batch-norm modules stay in evaluation mode.

    They then normalise with the pretrained statistics and do not update them, while gamma and beta train.
    (timm's FrozenBatchNormAct2d would freeze gamma and beta too.)
    """
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def keep_inputs_of_activations(model: nn.Module) -> None:
    """Switch off in-place computation where autograd would copy the input first, because it needs it: the same bits."""
    for module in model.modules():
        if type(module).__name__ in _NEED_THE_INPUT and getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]


def allow_single_values(model: nn.Module) -> None:
    """Let batch norm train on a batch of one value per channel, as of one image on a 1 x 1 feature map.

    Such a batch has no variance, and torch refuses it. It is normalised by the running statistics, which do not change.
    (Synchronised batch norm has the values of all ranks.)
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            module.register_forward_pre_hook(_eval_for_single_values)
            module.register_forward_hook(_back_to_training, always_call=True)


def _eval_for_single_values(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    module.has_single_values = module.training and inputs[0].numel() == inputs[0].shape[1]  # type: ignore[assignment]
    if module.has_single_values:
        module.training = False


def _back_to_training(module: nn.Module, *_: Any) -> None:
    if module.has_single_values:
        module.training = True


def convert_sync_bn(model: nn.Module, device: torch.device) -> nn.Module:
    """Make batch norm use the batches of all ranks. Raises MachineError on a CPU, where torch cannot."""
    if device.type == "cpu":
        raise MachineError("--sync-bn on a CPU", "torch synchronises batch norm only on GPUs", "leave it out")
    converted: nn.Module = timm.layers.convert_sync_batchnorm(model)
    return converted


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations of the model's blocks in the backward pass. Raises ModelError if the model cannot."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"--grad-checkpointing: model {type(model).__name__} cannot", first_line(error), "leave it out"
        ) from None


def parameter_groups(model: nn.Module, *, lr: float, head_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: body and head, each with decay on its weights and none on its vectors."""
    head = {id(p) for p in head_parameters(model)}
    groups = []
    for part, part_lr in (("body", lr), ("head", head_lr)):
        params = [p for p in model.parameters() if p.requires_grad and (id(p) in head) == (part == "head")]
        matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        for members, decay in ((matrices, weight_decay), (vectors, 0.0)):
            groups.append({"params": members, "lr": part_lr, "weight_decay": decay, "name": part})
    return [group for group in groups if group["params"]]


class WeightAverage:
    """An average of a model's weights and buffers over the steps of a run; `module` is a model like it.

    With a decay it is the exponential moving average. The decay at step t is the smaller of 1 - t^(-2/3) and `decay`,
    because a fine-tuning run may have too few steps to forget its first weights otherwise.

    Without, it is the mean over the steps after step `start` (Polyak and Juditsky 1992; over the tail of a run, SWA,
    Izmailov et al. 2018). A step that was skipped counts with the weights that it left as they were.

    count: number of steps in the mean, which belongs to the state of a run.
    """

    def __init__(self, model: nn.Module, decay: float | None = None, start: int = 0) -> None:
        self.module = copy.deepcopy(model).eval()
        self.decay, self.start = decay, start
        self.count = 0
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def has_begun(self) -> bool:
        """Whether there is an average; before the tail there is none."""
        return self.decay is not None or self.count > 0

    def update(self, model: nn.Module, step: int, *, applied: bool = True) -> None:
        """Average the model's weights after a step, from 1; every call is given the same model.

        applied: whether the step changed them.
        """
        if self.decay is not None:
            if applied:
                self._move(model, 1 - min(self.decay, 1 - step ** (-2 / 3)))
            return
        if self.count >= step - self.start:  # it has steps from before the tail: the run's length was changed
            self.count = 0
        if step > self.start:
            self.count += 1
            self._move(model, 1 / self.count)

    @torch.no_grad()
    def _move(self, model: nn.Module, weight: float) -> None:
        """Move the average towards the model by this share of their distance; all the way at 1, bit for bit."""
        if not self._pairs:  # listed once: to walk through all modules takes milliseconds
            self._pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        pairs = [(_local(average), _local(w)) for average, w in self._pairs]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floats], [w for _, w in floats], weight)
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        if counters:
            torch._foreach_copy_([average for average, _ in counters], [w for _, w in counters])


@torch.no_grad()
def estimate_batch_norm(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Estimate the running statistics of batch norm anew: the mean over these batches, each counting once.

    As torch.optim.swa_utils.update_bn, but all else, such as dropout, stays in evaluation mode: no random numbers are
    drawn, and the statistics are those that the model has when it is used. Leaves the model in evaluation mode.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in norms]
    model.eval()
    try:
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # a cumulative mean
            module.train()
        for images in batches:
            model(images)
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
        model.eval()


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded model's parameter that is on this rank; other tensors whole."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
