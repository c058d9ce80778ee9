"""A training step that is compiled but not run, and the kernels that it would launch.

Compiled parts are found by their calls of torch.compile. Dynamo, AOTAutograd with its partitioner, and Inductor's
passes, lowering and scheduler run as in training; only code generation is left out. Operators outside compiled parts
are recorded as torch dispatches them, one kernel each.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from kernel_traffic import Kernel, SequencePairs, dispatched_kernels, scheduled_kernels
from torch import Tensor, nn
from torch._guards import TracingContext
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves


class SavedTensor(NamedTuple):
    """Tensor that a forward graph hands to its backward graph."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass
class Graph:
    """Compiled graph: the forward or the backward pass of a part, or of several equal parts."""

    backward: bool
    kernels: list[Kernel]
    calls: Counter[str] = field(default_factory=Counter)
    """Calls in a step, by the name of the module or method within the model."""
    tokens: int = 0
    """Rows of the part's output; where that is a scalar, of its first input."""
    saved: list[SavedTensor] = field(default_factory=list)
    """Tensors kept for the backward pass, without parameters and buffers; casts of parameters are among them. A part's
    input is listed if its backward pass needs it, not where the part before computed it. Views of a buffer are one
    tensor."""

    @property
    def name(self) -> str:
        return collapsed(self.calls)


@dataclass
class TracedStep:
    """Kernels of a step."""

    graphs: list[Graph] = field(default_factory=list)
    """In the order of their first call."""
    eager: dict[str, list[Kernel]] = field(default_factory=dict)
    """Kernels outside compiled parts, by phase of the step."""


class StepRecorder(FakeTensorMode):
    """Fake mode that records the kernels of what runs in it."""

    def __init__(self, pairs: SequencePairs) -> None:
        """Record nothing yet. pairs: lengths of packed sequences, for the FLOPs of their attention."""
        super().__init__(allow_non_fake_inputs=True)
        self.step = TracedStep()
        self._pairs = pairs
        self._names: dict[int, str] = {}
        self._static: set[int] = set()
        self._running: list[str] = []
        self._forward: dict[int | None, Graph] = {}
        self._phase: list[Kernel] | None = None
        self._depth = 0

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Schedule and record what is compiled in this context instead of generating code for it."""
        original = torch.compile

        def compile_recorded(model: Any = None, **options: Any) -> Any:
            return self._named(model, original(model, **options))

        def compile_to_module(lowered: GraphLowering) -> Any:
            return self._scheduled(lowered)

        with (
            patch.object(torch, "compile", compile_recorded),
            patch.object(GraphLowering, "compile_to_module", compile_to_module),
        ):
            yield

    def know(self, model: nn.Module, copies: Iterable[Tensor] = ()) -> None:
        """Learn the names of a model's modules, and its parameters, buffers and their copies."""
        self._names = {id(module): name for name, module in model.named_modules()}
        self._static = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers(), *copies)}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record operators outside compiled parts in this context, under the name of a phase."""
        self._phase = self.step.eager.setdefault(name, [])
        try:
            yield
        finally:
            self._phase = None

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._depth += 1  # operators within operators are not launched
        try:
            result = super().dispatch(func, types, args, kwargs or {})
        finally:
            self._depth -= 1
        if self._phase is not None and self._depth == 0 and not self._running:
            self._phase.extend(dispatched_kernels(func, args, kwargs or {}, result))
        return result

    def _named(self, function: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a compiled method: graphs that run in a call of it are recorded under its name."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            module = self._names[id(function.__self__)]
            method = "" if function.__name__ == "_call_impl" else function.__name__
            self._running.append(".".join(filter(None, (module, method))))
            known = len(self.step.graphs)
            try:
                result = compiled(*arguments, **options)
            finally:
                self._running.pop()
            for graph in self.step.graphs[known:]:
                graph.tokens = _rows(result) or _rows(arguments)
            return result

        return call

    def _scheduled(self, lowered: GraphLowering) -> Any:
        """Schedule a graph; return what stands in for the module of its code."""
        lowered.init_wrapper_code()
        lowered._update_scheduler()
        graph = Graph(lowered.is_backward, scheduled_kernels(lowered.scheduler, self._pairs))
        outputs, number = [_blueprint(output) for output in lowered.graph_outputs], lowered.graph_id
        saved, inputs = _saved(lowered), list(lowered.graph_input_names)

        def call(arguments: list[Any]) -> list[Tensor | None]:
            if not graph.calls:
                static = {name for name, tensor in zip(inputs, arguments, strict=True) if self._is_static(tensor)}
                graph.saved = [tensor for name, tensor in saved.items() if name not in static]
                self.step.graphs.append(graph)
            if graph.backward:
                forward = self._forward[number]
                graph.tokens = forward.tokens
                names = list(forward.calls)  # their backward passes run in reverse order
                graph.calls[names[-1 - graph.calls.total() % len(names)]] += 1
            else:
                self._forward[number] = graph
                graph.calls[self._running[-1]] += 1
            arguments.clear()
            self._depth += 1  # its outputs are not launched operators either
            with self:
                made = [None if output is None else torch.empty_strided(**output) for output in outputs]
            self._depth -= 1
            return made

        return SimpleNamespace(call=call)

    def _is_static(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and _storage(tensor) in self._static


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _rows(value: Any) -> int:
    """Return the rows of the first tensor in `value` with more than one dimension; 0 where there is none."""
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim > 1)
    return next((tensor.numel() // tensor.shape[-1] for tensor in tensors), 0)


def _blueprint(output: Any) -> dict[str, Any] | None:
    """Return the arguments of torch.empty_strided for a graph's output; None for an output that is None."""
    if isinstance(output, ir.NoneAsConstantBuffer):
        return None
    size, stride = ([int(number) for number in numbers] for numbers in (output.get_size(), output.get_stride()))
    return {"size": size, "stride": stride, "dtype": output.get_dtype(), "device": output.get_device()}


def _saved(lowered: GraphLowering) -> dict[str, SavedTensor]:
    """Return the tensors that a forward graph saves, by the name of their buffer."""
    context = TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if lowered.is_inference or lowered.is_backward or metadata is None:
        return {}
    saved: dict[str, SavedTensor] = {}
    for output in lowered.graph_outputs[metadata.num_forward :]:
        if not isinstance(output, ir.NoneAsConstantBuffer | ir.ShapeAsConstantBuffer):
            shape, dtype = tuple(int(size) for size in output.get_size()), output.get_dtype()
            tensor = SavedTensor(shape, str(dtype).removeprefix("torch."), torch.Size(shape).numel() * dtype.itemsize)
            known = saved.setdefault(output.get_name(), tensor)
            saved[output.get_name()] = max(known, tensor, key=lambda one: one.bytes)
    return saved


def collapsed(names: Iterable[str]) -> str:
    """Return names in which only a number differs as one: blocks.0, blocks.1, blocks.3 as blocks.0-1,3."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\d+", name)
        numbers.setdefault(re.sub(r"\d+", "{}", name, count=1), []).extend([int(number[0])] if number else [])
    return ", ".join(name.format(_ranges(sorted(found))) for name, found in numbers.items())


def _ranges(numbers: list[int]) -> str:
    starts = [later for before, later in pairwise([-2, *numbers]) if later != before + 1]
    ends = [before for before, later in pairwise([*numbers, numbers[-1] + 2 if numbers else 0]) if later != before + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
