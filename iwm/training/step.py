"""One optimiser step, without host-device synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dali_pipelines.loader import ViewBatch
from iwm.config import Config
from iwm.kernels.bf16_weights import Bf16Weights
from iwm.masking import Masks, PackedMasks, mask_buffer_sizes, pack_masks, sample_masks
from iwm.models.predictor import num_action_tokens
from iwm.models.world_model import WorldModel
from iwm.training.distributed import DistEnv
from iwm.training.optim import ScheduleValues, set_lr_wd, step_if_finite
from iwm.training.parallel import grad_sync, gradient_norm


class StepResult(NamedTuple):
    """Result of a step: scalars on the device, or vectors with one entry per trial. Reading them waits for the device.

    `loss` is that of this process.
    """

    loss: Float[Tensor, "*trials"]
    gradient_norm: Float[Tensor, "*trials"]
    """Norm, before clipping, of the gradient averaged over processes."""
    skipped: Bool[Tensor, "*trials"]
    """True where the gradient was not finite, so that parameters and moments are unchanged."""


def sample_step_masks(
    config: Config, dist: DistEnv, step: int, part: int, batch: int, device: torch.device | None = None
) -> Masks:
    """Sample the masks of this process's `batch` samples in pass `part` of a step, by their positions in the batch.

    device: device that computes them; None: the host. The masks are the same on every device.
    """
    first = (part * dist.size + dist.rank) * batch
    index = torch.arange(first, first + batch, device=device)
    return sample_masks(config.masking, config.grid_size, config.train.seed, step, index)


def prepare_masks(config: Config, dist: DistEnv, step: int, part: int, batch: int) -> PackedMasks:
    """Sample and pack the masks of a pass, on its device; in constant shapes if the step is compiled or in fp8."""
    masks = sample_step_masks(config, dist, step, part, batch)
    extra, fixed = num_action_tokens(config), None
    if config.train.compile or config.train.precision == "fp8":  # whose shapes must be aligned
        fixed = mask_buffer_sizes(config.masking, config.grid_size, extra, batch, config.loss.predict)
    return pack_masks(masks, fixed, extra, config.loss).to(dist.device)


class ForwardBackward:
    """Forward and backward passes of a step, launched kernel by kernel.

    Calling it leaves the mean gradient of `batches` in the parameters' `.grad`, clipped as configured.
    """

    def __init__(self, model: WorldModel, wrapped: nn.Module) -> None:
        """Store the model and `wrapped`, the result of `parallel.parallelize`."""
        self.model, self.wrapped = model, wrapped
        self.bf16_weights = Bf16Weights(copied_layers(model))

    def __call__(self, batches: Sequence[ViewBatch], masks: Sequence[PackedMasks]) -> StepResult:
        with self.bf16_weights.in_use():
            return self._run(batches, masks)

    def _run(self, batches: Sequence[ViewBatch], masks: Sequence[PackedMasks]) -> StepResult:
        config, device = self.model.config, batches[0].source.device
        self.model.zero_grad()
        loss = torch.zeros((), device=device)
        for number, (batch, mask) in enumerate(zip(batches, masks, strict=True), start=1):
            with grad_sync(self.model, self.wrapped, now=number == len(batches)):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.train.bf16_autocast):
                    part = self.wrapped(batch.source, batch.target, batch.params, mask) / len(batches)
                part.backward()
            loss += part.detach()
        norm = gradient_norm(self.model.parameters())
        if config.optim.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), config.optim.grad_clip, norm)
        return StepResult(loss, norm, ~torch.isfinite(norm))


def copied_layers(model: WorldModel) -> list[nn.Linear]:
    """Return the linear layers whose bf16 copies a step uses: those of all blocks, compiled on a GPU in bf16.

    Sharded parameters (FSDP) have none, because they are gathered in bf16.
    """
    train, positions = model.config.train, model.encoder.pos_embed
    if not (train.compile and train.precision == "bf16" and positions.is_cuda) or isinstance(positions, DTensor):
        return []
    return block_layers(model)


def block_layers(model: WorldModel) -> list[nn.Linear]:
    """Return the linear layers of all blocks; a subclass (float8) is none of them."""
    parts = (model.encoder, model.target_encoder, model.predictor)
    layers = (layer for part in parts for block in part.blocks for layer in block.modules())
    return [layer for layer in layers if type(layer) is nn.Linear]


def train_step(
    model: WorldModel,
    forward_backward: ForwardBackward,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[ViewBatch],
    masks: Sequence[PackedMasks],
    values: ScheduleValues,
) -> StepResult:
    """Compute the gradient of `batches`, update the parameters, and update the target encoder.

    values: hyperparameters of this step (optim.Schedules).
    """
    set_lr_wd(optimizer, values.lr, values.weight_decay)
    result = forward_backward(batches, masks)
    step_if_finite(optimizer, result.skipped)
    model.update_target(values.ema)
    return result
