"""I-JEPA baseline: this project's model with a step as in I-JEPA's public code.

It follows src/train.py of facebookresearch/ijepa. All patches are embedded, then masked. Masks are cut to the shortest
of the batch, so that rows are rectangular and patches are discarded. The predictor runs once per target block, on the
concatenated context and mask tokens. GradScaler is used also for bf16, the EMA loops over parameters, and the loss and
every gradient norm are read at each step. Masks are sampled beforehand, because there the data loader's workers do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from baselines.plain_step import distributed, gather_patches, read, run_blocks, update_ema
from jaxtyping import Bool, Float, Int64, UInt8
from step_modes import BaselineStep
from torch import Tensor, nn

from dali_pipelines.loader import ViewBatch
from iwm.actions import action_from_params, action_spec
from iwm.config import Config
from iwm.masking import Masks
from iwm.models.flops import embedding_flops, transformer_flops
from iwm.models.predictor import CONDITIONING
from iwm.models.world_model import WorldModel
from iwm.training.distributed import DistEnv
from iwm.training.optim import param_groups
from iwm.training.step import sample_step_masks

MASK_SETS = 16
"""Number of steps whose masks are sampled beforehand; later steps repeat them."""


class CutMasks(NamedTuple):
    """Patch indices, cut to the shortest row of the batch."""

    visible: Int64[Tensor, "b v"]
    queried: Int64[Tensor, "m b q"]
    """Predicted patches of each target block."""


def cut(masks: Masks) -> CutMasks:
    """Cut masks as I-JEPA's collator does: to the first patches of each image, as many as the smallest mask has."""
    queried = _first(masks.predicted.flatten(0, 1)).unflatten(0, masks.predicted.shape[:2])
    return CutMasks(_first(masks.visible), queried.transpose(0, 1).contiguous())


def _first(present: Bool[Tensor, "r n"]) -> Int64[Tensor, "r k"]:
    shortest = int(present.sum(dim=1).min())
    return present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :shortest]


class BlockwiseWorldModel(WorldModel):
    """World model that predicts block by block; parameters are WorldModel's."""

    def forward(  # type: ignore[override]  # masks come as indices
        self,
        source: UInt8[Tensor, "b h w 3"],
        target: UInt8[Tensor, "b h w 3"],
        params: Float[Tensor, "b p"],
        masks: CutMasks,
    ) -> Float[Tensor, ""]:
        """Return the smooth L1 loss between predictions and targets of all blocks, all patches equally weighted."""
        blocks = len(masks.queried)
        with torch.no_grad():
            features = self.target_encoder(target)
            features = F.layer_norm(features, features.shape[-1:])
            targets = torch.cat([gather_patches(features, block) for block in masks.queried])
        action = action_from_params(params, self.action_spec)
        context = run_blocks(self.encoder.blocks, gather_patches(self.encoder.embed(source), masks.visible))
        seen = self.predictor.predictor_embed(self.encoder.norm(context)) + self.predictor.pos_embed[masks.visible]
        queries = self.predictor.mask_queries(action).to(seen.dtype)
        mask_tokens = torch.cat([gather_patches(queries, block) for block in masks.queried])
        tokens = torch.cat((seen.repeat(blocks, 1, 1), mask_tokens), dim=1)
        tokens = run_blocks(
            self.predictor.blocks, self.predictor.append_action_tokens(tokens, action.repeat(blocks, 1))
        )
        predicted = tokens[:, seen.shape[1] : seen.shape[1] + mask_tokens.shape[1]]
        predictions = self.predictor.predictor_proj(self.predictor.norm(predicted))
        return F.smooth_l1_loss(predictions.float(), targets.float())


def baseline_step(config: Config, dist: DistEnv, batches: Sequence[ViewBatch]) -> BaselineStep:
    """Return the baseline: a whole optimiser step on these batches, with I-JEPA's masks in any configuration."""
    config = replace(config, masking=replace(config.masking, type="ijepa"), loss=replace(config.loss, predict="masked"))
    model = BlockwiseWorldModel(config).setup(dist.device, compiled=False)
    wrapped = distributed(model, dist)
    o, bf16 = config.optim, config.train.bf16_autocast
    optimizer = torch.optim.AdamW(param_groups(model), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=bf16)
    masks = [
        [
            cut(sample_step_masks(config, dist, number, part, len(batch.source), dist.device))
            for part, batch in enumerate(batches)
        ]
        for number in range(MASK_SETS)
    ]

    def step(number: int) -> None:
        for batch, mask in zip(batches, masks[number % MASK_SETS], strict=True):
            with torch.autocast(dist.device.type, torch.bfloat16, enabled=bf16):
                loss = wrapped(batch.source, batch.target, batch.params, mask) / len(batches)
            scaler.scale(loss).backward()
            read(loss)
        scaler.step(optimizer)
        scaler.update()
        gradient_norms(model.encoder)
        optimizer.zero_grad()
        update_ema(model.target_encoder, model.encoder, o.ema_momentum)

    flops = [blockwise_flops(config, mask) for number in masks for mask in number]
    images = sum(len(batch.source) for batch in batches)
    return BaselineStep("as I-JEPA's code", step, sum(flops) / len(flops), images)


def blockwise_flops(config: Config, masks: CutMasks) -> float:
    """Return the FLOPs per image of one step with these masks, including all computed patches."""
    e, p, n, k = config.encoder, config.predictor, config.grid_size**2, action_spec(config.action, config.views).size
    visible, (blocks, _, queried) = masks.visible.shape[1], masks.queried.shape
    teacher = transformer_flops(n, e.embed_dim, e.depth, e.mlp_ratio) + embedding_flops(config, n)
    context = 3 * transformer_flops(visible, e.embed_dim, e.depth, e.mlp_ratio) + 2 * embedding_flops(config, n)
    conditioning = CONDITIONING[config.action.conditioning]
    row = visible + queried + conditioning.num_tokens(k)
    predictor = blocks * transformer_flops(row, p.embed_dim, p.depth, p.mlp_ratio)
    predictor += 2 * (visible + blocks * queried) * p.embed_dim * e.embed_dim
    predictor += conditioning.flops(p.embed_dim, k, n)
    return teacher + context + 3 * predictor


def gradient_norms(encoder: nn.Module) -> list[float]:
    """Return the gradient norm of each weight of the encoder, read one by one."""
    return [float(p.grad.norm()) for p in encoder.parameters() if p.grad is not None and p.ndim > 1]
