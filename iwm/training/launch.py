"""Who started this process, and as which of how many: torchrun, srun, or nobody, from environment variables.

torchrun's variables (RANK, WORLD_SIZE, …) take precedence. Without RANK, a task of a Slurm step of several tasks (srun)
is one process of that step. Everything else is one process: the shell of `salloc` or `srun --pty` and a batch script's
own lines have the allocation's number of tasks in their environment, but are no step of several tasks.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from shards.errors import UserError, one_line


class LaunchError(UserError):
    """Processes that cannot become one run; the message names the environment variable or host and the remedy."""


@dataclass(frozen=True)
class Launch:
    """Place of this process in its run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    rendezvous: tuple[str, int] | None = None
    """Host and port where srun's processes meet. None for one process, and where torch reads torchrun's variables."""
    description: str = ""
    """Launcher, nodes, job and restarts for the first lines of a run; empty for a process that nobody launched."""


def find_launch(environment: Mapping[str, str]) -> Launch:
    """Return the place that the environment variables describe. Raises LaunchError where they contradict each other."""
    if "RANK" in environment:
        return _torchrun(environment)
    if is_one_of_several_tasks(environment):
        return _srun(environment)
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if _number(environment, name, 1) > 1:
            raise LaunchError(
                f"{name} is {environment[name]}, but RANK is not set; start the processes with torchrun or srun"
            )
    return Launch(description=_job(environment))


def is_one_of_several_tasks(environment: Mapping[str, str]) -> bool:
    """Return True in a task of a Slurm step of several tasks.

    A shell of `srun --pty` is none: the step's other tasks have ended. Neither is a batch script that inherits the
    variables of the step in which sbatch was called: SLURM_GTIDS, the tasks of this node, is then `0`.
    """
    if "SLURM_STEP_ID" not in environment or "SLURM_PTY_PORT" in environment or _tasks(environment) == 1:
        return False
    counts = expand_counts(_either(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    return environment.get("SLURM_GTIDS") != "0" or counts[0] == 1


def _tasks(environment: Mapping[str, str]) -> int:
    # SLURM_NTASKS can be the allocation's.
    return _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))


def _torchrun(environment: Mapping[str, str]) -> Launch:
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_rank, local_size = _number(environment, "LOCAL_RANK", 0), _number(environment, "LOCAL_WORLD_SIZE", 1)
    _check_rank("RANK", rank, "WORLD_SIZE", size)
    _check_rank("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size)
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            _text(environment, name)
    restarts = _number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
    parts = ["torchrun" if "TORCHELASTIC_RUN_ID" in environment else "RANK and WORLD_SIZE"]
    parts += _nodes(_number(environment, "GROUP_WORLD_SIZE", 1))
    parts += [f"restart {restarts}"] if restarts else []
    return Launch(rank, size, local_rank, local_size, None, ", ".join([*parts, *filter(None, [_job(environment)])]))


def _srun(environment: Mapping[str, str]) -> Launch:
    rank, size = _number(environment, "SLURM_PROCID"), _tasks(environment)
    _check_rank("SLURM_PROCID", rank, "the step's number of tasks", size)
    if _number(environment, "WORLD_SIZE", size) != size:
        raise LaunchError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but the Slurm step has {size} tasks; unset WORLD_SIZE"
        )
    hosts = expand_nodes(_either(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    counts = expand_counts(_either(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    node, local_rank = _number(environment, "SLURM_NODEID"), _number(environment, "SLURM_LOCALID")
    if sum(counts) != size or len(counts) != len(hosts):
        raise LaunchError(
            f"the Slurm step has {size} tasks on {len(hosts)} nodes, but SLURM_STEP_TASKS_PER_NODE says {counts}; "
            "start the processes with one srun command"
        )
    _check_rank("SLURM_NODEID", node, "the step's number of nodes", len(hosts))
    _check_rank("SLURM_LOCALID", local_rank, "the node's number of tasks", counts[node])
    address = environment.get("MASTER_ADDR") or hosts[0]
    port = _number(environment, "MASTER_PORT", step_port(environment))
    meeting = f"rendezvous {address}:{port}"
    description = ", ".join(["srun", *_nodes(len(hosts)), meeting, *filter(None, [_job(environment)])])
    return Launch(rank, size, local_rank, counts[node], (address, port), description)


def step_port(environment: Mapping[str, str]) -> int:
    """Return the port of a step's rendezvous, 20000 … 28998, from job and step: the jobs of a node have different ones.

    The range is below Linux's ephemeral ports (32768 and up) and torchrun's 29400 and 29500.
    """
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    return 20000 + (101 * job + step) % 8999


def expand_nodes(text: str) -> list[str]:
    """Return the names in a node list of Slurm, in order: `n[1-3,07],gpu-01` has five.

    A range has the width of its first number (`n[08-10]`); a name may have several brackets, of which the last varies
    fastest. Raises LaunchError for anything else.
    """
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        found = [""]
        for piece in re.findall(r"\[[^\]]*\]|[^\[]+", part):
            found = [name + end for name in found for end in _bracket(piece, text)]
        names += found
    if not names or re.sub(r"\[[\d,-]+\]|[\w.,-]", "", text):
        raise LaunchError(f"'{text}' is not a node list of Slurm; set MASTER_ADDR and use torchrun")
    return names


def _bracket(piece: str, text: str) -> list[str]:
    if not piece.startswith("["):
        return [piece]
    numbers: list[str] = []
    for item in piece[1:-1].split(","):
        first, _, last = item.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise LaunchError(f"'{text}' is not a node list of Slurm; set MASTER_ADDR and use torchrun")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's short form: `2(x3),1` is 2, 2, 2, 1. Raises LaunchError otherwise."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE is '{text}', which is not of the form 2(x3),1; use torchrun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def gpu_index(launch: Launch, visible: int) -> int:
    """Return the index of this process's GPU among the `visible` ones.

    Where a task of srun sees fewer GPUs than its node has tasks, Slurm has bound it to its own (`--gpus-per-task=1`,
    `--gpu-bind`), the first that it sees. Two processes that see the same GPU are refused when they join.
    """
    is_bound = launch.rendezvous is not None and 0 < visible < launch.local_size
    return 0 if is_bound else launch.local_rank


def step_cores(environment: Mapping[str, str]) -> int | None:
    """Return the cores of this node that belong to the Slurm step of several tasks which this process is a task of.

    None in any other process.
    """
    if "RANK" in environment or not is_one_of_several_tasks(environment):
        return None
    return _number(environment, "SLURM_CPUS_ON_NODE", 0) or None


def check_host(address: str) -> None:
    """Raise LaunchError where the name of the rendezvous host cannot be resolved here."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise LaunchError(
            f"{socket.gethostname()} cannot resolve '{address}', where the processes meet ({one_line(error)}); "
            "set MASTER_ADDR to an address of the node of task 0"
        ) from error


def _job(environment: Mapping[str, str]) -> str:
    """Return Slurm's job and its restarts in words; empty outside of a job."""
    job, restarts = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "")
    return f"Slurm job {job}" + (f", restart {restarts}" if restarts else "") if job else ""


def _nodes(count: int) -> list[str]:
    return [f"{count} nodes"] if count > 1 else []


def _check_rank(name: str, rank: int, other: str, size: int) -> None:
    if not 0 <= rank < size:
        raise LaunchError(f"{name} is {rank}, but {other} is {size}; start the processes with torchrun or srun")


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable as a number, `default` where it is not set. Raises LaunchError without one."""
    if default is not None and not environment.get(name):
        return default
    text = _text(environment, name)
    if not text.isdecimal():
        raise LaunchError(f"{name} is '{text}', which is not a number; start the processes with torchrun or srun")
    return int(text)


def _text(environment: Mapping[str, str], name: str) -> str:
    text = environment.get(name, "")
    if not text:
        raise LaunchError(
            f"{name} is not set in a process that is one of several; start the processes with torchrun or srun"
        )
    return text


def _either(environment: Mapping[str, str], name: str, other: str) -> str:
    return environment.get(name) or environment.get(other) or _text(environment, name)
