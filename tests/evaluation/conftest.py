"""A real run to evaluate: real shards of drawn tiles and a checkpoint of a small, untrained model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dali_pipelines.views import Views
from iwm.config import Config, DataConfig
from iwm.evaluate import main
from iwm.model_config import EncoderConfig, PredictorConfig
from iwm.models.world_model import WorldModel
from iwm.train_config import TrainConfig
from iwm.training.checkpoint import Checkpoint, save_checkpoint, versions
from shards.errors import UserError
from tools.make_demo_data import make_split

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder whose split `val` has 12 tiles."""
    folder = tmp_path_factory.mktemp("evaluation")
    table = make_split(folder / "source", "val", 12)
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(table), str(folder / "shards")]
    subprocess.run([*command, "--split", "val"], check=True, capture_output=True)
    return folder / "shards"


@pytest.fixture(scope="session")
def config(shards: Path) -> Config:
    return Config(
        data=DataConfig(shards=str(shards)),
        views=Views(size=32),
        encoder=EncoderConfig(embed_dim=48, depth=1, num_heads=2, patch_size=8),
        predictor=PredictorConfig(embed_dim=48, depth=1, num_heads=2),
        train=replace(TrainConfig(), compile=False, precision="fp32"),
    )


@pytest.fixture
def run(tmp_path: Path, config: Config) -> Path:
    """A run's folder with one checkpoint, of step 7."""
    return untrained(tmp_path / "small", config)


def diverge(run: Path) -> None:
    """Make the predictor of a run's only checkpoint NaN throughout."""
    file = next((run / "checkpoints").iterdir())
    content = torch.load(file, weights_only=True)
    for name, value in content["model"].items():
        if name.startswith("predictor"):
            value.fill_(torch.nan)
    torch.save(content, file)


def untrained(folder: Path, config: Config) -> Path:
    """Make a run's folder with one checkpoint, of step 7."""
    torch.manual_seed(0)
    content = Checkpoint(
        config=config,
        step=7,
        samples=448,
        skipped=0,
        model=WorldModel(config).state_dict(),
        optimizer={},
        rng={},
        loader=[],
        versions=versions(),
    )
    save_checkpoint(folder, content)
    return folder


@pytest.fixture(scope="session")
def smooth_images() -> Tensor:
    """Random pictures of 16 px of middle brightness, so that jitter rarely clips."""
    generator = torch.Generator().manual_seed(0)
    coarse = 60 + 130 * torch.rand(6, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return fine.permute(0, 2, 3, 1).round().byte().contiguous()


def mistake(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run iwm/evaluate.py, which must end with a one-line error; return the line."""
    monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", *arguments])
    with pytest.raises(UserError) as stop:
        main()
    assert "\n" not in str(stop.value)
    return str(stop.value)
