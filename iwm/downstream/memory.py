"""Device memory of a training pass, measured arm by arm on few images."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from iwm.downstream.example import Example
from iwm.downstream.study import Arm, Shared, Study

MEASURED = 16
"""Most images of each task that a measured pass has."""


@dataclass(frozen=True)
class Need:
    """Peak memory of a pass in bytes, linear in the number of images."""

    fixed: int
    """Bytes that do not depend on the number of images: weights cast to bf16, gradients on their way."""
    image: int
    """Bytes per image."""

    def of(self, images: int) -> int:
        """Return the bytes of a pass of so many images."""
        return self.fixed + self.image * images


class LiveBytes(TorchDispatchMode):
    """Count of bytes that operators allocated on a device and that are still in use.

    Storages are counted once, however many tensors view them; those from outside (parameters, the batch) are not.
    Memory that a kernel takes and frees within one operator is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.now = 0
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
        return (each for each in tree_iter(tree) if isinstance(each, Tensor) and each.device.type == self._type)

    def _freed(self, count: int) -> None:
        self.now -= count


def need_of(study: Study, arm: int, example: Example, *, share: int, bf16: bool, kept: bool) -> Need:
    """Measure an arm's pass, forward and backward, after the frozen encoders' pass.

    Two passes are measured, of MEASURED images and of half as many. share: images of a process's step; where these are
    fewer, so are those of the passes, but at least 4 and 2, for batch norm. kept: frozen features are given and not
    computed. Nothing is compiled meanwhile. Parameters, buffers and torch's generators stay as they are. The step's
    gradients are taken to be there already, and are not counted. Where weights need more memory than MEASURED images,
    the peak of many images may come at another moment and be up to a tenth higher.
    """
    module = study.train().arm(arm)
    most = max(4, min(MEASURED, share))
    counts = (most // 2, most // 2 * 2)
    device = next(study.parameters()).device
    with _untouched(module, device), torch.compiler.set_stance("force_eager"):
        few, more = (_peak(study, module, example, count, bf16, kept) for count in counts)
    image = max(0, more - few) // counts[0]
    return Need(max(0, few - counts[0] * image), image)


def feature_bytes(study: Study, example: Example, *, bf16: bool) -> int:
    """Return the bytes of an image's frozen features, as they are kept (iwm.downstream.kept)."""
    pixels, _ = example(1)
    shared = study.share(pixels)
    return sum(shared[name].numel() for name in study.encoders.names) * (2 if bf16 else 4)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a GPU; None on a CPU, whose memory is not looked at."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _peak(study: Study, arm: Arm, example: Example, count: int, bf16: bool, kept: bool) -> int:
    """Return the peak bytes of a pass of `count` images of each task."""
    pixels, targets = example(count)
    inputs: Tensor | Shared = study.share(pixels) if kept else pixels
    live = LiveBytes(pixels.device)
    with live:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            loss = arm(study.share(inputs), targets)
        if loss.requires_grad:
            loss.backward()
    return live.peak


@contextmanager
def _untouched(arm: Arm, device: torch.device) -> Iterator[None]:
    """Give parameters gradients of zero; at the end drop them and put buffers and generators back."""
    trained = [parameter for parameter in arm.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in arm.buffers()]
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
