"""A step written the way I-JEPA's public code works (facebookresearch/ijepa, src/train.py), on this project's model.

All patches are embedded, then masked; masks are cut to the shortest of the batch, so that rows are rectangular and
patches are thrown away; the predictor runs once per target block, on context and mask tokens one behind the other;
GradScaler also for bf16; EMA parameter by parameter; loss and every gradient's norm are read at each step. Masks are
ready beforehand, for there the data loader's workers draw them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from baselines.plain_step import attend, distributed, move_one_by_one, pick, read
from contender import Contender
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from dali_pipelines.loader import Batch
from iwm.actions import action_from_params, action_spec
from iwm.config import Config
from iwm.flops import embedding_flops, transformer_flops
from iwm.masking import Masks
from iwm.models.world_model import WorldModel
from iwm.training.distributed import World
from iwm.training.optim import parameter_groups
from iwm.training.step import drawn_masks

MASK_SETS = 16
"""Steps whose masks are drawn beforehand; then they come again."""


class CutMasks(NamedTuple):
    """Patches by index, cut to the shortest row of the batch."""

    visible: Int64[Tensor, "b v"]
    queried: Int64[Tensor, "m b q"]
    """Of each target block."""


def cut(masks: Masks) -> CutMasks:
    """What I-JEPA's collator keeps: the first patches of each image, as many as the poorest image of the batch has."""
    queried = _first(masks.queried.flatten(0, 1)).unflatten(0, masks.queried.shape[:2])
    return CutMasks(_first(masks.visible), queried.transpose(0, 1).contiguous())


def _first(present: Bool[Tensor, "r n"]) -> Int64[Tensor, "r k"]:
    shortest = int(present.sum(dim=1).min())
    return present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :shortest]


class BlockwiseWorldModel(WorldModel):
    """The world model trained block by block; parameters are WorldModel's."""

    def forward(  # type: ignore[override]  # masks come as indices
        self,
        source: UInt8[Tensor, "b h w 3"],
        target: UInt8[Tensor, "b h w 3"],
        params: Float[Tensor, "b p"],
        masks: CutMasks,
    ) -> Float[Tensor, ""]:
        """Smooth L1 between predictions and targets of all blocks, each patch weighing the same."""
        blocks = len(masks.queried)
        with torch.no_grad():
            features = self.target_encoder(target)
            features = F.layer_norm(features, features.shape[-1:])
            targets = torch.cat([pick(features, block) for block in masks.queried])
        action = action_from_params(params, self.action_spec)
        context = attend(self.encoder.blocks, pick(self.encoder.embed(source), masks.visible))
        seen = self.predictor.embed(self.encoder.norm(context)) + self.predictor.positions[masks.visible]
        queries = self.predictor.queries(action).to(seen.dtype)
        mask_tokens = torch.cat([pick(queries, block) for block in masks.queried])
        tokens = torch.cat((seen.repeat(blocks, 1, 1), mask_tokens), dim=1)
        tokens = attend(self.predictor.blocks, self.predictor.with_action(tokens, action.repeat(blocks, 1)))
        wanted = tokens[:, seen.shape[1] : seen.shape[1] + mask_tokens.shape[1]]
        predictions = self.predictor.project(self.predictor.norm(wanted))
        return F.smooth_l1_loss(predictions.float(), targets.float())


def contender(config: Config, here: World, batches: Sequence[Batch]) -> Contender:
    """A whole optimiser step on these batches, with I-JEPA's masks whatever the configuration's kind."""
    config = replace(config, masking=replace(config.masking, kind="ijepa"), loss=replace(config.loss, predict="masked"))
    model = BlockwiseWorldModel(config).prepare(here.device, compiled=False)
    wrapped = distributed(model, here)
    o, bf16 = config.optim, config.train.precision == "bf16"
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
    scaler = torch.amp.GradScaler(here.device.type, enabled=bf16)
    masks = [
        [
            cut(drawn_masks(config, here, number, part, len(batch.source), here.device))
            for part, batch in enumerate(batches)
        ]
        for number in range(MASK_SETS)
    ]

    def step(number: int) -> None:
        for batch, mask in zip(batches, masks[number % MASK_SETS], strict=True):
            with torch.autocast(here.device.type, torch.bfloat16, enabled=bf16):
                loss = wrapped(batch.source, batch.target, batch.params, mask) / len(batches)
            scaler.scale(loss).backward()
            read(loss)
        scaler.step(optimizer)
        scaler.update()
        gradient_norms(model.encoder)
        optimizer.zero_grad()
        move_one_by_one(model.target_encoder, model.encoder, o.ema)

    flops = [blockwise_flops(config, mask) for number in masks for mask in number]
    images = sum(len(batch.source) for batch in batches)
    return Contender("as I-JEPA's code", step, sum(flops) / len(flops), images)


def blockwise_flops(config: Config, masks: CutMasks) -> float:
    """FLOPs per image of one step with these masks, all that it computes."""
    e, p, n, k = config.encoder, config.predictor, config.grid**2, action_spec(config.action, config.views).size
    visible, (blocks, _, queried) = masks.visible.shape[1], masks.queried.shape
    teacher = transformer_flops(n, e.width, e.depth, e.mlp_ratio) + embedding_flops(config, n)
    context = 3 * transformer_flops(visible, e.width, e.depth, e.mlp_ratio) + 2 * embedding_flops(config, n)
    row = visible + queried + (k if config.action.conditioning == "sequence" else 0)
    predictor = blocks * transformer_flops(row, p.width, p.depth, p.mlp_ratio)
    predictor += 2 * (visible + blocks * queried) * p.width * e.width
    if config.action.conditioning == "feature":
        predictor += 2 * p.width * (k + 2 * n * p.width)
    return teacher + context + 3 * predictor


def gradient_norms(encoder: nn.Module) -> list[float]:
    """Of each weight of the encoder, read one by one."""
    return [float(p.grad.norm()) for p in encoder.parameters() if p.grad is not None and p.ndim > 1]
