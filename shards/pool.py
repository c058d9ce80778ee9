"""Tasks on every core: a process takes one task at a time, reports on the way, and none outlives the one that began it.

concurrent.futures would do, but it has no reports from inside a task, and its workers wait for ever when the parent is
killed, holding half-written files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, TypeVar

from shards.manifest import ShardError

Task = TypeVar("Task")
Report = TypeVar("Report")


class Tally(NamedTuple):
    """What a task reports on the way: samples done since its last report, and how many of those were bad."""

    done: int
    bad: int


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def available_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def run_tasks(
    work: Callable[[Task], Generator[Report, None, None]],
    tasks: Iterable[Task],
    workers: int,
    name: Callable[[Task], str],
) -> Generator[Report, None, None]:
    """Run `work` on each task in `workers` processes and yield their reports as they come.

    A ShardError in a worker is raised here. A worker that dies gives a ShardError that names its task by `name`.
    However this ends, no worker is left running.
    """
    if workers == 1:
        for task in tasks:
            yield from work(task)
        return
    queue = iter(tasks)
    busy: dict[Connection, tuple[SpawnProcess, Task]] = {}
    try:
        # range() first: zip takes from the queue only what a worker is there for.
        for _, task in zip(range(workers), queue, strict=False):
            connection, process = _start(work)
            busy[connection] = process, task
        # Only now: a task fills the pipe, and sending it waits for its worker to have started.
        for connection, (process, task) in busy.items():
            _send(connection, process, task, name)
        while busy:
            ready = wait(list(busy))
            for connection, (process, task) in list(busy.items()):
                if connection not in ready:
                    continue
                kind, content = _receive(connection, process, task, name)
                if kind == "error":
                    raise ShardError(content)
                if kind == "report":
                    yield content
                    continue
                following = next(queue, None)
                if following is None:
                    connection.close()
                    del busy[connection]
                    process.join()
                else:
                    busy[connection] = process, following
                    _send(connection, process, following, name)
    finally:
        for process, _ in busy.values():
            process.kill()
        for process, _ in busy.values():
            process.join()


def _start(work: Callable[[Task], Generator[Report, None, None]]) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    # Started first, for it unblocks the signals that are blocked next.
    resource_tracker.ensure_running()
    # Ctrl-C reaches all processes of a terminal. Workers inherit that these signals are blocked: the parent decides.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return ours, process


def _serve(connection: Connection, work: Callable[[Task], Generator[Report, None, None]]) -> None:
    """A worker's life: it ends when the parent closes the connection, or is gone."""
    try:
        while True:
            task = connection.recv()
            try:
                for report in work(task):
                    connection.send(("report", report))
                connection.send(("done", None))
            except ShardError as error:
                connection.send(("error", str(error)))
    except (EOFError, ConnectionError):
        return


def _send(connection: Connection, process: SpawnProcess, task: Task, name: Callable[[Task], str]) -> None:
    try:
        connection.send(task)
    except ConnectionError:
        raise _obituary(process, name(task)) from None


def _receive(connection: Connection, process: SpawnProcess, task: Task, name: Callable[[Task], str]) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise _obituary(process, name(task)) from None


def _obituary(process: SpawnProcess, task: str) -> ShardError:
    process.join()
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        cause = "was killed, most likely for want of memory: use fewer --workers"
    elif code < 0:
        cause = f"crashed ({signal.Signals(-code).name})"
    else:
        cause = "failed, see above"
    return ShardError(f"the worker process on {task} {cause}; the same command goes on from here")
