"""Linear layers of the blocks in float8 (train.precision fp8), by torchao's float8 training.

Each of the three matrix products of a linear layer (output, gradient of the input, gradient of the weight) rounds both
operands to float8 e4m3, with one scale for each row of the first operand and each column of the second: it maps the
largest value there to the largest float8, and is rounded down to a power of two (torchao's recipe `rowwise`).
Parameters, moments and EMA stay float32, and everything else runs as in bf16. The layers are replaced in place around
the same parameters: names, dtypes and order in the state dict are those of any other precision, and a checkpoint is
read without torchao.

The patch embedding, the predictor's input and output projection, norms and conditioning are not converted: they are a
small part of the computation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from iwm.compat import matmul_dtype
from iwm.config import ConfigError
from iwm.models.predictor import num_action_tokens
from iwm.models.world_model import WorldModel
from iwm.packing import TOKEN_MULTIPLE

CONVERTED = frozenset({"qkv", "proj", "fc1", "fc2"})
"""Names of the linear layers of a block."""

LOWEST_CAPABILITY = (8, 9)
"""Lowest compute capability of a GPU with float8 matrix products (Ada; Hopper has 9.0)."""

BF16 = "or use --train.precision bf16"


def convert_to_fp8(model: WorldModel, device: torch.device, batch: int) -> str:
    """Compute the linear layers of all blocks in float8, in place. Return a description for the user.

    Call it before the model is compiled or wrapped. batch: images per pass. On a CPU torchao emulates float8: it rounds
    the operands and multiplies in float32. Raises ConfigError where torchao is missing, the GPU is too old, or the
    number of tokens does not fit.
    """
    torchao_version, float8 = _import_torchao()
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.get_device_capability(device) < LOWEST_CAPABILITY:
        raise ConfigError(
            f"train.precision fp8: {torch.cuda.get_device_name(device)} has no float8 matrix products, which need "
            f"compute capability 8.9 (Ada, Hopper or newer); use another GPU, {BF16}"
        )
    _check_batch(model, batch)
    config = replace(float8.Float8LinearConfig.from_recipe_name("rowwise"), emulate=not on_gpu)
    for part in (model.encoder, model.target_encoder, model.predictor):
        float8.convert_to_float8_training(
            part.blocks, config=config, module_filter_fn=lambda _, name: name.rpartition(".")[2] in CONVERTED
        )
        if not on_gpu:
            for name, layer in part.blocks.named_modules():
                if name.rpartition(".")[2] in CONVERTED:
                    layer.register_forward_pre_hook(_cast_input)
    return f"fp8 ({'' if on_gpu else 'emulated on a CPU, slow; '}torchao {torchao_version})"


def _import_torchao() -> tuple[str, Any]:
    """Return torchao's version and its module of float8 training."""
    try:
        import torchao
        import torchao.float8
    except ImportError as error:
        raise ConfigError(
            f"train.precision fp8 needs torchao, which cannot be imported ({error}); pip install 'iwm[fp8]' (in a "
            f"checkout: pip install -e '.[fp8]'), {BF16}"
        ) from error
    return torchao.__version__, torchao.float8


def _check_batch(model: WorldModel, batch: int) -> None:
    """Check the predictor's number of tokens, over which the gradient of a weight is summed.

    Packed buffers are always a multiple of TOKEN_MULTIPLE, and the target encoder has no such product.
    """
    config = model.config
    tokens = config.grid_size**2 + num_action_tokens(config)
    if config.masking.type == "iwm" and batch * tokens % TOKEN_MULTIPLE:
        raise ConfigError(
            f"train.precision fp8: the predictor's {batch} × {tokens} tokens per pass are not a multiple of "
            f"{TOKEN_MULTIPLE}; use another data.global_batch_size or data.micro_batch_size, {BF16}"
        )


def _cast_input(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Cast the input to autocast's dtype. torchao's layer does so on a GPU only, whose autocast it asks for."""
    (x,) = inputs
    return (x.to(matmul_dtype(x)),)
