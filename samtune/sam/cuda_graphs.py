"""CUDA graphs: passes of one shape are recorded once, and then replayed without launching each kernel from Python.

A step of a small network is bound by the launching of its kernels. Only the two passes are recorded. Perturbation,
restoring, clipping and the optimizer's step stay as they are, so that rho and the learning rate remain numbers.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from samtune.distributed import device
from samtune.errors import MachineError, first_line
from samtune.sam.batch import Batch
from samtune.sam.losses import ScalarLoss
from samtune.sam.runner import EagerRunner, nan_unless_finite
from samtune.sam.snapshot import generator_states, set_generator_states

Tensors = Sequence[torch.Tensor]
Outputs = Sequence[torch.Tensor | None]

# Calls of a function before it is recorded. Libraries choose their algorithms in them. What is called no more than
# that, such as a batch of another size, is not worth a recording.
_EAGER_CALLS = 2


class Recorder(Protocol):
    """Runs functions without arguments, and records them."""

    def run(self, function: Callable[[], Outputs]) -> tuple[Outputs, str]:
        """Call the function as it will be recorded: its outputs, and where it waits for the GPU, if anywhere."""

    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record the function: what replays it, and its outputs, which every replay overwrites."""


class CudaRecorder:
    """Records on a stream of its own. All recordings share one pool of memory."""

    def __init__(self, target: torch.device) -> None:
        self._device = target
        self._stream = torch.cuda.Stream(target)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Outputs]) -> tuple[Outputs, str]:
        """Call the function on the stream on which it will be recorded, where libraries then have their workspaces."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _waits() as waits:
            outputs = function()
        current.wait_stream(self._stream)
        for output in outputs:
            if output is not None:
                output.record_stream(current)
        return outputs, "".join(waits[:1])

    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record the function. Threads that load images or write files may use the GPU meanwhile."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = function()
        except Exception:
            self._clean_up(current)
            raise
        return graph.replay, outputs

    def _clean_up(self, current: torch.cuda.Stream) -> None:
        """Undo what torch may leave behind where CUDA refuses a recording.

        Its stream is still the current one, memory still comes from the pool of the graphs, and the generator, whose
        state is kept here, still counts for the recording.
        """
        torch.cuda.set_stream(current)
        index = self._device.index
        with suppress(RuntimeError):  # raised where the recording has ended in order
            torch._C._cuda_endAllocateToPool(index, self._pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _waits() -> Iterator[list[str]]:
    """The places in the block at which the CPU waits for the GPU; torch warns of them if it is asked to."""
    places: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            places += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
    for w in caught:  # of other things; one is that torch calls the debug mode a prototype
        if "synchroniz" not in str(w.message).lower():
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


@dataclass(frozen=True)
class _Recording:
    inputs: Tensors
    outputs: Outputs
    replay: Callable[[], None]


class GraphRunner(EagerRunner):
    """Runs forward-backward passes by CUDA graphs, each shape of a pass after two calls.

    The model must be whole on one device, and the loss a function of the tensors of a batch that never waits for the
    GPU. Random masks are those of an EagerRunner: a replay takes the generator's state, and moves it as far. What
    Python decides or draws by itself within a pass stays as it was when the pass was recorded.

    is_perturbed: whether the weights are perturbed at this moment, on which a loss may depend. required: raise
    MachineError where a pass cannot be recorded; by default the passes stay eager then.
    """

    def __init__(
        self,
        model: nn.Module,
        perturbed: Sequence[nn.Parameter],
        ranks: Any,
        *,
        is_perturbed: Callable[[], bool],
        required: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(model, perturbed, ranks)
        self._params = [w for w in model.parameters() if w.requires_grad]
        self._device = self._params[0].device
        self._is_perturbed = is_perturbed
        self._required = required
        self._recorder: Recorder = recorder or CudaRecorder(self._device)
        self._calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}
        self._grads = [torch.empty_like(w, requires_grad=False) for w in self._params]
        self._refused = ""  # why nothing is recorded any more

    @property
    def mode(self) -> str:
        """How passes are run at this moment, for reports."""
        if self._recordings:
            return "CUDA graphs"
        return f"eager ({self._refused or 'nothing is recorded yet'})"

    def ascend(self, loss: ScalarLoss, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As in EagerRunner. The next call overwrites the gradients."""

        def run(*batch: torch.Tensor) -> Outputs:
            value = loss(*batch)
            return value.detach(), *torch.autograd.grad(value, self._perturbed, materialize_grads=True)

        value, *grads = self._call(("ascend", self._is_perturbed()), run, batch)
        assert value is not None
        return value.clone(), grads  # type: ignore[return-value]

    def evaluate(self, loss: ScalarLoss, batch: Batch) -> torch.Tensor:
        """As in EagerRunner."""
        (value,) = self._call("evaluate", lambda *batch: (loss(*batch).detach(),), batch)
        assert value is not None
        return value.clone()

    def descend(self, loss: ScalarLoss, batch: Batch, share: float, at_w: torch.Tensor | None = None) -> torch.Tensor:
        """As in EagerRunner. The next call overwrites what is returned."""

        def run(*inputs: torch.Tensor) -> Outputs:
            value = loss(*inputs[: len(batch)])
            total = nan_unless_finite(value, value if at_w is None else inputs[-1], share)
            return value.detach(), *torch.autograd.grad(total, self._params, allow_unused=True)

        inputs = batch if at_w is None else (*batch, at_w)
        value, *grads = self._call(("descend", share), run, inputs)
        self._add(grads)
        assert value is not None
        return value

    def release(self) -> None:
        """Forget all recordings, and free their memory."""
        self._recordings.clear()
        self._calls.clear()

    def _add(self, grads: Outputs) -> None:
        """Add gradients to `.grad`; where it was None, it becomes a buffer of this object that stays in its place."""
        used = [(w, g, buffer) for w, g, buffer in zip(self._params, grads, self._grads, strict=True) if g is not None]
        first = [(g, buffer) for w, g, buffer in used if w.grad is None]
        more = [(g, w.grad) for w, g, _ in used if w.grad is not None]
        for pairs, fused in ((first, torch._foreach_copy_), (more, torch._foreach_add_)):
            if pairs:
                fused([total for _, total in pairs], [g for g, _ in pairs])
        for w, _, buffer in used:
            w.grad = buffer if w.grad is None else w.grad

    def _call(self, kind: Hashable, function: Callable[..., Outputs], inputs: Batch) -> Outputs:
        """function(*inputs), by a replay if there is a recording of this kind for inputs of these shapes."""
        key = (kind, *((t.shape, t.stride(), t.dtype) for t in inputs))
        if self._refused:
            return function(*inputs)
        if key not in self._recordings:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= _EAGER_CALLS:
                outputs, wait = self._recorder.run(lambda: function(*inputs))
                if wait and self._calls[key] == _EAGER_CALLS:  # the first call may wait for libraries
                    self._refuse(f"a pass waits for the GPU at {wait}")
                return outputs
            if not self._record(key, function, inputs):
                return function(*inputs)
        recording = self._recordings[key]
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        recording.replay()
        return recording.outputs

    def _record(self, key: Hashable, function: Callable[..., Outputs], inputs: Batch) -> bool:
        """Record the function. Returns False where it cannot be; from then on all passes are eager."""
        own = [t.clone() for t in inputs]
        generators = generator_states(self._device)
        try:
            replay, outputs = self._recorder.record(lambda: function(*own))
        except Exception as error:
            no_memory = device.may_be_out_of_memory(error)
            reason = f"{'no memory for CUDA graphs' if no_memory else 'not recorded'}: {first_line(error)}"
        else:
            self._recordings[key] = _Recording(own, outputs, replay)
            return True
        # Out here the error is gone, and with it the frames that held what did not fit.
        set_generator_states(generators, self._device)
        self._refuse(reason)
        return False

    def _refuse(self, reason: str) -> None:
        """Record nothing any more."""
        self._refused = reason
        self.release()
        device.free_memory()
        if self._required:
            raise MachineError("a step cannot be recorded as CUDA graphs", self._refused, "--graphs auto stays eager")
