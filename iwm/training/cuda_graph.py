"""The forward and backward passes of a step as one CUDA graph, which the host replays with a single call.

A step of the B/16 recipe is about 2,000 kernels. One by one they take the host 80 ms to issue, where the GPU needs 98
to run them (H100); with the graph the host's part is 11 ms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dali_pipelines.loader import Batch
from iwm.masking import PackedMasks
from iwm.models.world_model import WorldModel
from iwm.training.distributed import World
from iwm.training.step import Gradient, StepResult

WARM_UP = 3
"""Steps taken kernel by kernel before the graph is captured: they compile, and plan attention and matrix products."""

AHEAD = 2
"""Replayed steps that the host may be ahead of the GPU. It issues one in 11 ms: without a bound it would run ahead as
far as the pipeline can, with every batch that waits in GPU memory (77 MB for 256 images)."""


class GraphedGradient(Gradient):
    """Gradient whose kernels are captured once and then replayed on copies of each step's batches and masks.

    A step whose shapes are not those of the capture (a batch with more visible patches than the buffer has room for,
    one in 30,000) is taken kernel by kernel, and the next one is captured anew: the memory of two would not fit where
    one fills the GPU. Call it on a stream that is not the default one, always the same.
    """

    def __init__(self, model: WorldModel, wrapped: nn.Module) -> None:
        super().__init__(model, wrapped)
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[list[Batch], list[PackedMasks]] = ([], [])
        self._result: StepResult
        self._gradients: list[Tensor | None] = []
        self._replays = 0
        self._ended: list[torch.cuda.Event] = []

    def __call__(self, batches: Sequence[Batch], masks: Sequence[PackedMasks]) -> StepResult:
        if self._warm < WARM_UP:
            self._warm += 1
            return super().__call__(batches, masks)
        if self._graph is None:
            self._capture(batches, masks)
        given, kept = (list(_tensors(*inputs)) for inputs in ((batches, masks), self._inputs))
        if [tensor.shape for tensor in given] != [tensor.shape for tensor in kept]:
            self._release()
            return super().__call__(batches, masks)
        ended = self._ended[self._replays % AHEAD]
        ended.synchronize()  # of the replay AHEAD steps ago
        torch._foreach_copy_(kept, given)
        assert self._graph is not None  # captured above
        self._graph.replay()
        ended.record()
        self._replays += 1
        for parameter, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        return StepResult(*(value.clone() for value in self._result))

    def _capture(self, batches: Sequence[Batch], masks: Sequence[PackedMasks]) -> None:
        """Record the kernels of a step; none of them runs."""
        self._inputs = [batch.clone() for batch in batches], [mask.apply(torch.clone) for mask in masks]
        self.model.zero_grad()  # so that a replay overwrites gradients and does not add to them
        graph = torch.cuda.CUDAGraph()
        # The pipeline's threads allocate memory and wait for events meanwhile; that concerns no capture of this thread.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._result = super().__call__(*self._inputs)
        self._gradients = [parameter.grad for parameter in self.model.parameters()]
        self._graph = graph
        self._ended = [torch.cuda.Event(blocking=True) for _ in range(AHEAD)]

    def _release(self) -> None:
        """Free what the graph holds, once it has ended."""
        for ended in self._ended:
            ended.synchronize()
        self.model.zero_grad()
        self._graph, self._gradients, self._inputs = None, [], ([], [])
        del self._result


def gradient_for(model: WorldModel, wrapped: nn.Module, here: World) -> tuple[Gradient, str]:
    """The gradient as train.cuda_graph wants it, and in words how its kernels are issued."""
    train = model.config.train
    if not train.cuda_graph:
        return Gradient(model, wrapped), "kernel by kernel"
    for reason, applies in (
        ("no GPU", here.device.type != "cuda"),
        (f"{here.size} processes", here.size > 1),
        ("not compiled", not train.compile),
    ):
        if applies:
            return Gradient(model, wrapped), f"kernel by kernel ({reason})"
    return GraphedGradient(model, wrapped), f"as one CUDA graph after {WARM_UP} steps"


def _tensors(batches: Sequence[Batch], masks: Sequence[PackedMasks]) -> Iterator[Tensor]:
    """Everything that differs from step to step."""
    for batch in batches:
        yield from (batch.source, batch.target, batch.params)
    for mask in masks:
        yield from mask.tensors()
