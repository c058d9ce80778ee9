"""Number of compiled graphs after each step of a training run, printed as JSON.

This is a script, because the test suite's run-time shape checks cause graph breaks:
python tests/training/graphs.py RUN ARGUMENTS_OF_TRAIN_PY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch._dynamo.utils import counters

from iwm.recipes import parse
from iwm.training.runtime import StopFlag
from tests.training.runs import train_here


class CountGraphs(StopFlag):
    """Stop flag that is read after every step: it records the number of compiled graphs and stays False."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __bool__(self) -> bool:
        self.graphs.append(counters["stats"]["unique_graphs"])
        return False


if __name__ == "__main__":
    count = CountGraphs()
    train_here(parse(sys.argv[2:]).config, Path(sys.argv[1]), count)
    print(json.dumps({"graphs": count.graphs, "breaks": sum(counters["graph_break"].values())}))
