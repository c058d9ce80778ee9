"""Checkpoints that are written while training goes on.

Training waits only for the copy of its state to host memory. A background thread then gathers what other processes have
on rank 0, and writes. One checkpoint is written at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from iwm.training.device_events import DeviceEvent, record_event
from iwm.training.distributed import DistEnv
from iwm.training.host_copies import HostCopies
from iwm.training.metric_window import CheckpointPause
from iwm.training.shard_gather import gather


class CheckpointWriter:
    """Writer of a training's checkpoints. Leaving its context waits for the checkpoint that is being written.

    All processes must build it, call `save` after the same steps, and leave it.
    """

    def __init__(
        self, dist: DistEnv, write: Callable[[Any, list[Any]], None], failed: Callable[[OSError], None]
    ) -> None:
        """Store the arguments.

        write: function that writes a content and the values `local` of all ranks, called on rank 0 in the thread; it
        raises OSError where that fails. failed: function that reports such an error, called in the main thread.
        """
        self._write, self._failed, self._device, self._progress = write, failed, dist.device, dist.progress
        self._copies = HostCopies(dist.device, sharded_only=not dist.is_main)
        # A group of its own, which only the thread uses: its order does not depend on training's collectives.
        self._group: Any = torch.distributed.new_group(backend="gloo") if dist.size > 1 else None
        # A thread begins on GPU 0, where a process of another GPU must not create a context.
        start = (lambda: torch.cuda.set_device(dist.device)) if dist.device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=start)
        self._writing: Future[None] | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the copies of this process take."""
        return self._copies.nbytes

    def reserve(self, tensors: Iterable[Tensor]) -> None:
        """Allocate host memory for a state with these tensors, so that its first checkpoint takes no longer."""
        self._copies.reserve(tensors)

    def save(self, collect: Callable[[], tuple[Any, Any]]) -> CheckpointPause:
        """Start to write a checkpoint, after the one before, whose failure is reported. Return training's pause.

        collect: function that returns the content, a nested container of plain values and tensors, and this process's
        own part, of plain values. Both may change once `save` has returned.
        """
        began = record_event(self._device)
        self.wait()
        content, local = collect()
        # Copies run in the order of training's stream: after the step before, which a replayed CUDA graph may be part
        # of, and before the next step changes a parameter.
        copied = self._copies.copy(content)
        pause = CheckpointPause(began, record_event(self._device))
        self._writing = self._thread.submit(self._gather_and_write, copied, local, pause.ended)
        return pause

    def _gather_and_write(self, copied: Any, local: Any, ended: DeviceEvent) -> None:
        ended.synchronize()
        gathered = gather(copied, local, self._group)
        if gathered is not None:
            with self._progress.writing():
                self._write(*gathered)

    def poll(self) -> None:
        """Report the failure of a write that has ended. Does not wait.

        Raises an error of the thread that is not an OSError.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written and report its failure.

        Raises an error of the thread that is not an OSError.
        """
        if (error := self.finish()) is not None:
            self._failed(error)

    def finish(self) -> OSError | None:
        """Wait for the checkpoint that is being written; return its failure in place of reporting it.

        Raises an error of the thread that is not an OSError.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        error = writing.exception()
        if error is None or isinstance(error, OSError):
            return error
        raise error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        try:
            self.wait()
        except RuntimeError as error:
            # A process that is gone breaks off the exchange of the thread too; the first error says more.
            if value is None:
                raise
            value.add_note(f"the checkpoint that was being written failed too: {error}")
