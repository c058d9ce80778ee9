"""A whole training step with the GPU's kernels and bf16 copies, interpreted on a CPU, against the plain step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import DEVICE, CountedKernel

# isort: split
from dali_pipelines.augmentations import PARAMS
from dali_pipelines.loader import ViewBatch
from dali_pipelines.views import Views
from iwm.config import Config
from iwm.kernels import gelu_backward_triton, mlp, residual_norm, residual_norm_triton, short_attention_triton
from iwm.kernels.mlp import Mlp, MlpTiling
from iwm.kernels.residual_norm import NormTiling
from iwm.model_config import EncoderConfig, MaskingConfig, PredictorConfig
from iwm.models.attention import Attention
from iwm.models.world_model import WorldModel
from iwm.train_config import TrainConfig
from iwm.training import step
from iwm.training.distributed import init_distributed
from iwm.training.step import ForwardBackward, block_layers, prepare_masks

BATCH = 6
SMALL = Config(
    views=Views(size=32),
    encoder=EncoderConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8, init="xavier"),
    predictor=PredictorConfig(embed_dim=32, depth=2, num_heads=2),
    train=TrainConfig(device=DEVICE, residual_dtype="bf16"),
)

KERNELS = (residual_norm_triton, gelu_backward_triton, short_attention_triton)


@pytest.mark.parametrize("masking", ["iwm", "ijepa"])
def test_loss_and_gradients_are_as_exact_as_those_of_the_plain_bf16_step(
    masking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare both with float32: the errors of the fused step may be half as large again."""
    config = replace(SMALL, masking=MaskingConfig(type=masking))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
    params = torch.rand(BATCH, len(PARAMS), generator=generator) + 0.5

    def run(precision: str, fused: bool) -> tuple[Tensor, list[Tensor]]:
        chosen = replace(config, train=replace(config.train, precision=precision, compile=fused))
        with init_distributed(chosen.train) as dist:
            torch.manual_seed(0)
            model = WorldModel(chosen).setup(dist.device, compiled=False)
            if fused:
                for part in (model.encoder, model.target_encoder, model.predictor):
                    for block in part.blocks:
                        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
            batch = ViewBatch(*(tensor.to(dist.device) for tensor in (pixels[0], pixels[1], params)), None, None)
            result = ForwardBackward(model, model)([batch], [prepare_masks(chosen, dist, 0, 0, BATCH)])
            return result.loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    exact, plain = run("fp32", fused=False), run("bf16", fused=False)
    used: list[int] = []
    copied = step.copied_layers

    def layers_here(model: WorldModel) -> list[torch.nn.Linear]:
        layers = copied(model) or block_layers(model)  # on a CPU the first is empty
        used.append(len(layers))
        return layers

    monkeypatch.setattr(step, "copied_layers", layers_here)
    monkeypatch.setattr(Mlp, "fuses", lambda self, x: torch.is_grad_enabled())
    monkeypatch.setattr(Attention, "_uses_short_kernels", lambda self, x, packing, longest: torch.is_grad_enabled())
    monkeypatch.setattr(mlp, "TILING", MlpTiling(32, 128, 4, 1, 4))
    monkeypatch.setattr(residual_norm, "TILING", NormTiling(1024, 4, 1, 2))
    torch._dynamo.reset()
    ran = {module.__name__: CountedKernel(module.backward_kernel) for module in KERNELS}
    for module in KERNELS:
        monkeypatch.setattr(module, "backward_kernel", ran[module.__name__])
    fused = run("bf16", fused=True)
    assert used == [3 * 2 * 4], "four layers in each block"
    assert [ran[module.__name__].launches for module in KERNELS] == [8, 4, 4]
    assert fused[0] == pytest.approx(exact[0].item(), rel=5e-3)
    for found, other, reference in zip(fused[1], plain[1], exact[1], strict=True):
        assert (found.dtype, found.shape) == (reference.dtype, reference.shape)
        size = reference.norm()
        assert (found - reference).norm() <= 1.5 * (other - reference).norm() + 5e-3 * size
