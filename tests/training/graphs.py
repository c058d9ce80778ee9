"""Number of compiled graphs after each step of a training run, printed as JSON.

This is a script, because the test suite's run-time shape checks cause graph breaks:
python tests/training/graphs.py BACKEND RUN ARGUMENTS_OF_TRAIN_PY
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from iwm.train_options import parse
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
    backend, run, *words = sys.argv[1:]
    torch.compile = partial(torch.compile, backend=backend)  # Module.compile uses it too
    count = CountGraphs()
    train_here(parse(words).config, Path(run), count)
    print(json.dumps({"graphs": count.graphs, "breaks": sum(counters["graph_break"].values())}))
