"""Compiled models (--compile): each block of a model as a few large kernels, made by torch.compile."""

import importlib.util
import os
import shutil
from collections.abc import Iterator

import torch
from torch import nn

from samtune.errors import MachineError

# torch counts the versions of all blocks together, and by default computes the ninth one uncompiled.
_MOST_VERSIONS = 10_000


def check_compiler(device: torch.device) -> None:
    """Raise MachineError if what torch.compile needs for this device is not on the machine."""
    hint = "install it, or leave --compile out"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise MachineError("--compile has no compiler for the GPU", "package triton is not installed", hint)
    language, variable, usual = ("C", "CC", ["gcc", "clang"]) if device.type == "cuda" else ("C++", "CXX", ["g++"])
    names = [os.environ[variable]] if variable in os.environ else usual
    if not any(map(shutil.which, names)):
        raise MachineError(f"--compile has no {language} compiler", f"{' or '.join(names)} is not on the PATH", hint)


def compile_blocks(model: nn.Module) -> None:
    """Let the blocks of a model compile themselves when they are called first, each for every shape of its input.

    Modules, their names and their weights stay what they are. The gradients of a block are ready as soon as its
    backward pass is done, so that ranks exchange them meanwhile.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _MOST_VERSIONS
    on_gpu = next(model.parameters()).device.type == "cuda"
    for block in list(_blocks(model)) or [model]:
        # The passes of a step are recorded as CUDA graphs by samtune.sam: torch's own would overwrite gradients.
        block.compile(dynamic=False, mode="max-autotune-no-cudagraphs" if on_gpu else None)


def _blocks(module: nn.Module, is_list: bool = False) -> Iterator[nn.Module]:
    """The outermost modules with layers in a sequence or list: those that a model calls one after the other."""
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _blocks(child, is_list=True)
        elif not is_list:
            yield from _blocks(child)
        elif next(child.children(), None) is not None:
            yield child
