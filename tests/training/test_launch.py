"""Processes started by torchrun, srun or nobody know their place in the run; what cannot become one run is refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from iwm.training.launch import (
    Launch,
    LaunchError,
    expand_counts,
    expand_nodes,
    find_launch,
    gpu_index,
    step_cores,
    step_port,
)
from tests.training.runs import ENVIRONMENT, ROOT, arguments

BATCH = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "6",
    "SLURM_TASKS_PER_NODE": "3(x2)",
    "SLURM_PROCID": "0",
    "SLURM_GTIDS": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_CPUS_ON_NODE": "24",
}
"""Variables of a batch script, as Slurm 22.05 sets them."""
TASK = {
    **BATCH,
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_PROCID": "5",
    "SLURM_GTIDS": "4,5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
"""Variables of a task of srun, as Slurm 22.05 sets them."""
WORKER = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "1",
}
"""Variables of a process of torchrun."""


def test_a_task_of_srun_is_one_process_of_its_step() -> None:
    port = step_port(TASK)
    said = f"srun, 2 nodes, rendezvous n1:{port}, Slurm job 41"
    assert find_launch(TASK) == Launch(5, 6, 1, 2, ("n1", port), said)
    assert find_launch({**TASK, "SLURM_RESTART_COUNT": "3"}).description == f"{said}, restart 3"


def test_the_users_rendezvous_and_world_size_are_respected() -> None:
    given = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "WORLD_SIZE": "6"}
    assert find_launch(given).rendezvous == ("10.0.0.1", 1234)


@pytest.mark.parametrize("inside", [{}, BATCH, {**TASK, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}])
def test_torchruns_variables_take_precedence(inside: dict[str, str]) -> None:
    launch = find_launch({**inside, **WORKER})
    assert (launch.rank, launch.size, launch.local_rank, launch.local_size, launch.rendezvous) == (3, 4, 1, 2, None)
    assert launch.description.startswith("torchrun, 2 nodes, restart 1")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,
        {name: BATCH[name] for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE")},
        {**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**TASK, "SLURM_PTY_PORT": "4000"},
        {**TASK, **BATCH},
    ],
    ids=["no Slurm", "batch script", "salloc", "srun of one task", "srun --pty", "sbatch called in a step"],
)
def test_everything_else_is_one_process(environment: dict[str, str]) -> None:
    launch = find_launch(environment)
    assert (launch.rank, launch.size, launch.local_size, launch.rendezvous) == (0, 1, 1, None)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TASK, "SLURM_PROCID": ""}, "SLURM_PROCID is not set"),
        ({**TASK, "SLURM_PROCID": "6"}, "SLURM_PROCID is 6, but the step's number of tasks is 6"),
        ({**TASK, "SLURM_LOCALID": "2"}, "SLURM_LOCALID is 2, but the node's number of tasks is 2"),
        ({**TASK, "SLURM_NODEID": "two"}, "SLURM_NODEID is 'two', which is not a number"),
        ({**TASK, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, r"6 tasks on 2 nodes, but .* says \[4, 4\]"),
        ({**TASK, "SLURM_STEP_TASKS_PER_NODE": "4 2"}, "'4 2', which is not of the form"),
        ({**TASK, "SLURM_STEP_NODELIST": "n[1-"}, r"'n\[1-' is not a node list of Slurm"),
        ({**TASK, "WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but the Slurm step has 6 tasks"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but RANK is not set"),
        ({**WORKER, "RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
    ],
)
def test_what_cannot_become_one_run_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        find_launch(environment)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],gpu-01", ["n1", "n2", "n3", "n7", "gpu-01"]),
        ("n[08-10]", ["n08", "n09", "n10"]),
        ("a-[1,3]-ib,b.example.org", ["a-1-ib", "a-3-ib", "b.example.org"]),
        ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
    ],
)
def test_a_node_list_is_expanded_as_scontrol_does(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["", "n[1-", "n[]", "n[3-1]", "n[a]", "n1;n2", "n]1["])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="is not a node list"):
        expand_nodes(text)


def test_tasks_of_nodes_are_expanded() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("8") == [8]


def test_jobs_and_steps_of_a_node_meet_at_different_ports() -> None:
    places = [{"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(70, 130) for step in range(50)]
    ports = {step_port(place) for place in places}
    assert len(ports) == len(places)
    assert min(ports) >= 20000
    assert max(ports) < 29000


def test_a_task_takes_the_gpu_that_slurm_bound_it_to() -> None:
    task = Launch(5, 8, 1, 4, ("n1", 20000))
    assert [gpu_index(task, visible) for visible in (8, 4, 1)] == [1, 1, 0]
    assert gpu_index(Launch(1, 2, 1, 2), visible=1) == 1, "torchrun binds nothing: the missing GPU must be an error"


def test_cores_of_a_step_are_those_of_the_job_on_the_node() -> None:
    assert step_cores(TASK) == 24
    assert [step_cores(other) for other in ({}, BATCH, {**TASK, **WORKER})] == [None, None, None]


def tasks(count: int, more: dict[str, str]) -> list[dict[str, str]]:
    """Return the environment variables of the tasks of a step on this machine."""
    step = {**TASK, "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_NODEID": "0"}
    step |= {
        "SLURM_STEP_TASKS_PER_NODE": str(count),
        "SLURM_GTIDS": ",".join(map(str, range(count))),
        "SLURM_JOB_ID": str(os.getpid()),
        **more,
    }
    return [{**ENVIRONMENT, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]


def train_as_tasks(line: list[str], environments: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Return exit status and output of each task of a training command."""
    started = [
        subprocess.Popen(
            line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        for environment in environments
    ]  # fmt: skip
    return [(process.returncode, output) for process in started for output in [process.communicate(timeout=600)[0]]]


def test_tasks_of_a_step_train_as_one_run(tiny_shards: Path, tmp_path: Path) -> None:
    """Two processes with srun's variables; tests/slurm has the real srun."""
    line = [sys.executable, "iwm/train.py", *arguments(tiny_shards, tmp_path, 10, "--data.val", "None")]
    ended = train_as_tasks(line, tasks(2, {}))
    assert [status for status, _ in ended] == [0, 0], ended
    assert "10 steps of 8 images (2 processes × 4 images" in ended[0][1]
    assert "launched by srun, rendezvous localhost:" in ended[0][1]
    assert ended[1][1].strip() == "", "the other process prints what the first one does"


@pytest.mark.parametrize("broken", ["name", "port"])
def test_processes_that_cannot_meet_say_so_in_one_line(tiny_shards: Path, tmp_path: Path, broken: str) -> None:
    line = [sys.executable, "iwm/train.py", *arguments(tiny_shards, tmp_path, 10)]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        given = {"name": ("no-such-host.invalid", "20000"), "port": ("localhost", str(taken.getsockname()[1]))}[broken]
        (only,) = train_as_tasks(line, tasks(2, {"MASTER_ADDR": given[0], "MASTER_PORT": given[1]})[:1])
    assert only[0] == 1
    assert "MASTER_ADDR" in only[1].splitlines()[-1]
    assert "Traceback" not in only[1]
