"""Torch's backward engine in Python, for fake tensors on a GPU that is not there: its own asks a driver for streams."""

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch


def run_backward(
    roots: Sequence[torch.Tensor],
    grad_tensors: Sequence[torch.Tensor | None],
    keep_graph: bool,
    create_graph: bool,
    inputs: Sequence[torch.Tensor] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Torch's backward engine, node by node in its order, without asking a driver for streams. One root, no hooks.

    It takes the place of torch.autograd._engine_run_backward.
    """
    (root,), (seed,) = roots, grad_tensors
    assert root.grad_fn is not None
    wanted = {id(w) for w in inputs}
    nodes = _graph(root.grad_fn)
    waiting = Counter(after for node in nodes for after, _ in node.next_functions if after is not None)
    needed = _leads_to(nodes, wanted) if wanted else set(nodes)
    found: dict[int, torch.Tensor] = {}
    grads: dict[Any, list[torch.Tensor | None]] = {root.grad_fn: [seed]}
    ready = [(-root.grad_fn._sequence_nr(), 0, root.grad_fn)]
    order = 0
    with torch.no_grad():
        while ready:
            node = heapq.heappop(ready)[2]
            given = grads.pop(node, None)
            edges = node.next_functions
            made: Any = (None,) * len(edges)
            if given is not None and node in needed:
                leaf = getattr(node, "variable", None)
                if leaf is None and callable(node):
                    made = node(*given)
                    made = made if isinstance(made, tuple) else (made,)
                elif leaf is None:  # of a torch.autograd.Function, whose arguments need not be tensors
                    made = node.apply(*given)
                    made = made if isinstance(made, tuple) else (made,)
                    made = [grad for grad, is_used in zip(made, node.needs_input_grad, strict=False) if is_used]
                    edges = [edge for edge in edges if edge[0] is not None]
                elif accumulate_grad:
                    _accumulate(leaf, given[0])
                else:
                    found[id(leaf)] = given[0]
            del given
            for (after, place), grad in zip(edges, made, strict=True):
                if after is None:
                    continue
                if grad is not None:
                    like = after._input_metadata[place]
                    grad = grad.sum_to_size(like.shape).to(like.dtype)
                    slots = grads.setdefault(after, [None] * len(after._input_metadata))
                    slots[place] = grad if slots[place] is None else slots[place] + grad
                waiting[after] -= 1
                if waiting[after] == 0:
                    order += 1
                    heapq.heappush(ready, (-after._sequence_nr(), order, after))
    return tuple(found.get(id(w)) for w in inputs)


def _graph(first: Any) -> list[Any]:
    """All nodes that a node leads to, itself included."""
    nodes, stack = {first}, [first]
    while stack:
        for after, _ in stack.pop().next_functions:
            if after is not None and after not in nodes:
                nodes.add(after)
                stack.append(after)
    return list(nodes)


def _leads_to(nodes: list[Any], wanted: set[int]) -> set[Any]:
    """The nodes from which a wanted leaf is reached."""
    leaves = {node for node in nodes if hasattr(node, "variable")}
    leading = {node for node in leaves if id(node.variable) in wanted}
    for node in sorted(set(nodes) - leaves, key=lambda node: node._sequence_nr()):  # made before what uses them
        if any(after in leading for after, _ in node.next_functions):
            leading.add(node)
    return leading


def _accumulate(leaf: torch.Tensor, grad: torch.Tensor) -> None:
    """As torch's AccumulateGrad: a first gradient stays as it is, if it lies in memory as its leaf does."""
    if leaf.grad is not None:
        leaf.grad.add_(grad)
    elif all(a == b for a, b, n in zip(grad.stride(), leaf.stride(), leaf.shape, strict=True) if n != 1):
        leaf.grad = grad.detach()
    else:
        leaf.grad = torch.empty_like(leaf).copy_(grad)
