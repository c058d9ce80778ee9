"""Cost of a trial: parameters, images per second (paper, figure 3), and device memory of a pass.

Speed and memory are measured on dummy batches of few images.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from iwm.compat import synchronize
from iwm.downstream.pretrained import Pretrained
from iwm.downstream.study import SharedInputs, Study, Trial

WARMUP_ITERS, TIMED_ITERS = 2, 5
"""Passes before timing, and passes that are timed."""


def count_parameters(module: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def images_per_second(study: Study, trial: int, pixels: Tensor, targets: Sequence[Tensor], bf16: bool) -> float:
    """Return this process's images per second for the frozen encoders and one trial, forward and backward.

    The time is the median of TIMED_ITERS passes. Parameters are not changed, and their gradients are dropped.
    """
    module = study.trial(trial)
    seconds: list[float] = []
    for number in range(WARMUP_ITERS + TIMED_ITERS):
        synchronize(pixels.device)
        start = time.perf_counter()
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            loss = module.loss(study.shared_inputs(pixels), targets)
        loss.backward()
        synchronize(pixels.device)
        if number >= WARMUP_ITERS:
            seconds.append(time.perf_counter() - start)
    module.zero_grad(set_to_none=True)
    return len(pixels) / statistics.median(seconds)


MEASURED_IMAGES = 16
"""Largest number of images of each task in a measured pass."""


@dataclass(frozen=True)
class MemoryNeed:
    """Peak memory of a pass in bytes, linear in the number of images."""

    fixed: int
    """Bytes that do not depend on the number of images: weights cast to bf16, their new gradients."""
    image: int
    """Bytes per image."""

    def of(self, images: int) -> int:
        """Return the bytes of a pass of `images` images of each task."""
        return self.fixed + self.image * images


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes that operators allocated on a device and that are still in use.

    Each storage is counted once, however many tensors view it. Storages that existed before (parameters, the batch) are
    not counted. Memory that a kernel allocates and frees within one operator is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.now = 0
        """Bytes in use."""
        self.peak = 0
        """Highest value of `now`, in bytes."""
        self._type = device.type
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in self._tensors((args, kwargs)):
            self._known.setdefault(tensor.untyped_storage(), True)
        result = function(*args, **kwargs)
        for tensor in self._tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _tensors(self, tree: Any) -> Iterator[Tensor]:
        return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor) and leaf.device.type == self._type)

    def _freed(self, count: int) -> None:
        self.now -= count


def memory_need(
    study: Study, trial: int, example: MakeDummyBatch, *, share: int, bf16: bool, cached: bool
) -> MemoryNeed:
    """Measure the memory of a trial's pass: the frozen encoders' forward pass, then the trial's forward and backward.

    Two passes are measured, of MEASURED_IMAGES images and of half as many. share: images of a process's step; where
    there are fewer of them, the passes are smaller too, but have at least 4 and 2 images, for batch norm. cached: the
    frozen features are inputs and are not computed. Nothing is compiled during the measurement. Parameters, buffers and
    torch's generators are not changed. The gradients of parameters are assumed to be allocated and are not counted.
    Where weights need more memory than MEASURED_IMAGES images, the peak of many images may occur at another operator
    and be up to a tenth higher.
    """
    module = study.train().trial(trial)
    most = max(4, min(MEASURED_IMAGES, share))
    counts = (most // 2, most // 2 * 2)
    device = next(study.parameters()).device
    with _untouched(module, device), torch.compiler.set_stance("force_eager"):
        few, more = (_peak(study, module, example, count, bf16, cached) for count in counts)
    image = max(0, more - few) // counts[0]
    return MemoryNeed(max(0, few - counts[0] * image), image)


def feature_bytes(study: Study, example: MakeDummyBatch, *, bf16: bool) -> int:
    """Return the bytes of one image's cached features (tasks.CachedFeatures)."""
    pixels, _ = example(1)
    shared = study.shared_inputs(pixels)
    return sum(shared[name].numel() for name in study.encoders.names) * (2 if bf16 else 4)


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a GPU; None on a CPU, whose memory is not measured."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _peak(study: Study, trial: Trial, example: MakeDummyBatch, count: int, bf16: bool, cached: bool) -> int:
    """Return the peak bytes of a pass of `count` images of each task."""
    pixels, targets = example(count)
    inputs: Tensor | SharedInputs = study.shared_inputs(pixels) if cached else pixels
    live = LiveBytes(pixels.device)
    with live:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            loss = trial(study.shared_inputs(inputs), targets)
        if loss.requires_grad:
            loss.backward()
    return live.peak


@contextmanager
def _untouched(trial: Trial, device: torch.device) -> Iterator[None]:
    """Give parameters zero gradients; at the end drop them and restore buffers and generators."""
    trained = [parameter for parameter in trial.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in trial.buffers()]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for parameter in trained:
            parameter.grad = None
        for buffer, before in buffers:
            buffer.copy_(before)


MakeDummyBatch = Callable[[int], tuple[Tensor, list[Tensor]]]
"""Function from a number of images per task to the pixels of all tasks, concatenated, and the targets of each task."""


def dummy_labelled_batch(pretrained: Pretrained, classes: Sequence[int], device: torch.device) -> MakeDummyBatch:
    """Return a function that makes images with soft targets. classes: number of classes of each task."""

    def make(count: int) -> tuple[Tensor, list[Tensor]]:
        size = pretrained.img_size
        pixels = torch.randint(0, 256, (count * len(classes), size, size, 3), device=device).float()
        return pixels, [torch.full((count, number), 1 / number, device=device) for number in classes]

    return make


def dummy_masked_batch(pretrained: Pretrained, device: torch.device) -> MakeDummyBatch:
    """Return a function that makes images with masks of class 0."""

    def make(count: int) -> tuple[Tensor, list[Tensor]]:
        sides = (count, pretrained.img_size, pretrained.img_size)
        pixels = torch.randint(0, 256, (*sides, 3), dtype=torch.uint8, device=device)
        return pixels, [torch.zeros(sides, dtype=torch.uint8, device=device)]

    return make
