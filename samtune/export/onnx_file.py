"""ONNX files: written from a torch.export program, and run. The only user of onnx and onnxruntime."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from samtune.errors import CheckpointError, MachineError, ModelError, first_line

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MAX_BYTES = 2**31  # of one protobuf message


def check_packages() -> None:
    """Raise MachineError if a package is missing that ONNX needs."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(f"--to onnx needs {', '.join(missing)}", "not installed here", "pip install 'samtune[onnx]'")


def write(
    program: torch.export.ExportedProgram,
    file: Path,
    *,
    inputs: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    metadata: Mapping[str, str],
) -> None:
    """Write a program. inputs: name -> axis -> name of a size that may vary. outputs: their names.

    Raises ModelError for an operation that ONNX lacks, or a model too large for one file.
    """
    import onnx

    size = sum(value.nbytes for value in program.state_dict.values())
    if size >= _MAX_BYTES:
        raise ModelError(
            f"the model has {size / 2**30:.1f} GiB of weights", "an ONNX file holds 2 GiB", "export it --to torch"
        )
    try:
        with quiet():
            translated = torch.onnx.export(
                program, input_names=list(inputs), output_names=list(outputs), dynamo=True, verbose=False
            )
            assert translated is not None
            model = translated.model_proto
    except Exception as error:  # torch.onnx, onnxscript and onnx_ir have their own
        root = _root(error)
        raise ModelError(
            f"the model cannot be exported to ONNX: {_operation(root, program)}",
            first_line(root),
            "export it --to torch, or --to timm",
        ) from None
    _name_sizes(model.graph, inputs)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save_model(model, str(file))


class Session:
    """An ONNX file in onnxruntime, on the CPU."""

    def __init__(self, file: Path) -> None:
        """Raises CheckpointError for a file that onnxruntime cannot run."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base
            raise CheckpointError(
                "the exported file does not load in onnxruntime",
                first_line(error),
                "pip install --upgrade onnxruntime, or export to another format",
            ) from None

    def __call__(self, value: torch.Tensor) -> list[npt.NDArray[np.float32]]:
        """The outputs for one input."""
        name = self._session.get_inputs()[0].name
        outputs: list[npt.NDArray[np.float32]] = self._session.run(None, {name: value.contiguous().numpy()})
        return outputs


def keep_outputs(file: Path, count: int) -> None:
    """Keep only the first outputs of the graph."""
    import onnx

    model = onnx.load_model(str(file))
    del model.graph.output[count:]
    onnx.save_model(model, str(file))


def _name_sizes(graph: Any, inputs: Mapping[str, Mapping[int, str]]) -> None:
    """Replace torch's symbols for variable sizes by names."""
    names: dict[str, str] = {}
    for value in graph.input:
        for axis, name in inputs[value.name].items():
            names[value.type.tensor_type.shape.dim[axis].dim_param] = name
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _operation(error: BaseException, program: torch.export.ExportedProgram) -> str:
    """The operation without translation, and its layer."""
    for node in program.graph.nodes:
        name, _, overload = str(node.target).rpartition(".")
        if node.op == "call_function" and f"op='{name}', overload='{overload}'" in str(error):
            layers = list(node.meta.get("nn_module_stack", {}).values())
            layer, kind = layers[-1] if layers else ("", "")
            return f"operation {name} in layer {layer or 'of the model itself'} ({str(kind).rpartition('.')[2]})"
    return "an operation has no translation"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and logs of torch's exporters: a user cannot act on them."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
