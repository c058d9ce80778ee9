"""The compiled step: the eager step's losses, and no recompilation once it is warm."""

from pathlib import Path

import pytest
from torch._dynamo.utils import counters

from iwm.config import Log, Train
from iwm.training.signals import StopWish
from tests.training.runs import metrics, tiny_config, train_here

STEPS, WARM = 12, 3


class CountGraphs(StopWish):
    """Asked after every step; notes how many graphs have been compiled by then, and never wants to stop."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __bool__(self) -> bool:
        self.graphs.append(counters["stats"]["unique_graphs"])
        return False


@pytest.mark.timeout(600)
def test_nothing_is_recompiled_after_warm_up_and_losses_are_the_eager_ones(tiny_shards: Path, tmp_path: Path) -> None:
    log = Log(every=1, checkpoint_every=100, health_every=6, health_images=2, health_bank=8, tensorboard=False)
    for name, compiled in (("eager", False), ("compiled", True)):
        counters.clear()
        graphs = CountGraphs()
        config = tiny_config(tiny_shards, STEPS, train=Train(compile=compiled, precision="fp32"), log=log)
        train_here(config, tmp_path / name, graphs)
        assert len(graphs.graphs) >= STEPS
        assert graphs.graphs[-1] == graphs.graphs[WARM], f"recompiled after step {WARM}: {graphs.graphs}"
        assert graphs.graphs[-1] == (3 if compiled else 0), (
            "context encoder, target encoder and predictor: a graph each"
        )
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
