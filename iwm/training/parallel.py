"""Data parallelism: DDP (replicated) or FSDP2 (sharded parameters, gradients and moments)."""

from __future__ import annotations

import warnings
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
from iwm.training.distributed import DistEnv


def parallelize(model: WorldModel, dist: DistEnv, accumulation: int) -> nn.Module:
    """Return the module to call in training: the model on one process, else DDP around it, or the sharded model.

    accumulation: passes per step. Call it before the optimiser is built, because sharding replaces the parameters.
    """
    if dist.size == 1:
        return model
    if model.config.train.parallel == "fsdp":
        return _apply_fsdp(model, dist)
    # A static graph lets DDP overlap more. With gradient accumulation the graph is not static.
    return replicate(model, dist, sync_buffers=False, static_graph=accumulation == 1)


def replicate(
    module: nn.Module, dist: DistEnv, *, sync_buffers: bool, static_graph: bool = False
) -> DistributedDataParallel:
    """Wrap a module in DDP, with gradients as views of the communication buckets.

    sync_buffers: broadcast the buffers of rank 0 before each forward pass. Raises RuntimeError where the module has no
    trained parameter.
    """
    options: dict[str, Any] = {SYNC_BUFFERS: sync_buffers}
    return DistributedDataParallel(
        module,
        device_ids=[dist.device.index] if dist.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
        **options,
    )


def _apply_fsdp(model: WorldModel, dist: DistEnv) -> WorldModel:
    """Shard the model with FSDP2, block by block.

    Encoder, target encoder and predictor are separate roots, so that evaluation can call each of them. In bf16 on GPUs
    parameters are gathered in bf16 and gradients are reduced in float32; autocast chooses the precision of each
    operator, as without FSDP. (On a CPU autocast does not cast layer norm, whose weights must then stay float32.)
    """
    # Torch 2.14 warns that the predictor's output is a view; nothing modifies it in place, which would be wrong.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(dist.device.type, (dist.size,))
    bf16 = model.config.train.bf16_autocast and dist.device.type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for encoder in (model.encoder, model.target_encoder):
        # FSDP shards only contiguous parameters. Without channels-last, `embed` copies the weight in each forward pass.
        weight = encoder.patch_embed.proj.weight
        weight.data = weight.data.contiguous()
    for part in (model.encoder, model.target_encoder, model.predictor):
        for block in part.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # By default a root is not resharded after its forward pass, and the target encoder has no backward pass.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in ("predict_masked", "predict_image"):
        register_fsdp_forward_method(model.predictor, method)
    return model


@contextmanager
def grad_sync(model: WorldModel, wrapped: nn.Module, now: bool) -> Iterator[None]:
    """Average gradients over processes in the backward passes of this context if `now`: in a step's last pass."""
    if isinstance(wrapped, DistributedDataParallel):
        with nullcontext() if now else wrapped.no_sync():
            yield
        return
    for part in (model.encoder, model.predictor):
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(now)
    yield


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the global L2 norm of the gradients, a scalar on the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's shard of an unsharded tensor where its parameter is sharded. Nothing is communicated.

    Sharded parameters are contiguous. So must their moments be, which may come from a channels-last parameter: fused
    AdamW reads all of them in memory order.
    """
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    on_device = tensor.to(parameter.device).contiguous()
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)
