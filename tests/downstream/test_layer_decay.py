"""Layer decay: BEiT's and MAE's layer numbers for an encoder; continued numbers for encoder and predictor."""

import pytest
import timm
from packaging.version import Version
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from iwm.config import Config
from iwm.downstream.optim import layer_decay_scales, layer_ids
from iwm.model_config import ActionConfig, EncoderConfig, PredictorConfig
from iwm.models.backbone import frozen_backbone
from iwm.models.external.loading import ExternalEncoder, MaeDecoder
from iwm.models.heads import AttentiveHead, LinearHead
from iwm.models.predictor import Predictor as Pretrained
from iwm.models.predictor_backbone import PredictorBackbone, copy_pretrained
from iwm.models.world_model import WorldModel
from iwm.train_config import TrainConfig

DIMENSIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


def world_model(conditioning: str) -> WorldModel:
    return WorldModel(
        Config(
            encoder=EncoderConfig(embed_dim=32, depth=3, num_heads=4),
            predictor=PredictorConfig(embed_dim=16, depth=2, num_heads=2),
            action=ActionConfig(conditioning=conditioning),
            train=TrainConfig(compile=False),
        )
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"reg_tokens": 2, "pre_norm": True, "init_values": 0.1},
            marks=pytest.mark.skipif(
                Version(timm.__version__) < Version("1.0.31"),
                reason="timm before 1.0.31 leaves register tokens and the norm before the blocks out of the stem",
            ),
        ),
    ],
)
@pytest.mark.parametrize("decay", [0.65, 0.9])
def test_encoder_and_head_decay_as_timm_has_it_but_for_the_norm(options: dict[str, object], decay: float) -> None:
    """BEiT and MAE count the last norm with the head, timm with the last block."""
    stock = VisionTransformer(**DIMENSIONS, **options, num_classes=10)
    names = {parameter: name for name, parameter in stock.named_parameters()}
    expected = {
        names[parameter]: group["lr_scale"]
        for group in param_groups_layer_decay(stock, layer_decay=decay)
        for parameter in group["params"]
    }
    vit = VisionTransformer(**DIMENSIONS, **options, num_classes=0)
    trained = frozen_backbone(ExternalEncoder("timm", vit, (0.5,) * 3, (0.5,) * 3)).finetune_copy()
    scales = layer_decay_scales(nn.ModuleDict({"backbone": trained, "head": LinearHead(32, 10)}), decay)
    scales = {
        name.removeprefix("backbone.encoder.vit.").replace("head.fc", "head"): scale for name, scale in scales.items()
    }
    assert scales == pytest.approx({**expected, "norm.weight": 1, "norm.bias": 1})


@pytest.mark.parametrize("conditioning", ["none", "sequence", "feature"])
def test_encoder_and_predictor_are_one_ladder(conditioning: str) -> None:
    model = world_model(conditioning)
    both = nn.ModuleDict(
        {
            "backbone": frozen_backbone(model.target_encoder).finetune_copy(),
            "predictor_backbone": PredictorBackbone(copy_pretrained(model.predictor), num_tasks=2),
            "heads": nn.ModuleList([AttentiveHead(32, 4, 10), AttentiveHead(32, 4, 5)]),
        }
    )
    first, begins, last = 0, 4, 7
    expected = {"backbone.encoder.patch_embed": first, "backbone.encoder.norm": begins}
    expected |= {f"backbone.encoder.blocks.{i}": 1 + i for i in range(3)}
    expected |= {
        f"predictor_backbone.predictor.{name}": begins
        for name in ("predictor_embed", "mask_token", "action_mixer", "action_tokens")
    }
    expected |= {f"predictor_backbone.predictor.blocks.{i}": 5 + i for i in range(2)}
    expected |= {
        "predictor_backbone.task_tokens": begins,
        "predictor_backbone.predictor.norm": last,
        "predictor_backbone.predictor.predictor_proj": last,
    }
    expected |= {"heads": last}
    numbers = layer_ids(both)
    assert set(numbers) == {name for name, parameter in both.named_parameters() if parameter.requires_grad}
    for name, number in numbers.items():
        assert number == next(value for part, value in expected.items() if f"{name}.".startswith(f"{part}.")), name
    scales = layer_decay_scales(both, 0.9)
    assert scales["backbone.encoder.patch_embed.proj.weight"] == pytest.approx(0.9**7)
    assert scales["heads.0.query"] == 1


def test_what_is_frozen_is_no_layer() -> None:
    model = world_model("feature")
    parts = {
        "backbone": frozen_backbone(model.target_encoder),
        "predictor_backbone": PredictorBackbone(copy_pretrained(model.predictor)),
    }
    numbers = layer_ids(nn.ModuleDict(parts))
    assert not any(name.startswith("backbone") for name in numbers)
    assert numbers["predictor_backbone.predictor.predictor_embed.weight"] == 0
    assert max(numbers.values()) == 3
    assert isinstance(parts["predictor_backbone"].predictor, Pretrained)
    alone = nn.ModuleDict({"backbone": parts["backbone"], "head": LinearHead(32, 10)})
    assert layer_decay_scales(alone, 0.5) == {"head.fc.weight": 1, "head.fc.bias": 1}


def test_maes_decoder_on_its_encoder_is_one_ladder_too() -> None:
    vit = VisionTransformer(**DIMENSIONS, num_classes=0)
    decoder = MaeDecoder(width=32, own_width=16, depth=2, heads=2, hidden=32, grid=4, pixels=192)
    backbone = frozen_backbone(ExternalEncoder("mae", vit, (0.5,) * 3, (0.5,) * 3, decoder))
    numbers = layer_ids(
        nn.ModuleDict(
            {"backbone": backbone.finetune_copy(), "predictor_backbone": PredictorBackbone(copy_pretrained(decoder))}
        )
    )
    assert numbers["backbone.encoder.vit.cls_token"] == numbers["backbone.encoder.vit.pos_embed"] == 0
    assert (
        numbers["backbone.encoder.vit.norm.weight"] == numbers["predictor_backbone.predictor.decoder_embed.weight"] == 4
    )
    assert numbers["predictor_backbone.predictor.mask_token"] == 4
    assert numbers["predictor_backbone.predictor.decoder_blocks.1.norm1.weight"] == 6
    assert numbers["predictor_backbone.predictor.decoder_norm.weight"] == 7
    assert not any("decoder_pred" in name for name in numbers)
