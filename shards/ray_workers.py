"""Tasks on a Ray cluster: one Ray task each, about two per CPU in flight, progress as they run.

An attempt that is lost with its worker or node is made again here and not by Ray, whose retries number the reports of a
task anew: so no image counts twice in the progress, and the user sees what was lost. A node that was only thought to be
dead may still work on the lost attempt, so work must allow for two attempts at the same task at once.
"""

from __future__ import annotations

import os
import pickle
import secrets
import sys
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from shards.errors import ShardError, one_line
from shards.images import codec_versions
from shards.ray_cluster import cluster_cpus, join_cluster, require_ray
from shards.ray_task import NodeRequirements, attempt_task
from shards.workers import ProgressCount

Task = TypeVar("Task")

ATTEMPTS = 4
"""Attempts at a task: as many as Ray's own tasks have."""

PER_CPU = 2
"""Tasks in flight per CPU: one runs, the next is at hand."""

CPUS_EVERY = 10.0
"""Time between two looks at how many CPUs the cluster has (seconds)."""

STOP_TIMEOUT = 30.0
"""Time that stopped tasks may take to end (seconds)."""


@dataclass
class _Attempt(Generic[Task]):
    """Attempt `number` at a task. `done` and `bad` are the progress that was reported, of all attempts together."""

    task: Task
    number: int = 1
    done: int = 0
    bad: int = 0

    def advance(self, done: int, bad: int) -> ProgressCount:
        """Return what is new in the totals of this attempt."""
        news = ProgressCount(max(done - self.done, 0), max(bad - self.bad, 0))
        self.done, self.bad = self.done + news.done, self.bad + news.bad
        return news


class RayDistributor:
    """Tasks on a Ray cluster, which is joined when the first task is there. Close it at the end.

    workers: the most tasks at a time; None: all CPUs of the cluster. Raise ShardError where Ray is not installed.
    """

    def __init__(self, workers: int | None, console: Console) -> None:
        require_ray()
        self._workers = workers
        self._console = console
        self._joined: bool | None = None

    def run(
        self,
        work: Callable[[Task], Generator[ProgressCount, None, None]],
        tasks: Iterable[Task],
        count: int,
        name: Callable[[Task], str],
        folder: Path,
    ) -> Generator[ProgressCount, None, None]:
        """Run `work` on each of `count` tasks; yield the progress since the last report.

        Raise the ShardError of a task, and a ShardError that names the task by `name` where it was lost ATTEMPTS times,
        and one that names the node where it does not see `folder` or has other codecs. All tasks are stopped at the
        end, also after an error.
        """
        if not count:
            return
        if self._joined is None:
            self._joined = join_cluster(self._console)
        check_file = folder.absolute() / f"{secrets.token_hex(8)}.partial"
        check_file.touch()
        flight = _Flight(work, NodeRequirements(check_file, os.getcwd(), codec_versions()))
        try:
            yield from self._fly(flight, iter(tasks), name)
        finally:
            # First, so that an attempt that cannot be stopped, on a node without connection, gives up.
            check_file.unlink(missing_ok=True)
            flight.stop()

    def close(self) -> None:
        """Leave the cluster; end it if it was started for this run."""
        if self._joined:
            import ray

            ray.shutdown()
        self._joined = None

    def _fly(
        self, flight: _Flight[Task], queue: Iterable[Task], name: Callable[[Task], str]
    ) -> Generator[ProgressCount, None, None]:
        limit, looked = self._limit(), time.monotonic()
        while True:
            if time.monotonic() - looked > CPUS_EVERY:
                limit, looked = self._limit(), time.monotonic()
            for task in islice(queue, max(limit - len(flight.attempts), 0)):
                flight.submit(_Attempt(task))
            if not flight.attempts:
                return
            for attempt, totals in flight.landed():
                if isinstance(totals, BaseException):
                    self._try_again(flight, attempt, totals, name(attempt.task))
                else:
                    yield attempt.advance(*totals)

    def _limit(self) -> int:
        return self._workers or max(PER_CPU * cluster_cpus(), PER_CPU)

    def _try_again(self, flight: _Flight[Task], attempt: _Attempt[Task], error: BaseException, name: str) -> None:
        """Submit a lost attempt again. Raise ShardError for an error of the task itself, and after the last attempt."""
        from ray.exceptions import RayTaskError

        if isinstance(error, RayTaskError):
            if isinstance(error.cause, ShardError):
                raise ShardError(str(error.cause)) from None
            print(error, file=sys.stderr)
            raise ShardError(f"the Ray task on {name} failed, see the error above; rerun the same command to resume")
        cause, remedy = _explain_loss(error)
        if attempt.number == ATTEMPTS:
            raise ShardError(
                f"the Ray task on {name} was lost {ATTEMPTS} times, the last time because {cause}: {remedy}; "
                "rerun the same command to resume"
            )
        self._console.print(f"{name}: {cause}; trying again")
        attempt.number += 1
        flight.submit(attempt)


class _Flight(Generic[Task]):
    """Attempts that Ray runs or is about to run."""

    def __init__(
        self, work: Callable[[Task], Generator[ProgressCount, None, None]], requirements: NodeRequirements
    ) -> None:
        import ray

        self.attempts: dict[Any, _Attempt[Task]] = {}
        self._remote = ray.remote(num_cpus=1, max_retries=0, num_returns="streaming")(attempt_task)
        self._shared = ray.put(requirements), ray.put(pickle.dumps(work))

    def submit(self, attempt: _Attempt[Task]) -> None:
        self.attempts[self._remote.remote(*self._shared, pickle.dumps(attempt.task))] = attempt

    def landed(self) -> Generator[tuple[_Attempt[Task], Any], None, None]:
        """Wait until there is a report, then yield what all attempts report: totals, or the error that ended them."""
        import ray
        from ray.exceptions import RayError

        streams = list(self.attempts)
        if ray.wait(streams, num_returns=1, timeout=CPUS_EVERY, fetch_local=False)[0]:
            ready, _ = ray.wait(streams, num_returns=len(streams), timeout=0, fetch_local=False)
            for stream in ready:
                try:
                    yield self.attempts[stream], ray.get(next(stream))
                except StopIteration:
                    del self.attempts[stream]
                except RayError as error:
                    yield self.attempts.pop(stream), error

    def stop(self) -> None:
        """Stop all attempts and wait until they have ended."""
        import ray

        streams, self.attempts = list(self.attempts), {}
        if streams and ray.is_initialized():
            for stream in streams:
                ray.cancel(stream, force=True)
            ends = [stream.completed() for stream in streams]
            ray.wait(ends, num_returns=len(ends), timeout=STOP_TIMEOUT, fetch_local=False)


def _explain_loss(error: BaseException) -> tuple[str, str]:
    """Return why an attempt was lost, and the remedy."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RuntimeEnvSetupError, WorkerCrashedError

    if isinstance(error, OutOfMemoryError):
        return "the memory of its node ran out and Ray killed its worker", "use fewer --workers"
    if isinstance(error, NodeDiedError):
        return "its node died", "use nodes that stay up"
    if isinstance(error, WorkerCrashedError):
        return "its worker or node died", "use fewer --workers if memory ran out"
    if isinstance(error, RuntimeEnvSetupError):
        return one_line(error), "see the logs of Ray on its node"
    return one_line(error), "see the logs of Ray"
