"""The benchmark of making shards: what it counts, and its ratios."""

from __future__ import annotations

import os
import subprocess
import sys

from sharding import MadeShards, cpu_seconds, spread, table

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
    assert spread([10.0, 12.0, 9.0], [5.0, 4.0, 9.0]) == "2.00 (1.00–3.00)"
    runs = {
        "processes": [MadeShards(100, 0.0, 10.0, 20.0, 5)],
        "ray": [MadeShards(100, 6.0, 8.0, 25.0, 5)],
    }
    rows = list(zip(*(column.cells for column in table(runs, 2).columns), strict=True))
    assert rows[1] == ("ray", "12.5", "6.2", "1.25 (1.25–1.25)", "4.0", "0.80 (0.80–0.80)", "6.0 s")
