"""Staging of a cache's shards by threads, in the order in which DALI's reader needs them and ahead of need.

A loader waits for the shards that its next batch may read. So training begins once the beginning of the epoch is there.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

from torch import Tensor

from dali_pipelines.outputs import run_pipeline
from dali_pipelines.read_order import ReadOrder
from dali_pipelines.reader import DataSource
from shards.cache import SplitCache, StagingStopped
from shards.errors import ShardError

DOWNLOADS = 4
"""Number of shards that a loader stages at the same time."""
AGE = 40
"""Number of buffers that a sample is older than when it has surely left the shuffle buffer: each draw takes one of B
samples at random, so one of them stays for 40·B draws with a probability of B·e⁻⁴⁰, 1e-14 for 2,048."""

ROOM_CHECK = 1.0
"""Time between two looks for room in the cache (seconds)."""


class Reading(NamedTuple):
    """Settings of a reader that tell how far it has read."""

    samples: int
    """Samples of this rank in an epoch."""
    batch_size: int
    batches_per_epoch: int
    """Batches of this rank, those that are padded included."""
    shuffle_buffer: int
    """Samples in the buffer that samples are drawn from; 1 for a reader that does not shuffle."""
    ahead: int
    """Number of batches that DALI may have begun after the one that is asked for."""


class Staging(NamedTuple):
    """Shard that is read from one position of the rank's stream of samples to another."""

    shard: int
    begin: int
    end: int


def stage(
    source: DataSource, *, batch_size: int, shuffle_buffer: int, shuffle_seed: int, prefetch: int, batches: int = 0
) -> StagedShards | None:
    """Begin to stage the shards of a reader; return None for shards that are all there.

    batches: number of batches after which the reader continues. The other arguments are those of the pipeline;
    shuffle_buffer 0: the order of the shards.
    """
    if source.cache is None:
        return None
    reading = Reading(
        samples=source.samples,
        batch_size=batch_size,
        batches_per_epoch=source.batches_per_epoch(batch_size),
        shuffle_buffer=max(shuffle_buffer, 1),
        # The reader and the pipeline have a queue of batches each, and work on one more.
        ahead=2 * (prefetch + 1),
    )
    order = ReadOrder(source, shuffle_seed if shuffle_buffer else None)
    return StagedShards(source.cache, order, reading, batches)


def ordered_outputs(
    source: DataSource, build: Callable[[], Any], batch_size: int, prefetch: int
) -> Iterator[list[Tensor]]:
    """Yield the outputs of a pipeline that reads the shards in their order, endlessly. Raise ShardError as it does.

    build: function that makes the pipeline.
    """
    staged = stage(source, batch_size=batch_size, shuffle_buffer=0, shuffle_seed=0, prefetch=prefetch)
    try:
        pipeline = None
        for batch in count():
            if staged:
                staged.wait_for(batch)
            pipeline = pipeline or build()
            yield run_pipeline(pipeline, source.folder)
    finally:
        if staged:
            staged.stop()


class StagedShards:
    """Shards of one reader, staged by threads that end with `stop`, or with the process."""

    def __init__(self, cache: SplitCache, order: ReadOrder, reading: Reading, batches: int) -> None:
        """Start staging for a reader that continues after `batches` batches.

        Raise ShardError where the cache's limit is below what the reader needs at the same time.
        """
        self._cache, self._order, self._reading, self._first = cache, order, reading, batches
        self._read, self._needed = self._positions(batches)
        self._check_limit()
        self._plan = self._stagings(batches)
        self._next = next(self._plan)
        self._pending: set[Staging] = set()
        self._held: deque[Staging] = deque()
        self._holders: Counter[int] = Counter()
        self._here: set[str] = set()
        self._error: Exception | None = None
        self._stop, self._changed = threading.Event(), threading.Condition()
        self._running = DOWNLOADS
        for _ in range(DOWNLOADS):
            threading.Thread(target=self._stage, name="staging", daemon=True).start()

    def wait_for(self, batch: int) -> None:
        """Wait until all shards are here that DALI may read before it returns batch number `batch`, counted from 0.

        Raise ShardError where a shard cannot be staged.
        """
        with self._changed:
            self._read, self._needed = self._positions(batch)
            # Before its first batch DALI has read nothing.
            if batch > self._first and self._error is None:
                self._release()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error is not None or self._first_missing() >= self._needed)
            if self._error is not None:
                raise self._error

    def check(self, tars: Iterable[str]) -> None:
        """Raise ShardError where a tar that samples of a batch are from was not staged. tars: file names."""
        for name in tars:
            if name not in self._here:
                raise ShardError(
                    f"{self._cache.folder / name} was read before it was staged, which is a defect of this program: "
                    "report it, and train from a local copy of the shards"
                )

    def stop(self) -> None:
        """End the threads, each after the block that it is fetching."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def _positions(self, batches: int) -> tuple[int, int]:
        """Return how far DALI has read before it returns batch number `batches`: at least, and at most.

        Positions are in the rank's stream of samples, over all epochs, without repetitions.
        """
        buffer = self._reading.shuffle_buffer
        return self._returned(batches) + buffer, self._returned(batches + 1 + self._reading.ahead) + buffer

    def _returned(self, batches: int) -> int:
        """Return the number of samples in the first batches."""
        epochs, rest = divmod(batches, self._reading.batches_per_epoch)
        return epochs * self._reading.samples + min(rest * self._reading.batch_size, self._reading.samples)

    def _stagings(self, batches: int) -> Iterator[Staging]:
        """Yield what is to be staged, in order, from the oldest sample that may still be in the buffer."""
        epoch = batches // self._reading.batches_per_epoch
        position = epoch * self._reading.samples
        oldest = self._returned(batches) - AGE * self._reading.shuffle_buffer
        for stretch in self._order.stretches(epoch):
            end = position + stretch.samples
            if end > oldest:
                yield Staging(stretch.shard, position, end)
            position = end

    def _check_limit(self) -> None:
        shards, limit = self._cache.shards, self._cache.limit
        tars = self._order.tars
        sample = sum(shards[tar.number].bytes for tar in tars) / sum(tar.samples for tar in tars)
        at_once = self._needed - self._read + self._reading.shuffle_buffer
        needed = at_once * sample + 2 * max(shard.bytes for shard in shards)
        if limit is not None and needed > limit:
            raise ShardError(
                f"data.cache_gb {limit / 1e9:g}: a process reads from up to {needed / 1e9:.3g} GB of shards at the "
                "same time; give more, or make smaller shards (--shard-mb)"
            )

    def _first_missing(self) -> int:
        """Return the position up to which everything is here."""
        return min(staging.begin for staging in (self._next, *self._pending))

    def _release(self) -> None:
        """Allow shards to be evicted that the reader has read."""
        while self._held and self._held[0].end <= self._read:
            shard = self._held.popleft().shard
            self._holders[shard] -= 1
            if not self._holders[shard]:
                self._cache.done_with(shard)

    def _stage(self) -> None:
        """Stage shards until the end, in a thread."""
        try:
            while (staging := self._take()) is not None:
                self._cache.use(staging.shard, self._stop)
                with self._changed:
                    self._pending.remove(staging)
                    self._here.add(self._cache.shards[staging.shard].name)
                    self._changed.notify_all()
        except StagingStopped:
            return
        # Whatever ends a thread ends the training, which would wait for the shard for ever.
        except Exception as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
        finally:
            with self._changed:
                self._running -= 1
                if not self._running:
                    self._cache.done()

    def _take(self) -> Staging | None:
        """Return the next shard once it may be staged; None at the end."""
        with self._changed:
            while self._error is None and not self._stop.is_set():
                staging = self._next
                if self._is_due(staging):
                    self._next = next(self._plan)
                    self._pending.add(staging)
                    # Without a limit the reader maps shards, and may read them later; nothing is evicted.
                    if self._cache.limit is not None:
                        self._held.append(staging)
                        self._holders[staging.shard] += 1
                    return staging
                # Other processes make room without telling this one.
                self._changed.wait(ROOM_CHECK)
        return None

    def _is_due(self, staging: Staging) -> bool:
        """Return True where the shard is needed at once, or is read within an epoch and fits into the limit."""
        needed = staging.begin < self._needed
        if not needed and staging.begin > self._read + self._reading.samples:
            return False
        fetching = sum(self._cache.shards[pending.shard].bytes for pending in self._pending)
        return self._cache.make_room(staging.shard, fetching) or needed
