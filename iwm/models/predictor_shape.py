"""Shape of a predictor without a run: its configuration on another project's encoder, and the reverse."""

from __future__ import annotations

from dataclasses import fields

from timm.models.vision_transformer import Block

from dali_pipelines.views import Views
from iwm.config import Config, ConfigError
from iwm.model_config import ActionConfig, EncoderConfig, PredictorConfig, check_width
from iwm.models.external.tensors import mlp_ratio_of
from iwm.models.predictor import Predictor


def unconditioned(width: int, img_size: int, patch_size: int, shape: PredictorConfig, prefix: str) -> Config:
    """Return a configuration of which an unconditioned predictor can be built, on an encoder of this width.

    Only the predictor's own shape is checked: nothing is masked or pretrained. prefix: beginning of a field's name in
    messages. Raises ConfigError, which names the field.
    """
    for field in fields(shape):
        value = getattr(shape, field.name)
        if value <= 0:
            raise ConfigError(f"{prefix}{field.name.replace('_', '-')} {value}: must be above 0")
    check_width(shape.embed_dim, shape.num_heads, f"{prefix}embed-dim", f"{prefix}num-heads")
    # The number of heads of an encoder affects no predictor.
    encoder = EncoderConfig(embed_dim=width, num_heads=1, patch_size=patch_size)
    return Config(
        views=Views(size=img_size), encoder=encoder, predictor=shape, action=ActionConfig(conditioning="none")
    )


def shape_of_predictor(predictor: Predictor) -> PredictorConfig:
    """Return the shape of a predictor."""
    first, width = predictor.blocks[0], predictor.mask_token.numel()
    assert isinstance(first, Block)  # for mypy: a ModuleList is typed as a list of modules
    return PredictorConfig(
        embed_dim=width,
        depth=len(predictor.blocks),
        num_heads=first.attn.num_heads,
        mlp_ratio=mlp_ratio_of(first.mlp.fc1.out_features, width),
    )
