"""Sections of a run's configuration that define the model and its task: networks, conditioning, masks and loss.

Sections in brackets are those of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from iwm.ranges import ConfigError, Range

Initialisation = Literal["ijepa", "beit", "xavier"]


@dataclass(frozen=True)
class EncoderConfig:
    """ViT of the context encoder and the target encoder. Defaults: ViT-B/16 (A.1)."""

    embed_dim: int = 768
    """Width of the tokens, a multiple of 4 and of num_heads."""
    depth: int = 12
    """Number of blocks."""
    num_heads: Annotated[int, Range(min=1)] = 12
    """Number of attention heads."""
    patch_size: Annotated[int, Range(min=1)] = 16
    """Side of a patch (pixels)."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP, as a multiple of embed_dim."""
    init: Initialisation = "ijepa"
    """Initialisation of the encoders and the predictor.
    `ijepa`: truncated normal with standard deviation 0.02, as in I-JEPA's training.
    `beit`: the same, with the output projections of block i divided by √(2i), where i counts from 1.
    I-JEPA's constructors do this too, but its training then initialises every linear layer again.
    `xavier`: Xavier uniform, better for narrow models (width below about 256)."""


@dataclass(frozen=True)
class PredictorConfig:
    """Predictor, the world model IWM(depth, width) (section 4.2). Defaults: IWM 18×384."""

    embed_dim: int = 384
    """Width of the tokens, a multiple of 4 and of num_heads."""
    depth: int = 18
    """Number of blocks."""
    num_heads: Annotated[int, Range(min=1)] = 12
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP, as a multiple of embed_dim."""


@dataclass(frozen=True)
class ActionConfig:
    """Conditioning of the predictor on the action, the change from source to target (sections 4.1, 4.2; A.1)."""

    conditioning: Literal["none", "sequence", "feature"] = "feature"
    """Kind of conditioning. `none`: the predictor does not receive the action.
    `feature`: three fully-connected layers mix the action into the mask tokens.
    `sequence`: the action is appended as one token per component."""
    jitter_encoding: Literal["difference", "log_ratio"] = "difference"
    """Encoding of the change of brightness, contrast and saturation. Hue is always encoded as a difference.
    `difference`: target − source, as in the paper. `log_ratio`: log(target / source)."""
    shuffle: bool = False
    """Control: condition every image on the action of the next image of its pass, so that none can be learned."""


@dataclass(frozen=True)
class MaskingConfig:
    """Masks: patches that are hidden from the context encoder and predicted (A.1)."""

    type: Literal["iwm", "ijepa"] = "iwm"
    """Kind of masks. `iwm`: the union of the blocks is masked and predicted in one pass.
    `ijepa`: each block is predicted separately, from a context block that excludes all of them."""
    num_blocks: Annotated[int, Range(min=1)] = 4
    """Number of blocks per image."""
    block_scale: Annotated[tuple[float, float], Range(above=0, below=1)] = (0.15, 0.2)
    """Range of a block's area as a share of the image (0 to 1)."""
    block_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    """Range of a block's aspect ratio (height / width)."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """For `ijepa`: range of the square context block's area as a share of the image (0 to 1).
    The target blocks are then removed from it."""
    sampler: Literal["paper", "official"] = "paper"
    """Draw of the blocks. `paper`: each block has its own size and can lie anywhere (A.1).
    `official`: as in I-JEPA's code. All blocks of a step have one size, and none reaches the last row and column.
    Area and aspect ratio come from one number. The context is drawn again if min_keep or fewer patches are left."""
    min_keep: Annotated[int, Range(min=0)] = 10
    """For sampler `official`: number of patches that every block, and the context, must exceed."""
    cut: bool = False
    """For `ijepa`: cut every context to the fewest patches that an image of its group has.
    Target blocks are cut to the smallest of the group. I-JEPA's code does this to make a batch rectangular.
    The patches of the last rows go."""
    cut_group: Annotated[int, Range(min=1)] = 128
    """For `cut`: number of consecutive images of the global batch in a group, I-JEPA's batch of one GPU.
    It does not depend on the number of processes or on data.micro_batch_size."""


@dataclass(frozen=True)
class LossConfig:
    """Distance between predictions and target features (section 3)."""

    type: Literal["l2", "smooth_l1"] = "l2"
    """`l2`: squared error. `smooth_l1`: smooth L1, as in I-JEPA."""
    predict: Literal["masked", "all"] = "masked"
    """Patches in the loss. `masked`: the masked patches (figure S1).
    `all`: every patch of the target, a literal reading of the paper's formula; needs masking.type iwm."""
    normalize_targets: bool = True
    """Layer-normalise the target features (no affine parameters), as in I-JEPA."""
    reduction: Literal["mean", "sum"] = "mean"
    """Reduction over the predicted tokens of an image: the mean, or the sum as in the paper.
    The reduction over features and images is always the mean."""


def check_width(width: int, heads: int, embed_dim: str, num_heads: str) -> None:
    """Raise ConfigError where a width does not fit its heads or positions. embed_dim, num_heads: names for messages."""
    if width % heads:
        raise ConfigError(f"{embed_dim} {width} is not a multiple of {num_heads} {heads}")
    if width % 4:
        raise ConfigError(f"{embed_dim} {width} is not a multiple of 4, which 2-D sin-cos positions need")
