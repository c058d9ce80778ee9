"""Worker pool with progress reports from inside each task, and a progress display.

concurrent.futures has no reports from inside a task. Its workers also wait forever when the parent process is killed,
and keep partial files open; here they exit.

show_progress draws a live bar on a terminal, and prints a plain line every ten seconds elsewhere.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from shards.errors import ShardError

Task = TypeVar("Task")
Report = TypeVar("Report")


class ProgressCount(NamedTuple):
    """Progress report of a task: samples done since its last report, and how many of them were bad."""

    done: int
    bad: int


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def available_cores() -> int:
    """Return the number of cores that this process may use, which can be less than the machine has."""
    return len(os.sched_getaffinity(0))


def run_tasks(
    work: Callable[[Task], Generator[Report, None, None]],
    tasks: Iterable[Task],
    workers: int,
    name: Callable[[Task], str],
) -> Generator[Report, None, None]:
    """Run `work` on each task in `workers` processes and yield their reports as they arrive.

    Raise a worker's ShardError here, and a ShardError that names the task by `name` where a worker dies. All workers
    are stopped at the end, also after an error.
    """
    if workers == 1:
        for task in tasks:
            yield from work(task)
        return
    queue = iter(tasks)
    busy: dict[Connection, tuple[SpawnProcess, Task]] = {}
    try:
        # range() first: zip then takes no more tasks from the queue than there are workers.
        for _, task in zip(range(workers), queue, strict=False):
            connection, process = _start(work)
            busy[connection] = process, task
        # After all workers are started: a task fills the pipe, so sending it waits until its worker reads it.
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


class ProcessDistributor:
    """Worker processes on this machine, started for each list of tasks; as many as cores where `workers` is None."""

    def __init__(self, workers: int | None) -> None:
        self._workers = workers or available_cores()

    def run(
        self,
        work: Callable[[Task], Generator[ProgressCount, None, None]],
        tasks: Iterable[Task],
        count: int,
        name: Callable[[Task], str],
        folder: Path,
    ) -> Generator[ProgressCount, None, None]:
        """Run `work` on each of `count` tasks, as run_tasks does. This machine's processes all see `folder`."""
        return run_tasks(work, tasks, min(self._workers, max(count, 1)), name)

    def close(self) -> None:
        """Do nothing: the processes have ended with their tasks."""


def _start(work: Callable[[Task], Generator[Report, None, None]]) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    # Start the resource tracker first: starting it unblocks the signals that are blocked next.
    resource_tracker.ensure_running()
    # Ctrl-C reaches all processes of a terminal. Workers inherit the blocked signals; only the parent handles them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return ours, process


def _serve(connection: Connection, work: Callable[[Task], Generator[Report, None, None]]) -> None:
    """Run tasks in a worker until the parent closes the connection or dies."""
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
        raise _worker_failure(process, name(task)) from None


def _receive(connection: Connection, process: SpawnProcess, task: Task, name: Callable[[Task], str]) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise _worker_failure(process, name(task)) from None


def _worker_failure(process: SpawnProcess, task: str) -> ShardError:
    process.join()
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        cause = "was killed, most likely because memory ran out: use fewer --workers"
    elif code < 0:
        cause = f"crashed ({signal.Signals(-code).name})"
    else:
        cause = "failed, see the error above"
    return ShardError(f"the worker process on {task} {cause}; rerun the same command to resume")


PLAIN_EVERY = 10.0
"""Time between two progress lines where there is no terminal (seconds)."""


def show_progress(reports: Iterable[ProgressCount], total: int, console: Console, bad: str = "rejected") -> None:
    """Consume the progress reports and show images done of `total`, bad images, images/s and the time left."""
    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[rate]:,.0f} images/s"),
        TimeRemainingColumn(),
        TextColumn(f"{{task.fields[bad]:,}} {bad}"),
    )
    start = line = time.monotonic()
    done = found = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total, rate=0.0, bad=0)
        for report in reports:
            done, found = done + report.done, found + report.bad
            now = time.monotonic()
            rate = done / max(now - start, 1e-9)
            progress.update(bar, completed=done, rate=rate, bad=found)
            if not console.is_terminal and (now - line > PLAIN_EVERY or done == total):
                line = now
                left = timedelta(seconds=round((total - done) / rate)) if rate else "?"
                console.print(f"{done:,}/{total:,} images, {rate:,.0f} images/s, {left} left, {found:,} {bad}")
