"""Inputs of probes: patches, class token or both; batch norm; prefix tokens; held-out images resized as in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from iwm.config import ConfigError
from iwm.downstream import cached_features, experiment, tasks
from iwm.downstream.progress import TrainPlan
from iwm.downstream.settings import DataSettings, ExternalModel
from iwm.downstream.study import FrozenEncoders
from iwm.models.backbone import Backbone, frozen_backbone
from iwm.models.external.loading import load_external

Leverage = Callable[..., Any]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Write the state of a timm ViT for 32 px images, with a class token."""
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).state_dict(), tmp_path / "v.pth")
    return tmp_path / "v.pth"


def with_class_token(plain: Path) -> Backbone:
    return frozen_backbone(load_external("timm", plain, name="vit_tiny_patch16_224", image_size=32))


def of_timm(plain: Path, boxes: Path) -> dict[str, Any]:
    return {
        "checkpoint": plain,
        "external": ExternalModel(format="timm", name="vit_tiny_patch16_224", image_size=32),
        "data": DataSettings(shards=str(boxes), num_threads=1),
    }


def test_pools_are_the_mean_of_the_patches_the_class_token_and_both(plain: Path) -> None:
    backbone = with_class_token(plain)
    assert (backbone.num_prefix_tokens, backbone.has_class_token) == (1, True)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    tokens = backbone.tokens(pixels)
    expected = {"cls": tokens[:, :1], "mean": tokens[:, 1:].mean(1, keepdim=True)}
    expected["both"] = torch.cat((expected["cls"], expected["mean"]), dim=2)
    for pool, features in expected.items():
        assert torch.equal(FrozenEncoders({"teacher": backbone}, pool=pool)(pixels)["teacher"], features)
    assert torch.equal(FrozenEncoders({"teacher": backbone})(pixels)["teacher"], tokens)


@pytest.mark.parametrize("pool", ["cls", "both"])
def test_linear_probes_of_the_class_token_train(leverage: Leverage, plain: Path, boxes: Path, pool: str) -> None:
    result = leverage("linear", **of_timm(plain, boxes), pool=pool, cache_features=True, lr=(1.0,))
    (trial,) = result["trials"].values()
    assert (trial["pool"], trial["batch_norm"]) == (pool, False)
    assert trial["parameters"] == 3 * (1 + 192 * (2 if pool == "both" else 1))


@pytest.mark.parametrize("pool", ["cls", "both"])
def test_an_encoder_without_a_class_token_is_told(leverage: Leverage, pool: str) -> None:
    with pytest.raises(ConfigError, match=f"^--pool {pool}: this encoder has no class token; use --pool mean$"):
        leverage("linear", pool=pool)


def test_attentive_probes_attend_over_the_class_token(
    leverage: Leverage, plain: Path, boxes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[TrainPlan] = []
    monkeypatch.setattr(experiment, "train", lambda plan, *rest: plans.append(plan))
    leverage("attentive", **of_timm(plain, boxes))
    study = plans[0].study.eval()
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    shared = dict(study.shared_inputs(pixels))
    before = study.predict(shared, 0, [0])[0]
    shared["teacher"] = torch.cat((-shared["teacher"][:, :1], shared["teacher"][:, 1:]), dim=1)
    assert not torch.allclose(study.predict(shared, 0, [0])[0], before)


def test_a_batch_norm_makes_a_probe_blind_to_the_scale_of_its_features(
    leverage: Leverage, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of a hundred times the scale give the same training where they are normalised."""
    made = FrozenEncoders.forward

    def enlarged(encoders: FrozenEncoders, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: 100.0 * value for name, value in made(encoders, pixels).items()}

    states = []
    for name in ("as-it-is", "enlarged"):
        output = run / f"eval/{name}.json"
        result = leverage("linear", batch_norm=True, output=output, cache_features=True, steps=12, lr=(10.0,))
        states.append(torch.load(output.with_suffix("") / "last.pt", weights_only=True)["trials"])
        assert next(iter(result["trials"].values()))["batch_norm"] is True
        monkeypatch.setattr(FrozenEncoders, "forward", enlarged)
    one, other = states
    means = (one["0.head.bn.running_mean"], other["0.head.bn.running_mean"])
    torch.testing.assert_close(100 * means[0], means[1], atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(one["0.head.fc.weight"], other["0.head.fc.weight"], atol=1e-3, rtol=0.05)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("name", "expected"), [("attentive", "linear"), ("finetune-predictor", "cubic")])
def test_held_out_images_are_resized_as_those_of_training(
    leverage: Leverage, monkeypatch: pytest.MonkeyPatch, name: str, expected: str, cached: bool
) -> None:
    given: list[str] = []
    for module in (tasks, cached_features):
        made = module.ValidationLoader

        def recorded(*args: Any, made: Any = made, **options: Any) -> Any:
            given.append(options["interpolation"])
            return made(*args, **options)

        monkeypatch.setattr(module, "ValidationLoader", recorded)
    monkeypatch.setattr(experiment, "train", lambda plan, *rest: None)
    leverage(name, lr=(1e-3, 1e-2), cache_features=cached)
    assert given == [expected] * (3 if cached else 2)
