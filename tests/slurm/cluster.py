"""A Slurm cluster of two nodes on this machine, with its own munge, ports and folder.

A run's processes meet at the first node of their step, whose name must resolve: the first node has
this machine's name.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "squeue")
KILL_WAIT = 30
"""Seconds between SIGTERM and SIGKILL where Slurm ends a job; Slurm's default."""

CONFIGURATION = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait={kill_wait}
MinJobAge=3600
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return why no cluster can be started here, or None."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path
    """Its files: configuration, logs, state."""
    environment: dict[str, str]
    """Variables with which Slurm's commands find it."""

    def run(self, *command: str) -> str:
        """Run a command of Slurm; return its output. Raises AssertionError, with the output, where it fails."""
        done = subprocess.run(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, number: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job is in one of the states; return its fields. `seconds` catches hangs alone."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{job}\n{(self.folder / 'slurmctld.log').read_text()[-3000:]}"
            time.sleep(0.2)
        return job


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Start a cluster, wait until its nodes are idle, and end it with its jobs."""
    # A socket's path is limited to 108 characters, which a folder of pytest's can exceed.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge wants its socket reachable by all users
    # A job's `python` is that of the tests.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    for name in [name for name in environment if name.startswith(("SLURM_JOB", "SLURM_STEP", "SBATCH_"))]:
        del environment[name]
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    for node in (host, f"{host}-2"):
        (folder / f"spool-{node}").mkdir()
    configuration = CONFIGURATION.format(folder=folder, host=host, ports=_free_ports(3), kill_wait=KILL_WAIT)
    (folder / "slurm.conf").write_text(configuration)
    munge = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("key-file", "pid-file", "seed-file")]
    munge += [f"--socket={folder}/munge.socket", f"--log-file={folder}/munged.log", "--force", "--foreground"]
    cluster = Cluster(folder, environment)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_daemon(environment, folder, "munged", *munge))
        _wait_for(folder / "munge.socket")
        stack.enter_context(_daemon(environment, folder, "slurmctld", "-D"))
        for node in (host, f"{host}-2"):
            stack.enter_context(_daemon(environment, folder, "slurmd", "-D", "-N", node))
        _wait_for_nodes(cluster)
        stack.callback(_end_jobs, cluster)
        yield cluster


@contextmanager
def _daemon(environment: dict[str, str], folder: Path, *command: str) -> Iterator[None]:
    with open(folder / "daemons.log", "a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, (path.parent / "daemons.log").read_text()
        time.sleep(0.05)


def _wait_for_nodes(cluster: Cluster) -> None:
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%t"],
            env=cluster.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.stdout.split() == ["idle", "idle"]:
            return
        logs = "\n".join(path.read_text()[-2000:] for path in cluster.folder.glob("*.log"))
        assert time.monotonic() < deadline, f"{done.stdout}{done.stderr}\n{logs}"
        time.sleep(0.2)


def _end_jobs(cluster: Cluster) -> None:
    subprocess.run(["scancel", "--user=root"], env=cluster.environment, check=False)
    deadline = time.monotonic() + 2 * KILL_WAIT
    while cluster.run("squeue", "--noheader").strip() and time.monotonic() < deadline:
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
