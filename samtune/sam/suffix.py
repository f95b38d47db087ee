"""SAM on the last part of a network: the front is computed once for both passes.

A network is cut before one of its modules: z = front(x), logits = suffix(z). If only the suffix is perturbed, z is the
same in both passes. So pass 1 keeps z with its graph and goes on from z.detach(), and pass 2 begins with z itself:

    z = front(x)                                    # once
    g1 = gradient of loss(suffix(z.detach()))       # by the suffix's parameters
    suffix += rho * dual(g1)
    loss(suffix(z)).backward()                      # the suffix's gradient at w + e, and the front's

This is SAM exactly, for a perturbation that is restricted to the suffix. It costs one pass over the front and two over
the suffix. Activations take as much memory as in a plain pass: those of the suffix are free again before pass 2.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from samtune.sam.snapshot import generator_states, set_generator_states


class Cut:
    """The place before a module where a network is cut in two.

    What is registered before the module, on any level of the network, belongs to the front, with the parameters that
    the modules around it have themselves. All data must pass through the module's first argument, once in a forward
    pass, nothing else may lead from the front to the output, and the module must not change its argument in place.
    `check` and the first pass look for that. What the front does must not depend on the values of its activations: in
    later passes its modules return tensors of any values.

    Args:
        model: the network, without wrappers.
        name: of the module, such as "layer4" or "blocks.5".

    Raises ValueError for a name that is none, the first module, or one from which on nothing trains.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self._model = model
        self._module, fronts = _find(model, name)
        self._front_modules = fronts
        suffix = {id(w) for w in self._module.parameters()}
        for module in _registered_after(model, name):
            suffix |= {id(w) for w in module.parameters()}
        named = {parameter: w for parameter, w in model.named_parameters() if w.requires_grad}
        self.suffix = {parameter: w for parameter, w in named.items() if id(w) in suffix}
        """The trainable parameters of the suffix, by name."""
        self._front = {parameter: w for parameter, w in named.items() if id(w) not in suffix}
        if not fronts:
            raise ValueError(f"module {name!r}: nothing comes before it")
        if not self.suffix:
            raise ValueError(f"module {name!r}: no parameters train from it on")
        self._is_checked = False
        self._z: torch.Tensor | None = None
        self._at_cut: list[torch.Tensor] = []
        self._outputs: dict[nn.Module, list[tuple[Any]]] = {}

    def check(self, example: torch.Tensor) -> None:
        """Raise ValueError unless this is a place to cut: a later pass must come to what the first one came to.

        example: an input of one sample, not constant. The model is left as it was.
        """
        training = {module: module.training for module in self._model.modules()}
        try:
            self._model.eval()
            with self.first_pass():
                first = self._model(example)
            with self.later_pass(with_front=False):  # with gradients, too: torch has other kernels without
                later = self._model(example)
            if not all(torch.equal(a, b) for a, b in zip(_tensors(first), _tensors(later), strict=True)):
                raise ValueError(f"module {self.name!r} is no place to cut: more than its argument leads past it")
        finally:
            for module, was in training.items():
                module.training = was
            self.release()

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """A forward pass in this block keeps z, and goes on from it without its graph."""
        self._z, self._outputs = None, {}
        reached, version = False, 0

        def keep_output(module: nn.Module, _: Any, output: Any) -> None:
            if not reached:
                self._outputs.setdefault(module, []).append((_on_meta(output),))

        def cut(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal reached, version
            if reached or not arguments or not isinstance(arguments[0], torch.Tensor):
                raise ValueError(f"module {self.name!r}: data do not pass through it once, as one tensor")
            reached = True
            self._z, version = arguments[0], arguments[0]._version
            self._at_cut = generator_states(self._z.device)
            return (self._z.detach(), *arguments[1:])

        hooks: list[RemovableHandle] = []
        try:
            hooks += (module.register_forward_hook(keep_output) for module in self._front_modules)
            hooks.append(self._module.register_forward_pre_hook(cut))
            if not self._is_checked:
                hooks.append(self._model.register_forward_hook(self._check))
            yield
            if self._z is None:
                raise ValueError(f"module {self.name!r}: no data pass through it")
            if self._z._version != version:
                raise ValueError(f"module {self.name!r} is no place to cut: its input is changed in place")
            if not self._is_checked:
                raise ValueError(f"module {self.name!r}: the loss must call the model itself, to be cut")
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def later_pass(self, *, with_front: bool) -> Iterator[None]:
        """A forward pass in this block begins with the z of the first one. with_front: its graph is that of z, too."""
        z, outputs, reached = self._z, {module: iter(kept) for module, kept in self._outputs.items()}, False
        assert z is not None

        def cut(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal reached
            reached = True
            set_generator_states(self._at_cut, z.device)  # the front drew its random numbers in the first pass
            return (z if with_front else z.detach(), *arguments[1:])

        def again(module: nn.Module, forward: Any, *arguments: Any, **named: Any) -> Any:
            if reached:
                return forward(*arguments, **named)
            kept = next(outputs[module], None)
            if kept is None:
                raise ValueError(f"module {self.name!r} is no place to cut: what is before it differs between passes")
            return _placeholder(kept[0])

        replaced = [module for module in outputs if "forward" not in vars(module)]
        hook = self._module.register_forward_pre_hook(cut)
        try:
            for module in replaced:
                module.forward = partial(again, module, module.forward)
            yield
        finally:
            hook.remove()
            for module in replaced:
                vars(module).pop("forward", None)

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is part of the suffix."""
        after = [self._module, *_registered_after(self._model, self.name)]
        return any(module is one for top in after for one in top.modules())

    def release(self) -> None:
        """Free z and its graph."""
        self._z, self._outputs = None, {}

    def _check(self, _: nn.Module, __: Any, output: Any) -> None:
        """Raise ValueError if something leads past the cut: from the front to the output, or from the suffix to z."""
        assert self._z is not None
        for start, parameters, way in ((output, self._front, "past"), (self._z, self.suffix, "back before")):
            reached = _leaves(start)
            found = [name for name, w in parameters.items() if w in reached]
            if found:
                raise ValueError(f"module {self.name!r} is no place to cut: {found[0]} leads {way} it")
        self._is_checked = True


def _find(model: nn.Module, name: str) -> tuple[nn.Module, list[nn.Module]]:
    """The module of a name, and those before it whose calls make up the front."""
    fronts: list[nn.Module] = []
    module = model
    for part in name.split("."):
        children = dict(module.named_children())
        if part not in children:
            raise ValueError(f"module {name!r}: there is none of this name")
        for child, before in children.items():
            if child == part:
                break
            fronts += _called(before)
        module = children[part]
    return module, fronts


def _registered_after(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that are registered after the one of this name, on each level that leads to it."""
    module = model
    for part in name.split("."):
        children = list(module.named_children())
        position = [child for child, _ in children].index(part)
        yield from (after for _, after in children[position + 1 :])
        module = children[position][1]


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose calls make up the call of a module, or of a list, which is not called."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        yield module
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):  # a model may go through a sequence by itself
        for child in module.children():
            yield from _called(child)


def _on_meta(output: Any) -> Any:
    """What a module returned; what has a graph without its values, which take no memory then."""
    if isinstance(output, torch.Tensor) and output.requires_grad:
        return output.device, torch.empty_like(output, device="meta", requires_grad=False)
    return _mapped(_on_meta, output) if isinstance(output, tuple | list) else output


def _placeholder(kept: Any) -> Any:
    """A tensor, of any values, in the place of what a module returned: nothing but its shape matters before the cut."""
    if isinstance(kept, tuple) and len(kept) == 2 and isinstance(kept[0], torch.device):
        return torch.empty_like(kept[1], device=kept[0])  # filled, it would cost a hundredth of a step
    return _mapped(_placeholder, kept) if isinstance(kept, tuple | list) else kept


def _mapped(function: Callable[[Any], Any], parts: Any) -> Any:
    """A tuple, named or not, or a list, with the function applied to each part."""
    mapped = map(function, parts)
    return type(parts)(*mapped) if hasattr(parts, "_fields") else type(parts)(mapped)


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output."""
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _leaves(output: Any) -> set[torch.Tensor]:
    """The parameters that an output's graph leads back to."""
    waiting = [tensor.grad_fn for tensor in _tensors(output)]
    seen, found = set(waiting), set()
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.add(node.variable)
        for after, _ in node.next_functions:
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return found
