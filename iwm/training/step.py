"""One optimiser step, with nothing in it that makes the host wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dali_pipelines.loader import Batch
from iwm.actions import action_spec
from iwm.config import Config
from iwm.masking import Masks, PackedMasks, pack_masks, rooms, sample_masks
from iwm.models.world_model import WorldModel
from iwm.training.distributed import World
from iwm.training.optim import set_values, step_unless
from iwm.training.parallel import gradient_norm, synchronised
from iwm.training.schedules import Values


class StepResult(NamedTuple):
    """Scalars on the device; read them seldom. `loss` is this process's own."""

    loss: Float[Tensor, ""]
    gradient_norm: Float[Tensor, ""]
    """Before clipping, of all processes' mean gradient."""
    skipped: Bool[Tensor, ""]
    """Whether the gradient was not finite, so that parameters and moments were left as they were."""


def drawn_masks(
    config: Config, here: World, step: int, part: int, batch: int, device: torch.device | None = None
) -> Masks:
    """Masks of this process's `batch` samples in pass `part` of a step: those of their places in the step's batch.

    device: where they are drawn; None: on the host. They are the same everywhere.
    """
    first = (part * here.size + here.rank) * batch
    index = torch.arange(first, first + batch, device=device)
    return sample_masks(config.masking, config.grid, config.train.seed, step, index)


def masks_for(config: Config, here: World, step: int, part: int, batch: int) -> PackedMasks:
    """Those masks, as a step takes them: packed, on its device, in shapes that never change if compiled."""
    drawn = drawn_masks(config, here, step, part, batch)
    extra = action_spec(config.action, config.views).size if config.action.conditioning == "sequence" else 0
    fixed = rooms(config.masking, config.grid, extra, batch) if config.train.compile else None
    return pack_masks(drawn, fixed, extra).to(here.device)


class Gradient:
    """The forward and backward passes of a step, one kernel after another.

    Calling it leaves the mean gradient of `batches` in the parameters' `.grad`, clipped as configured.
    """

    def __init__(self, model: WorldModel, wrapped: nn.Module) -> None:
        """wrapped: `parallel.wrap(model, …)`."""
        self.model, self.wrapped = model, wrapped

    def __call__(self, batches: Sequence[Batch], masks: Sequence[PackedMasks]) -> StepResult:
        config, device = self.model.config, batches[0].source.device
        self.model.zero_grad()
        loss = torch.zeros((), device=device)
        for number, (batch, mask) in enumerate(zip(batches, masks, strict=True), start=1):
            with synchronised(self.model, self.wrapped, now=number == len(batches)):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                    part = self.wrapped(batch.source, batch.target, batch.params, mask) / len(batches)
                part.backward()
            loss += part.detach()
        norm = gradient_norm(self.model.parameters())
        if config.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), config.optim.clip, norm)
        return StepResult(loss, norm, ~torch.isfinite(norm))


def train_step(
    model: WorldModel,
    gradient: Gradient,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    masks: Sequence[PackedMasks],
    values: Values,
) -> StepResult:
    """Compute the gradient of `batches`, step, and move the target encoder.

    `values` are this step's from schedules.py.
    """
    set_values(optimizer, values.lr, values.weight_decay)
    result = gradient(batches, masks)
    step_unless(optimizer, result.skipped)
    model.update_target(values.ema)
    return result
