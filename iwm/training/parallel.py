"""One model on several processes: replicated (DDP) or its parameters, gradients and moments divided (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from iwm.compat import SYNC_BUFFERS
from iwm.models.world_model import WorldModel
from iwm.training.distributed import World


def wrap(model: WorldModel, here: World, accumulation: int) -> nn.Module:
    """The module whose forward is trained: the model itself, DDP around it, or the model with its parameters divided.

    Call it before the optimiser is built: dividing replaces the parameters.
    """
    if here.size == 1:
        return model
    if model.config.train.parallel == "fsdp":
        return _divide(model, here)
    # A static graph lets DDP overlap more; with accumulation the graph of a step is not one.
    return replicate(model, here, sync_buffers=False, static_graph=accumulation == 1)


def replicate(
    module: nn.Module, here: World, *, sync_buffers: bool, static_graph: bool = False
) -> DistributedDataParallel:
    """Wrap a module in DDP; its gradients are views of the buckets that processes average.

    sync_buffers: each forward pass begins with the first process's buffers. Raises RuntimeError where no parameter of
    the module is trained.
    """
    options: dict[str, Any] = {SYNC_BUFFERS: sync_buffers}
    return DistributedDataParallel(
        module,
        device_ids=[here.device.index] if here.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
        **options,
    )


def _divide(model: WorldModel, here: World) -> WorldModel:
    """Each block is gathered when it is needed and its gradient scattered when it is there.

    The three parts are roots of their own, so that evaluation can call them one by one. In bf16 on GPUs bf16 is
    gathered and gradients are summed in float32; autocast decides what is computed in which precision, as without. (On
    a CPU autocast leaves layer norm alone, whose weights must then stay float32.)
    """
    mesh = init_device_mesh(here.device.type, (here.size,))
    bf16 = model.config.train.precision == "bf16" and here.device.type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for encoder in (model.encoder, model.target_encoder):
        # FSDP divides contiguous parameters only; channels-last is for the embedding's product, which copies now.
        weight = encoder.patch_embed.proj.weight
        weight.data = weight.data.contiguous()
    for part in (model.encoder, model.target_encoder, model.predictor):
        for block in part.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # A root is not divided again after its forward pass by default, and the target encoder has no backward pass.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in ("inpaint", "transform"):
        register_fsdp_forward_method(model.predictor, method)
    return model


@contextmanager
def synchronised(model: WorldModel, wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Whether gradients are averaged over processes in the backward passes inside: only in a step's last one."""
    if isinstance(wrapped, DistributedDataParallel):
        with nullcontext() if now else wrapped.no_sync():
            yield
        return
    for part in (model.encoder, model.predictor):
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(now)
    yield


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The global norm of the gradients, a scalar on the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, in the host's memory if it was divided. Every process must call this."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, where the parameter it belongs to is divided. Nothing is communicated."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    on_device = tensor.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)
