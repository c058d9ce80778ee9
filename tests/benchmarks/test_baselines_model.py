"""Baseline steps: they train the same model, and their FLOPs are counted correctly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from baselines import ijepa_step, plain_step
from baselines.ijepa_step import BlockwiseWorldModel, blockwise_flops, cut
from baselines.plain_step import PaddedWorldModel
from step_modes import BaselineStep
from torch.utils.flop_counter import FlopCounterMode

from dali_pipelines.augmentations import IDENTITY, PARAMS
from dali_pipelines.loader import ViewBatch
from dali_pipelines.outputs import SampleKeys
from dali_pipelines.views import Views
from iwm.config import Config
from iwm.model_config import ActionConfig, EncoderConfig, LossConfig, MaskingConfig, PredictorConfig
from iwm.models.world_model import WorldModel
from iwm.train_config import OptimConfig, TrainConfig
from iwm.training.step import prepare_masks, sample_step_masks
from tests.training.runs import alone

SMALL = Config(
    views=Views(size=64),
    encoder=EncoderConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8, init="xavier"),
    predictor=PredictorConfig(embed_dim=32, depth=2, num_heads=2),
    optim=OptimConfig(lr=1e-3, ema_momentum=0.99, grad_clip=3.0),
    train=TrainConfig(precision="fp32", compile=False, attention_impl="eager"),
)
KINDS = {
    "iwm": SMALL,
    "ijepa": replace(SMALL, masking=MaskingConfig(type="ijepa"), loss=LossConfig(type="smooth_l1")),
    "sequence": replace(SMALL, action=ActionConfig(conditioning="sequence")),
    "all": replace(SMALL, loss=LossConfig(predict="all"), action=ActionConfig(conditioning="none")),
}
CONTENDERS = pytest.mark.parametrize(
    "make", [plain_step.baseline_step, ijepa_step.baseline_step], ids=["plain", "ijepa"]
)
Make = Callable[..., BaselineStep]


def batch(images: int = 8) -> ViewBatch:
    generator = torch.Generator().manual_seed(0)
    # Smooth images rather than noise, so that there is something to learn.
    coarse = torch.randint(0, 256, (images, 3, 4, 4), generator=generator).float()
    source = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 255)
    pixels = source.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    params = torch.zeros(images, len(PARAMS))
    params[:, -2 * len(IDENTITY) :] = torch.tensor(IDENTITY * 2)
    return ViewBatch(pixels, pixels, params, None, SampleKeys(torch.zeros(images, 8, dtype=torch.uint8)))


def losses(make: Make, config: Config, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the loss that is read in each step."""
    seen: list[float] = []
    for module in (plain_step, ijepa_step):
        monkeypatch.setattr(module, "read", lambda loss: seen.append(float(loss.detach())))
    torch.manual_seed(0)
    contender = make(config, alone(), [batch()])
    assert contender.images == 8
    for number in range(steps):
        contender.step(number)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_step_has_the_loss_of_the_trained_one(kind: str) -> None:
    config = KINDS[kind]
    torch.manual_seed(0)
    packed = WorldModel(config).setup(torch.device("cpu"), compiled=False)
    plain = PaddedWorldModel(config).setup(torch.device("cpu"), compiled=False)
    plain.load_state_dict(packed.state_dict())
    b = batch()
    ours = packed(b.source, b.target, b.params, prepare_masks(config, alone(), 3, 0, 8))
    theirs = plain(b.source, b.target, b.params, sample_step_masks(config, alone(), 3, 0, 8))
    torch.testing.assert_close(theirs, ours)


@CONTENDERS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_is_finite_and_falls_on_a_fixed_batch(
    make: Make, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, train=replace(SMALL.train, precision=precision))
    seen = losses(make, config, 60, monkeypatch)
    assert len(seen) == 60
    assert sum(seen[-10:]) < 0.75 * sum(seen[:10]), seen


@CONTENDERS
def test_a_step_moves_encoder_predictor_and_a_little_the_target_encoder(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[WorldModel] = []
    prepare = WorldModel.setup

    def remember(self: WorldModel, *arguments: Any, **options: Any) -> WorldModel:
        made.append(self)
        return prepare(self, *arguments, **options)

    monkeypatch.setattr(WorldModel, "setup", remember)
    contender = make(SMALL, alone(), [batch(4), batch(4)])
    (model,) = made
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    contender.step(0)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    still = [name for name, by in moved.items() if by == 0 and not name.endswith("pos_embed")]
    assert not still
    encoder, target = (moved[f"{part}.blocks.0.mlp.fc1.weight"] for part in ("encoder", "target_encoder"))
    assert target == pytest.approx(0.01 * encoder, rel=0.1)


def test_masks_are_cut_to_the_poorest_image_of_the_batch() -> None:
    masks = sample_step_masks(KINDS["ijepa"], alone(), 0, 0, 16)
    short = cut(masks)
    assert short.visible.shape == (16, int(masks.visible.sum(1).min()))
    assert short.queried.shape == (4, 16, int(masks.predicted.sum(2).min()))
    assert masks.visible.gather(1, short.visible).all()
    assert masks.predicted.transpose(0, 1).gather(2, short.queried).all()
    assert (short.visible.diff(dim=1) > 0).all(), "first patches first, none twice"


@pytest.mark.parametrize("conditioning", ["feature", "sequence", "none"])
def test_flops_of_the_step_as_i_jepas_code_has_it_are_those_that_torch_counts(conditioning: Any) -> None:
    config = replace(KINDS["ijepa"], action=ActionConfig(conditioning=conditioning))
    model = BlockwiseWorldModel(config).setup(torch.device("cpu"), compiled=False)
    b, masks = batch(), cut(sample_step_masks(config, alone(), 0, 0, 8))
    with FlopCounterMode(display=False) as counter:
        model(b.source, b.target, b.params, masks).backward()
    assert blockwise_flops(config, masks) * 8 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_loss_that_is_not_finite_is_not_trained_on() -> None:
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        plain_step.read(torch.tensor(float("nan")))
