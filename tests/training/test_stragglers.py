"""Metrics of several processes name the one that the others wait for."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from kill_job import KillJob

from tests.training.runs import ENVIRONMENT, arguments, metrics


def test_a_process_that_gets_little_time_is_the_slowest_rank(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop rank 1 for three quarters of the time, as a process with a share of a core is."""
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    run, output = tmp_path / "run", tmp_path / "log.txt"
    with open(output, "w") as file:
        words = arguments(tiny_shards, run, 100, "--data.val", "None", "--log.checkpoint-interval", "1000")
        job = KillJob(words, 1, 2, file)
    try:
        deadline = time.monotonic() + 600
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < deadline, output.read_text()
            assert job.processes(), output.read_text()
            time.sleep(0.05)
        slow = job.workers(0)[1]
        began = len(metrics(run))
        while job.agents[0].poll() is None:
            for number, seconds in ((signal.SIGSTOP, 0.03), (signal.SIGCONT, 0.01)):
                if slow in job.processes():
                    os.kill(slow, number)
                time.sleep(seconds)
            assert time.monotonic() < deadline, output.read_text()
    finally:
        job.end()
    lines = metrics(run)[began + 1 :]
    assert Counter(line["slowest_rank"] for line in lines).most_common(1)[0][0] == 1
    assert sum(line["rank_ms_max"] for line in lines) > 1.2 * sum(line["rank_ms_mean"] for line in lines)
    assert all(line["data_wait_max"] >= line["data_wait"] for line in lines)
    assert re.search(r"rank 1 on host \S+ is slow: .* ms per step before it waits for the others", output.read_text())
