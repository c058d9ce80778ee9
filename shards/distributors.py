"""Distributors of shards over processes: those of this machine, or those of a Ray cluster.

Shards do not depend on the distributor. A further one is a class with the two methods of Distributor, and a name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from rich.console import Console

from shards.ray_workers import RayDistributor
from shards.workers import ProcessDistributor, ProgressCount

Task = TypeVar("Task")

DistributorName = Literal["processes", "ray"]


class Distributor(Protocol):
    """Processes that do tasks."""

    def run(
        self,
        work: Callable[[Task], Generator[ProgressCount, None, None]],
        tasks: Iterable[Task],
        count: int,
        name: Callable[[Task], str],
        folder: Path,
    ) -> Generator[ProgressCount, None, None]:
        """Run `work` on each of `count` tasks; yield the progress since the last report.

        `work` and tasks can be pickled, and `work` may run twice on a task, even at once. `folder` exists, and every
        process must see it. Raise the ShardError of a task, and a ShardError that names the task by `name` where it
        cannot be done. No process works on after the end, also after an error.
        """
        ...

    def close(self) -> None:
        """Release the processes."""
        ...


def open_distributor(name: DistributorName, workers: int | None, console: Console) -> Distributor:
    """Return a distributor. workers: the most tasks at a time; None: as many as there are cores.

    Raise ShardError where its package is not installed.
    """
    return RayDistributor(workers, console) if name == "ray" else ProcessDistributor(workers)
