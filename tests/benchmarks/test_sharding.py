"""The benchmark of making shards: what it counts, and its ratios."""

from __future__ import annotations

import os
import subprocess
import sys

from sharding import MadeShards, cpu_seconds, table

BUSY = "import time\nwhile time.process_time() < 0.5: pass"


def test_cpu_time_of_processes_below_counts_while_they_live_and_after() -> None:
    before = cpu_seconds(os.getpid())
    # The shell is the parent of the process that works.
    with subprocess.Popen(["sh", "-c", f"{sys.executable} -c '{BUSY}'; echo; read line"], stdin=-1, stdout=-1) as shell:
        assert shell.stdout is not None
        assert shell.stdin is not None
        shell.stdout.readline()
        assert cpu_seconds(os.getpid()) - before >= 0.45
        shell.stdin.close()
    assert cpu_seconds(os.getpid()) - before >= 0.45


def test_a_ratio_above_one_is_faster_than_processes() -> None:
    runs = {
        "processes": [MadeShards(100, 0.0, seconds, 20.0, 5) for seconds in (10.0, 12.0, 9.0)],
        "ray": [MadeShards(100, 6.0, seconds, 25.0, 5) for seconds in (5.0, 4.0, 9.0)],
    }
    ray = table(runs, 2).rows[1]
    assert ray == ["ray", "20.0", "10.0", "2.00 (1.00–3.00)", "4.0", "0.80 (0.80–0.80)", "6.0 s"]
