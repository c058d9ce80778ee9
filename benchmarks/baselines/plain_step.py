"""The step that the trained one is compared with: the same model and loss, the way people first write them.

Eager; every patch is embedded, then the visible ones are picked and padded to the longest row; AdamW and EMA go
parameter by parameter; the loss is read at each step. Schedules are left out: they cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from contender import Contender
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dali_pipelines.loader import Batch
from iwm.actions import action_from_params
from iwm.config import Config
from iwm.flops import training_flops
from iwm.masking import Masks
from iwm.models.world_model import WorldModel
from iwm.training.distributed import World
from iwm.training.optim import parameter_groups
from iwm.training.step import drawn_masks


class PaddedWorldModel(WorldModel):
    """The world model with padding for packing: parameters, predictions and loss are WorldModel's."""

    def forward(  # type: ignore[override]  # masks come as they are drawn, not packed
        self,
        source: UInt8[Tensor, "b h w 3"],
        target: UInt8[Tensor, "b h w 3"],
        params: Float[Tensor, "b p"],
        masks: Masks,
    ) -> Float[Tensor, ""]:
        """Training loss of a batch."""
        targets = self.targets(target)
        action = action_from_params(params, self.action_spec)
        places, present = padded(masks.visible)
        context = attend(self.encoder.blocks, pick(self.encoder.embed(source), places), present)
        seen = self.predictor.embed(self.encoder.norm(context)) + self.predictor.positions[places]
        queries = self.predictor.queries(action).to(seen.dtype)
        grid = torch.zeros_like(queries).scatter(1, places[..., None].expand_as(seen), seen)
        tokens = self.predictor.with_action(torch.where(masks.visible[..., None], grid, queries), action)
        predictions = [self.predicted(tokens, masks.visible | queried) for queried in masks.queried.unbind(dim=1)]
        return self.distance(torch.stack(predictions, dim=1), targets, self.counted(masks))

    def predicted(self, tokens: Float[Tensor, "b s d"], present: Bool[Tensor, "b n"]) -> Float[Tensor, "b n e"]:
        """One pass of the predictor; the action's own tokens, behind those of the grid, are always present."""
        n = present.shape[1]
        tokens = attend(self.predictor.blocks, tokens, F.pad(present, (0, tokens.shape[1] - n), value=True))
        restored: Tensor = self.predictor.project(self.predictor.norm(tokens[:, :n]))
        return restored


def padded(visible: Bool[Tensor, "b n"]) -> tuple[Int64[Tensor, "b w"], Bool[Tensor, "b w"]]:
    """Places of the visible patches, first in each row, as wide as the longest row; which of them there are."""
    counts = visible.sum(dim=1)
    width = int(counts.max())
    places = visible.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return places, torch.arange(width, device=visible.device) < counts[:, None]


def pick(tokens: Float[Tensor, "b n d"], places: Int64[Tensor, "b w"]) -> Float[Tensor, "b w d"]:
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def attend(
    blocks: nn.ModuleList | nn.Sequential,
    tokens: Float[Tensor, "b t d"],
    present: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t d"]:
    """Through timm's blocks, with no attention to what is not present."""
    mask = None if present is None else present[:, None, None]
    if mask is not None and not cast(Any, blocks[0]).attn.fused_attn:
        # Timm before 1.0.31 adds what its plain attention is given, a boolean mask too.
        device = tokens.device.type
        computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        mask = torch.zeros_like(mask, dtype=computed).masked_fill(~mask, -torch.inf)
    for block in blocks:
        tokens = block(tokens, attn_mask=mask)
    return tokens


@torch.no_grad()
def move_one_by_one(target: nn.Module, context: nn.Module, momentum: float) -> None:
    """EMA of a target encoder, in a loop over its parameters."""
    for slow, fast in zip(target.parameters(), context.parameters(), strict=True):
        slow.mul_(momentum).add_(fast, alpha=1 - momentum)


def contender(config: Config, here: World, batches: Sequence[Batch]) -> Contender:
    """A whole optimiser step on these batches, with masks of its own each time."""
    model = PaddedWorldModel(config).prepare(here.device, compiled=False)
    wrapped = distributed(model, here)
    o = config.optim
    optimizer = torch.optim.AdamW(
        parameter_groups(model), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, foreach=False, fused=False
    )

    def step(number: int) -> None:
        optimizer.zero_grad()
        for part, batch in enumerate(batches):
            masks = drawn_masks(config, here, number, part, len(batch.source), here.device)
            with torch.autocast(here.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                loss = wrapped(batch.source, batch.target, batch.params, masks) / len(batches)
            loss.backward()
            read(loss)
        if o.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), o.clip, foreach=False)
        optimizer.step()
        move_one_by_one(model.target_encoder, model.encoder, o.ema)

    return Contender("plain eager", step, training_flops(config).total, sum(len(batch.source) for batch in batches))


def distributed(model: nn.Module, here: World) -> nn.Module:
    """DDP as it comes, where there are several processes."""
    if here.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[here.device.index] if here.device.type == "cuda" else None)


def read(loss: Float[Tensor, ""]) -> None:
    """Look at the loss, for which the host waits. Raises FloatingPointError where it is not finite."""
    if not math.isfinite(value := float(loss.detach())):
        raise FloatingPointError(f"the loss is {value}")
