"""Classification and segmentation heads: linear, attentive, UPerNet (paper, A.2).

UPerNet (Xiao et al., 2018) takes the last four layers of a ViT (A.2) and is otherwise that of BEiT and mmsegmentation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from iwm.config import ConfigError
from iwm.encoder_outputs import LayerNormKind

PROBE_INIT_STD = 0.01
"""Standard deviation of a probe's initial classifier weights, as in MAE, MoCo v3 and the context autoencoder. All
classes begin about equally likely."""
BATCH_NORM_EPS = 1e-6
"""Value that a linear probe's batch norm adds to variances, as MAE's."""
FINETUNE_INIT_STD = 2e-5
"""Standard deviation of a classifier's initial weights in finetuning, as in MAE. A larger one would send noisy
gradients into the encoder at first."""


class LinearHead(nn.Module):
    """Average pooling of the tokens and a linear layer (A.2, linear and encoder finetuning)."""

    def __init__(self, width: int, classes: int, *, std: float = PROBE_INIT_STD, batch_norm: bool = False) -> None:
        """Initialise. width: width of the tokens; std: standard deviation of the initial weights.

        batch_norm: normalise the mean by a batch norm without parameters, as in MAE's linear probe.
        """
        super().__init__()
        self.bn = nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS) if batch_norm else None
        self.fc = _linear(width, classes, std)

    def forward(self, tokens: Float[Tensor, "b s d"]) -> Float[Tensor, "b c"]:
        """Return logits from the tokens to average. In training a batch norm needs at least two images."""
        mean = tokens.mean(1)
        return self.fc(mean if self.bn is None else self.bn(mean.float()))


class AttentiveHead(nn.Module):
    """Cross-attention pooling by one learned query, and a linear layer (A.2, attentive).

    It is the block of the context autoencoder (Chen et al., 2023): query, keys and values each have their own norm;
    there is no residual connection and no MLP; the pooled features pass a batch norm without parameters. The query is
    initialised at zero, so attention begins as the mean.

    As one query serves all images, keys and values are not computed for every token. A head's score is the dot product
    of a normalised token with the query multiplied by the key weights (folded_query), and values are computed from the
    pooled tokens. The function is the same, with 2·heads dot products per token instead of 2·width.
    """

    def __init__(self, width: int, heads: int, classes: int, *, std: float = PROBE_INIT_STD) -> None:
        """Initialise. width: width of the tokens, a multiple of heads; std: of the classifier's initial weights."""
        super().__init__()
        self.num_heads = heads
        self.query = nn.Parameter(torch.zeros(width))
        self.norm_query = nn.LayerNorm(width, eps=1e-6)
        # An offset common to all keys does not change the attention weights: their norm and layer have no bias.
        self.norm_keys = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.norm_values = nn.LayerNorm(width, eps=1e-6)
        self.to_query = nn.Linear(width, width)
        self.to_keys = nn.Linear(width, width, bias=False)
        self.to_values = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        for layer in (self.to_query, self.to_keys, self.to_values, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.bn = nn.BatchNorm1d(width, affine=False)
        self.fc = _linear(width, classes, std)

    def forward(self, tokens: Float[Tensor, "b s d"]) -> Float[Tensor, "b c"]:
        """Return logits. In training a batch needs at least two images for the batch norm."""
        return self.fc(self.bn(self.pool(tokens).float()))

    def pool(self, tokens: Float[Tensor, "b s d"]) -> Float[Tensor, "b d"]:
        """Return the attention-pooled features."""
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=self.norm_keys.eps)
        weights = (normed @ self.folded_query().T).softmax(dim=1, dtype=torch.float32).to(normed.dtype)
        gathered = weights.transpose(1, 2) @ normed * self.norm_values.weight + self.norm_values.bias
        by_head = self.to_values.weight.unflatten(0, (self.num_heads, -1))
        values = torch.einsum("bhd,hcd->bhc", gathered, by_head).flatten(1) + self.to_values.bias
        pooled: Tensor = self.proj(values)
        return pooled

    def folded_query(self) -> Float[Tensor, "h d"]:
        """Return each head's query times its key weights, whose dot products with normalised tokens are the scores."""
        query = self.to_query(self.norm_query(self.query)).unflatten(0, (self.num_heads, -1))
        keys = (self.to_keys.weight * self.norm_keys.weight).unflatten(0, (self.num_heads, -1))
        return torch.einsum("hc,hcd->hd", query * query.shape[-1] ** -0.5, keys)


def _linear(width: int, classes: int, std: float) -> nn.Linear:
    layer = nn.Linear(width, classes)
    nn.init.trunc_normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


POOL_SCALES = (1, 2, 3, 6)
"""Grid sides that the coarsest level is pooled to."""
AUXILIARY_WEIGHT = 0.4
"""Weight of the auxiliary head's loss; the main head's is 1."""
IGNORE_INDEX = 255
"""Label of pixels without a class."""


class UPerNet(nn.Module):
    """Segmentation head: class logits from four layers of one width and grid.

    The layers are rescaled to a pyramid (4, 2, 1 and 1/2 times the grid). Its coarsest level is pooled to several grids
    and fused; each level is added to the next finer one; all levels are then resized to the finest grid, fused and
    classified. In training a small auxiliary head classifies the third level alone.

    Norms are batch norms, so training needs at least two images. nn.SyncBatchNorm.convert_sync_batchnorm synchronises
    their statistics over processes, as the recipes do.

    The paper states neither the channels nor which layers are normalised. The default of 512 channels is that of
    mmsegmentation's UPerNet and of its recipes for supervised ViTs; BEiT and mmsegmentation's configs/mae have 768 for
    ViT-B. Layers (`layer_norm`) are

    - `shared`, the default: all normalised by the backbone's final norm, as in DINOv2's get_intermediate_layers. It
      brings the layers of a pre-norm ViT, whose scale grows with depth, to one scale, adds no parameter, and leaves
      none of the backbone's without a gradient;
    - `last`: the last one alone by that norm, as in mmsegmentation's configs/vit with `_ln`;
    - `own`: each by a norm of its own, which is part of this head, as in mmsegmentation's Swin transformer;
    - `none`: not at all, as in BEiT and mmsegmentation's configs/mae.

    These recipes take blocks 4, 6, 8 and 12 of a ViT-B, or 3, 6, 9 and 12 (configs/vit), the paper the last four.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        channels: int = 512,
        layer_norm: LayerNormKind = "shared",
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
    ) -> None:
        """Initialise. width: width of the input layers. channels, auxiliary_channels: hidden channels of the two heads.

        layer_norm: norms of the layers; all but `own` are the backbone's part. dropout: dropout rate of whole channels
        before the classifier.
        """
        super().__init__()
        self.layer_norm: LayerNormKind = layer_norm
        own = [nn.LayerNorm(width, eps=1e-6) for _ in range(4)] if layer_norm == "own" else []
        self.layer_norms = nn.ModuleList(own)
        self.fpn = nn.ModuleList(
            (
                nn.Sequential(_deconv2x(width), nn.BatchNorm2d(width), nn.GELU(), _deconv2x(width)),
                _deconv2x(width),
                nn.Identity(),
                nn.MaxPool2d(2),
            )
        )
        self.ppm = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(s), *_conv(width, channels, 1)) for s in POOL_SCALES
        )
        self.psp_bottleneck = _conv(width + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(_conv(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(_conv(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = _conv(4 * channels, channels, 3)
        self.conv_seg = _class_scores(channels, classes, dropout)
        self.aux_head = nn.Sequential(
            _conv(width, auxiliary_channels, 3), _class_scores(auxiliary_channels, classes, dropout)
        )

    def forward(
        self, layers: list[Float[Tensor, "b n d"]], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "b c y x"], Float[Tensor, "b c h w"] | None]:
        """Return logits at four times the grid, and in training the auxiliary logits at the grid.

        layers: four layers as the backbone returns them for this `layer_norm`, patches row-major, the last block's
        last. grid: rows and columns, at least 2 each. Raises
        ConfigError where the grid is smaller.
        """
        if min(grid) < 2:
            raise ConfigError(f"segmentation needs at least 2×2 patches, not {grid[0]}×{grid[1]}; enlarge the image")
        if self.layer_norms:
            layers = [norm(layer) for norm, layer in zip(self.layer_norms, layers, strict=True)]
        maps = [layer.transpose(1, 2).unflatten(2, grid) for layer in layers]
        levels = [scale(feature_map) for scale, feature_map in zip(self.fpn, maps, strict=True)]
        coarsest = levels[3]
        pooled = [upsample(pool(coarsest), coarsest.shape[2:]) for pool in self.ppm]
        fused = [lateral(level) for lateral, level in zip(self.lateral_convs, levels[:3], strict=True)]
        fused.append(self.psp_bottleneck(torch.cat((coarsest, *pooled), dim=1)))
        for finer in (2, 1, 0):
            fused[finer] = fused[finer] + upsample(fused[finer + 1], fused[finer].shape[2:])
        smoothed = [smooth(level) for smooth, level in zip(self.fpn_convs, fused[:3], strict=True)]
        together = [smoothed[0], *(upsample(level, smoothed[0].shape[2:]) for level in (*smoothed[1:], fused[3]))]
        logits: Tensor = self.conv_seg(self.fpn_bottleneck(torch.cat(together, dim=1)))
        return logits, self.aux_head(levels[2]) if self.training else None


def upsample(maps: Float[Tensor, "b c h w"], size: tuple[int, ...] | torch.Size) -> Float[Tensor, "b c y x"]:
    """Resize maps to another height and width, bilinear, with align_corners=False."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def segmentation_loss(
    logits: Float[Tensor, "b c y x"],
    auxiliary: Float[Tensor, "b c h w"] | None,
    masks: UInt8[Tensor, "b height width"],
    ignore_index: int = IGNORE_INDEX,
) -> Float[Tensor, ""]:
    """Return the cross-entropy at the masks' resolution in float32, plus the weighted auxiliary loss.

    It is a mean over all pixels, to which pixels of `ignore_index` add zero, so the gradient does not depend on how a
    batch is split.
    """
    labels = masks.long()

    def loss(maps: Float[Tensor, "b c h2 w2"]) -> Tensor:
        enlarged = upsample(maps.float(), masks.shape[1:])
        return F.cross_entropy(enlarged, labels, ignore_index=ignore_index, reduction="sum") / labels.numel()

    return loss(logits) if auxiliary is None else loss(logits) + AUXILIARY_WEIGHT * loss(auxiliary)


def _deconv2x(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _class_scores(channels: int, classes: int, dropout: float) -> nn.Sequential:
    conv = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None  # for mypy: nn.Conv2d has a bias by default
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Dropout2d(dropout), conv)
