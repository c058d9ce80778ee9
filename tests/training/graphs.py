"""Train in this process, then print how many graphs had been compiled by the end of each step, as JSON.

A script, because the run-time shape checks of the test suite break graphs:
python tests/training/graphs.py RUN ARGUMENTS_OF_TRAIN_PY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch._dynamo.utils import counters

from iwm.train import parse
from iwm.training.signals import StopWish
from tests.training.runs import train_here


class CountGraphs(StopWish):
    """Asked after every step; notes how many graphs have been compiled by then, and never wants to stop."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __bool__(self) -> bool:
        self.graphs.append(counters["stats"]["unique_graphs"])
        return False


if __name__ == "__main__":
    count = CountGraphs()
    train_here(parse(sys.argv[2:]).config, Path(sys.argv[1]), count)
    print(json.dumps({"graphs": count.graphs, "breaks": sum(counters["graph_break"].values())}))
