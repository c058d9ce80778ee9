"""Script: run a protocol and print the number of compiled graphs after each step, as JSON.

It is a script because the run-time shape checks of the test suite break graphs. Usage:
python tests/downstream/counted.py RUN OUTPUT PROTOCOL BACKEND OPTIONS (settings as JSON)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from iwm import protocols
from iwm.training.runtime import StopFlag
from tests.downstream.conftest import settings_for
from tests.training.graphs import CountGraphs

if __name__ == "__main__":
    run, output, name, backend, given = sys.argv[1:]
    count = CountGraphs()

    @contextmanager
    def counting() -> Iterator[StopFlag]:
        yield count

    protocols.stop_on_signal = counting  # a generator with the same interface
    torch.compile = partial(torch.compile, backend=backend)  # Module.compile uses it too
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(given).items()}
    settings = settings_for(name, Path(run), **options, output=Path(output), compile="yes")
    protocols.train_and_evaluate(name, settings)
    total, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    print(json.dumps({"graphs": count.graphs, "total": total, "breaks": breaks}))
