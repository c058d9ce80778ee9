"""Training job of several torchrun agents on this machine, whose processes are killed and counted. Linux only."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO

MARK = "IWM_KILL_JOB"
"""Environment variable that every process of a job inherits."""

TRAIN = Path(__file__).parents[1] / "iwm" / "train.py"


class KillJob:
    """Job that trains: `nodes` torchrun agents with `workers` processes each; without nodes a single process."""

    def __init__(
        self, words: list[str], nodes: int, workers: int, output: IO[str] | None = None, script: Path = TRAIN
    ) -> None:
        """Start the job. words: arguments of the script; output: file of stdout and stderr."""
        self.id, self._script = uuid.uuid4().hex, script
        launcher: list[str] = []
        if nodes:
            with socket.create_server(("localhost", 0)) as free:
                port = free.getsockname()[1]
            launcher = ["-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc_per_node", str(workers)]
            launcher += ["--rdzv_backend", "c10d", "--rdzv_id", self.id, "--rdzv_endpoint", f"localhost:{port}"]
        line = [sys.executable, *launcher, str(script), *words]
        environment = {**os.environ, MARK: self.id, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self.agents = [
            subprocess.Popen(line, stdout=output, stderr=output, env=environment) for _ in range(max(1, nodes))
        ]

    def processes(self) -> list[int]:
        """Return the ids of the job's processes that have not ended."""
        for agent in self.agents:
            agent.poll()
        mark = f"{MARK}={self.id}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if folder.name.isdigit() and mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def workers(self, node: int) -> list[int]:
        """Return the ids of the training processes of an agent, by local rank."""
        agent, found = self.agents[node].pid, []
        for pid in self.processes():
            with suppress(FileNotFoundError, ProcessLookupError):
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if parent == agent and self._script.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return sorted(found)

    def names(self) -> list[str]:
        """Return what the processes are that have not ended: `agent 0`, `worker of 1`, or the command of another."""
        names = []
        of = {pid: f"worker of {node}" for node in range(len(self.agents)) for pid in self.workers(node)}
        of |= {agent.pid: f"agent {node}" for node, agent in enumerate(self.agents)}
        for pid in self.processes():
            with suppress(FileNotFoundError, ProcessLookupError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                names.append(of.get(pid) or f"{pid}: {' '.join(words)[:80]}")
        return names

    def holds(self, lock: Path) -> bool:
        """Return True where a process of the job holds a run's lock, which it takes once all are connected."""
        holder = re.search(r"\((\d+) on host", lock.read_text()) if lock.exists() else None
        return holder is not None and int(holder[1]) in self.processes()

    def kill(self, victim: str, node: int) -> None:
        """Send SIGKILL to the agent of a node, its first worker, or the whole node; nothing to what has ended."""
        workers = self.workers(node)
        pids = {"agent": [self.agents[node].pid], "worker": workers[:1], "node": [self.agents[node].pid, *workers]}
        for pid in pids[victim]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def seconds_until_gone(self, most: float) -> float | None:
        """Wait until no process of the job is left; return the seconds, None after `most` seconds."""
        start = time.monotonic()
        while time.monotonic() - start < most:
            if not self.processes():
                return time.monotonic() - start
            time.sleep(0.1)
        return None

    def end(self) -> None:
        """End all processes of the job at once."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.wait()
