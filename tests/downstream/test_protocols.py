"""Every protocol runs on real shards, writes a complete result, and learns a simple task."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from iwm.downstream.settings import DataSettings, ExternalModel, MixupSettings
from iwm.model_config import PredictorConfig
from tests.models.published import decoder_state, ijepa, ijepa_predictor_state, under, vit_state

Leverage = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("name", "options", "trials"),
    [
        ("linear", {"lr": (1.0, 10.0), "encoder": ("teacher", "student")}, 4),
        ("attentive", {"lr": (1e-3,)}, 1),
        ("finetune-encoder", {"seeds": (0, 1)}, 2),
        ("finetune-predictor", {}, 2),
        ("finetune-end-to-end", {"predictors": ("pretrained", "random")}, 2),
    ],
)
def test_a_protocol_runs_and_says_what_it_did(
    leverage: Leverage, run: Path, name: str, options: dict[str, Any], trials: int
) -> None:
    result = leverage(name, **options)
    assert result == json.loads((run / "eval" / f"{name}.json").read_text()) | {"settings": result["settings"]}
    assert (result["protocol"], result["steps"], result["batch_size"]) == (name, 6, 20)
    # Six of 120 training images, 5%, are held out for a sweep of learning rates.
    chooses = name == "linear"
    assert result["selection"] == ("train" if chooses else "none")
    assert result.get("selection_images") == (6 if chooses else None)
    assert (result["classes"], result["train_images"], result["val_images"]) == (3, 114 if chooses else 120, 48)
    assert result["chance"] == pytest.approx(18 / 48)
    assert len(result["trials"]) == trials
    for trial in result["trials"].values():
        assert 0 <= trial["top1"]["mean"] <= trial["top5"]["mean"] == 1
        assert ("selection" in trial["best"]) == chooses
        assert chooses or trial["best"] == {"score": trial["top1"]["mean"], "epoch": 1.0}
        assert trial["parameters"] > 0
        assert trial["skipped_steps"] == 0
    assert result["chosen"] in result["trials"]
    best = torch.load(run / "eval" / name / "best.pt", weights_only=True)
    assert best["trial"] in result["trials"]
    assert best["classes"] == ["blue", "green", "red"]
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"lr": (30.0, 100.0, 300.0, 1000.0)}),
        ("attentive", {"lr": (3e-3,)}),
        ("finetune-encoder", {"lr": (2e-3,), "layer_decay": 1.0}),
        ("finetune-predictor", {"lr": (2e-3,), "pretrained_lr_mult": 1.0}),
        ("finetune-end-to-end", {"lr": (2e-3,), "encoder_lr_mult": 1.0, "predictor_lr_mult": 1.0}),
    ],
)
def test_colours_are_learnt(leverage: Leverage, name: str, options: dict[str, Any]) -> None:
    plain = {} if name in ("linear", "attentive") else {"mixup": MixupSettings.none(), "drop_path": 0.0}
    result = leverage(name, steps=40, batch_size=60, validate_every=100.0, **plain, **options)
    assert result["trials"][result["chosen"]]["top1"]["mean"] > 0.9


def test_all_combinations_of_table_s3_are_trained_from_one_forward_pass(leverage: Leverage) -> None:
    result = leverage(
        "finetune-predictor",
        steps=2,
        predictors=("pretrained",),
        encoder=("teacher", "student"),
        actions=("null", "random"),
        outputs=("image", "token"),
    )
    settings = {(trial["features"], trial["actions"], trial["tokens"]) for trial in result["trials"].values()}
    assert len(settings) == len(result["trials"]) == 8


def test_a_random_predictor_has_the_pretrained_ones_shape_and_other_parameters(leverage: Leverage, run: Path) -> None:
    result = leverage("finetune-predictor", seeds=(0, 1), steps=1)
    assert set(result["trials"]) == {f"{kind}, seed {seed}" for kind in ("pretrained", "random") for seed in (0, 1)}
    assert len({trial["parameters"] for trial in result["trials"].values()}) == 1
    last = torch.load(run / "eval/finetune-predictor/last.pt", weights_only=True)["trials"]
    weights = [last[f"{number}.predictor_backbone.predictor.blocks.0.mlp.fc1.weight"] for number in range(4)]
    pretrained_apart, random_apart = ((weights[i] - weights[i + 1]).abs().max() for i in (0, 2))
    assert pretrained_apart < 1e-3 < random_apart


def test_several_tasks_are_learnt_by_one_predictor_beside_one_for_each(
    leverage: Leverage, boxes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = f"{boxes}:label"
    monkeypatch.setenv("COLUMNS", "500")
    result = leverage(
        "multitask", tasks=("side", other), cache_features=True, steps=60, lr=(3e-3,), pretrained_lr_mult=1.0
    )
    assert set(result["trials"]) == {"multitask", "single-side", f"single-{other}"}
    assert result["batch_size"] == 40
    # Rich would replace ":label:" by an emoji.
    assert f"{other}: 120 training" in capsys.readouterr().out
    assert set(result["tasks"]) == {"side", other} == set(result["trials"]["multitask"]["scores"])
    assert set(result["trials"]["single-side"]["scores"]) == {"side"}
    for trial in result["trials"].values():
        for scores in trial["scores"].values():
            assert scores["top1"]["mean"] > 0.7


def test_an_encoder_without_a_predictor_gets_a_random_one(leverage: Leverage, tmp_path: Path, boxes: Path) -> None:
    file = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0).state_dict(), file)
    options: dict[str, Any] = {
        "checkpoint": file,
        "external": ExternalModel(format="timm", name="vit_tiny_patch16_224", image_size=48),
        "data": DataSettings(shards=str(boxes), num_threads=1),
        "random_predictor": PredictorConfig(embed_dim=24, depth=1, num_heads=3),
        "steps": 2,
    }
    result = leverage("finetune-predictor", **options)
    assert list(result["trials"]) == ["random, seed 0"]
    assert result["encoder"]["format"] == "timm"
    assert (tmp_path / "vit" / "eval" / "finetune-predictor.json").exists()


WHOLE_IMAGE_PROTOCOLS = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("finetune-predictor", {"outputs": ("image", "token")}),
        ("finetune-end-to-end", {}),
        (
            "segmentation",
            {"parts": ("predictor",), "classes": 4, "reduce_zero_label": False, "channels": 8, "lr": (1e-3,)},
        ),
    ],
)


@WHOLE_IMAGE_PROTOCOLS
def test_ijepas_predictor_is_finetuned_and_a_file_without_it_gets_a_random_one(
    leverage: Leverage, tmp_path: Path, boxes: Path, name: str, options: dict[str, Any]
) -> None:
    """The width of the encoder is none that was published; --external.heads gives its heads."""
    whole = ijepa(vit_state(class_token=False)) | {"predictor": under("module.", ijepa_predictor_state(depth=4))}
    encoder = {entry: part for entry, part in whole.items() if entry != "predictor"}
    trained = {}
    for kind, content in (("whole", whole), ("encoder", encoder)):
        file = tmp_path / f"{kind}.pth"
        torch.save(content, file)
        result = leverage(
            name,
            checkpoint=file,
            external=ExternalModel(format="ijepa", image_size=48, heads=2),
            data=DataSettings(shards=str(boxes), num_threads=1),
            random_predictor=PredictorConfig(embed_dim=24, depth=4, num_heads=3),
            **options | {"steps": 1, "batch_size": 8},
        )
        trained[kind] = {trial["predictor"] for trial in result["trials"].values()}
        if kind == "whole" and name == "finetune-predictor":
            counts = {trial["parameters"] for trial in result["trials"].values() if trial["tokens"] == "all"}
            assert len(counts) == 1, "the random control has another shape"
            assert "predictor 4×32" in result["encoder"]["description"]
    assert trained["whole"] == ({"pretrained", "random"} if name == "finetune-predictor" else {"pretrained"})
    assert trained["encoder"] == {"random"}


@WHOLE_IMAGE_PROTOCOLS
def test_maes_decoder_is_its_predictor_and_a_file_without_it_gets_a_random_one(
    leverage: Leverage, tmp_path: Path, boxes: Path, name: str, options: dict[str, Any]
) -> None:
    """The widths are published ones, for which the number of heads is known."""
    encoder = vit_state(width=768, depth=1)
    whole = encoder | decoder_state(width=768, own=512, depth=4)
    trained = {}
    for kind, state in (("whole", whole), ("encoder", encoder)):
        file = tmp_path / f"{kind}.pth"
        torch.save({"model": state}, file)
        result = leverage(
            name,
            checkpoint=file,
            external=ExternalModel(format="mae", image_size=32),
            data=DataSettings(shards=str(boxes), num_threads=1),
            random_predictor=PredictorConfig(embed_dim=24, depth=4, num_heads=3),
            **options | {"steps": 1, "batch_size": 8},
        )
        trained[kind] = {trial["predictor"] for trial in result["trials"].values()}
    assert trained["whole"] == ({"pretrained", "random"} if name == "finetune-predictor" else {"pretrained"})
    assert trained["encoder"] == {"random"}


def test_several_tasks_are_learnt_by_ijepas_predictor(leverage: Leverage, tmp_path: Path, boxes: Path) -> None:
    predictor = under("module.", ijepa_predictor_state())
    torch.save(ijepa(vit_state(class_token=False)) | {"predictor": predictor}, tmp_path / "ijepa.pth")
    result = leverage(
        "multitask",
        checkpoint=tmp_path / "ijepa.pth",
        external=ExternalModel(format="ijepa", image_size=48, heads=2),
        data=DataSettings(shards=str(boxes), num_threads=1),
        tasks=("side", "label"),
        steps=1,
        batch_size=8,
    )
    assert set(result["trials"]) == {"multitask", "single-side", "single-label"}
    assert {trial["predictor"] for trial in result["trials"].values()} == {"pretrained"}
