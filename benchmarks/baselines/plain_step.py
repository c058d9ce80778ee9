"""Plain eager baseline of the training step, with the same model and loss.

Every patch is embedded; then the visible ones are gathered and padded to the longest row. AdamW and EMA loop over the
parameters, and the loss is read at each step. Schedules are left out because their cost is negligible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from step_modes import BaselineStep
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dali_pipelines.loader import ViewBatch
from iwm.actions import action_from_params
from iwm.compat import matmul_dtype
from iwm.config import Config
from iwm.loss_tokens import loss_mask, loss_weights
from iwm.masking import Masks
from iwm.models.flops import training_flops
from iwm.models.world_model import WorldModel
from iwm.training.distributed import DistEnv
from iwm.training.optim import param_groups
from iwm.training.step import sample_step_masks


class PaddedWorldModel(WorldModel):
    """World model with padding instead of packing; parameters, predictions and loss are WorldModel's."""

    def forward(  # type: ignore[override]  # masks come as they are drawn, not packed
        self,
        source: UInt8[Tensor, "b h w 3"],
        target: UInt8[Tensor, "b h w 3"],
        params: Float[Tensor, "b p"],
        masks: Masks,
    ) -> Float[Tensor, ""]:
        """Return the training loss of a batch."""
        targets = self.target_features(target)
        action = action_from_params(params, self.action_spec)
        places, present = padded(masks.visible)
        context = run_blocks(self.encoder.blocks, gather_patches(self.encoder.embed(source), places), present)
        seen = self.predictor.predictor_embed(self.encoder.norm(context)) + self.predictor.pos_embed[places]
        queries = self.predictor.mask_queries(action).to(seen.dtype)
        grid = torch.zeros_like(queries).scatter(1, places[..., None].expand_as(seen), seen)
        tokens = self.predictor.append_action_tokens(torch.where(masks.visible[..., None], grid, queries), action)
        predictions = [self.predicted(tokens, masks.visible | queried) for queried in masks.predicted.unbind(dim=1)]
        predicted = torch.stack(predictions, dim=1)
        weights = loss_weights(loss_mask(masks.visible, masks.predicted, self.config.loss), self.config.loss)
        return self.loss(predicted, targets[:, None].expand_as(predicted), weights)

    def predicted(self, tokens: Float[Tensor, "b s d"], present: Bool[Tensor, "b n"]) -> Float[Tensor, "b n e"]:
        """Run one pass of the predictor; action tokens, which follow those of the grid, are always present."""
        n = present.shape[1]
        tokens = run_blocks(self.predictor.blocks, tokens, F.pad(present, (0, tokens.shape[1] - n), value=True))
        restored: Tensor = self.predictor.predictor_proj(self.predictor.norm(tokens[:, :n]))
        return restored


def padded(visible: Bool[Tensor, "b n"]) -> tuple[Int64[Tensor, "b w"], Bool[Tensor, "b w"]]:
    """Return the positions of the visible patches, padded to the longest row, and the mask of the real ones."""
    counts = visible.sum(dim=1)
    width = int(counts.max())
    places = visible.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return places, torch.arange(width, device=visible.device) < counts[:, None]


def gather_patches(tokens: Float[Tensor, "b n d"], places: Int64[Tensor, "b w"]) -> Float[Tensor, "b w d"]:
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def run_blocks(
    blocks: nn.ModuleList | nn.Sequential,
    tokens: Float[Tensor, "b t d"],
    present: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t d"]:
    """Run tokens through timm's blocks, without attention to tokens that are not present."""
    mask = None if present is None else present[:, None, None]
    if mask is not None and not cast(Any, blocks[0]).attn.fused_attn:
        # timm's eager attention before 1.0.31 adds its mask to the scores, even a boolean one.
        mask = torch.zeros_like(mask, dtype=matmul_dtype(tokens)).masked_fill(~mask, -torch.inf)
    for block in blocks:
        tokens = block(tokens, attn_mask=mask)
    return tokens


@torch.no_grad()
def update_ema(target: nn.Module, context: nn.Module, momentum: float) -> None:
    """Update the EMA of a target encoder in a loop over its parameters."""
    for slow, fast in zip(target.parameters(), context.parameters(), strict=True):
        slow.mul_(momentum).add_(fast, alpha=1 - momentum)


def baseline_step(config: Config, dist: DistEnv, batches: Sequence[ViewBatch]) -> BaselineStep:
    """Return the baseline: a whole optimiser step on these batches, with new masks in each step."""
    model = PaddedWorldModel(config).setup(dist.device, compiled=False)
    wrapped = distributed(model, dist)
    o = config.optim
    optimizer = torch.optim.AdamW(
        param_groups(model), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, foreach=False, fused=False
    )

    def step(number: int) -> None:
        optimizer.zero_grad()
        for part, batch in enumerate(batches):
            masks = sample_step_masks(config, dist, number, part, len(batch.source), dist.device)
            with torch.autocast(dist.device.type, torch.bfloat16, enabled=config.train.bf16_autocast):
                loss = wrapped(batch.source, batch.target, batch.params, masks) / len(batches)
            loss.backward()
            read(loss)
        if o.grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip, foreach=False)
        optimizer.step()
        update_ema(model.target_encoder, model.encoder, o.ema_momentum)

    return BaselineStep("plain eager", step, training_flops(config).total, sum(len(batch.source) for batch in batches))


def distributed(model: nn.Module, dist: DistEnv) -> nn.Module:
    """Wrap the model in DDP with default options where there are several processes."""
    if dist.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[dist.device.index] if dist.device.type == "cuda" else None)


def read(loss: Float[Tensor, ""]) -> None:
    """Read the loss, which makes the host wait. Raises FloatingPointError where it is not finite."""
    if not math.isfinite(value := float(loss.detach())):
        raise FloatingPointError(f"the loss is {value}")
