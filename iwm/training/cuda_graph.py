"""CUDA graph of a step's forward and backward passes.

A step of the B/16 recipe launches about 2,000 kernels. On an H100 the host needs 80 ms to launch them one by one, and
the GPU 98 ms to run them. Replaying the graph takes 11 ms of host time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dali_pipelines.loader import ViewBatch
from iwm.masking import PackedMasks
from iwm.models.world_model import WorldModel
from iwm.training.distributed import DistEnv
from iwm.training.step import ForwardBackward, StepResult

WARMUP_STEPS = 3
"""Number of steps without a graph before the capture. Blocks are compiled and attention is planned in them."""

MAX_STEPS_AHEAD = 2
"""Maximum number of replayed steps by which the host may be ahead of the GPU. The host launches one in 11 ms. Without
this limit it would run as far ahead as the pipeline can, and every waiting batch occupies GPU memory (77 MB for 256
images)."""


class GraphedForwardBackward(ForwardBackward):
    """Forward and backward passes that are captured once and then replayed on copies of a step's batches and masks.

    A step with other shapes than the captured ones (a batch with more visible patches than the buffer size, one in
    30,000) runs kernel by kernel. The graph is then released and the next step is captured again, because two graphs
    may not fit into GPU memory. Always call it on the same stream, which must not be the default stream.
    """

    def __init__(self, model: WorldModel, wrapped: nn.Module) -> None:
        super().__init__(model, wrapped)
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[list[ViewBatch], list[PackedMasks]] = ([], [])
        self._result: StepResult
        self._gradients: list[Tensor | None] = []
        self._replays = 0
        self._ended: list[torch.cuda.Event] = []

    def __call__(self, batches: Sequence[ViewBatch], masks: Sequence[PackedMasks]) -> StepResult:
        if self._warm < WARMUP_STEPS:
            self._warm += 1
            return super().__call__(batches, masks)
        if self._graph is None:
            self._capture(batches, masks)
        inputs, static = (list(_tensors(*pair)) for pair in ((batches, masks), self._inputs))
        if [tensor.shape for tensor in inputs] != [tensor.shape for tensor in static]:
            self._release()
            return super().__call__(batches, masks)
        ended = self._ended[self._replays % MAX_STEPS_AHEAD]
        ended.synchronize()  # wait for the replay of MAX_STEPS_AHEAD steps ago
        torch._foreach_copy_(static, inputs)
        assert self._graph is not None  # captured above
        self._graph.replay()
        ended.record()
        self._replays += 1
        for parameter, gradient in zip(self.model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        return StepResult(*(value.clone() for value in self._result))

    def _capture(self, batches: Sequence[ViewBatch], masks: Sequence[PackedMasks]) -> None:
        """Record the kernels of a step without running them."""
        self._inputs = [batch.clone() for batch in batches], [mask.apply(torch.clone) for mask in masks]
        self.model.zero_grad()  # so that a replay overwrites gradients and does not add to them
        graph = torch.cuda.CUDAGraph()
        # The pipeline's threads allocate memory and wait for events meanwhile. A thread-local capture ignores that.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._result = super().__call__(*self._inputs)
        self._gradients = [parameter.grad for parameter in self.model.parameters()]
        self._graph = graph
        self._ended = [torch.cuda.Event(blocking=True) for _ in range(MAX_STEPS_AHEAD)]

    def _release(self) -> None:
        """Wait for the replays in flight, then free the graph and its memory."""
        for ended in self._ended:
            ended.synchronize()
        self.model.zero_grad()
        self._graph, self._gradients, self._inputs = None, [], ([], [])
        del self._result


def build_forward_backward(model: WorldModel, wrapped: nn.Module, dist: DistEnv) -> tuple[ForwardBackward, str]:
    """Return the passes that train.cuda_graph selects, and a description of the kernel launches for the user."""
    train = model.config.train
    if not train.cuda_graph:
        return ForwardBackward(model, wrapped), "kernel by kernel"
    for reason, applies in (
        ("no GPU", dist.device.type != "cuda"),
        (f"{dist.size} processes", dist.size > 1),
        ("not compiled", not train.compile),
    ):
        if applies:
            return ForwardBackward(model, wrapped), f"kernel by kernel ({reason})"
    return GraphedForwardBackward(model, wrapped), f"as one CUDA graph after {WARMUP_STEPS} steps"


def _tensors(batches: Sequence[ViewBatch], masks: Sequence[PackedMasks]) -> Iterator[Tensor]:
    """Yield all tensors that change from step to step."""
    for batch in batches:
        yield from (batch.source, batch.target, batch.params)
    for mask in masks:
        yield from mask.tensors()
