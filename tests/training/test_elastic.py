"""torchrun restarts a killed process, and goes on without a node that is lost for good.

python -m pytest -m long tests/training/test_elastic.py
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iwm.training.checkpoint import load_newest
from tests.training.runs import ENVIRONMENT, arguments, metrics, start, wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(autouse=True)
def new_store_for_each_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what docs/clusters.md asks for: otherwise restarted processes may read the addresses of killed ones."""
    monkeypatch.setitem(ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


STEPS = 200


def torchrun(shards: Path, run: Path, *options: str) -> list[str]:
    words = arguments(shards, run, STEPS, "--data.val", "None")
    return [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "3", *options, "iwm/train.py", *words]


def workers(agent: int) -> list[int]:
    """Return the training processes of a torchrun."""
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def wait_for_checkpoint(run: Path, agent: subprocess.Popen[str]) -> None:
    wait_until(lambda: bool(list(run.glob("checkpoints/step-*.pt"))), agent)


def test_a_killed_process_is_restarted_with_all_others(tiny_shards: Path, tmp_path: Path) -> None:
    agent = start(torchrun(tiny_shards, tmp_path, "--standalone", "--nproc_per_node", "2"))
    wait_for_checkpoint(tmp_path, agent)
    os.kill(workers(agent.pid)[1], signal.SIGKILL)
    output = agent.communicate(timeout=600)[0]
    assert agent.returncode == 0, output
    assert re.search(r"launched by torchrun, restart 1\b", output)
    assert re.search(r"resuming from step \d+ ", output)
    assert "a new epoch begins" not in output, "as many processes continue the epoch"
    assert metrics(tmp_path)[-1]["step"] == STEPS


def test_a_run_goes_on_without_a_node_that_is_lost_for_good(tiny_shards: Path, tmp_path: Path) -> None:
    """The rendezvous is on the first node, as that of a cluster is on a node that stays."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "elastic"]
    patience = ["--rdzv_conf", "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=10"]
    line = torchrun(tiny_shards, tmp_path, "--nnodes", "1:2", "--nproc_per_node", "1", *meeting, *patience)
    stays = start(line)
    time.sleep(2)  # so that it is the one that holds the rendezvous
    lost = start(line)
    wait_for_checkpoint(tmp_path, stays)
    for process in (*workers(lost.pid), lost.pid):
        os.kill(process, signal.SIGKILL)
    lost.communicate()
    output = stays.communicate(timeout=600)[0]
    assert stays.returncode == 0, output
    first, second = re.findall(r"steps of 8 images \((\d) processes", output) or ("", "")
    assert (first, second) == ("2", "1"), output
    assert "world_size was 2, is 1" in output
    assert "a new epoch begins" in output
    assert metrics(tmp_path)[-1]["step"] == STEPS
    saved = load_newest(tmp_path)
    assert saved is not None
    assert (saved.step, len(saved.loader["ranks"])) == (STEPS, 1)
