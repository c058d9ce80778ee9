"""Nodes of Ray clusters on this machine, each with processes of its own, and work that tests give to them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards.errors import ShardError
from shards.workers import ProgressCount

ROOT = Path(__file__).parents[2]

OBJECT_STORE = 80 * 1024**2
"""Object store of a node (bytes); Ray's least is 75 MiB."""


def descendants(pid: int) -> list[int]:
    """Return the process ids of all processes below a process."""
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(child) for child in task.read_text().split()]
    return children + [below for child in children for below in descendants(child)]


@dataclass
class RayNode:
    """A node of a cluster, started with `ray start --block`."""

    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    """Environment of processes that belong to the node's cluster."""

    def workers(self) -> list[int]:
        """Return the processes that run a task at this moment."""
        found = []
        for pid in descendants(self.process.pid):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if command.startswith(b"ray::attempt_task"):
                found.append(pid)
        return found

    def kill(self) -> None:
        """Kill all of the node's processes with SIGKILL, as a power cut does."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@contextmanager
def ray_head(cpus: int, **variables: str) -> Iterator[RayNode]:
    """Start a cluster of one node; `variables`: environment of its processes."""
    # Sockets have paths of at most 107 bytes; pytest's folders are longer.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    environment = {
        **os.environ,
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "shards"))),
        **variables,
    }
    environment.pop("RAY_ADDRESS", None)
    try:
        with ray_node(environment, cpus, "--head", "--port", "0", "--include-dashboard", "false") as head:
            environment["RAY_ADDRESS"] = Path(folder, "ray", "ray_current_cluster").read_text().strip()
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_node(environment: dict[str, str], cpus: int, *options: str, hide: Path | None = None) -> Iterator[RayNode]:
    """Start a node; without `options` it joins the cluster of RAY_ADDRESS. It sees the folder `hide` as empty."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    start += ["--num-cpus", str(cpus), "--object-store-memory", str(OBJECT_STORE)]
    start += options or ["--address", environment["RAY_ADDRESS"]]
    if hide:
        start = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hide} && exec "$@"', "sh", *start]
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.NamedTemporaryFile(dir=environment["RAY_TMPDIR"]))
        process = subprocess.Popen(start, env=environment, stdout=log, stderr=log, start_new_session=True)
        node = RayNode(process, environment)
        stack.callback(node.kill)
        while "Ray runtime started" not in (output := Path(log.name).read_text()):
            assert process.poll() is None, output
            time.sleep(0.1)
        yield node


def count_slowly(folder: Path, task: int) -> Generator[ProgressCount, None, None]:
    """Report three samples, the second of them bad; the first attempt dies after two."""
    first = folder / f"{task}.begun"
    dies = not first.exists()
    first.touch()
    for number in range(3):
        time.sleep(2.1)  # longer than the time between two reports
        yield ProgressCount(1, int(number == 1))
        if dies and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def die(task: int) -> Generator[ProgressCount, None, None]:
    """Kill the worker in every attempt."""
    yield ProgressCount(1, 0)
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(task: int) -> Generator[ProgressCount, None, None]:
    """Raise the error of a source that cannot be read."""
    yield ProgressCount(1, 0)
    raise ShardError(f"cannot read image {task}: correct it")


def fail(task: int) -> Generator[ProgressCount, None, None]:
    """Raise an error of the program."""
    yield ProgressCount(1, 0)
    raise ZeroDivisionError(f"in task {task}")
