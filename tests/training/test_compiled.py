"""The compiled step has the losses of the eager step, does not recompile after the warm-up, and is tuned on request."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor

from iwm.models.layers import compile_blocks
from iwm.models.world_model import WorldModel
from iwm.train_config import CompileMode, TrainConfig
from iwm.train_options import parse
from iwm.training.runtime import StopFlag
from tests.training.runs import arguments, finish, metrics, tiny_config, train_here

STEPS, COMPARED, WARM = 500, 24, 3
GRAPHS = 13
"""Compiled graphs: embedding, block and norm of both encoders; build_sequence, block and project of the predictor; the
last block of target encoder and predictor; target norm; loss."""


class StopAfter(StopFlag):
    """Stop flag that is read after every step and becomes True after `steps` steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_nothing_is_recompiled_in_500_steps_and_losses_are_the_eager_ones(tiny_shards: Path, tmp_path: Path) -> None:
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    settings = ("--train.precision", "fp32", "--log.interval", "4", "--log.eval-interval", "250")
    settings += ("--encoder.depth", "2", "--predictor.depth", "2")
    words = arguments(tiny_shards, compiled, STEPS, *settings)
    train_here(parse([*words, "--train.no-compile"]).config, eager, StopAfter(COMPARED))
    output = finish([sys.executable, "tests/training/graphs.py", "inductor", str(compiled), *words, "--train.compile"])
    counted = json.loads(output.splitlines()[-1])
    assert len(counted["graphs"]) >= STEPS
    assert counted["graphs"][-1] == counted["graphs"][WARM], f"recompiled after step {WARM}: {counted['graphs']}"
    assert counted["graphs"][-1] == GRAPHS
    assert counted["breaks"] == 0
    losses = [[line["loss"] for line in metrics(run) if "loss" in line][: COMPARED // 4] for run in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_every_compiled_part_of_the_model_has_the_configured_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []

    def compile_nothing(function: object, **options: object) -> object:
        modes.append(options["mode"])
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)  # Module.compile calls it too
    train = TrainConfig(compile_mode="max-autotune-no-cudagraphs")
    WorldModel(tiny_config(Path("unused"), 4, train=train)).setup(torch.device("cpu"), compiled=True)
    parts = 3 + 2 + 6  # a block of each network, the norms of both encoders, and the compiled methods
    assert modes == ["max-autotune-no-cudagraphs"] * parts


class LinearAndGelu(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(super().forward(x))


@pytest.mark.parametrize(("mode", "tuned"), [("default", False), ("max-autotune-no-cudagraphs", True)])
def test_the_mode_reaches_the_compiler(mode: CompileMode, tuned: bool) -> None:
    torch.manual_seed(0)
    block, x, seen = LinearAndGelu(32, 64), torch.randn(16, 32), list[bool]()
    # A graph with a pass of its own is not taken from torch's caches.
    observe = inductor.patch(post_grad_custom_post_pass=lambda graph: seen.append(inductor.max_autotune))
    with torch.no_grad(), observe:
        expected = block(x)
        compile_blocks(nn.Module(), [block], mode=mode)
        assert torch.allclose(block(x), expected, atol=1e-6)
    assert seen == [tuned]
