"""torch's autograd engine in Python, for tensors on a GPU that does not exist.

The C++ engine asks the CUDA driver about every gradient on a GPU. This one calls the same nodes in the same order and
asks nothing. It runs no hooks of tensors or nodes and builds no graph of the backward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import graph
from torch.autograd.function import BackwardCFunction, FunctionCtx

Gradients = list[Tensor | None]
Node = Any
"""torch.autograd.graph.Node, whose subclasses in C++ have no types."""

_tasks = count()


@contextmanager
def python_engine() -> Iterator[None]:
    """Make backward() and torch.autograd.grad use the engine in Python."""

    def set_materialize_grads(context: Any, value: bool) -> None:
        context.materialize_grads = context.fills_missing = value  # only the second can be read

    with (
        patch.object(FunctionCtx, "set_materialize_grads", set_materialize_grads),
        patch.object(graph, "_engine_run_backward", run_backward),
        patch.object(torch.autograd, "_engine_run_backward", run_backward),
    ):
        yield


def run_backward(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    keep_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of `inputs`, or accumulate those of all leaves where there are none.

    The arguments are those of the C++ engine, which torch.autograd calls.
    """
    assert not create_graph
    task = next(_tasks)
    # Checkpointed blocks are recomputed once per task of the engine.
    with torch.no_grad(), patch.object(torch._C, "_current_graph_task_id", lambda: task):
        roots, wanted = [_edge(tensor) for tensor in tensors], [_edge(tensor) for tensor in inputs]
        captured = _run(roots, gradients, wanted)
        if accumulate_grad:
            for (node, _), gradient in captured.items():
                _accumulate(node, gradient)
        return () if accumulate_grad else tuple(captured.get(edge) for edge in wanted)


def _edge(tensor: Any) -> tuple[Node, int]:
    edge = tensor if isinstance(tensor, graph.GradientEdge) else graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _run(
    roots: Sequence[tuple[Node, int]], gradients: Sequence[Tensor], wanted: Sequence[tuple[Node, int]]
) -> dict[tuple[Node, int], Tensor | None]:
    """Run the nodes behind `roots` in the engine's order: those that are ready, the most recent first."""
    needed, uses = _plan([node for node, _ in roots], {node for node, _ in wanted})
    buffers: dict[Node, Gradients] = {}
    captured: dict[tuple[Node, int], Tensor | None] = {}
    ready: list[tuple[int, int, Node]] = []
    order = count()

    def push(node: Node) -> None:
        heappush(ready, (-node._sequence_nr(), next(order), node))

    def add(node: Node, place: int, gradient: Tensor | None) -> None:
        buffer = buffers.setdefault(node, [None] * len(node._input_metadata))
        if gradient is not None:
            gradient = _fitted(gradient, node._input_metadata[place])
            before = buffer[place]
            buffer[place] = gradient if before is None else before + gradient

    for (root, place), gradient in zip(roots, gradients, strict=True):
        add(root, place, gradient)
    for node in dict.fromkeys(node for node, _ in roots):
        if not uses[node]:
            push(node)
    while ready:
        *_, node = heappop(ready)
        buffer = buffers.pop(node)
        captured |= {edge: buffer[edge[1]] for edge in wanted if edge[0] == node}
        edges = [(following, place) for following, place in node.next_functions if following is not None]
        if wanted and not any(following in needed for following, _ in edges):
            continue
        for (following, place), result in zip(edges, _call(node, buffer), strict=True):
            if following in needed:
                add(following, place, result)
                uses[following] -= 1
                if not uses[following]:
                    push(following)
    return captured


def _plan(roots: Sequence[Node], wanted: set[Node]) -> tuple[set[Node], Counter[Node]]:
    """Return the nodes to visit (those that lead to `wanted`, or all) and the number of gradients that each awaits."""
    following: dict[Node, list[Node]] = {}
    finished: list[Node] = []
    stack = [(node, False) for node in roots]
    while stack:
        node, done = stack.pop()
        if done:
            finished.append(node)
        elif node not in following:
            following[node] = [after for after, _ in node.next_functions if after is not None]
            stack += [(node, True), *((after, False) for after in following[node])]
    needed: set[Node] = set()
    for node in finished:  # a node's followers come before it
        if not wanted or node in wanted or any(after in needed for after in following[node]):
            needed.add(node)
    return needed, Counter(after for node in needed for after in following[node] if after in needed)


def _fitted(gradient: Tensor, expected: Any) -> Tensor:
    """Return a gradient in the shape and dtype of the tensor it belongs to."""
    if gradient.shape != expected.shape:
        gradient = gradient.sum_to_size(expected.shape)
    return gradient if gradient.dtype == expected.dtype else gradient.to(expected.dtype)


def _call(node: Node, gradients: Gradients) -> Gradients:
    """Call a node and return the gradients of its edges to other nodes."""
    expected: Sequence[Any] = node._input_metadata
    if type(node).__name__ == "AccumulateGrad":
        _accumulate(node, gradients[0])
        return []
    if isinstance(node, BackwardCFunction):
        if getattr(node, "fills_missing", True):
            gradients = [
                torch.zeros(to.shape, dtype=to.dtype, device=to.device) if gradient is None else gradient
                for gradient, to in zip(gradients, expected, strict=True)
            ]
        results, edges = node.apply(*gradients), tuple(node.needs_input_grad)
    else:
        results, edges = node(*gradients), tuple(after is not None for after, _ in node.next_functions)
    results = results if isinstance(results, tuple) else (results,)
    return [result for result, edge in zip(results, edges, strict=False) if edge]


def _accumulate(node: Node, gradient: Tensor | None) -> None:
    """Make a gradient that of a leaf, without a copy where the C++ engine needs none."""
    leaf = node.variable
    if gradient is not None and leaf.grad is None and gradient.stride() == leaf.stride():
        leaf.grad = gradient
    else:
        node(gradient)
