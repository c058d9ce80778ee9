"""Float8 layers, emulated on a CPU, against bf16: loss, gradients, training, state and compilation; one-line errors."""

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from iwm.config import Config, ConfigError
from iwm.kernels import mlp
from iwm.kernels.gelu import Gelu
from iwm.model_config import EncoderConfig, MaskingConfig, PredictorConfig
from iwm.models import attention
from iwm.models.fp8 import convert_to_fp8
from iwm.models.world_model import WorldModel
from iwm.train_config import OptimConfig, TrainConfig
from iwm.training import checkpoint as checkpoints
from iwm.training.checkpoint import load_world_model
from iwm.training.optim import ScheduleValues, build_optimizer
from iwm.training.step import ForwardBackward, prepare_masks, train_step
from iwm.training.train_state import build_model
from tests.training.runs import alone, arguments, finish, metrics, tiny_config, train_here
from tests.training.test_compiled import GRAPHS, StopAfter
from tests.training.test_no_waiting import NoReads
from tests.training.trajectory import BATCH, FP32, batch_of, trajectory

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed: pip install -e '.[fp8]'")
ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="no GPU here with float8 matrix products",
)
CPU = torch.device("cpu")


def config_of(precision: Any, masks: Any = "iwm", **train: Any) -> Config:
    return replace(
        tiny_config(Path("unused"), 50),
        encoder=EncoderConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8, init="xavier"),
        predictor=PredictorConfig(embed_dim=48, depth=2, num_heads=2),
        masking=MaskingConfig(type=masks),
        train=TrainConfig(precision=precision, **{"compile": False, **train}),
    )


def model_of(config: Config) -> WorldModel:
    torch.manual_seed(0)
    return build_model(config, CPU, BATCH)[0]


def gradient_of(model: WorldModel) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one batch."""
    masks = prepare_masks(model.config, alone(), 0, 0, BATCH)
    result = ForwardBackward(model, model)([batch_of(0, BATCH, 0)], [masks])
    return result.loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def layout(state: dict[str, Tensor]) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, value.dtype, value.shape) for name, value in state.items()]


@needs_torchao
@pytest.mark.parametrize("masks", ["iwm", "ijepa"])
def test_loss_and_gradients_are_those_of_bf16_within_the_rounding_of_float8(masks: str) -> None:
    """float8 e4m3 has 3 bits of mantissa: each operand is rounded by up to 1/16."""
    loss, gradients = gradient_of(model_of(config_of("bf16", masks)))
    ours, ours_gradients = gradient_of(model_of(config_of("fp8", masks)))
    assert ours == pytest.approx(loss, rel=0.01)
    assert list(ours_gradients) == list(gradients)
    for name, gradient in gradients.items():
        assert ours_gradients[name].dtype == torch.float32
        assert F.cosine_similarity(ours_gradients[name].flatten(), gradient.flatten(), dim=0) > 0.98, name
    whole, ours_whole = (torch.cat([g.flatten() for g in group.values()]) for group in (gradients, ours_gradients))
    apart = (ours_whole - whole).norm() / whole.norm()
    assert 0.02 < apart < 0.1, "bf16 is 0.01 from float32; less than 0.02 would mean that nothing is in float8"


@needs_torchao
def test_fifty_steps_lower_the_loss_as_in_bf16() -> None:
    losses = {}
    for precision in ("bf16", "fp8"):
        model = model_of(config_of(precision))
        optimizer, _ = build_optimizer(model, model.config.optim, CPU)
        passes, values = ForwardBackward(model, model), ScheduleValues(1e-3, 0.05, 0.99)
        masks = [prepare_masks(model.config, alone(), 0, 0, BATCH)]
        losses[precision] = [
            train_step(model, passes, optimizer, [batch_of(0, BATCH, 0)], masks, values).loss.item() for _ in range(50)
        ]
    assert losses["bf16"][-1] < 0.5 * losses["bf16"][0]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.02)


@needs_torchao
def test_the_layers_of_all_blocks_and_no_others_are_converted_around_the_same_parameters() -> None:
    model = WorldModel(config_of("fp8"))
    before, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    convert_to_fp8(model, CPU, BATCH)
    assert [*before] == [name for name, _ in model.named_parameters()]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert layout(model.state_dict()) == layout(state)
    linear = {name: type(part) for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    converted = {name for name, kind in linear.items() if kind is not nn.Linear}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    parts = ("encoder", "target_encoder", "predictor")
    assert converted == {f"{part}.blocks.{n}.{layer}" for part in parts for n in range(2) for layer in layers}
    assert len(linear) > len(converted), "the predictor's own layers are converted too"


@needs_torchao
def test_the_target_encoder_follows_and_a_step_reads_nothing_back() -> None:
    model = model_of(config_of("fp8"))
    optimizer, _ = build_optimizer(model, OptimConfig(), CPU)
    before = model.target_encoder.blocks[0].mlp.fc1.weight.clone()
    masks = [prepare_masks(model.config, alone(), 0, 0, BATCH)]
    with NoReads():
        train_step(
            model,
            ForwardBackward(model, model),
            optimizer,
            [batch_of(0, BATCH, 0)],
            masks,
            ScheduleValues(1e-3, 0.1, 0.5),
        )
    target, context = (part.blocks[0].mlp.fc1.weight for part in (model.target_encoder, model.encoder))
    torch.testing.assert_close(target, (before + context) / 2)
    assert target.grad is None


@needs_torchao
def test_a_run_is_resumed_and_evaluated_without_torchao(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint has the names and dtypes of a run in bf16, which is how it then continues."""
    plain = tiny_config(tiny_shards, 10)
    plain = replace(plain, data=replace(plain.data, val=None))
    train_here(replace(plain, train=replace(plain.train, precision="fp8")), tmp_path / "fp8", StopAfter(6))
    assert "on cpu, fp8 (emulated on a CPU, slow; torchao " in capsys.readouterr().out
    train_here(plain, tmp_path / "bf16", StopAfter(6))
    ours, theirs = (checkpoints.load_newest(tmp_path / name) for name in ("fp8", "bf16"))
    assert ours is not None
    assert theirs is not None
    assert layout(ours.model) == layout(theirs.model)
    assert ours.optimizer["groups"] == theirs.optimizer["groups"]
    for index, moments in theirs.optimizer["state"].items():
        assert layout(ours.optimizer["state"][index]) == layout(moments)

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    model, _ = load_world_model(tmp_path / "fp8")
    assert {type(part) for part in model.modules() if isinstance(part, nn.Linear)} == {nn.Linear}
    train_here(plain, tmp_path / "fp8")
    assert "changed since the last checkpoint: train.precision: fp8 → bf16" in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path / "fp8")] == [5, 6, 10]


@needs_torchao
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    out = tmp_path / "state.pt"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finish([sys.executable, *launcher, "tests/training/trajectory.py", str(out), "1", "ddp", "fp8"])
    _, losses = trajectory(alone(), train=replace(FP32, precision="fp8"))
    # The scales of a weight's gradient depend on all tokens of the process.
    assert torch.load(out, weights_only=True)["losses"] == pytest.approx(losses, rel=0.03)
    assert losses[-1] < 0.7 * losses[0]


@needs_torchao
def test_all_blocks_share_one_graph_without_breaks(tiny_shards: Path, tmp_path: Path) -> None:
    depth = ("--encoder.depth", "2", "--predictor.depth", "2", "--data.val", "None")
    words = arguments(tiny_shards, tmp_path, 5, "--train.precision", "fp8", "--train.compile", *depth)
    output = finish([sys.executable, "tests/training/graphs.py", "aot_eager", str(tmp_path), *words])
    counted = json.loads(output.splitlines()[-1])
    assert counted == {"graphs": [GRAPHS] * 5, "breaks": 0}
    assert metrics(tmp_path)[-1]["loss"] is not None


@needs_torchao
def test_the_buffers_of_packed_tokens_are_aligned_and_other_batches_refused() -> None:
    """The gradient of a weight sums over tokens, whose number must be a multiple of 16."""
    for masks in ("iwm", "ijepa"):
        packed = prepare_masks(config_of("fp8", masks), alone(), 0, 0, 3)
        for packing in (packed.context, packed.predictor):
            assert packing is None or len(packing.token_index) % 16 == 0
    config = replace(config_of("fp8"), views=replace(config_of("fp8").views, size=40))
    with pytest.raises(ConfigError, match=r"the predictor's 3 × 25 tokens per pass are not a multiple of 16"):
        convert_to_fp8(WorldModel(config), CPU, 3)
    assert "fp8" in convert_to_fp8(WorldModel(config), CPU, 16)


def test_without_torchao_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"train.precision fp8 needs torchao.*pip install 'iwm\[fp8\]'") as raised:
        convert_to_fp8(WorldModel(config_of("fp8")), CPU, BATCH)
    assert "\n" not in str(raised.value)


@needs_torchao
def test_a_gpu_without_float8_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"train.precision fp8: NVIDIA A100 .* compute capability 8.9"):
        convert_to_fp8(WorldModel(config_of("fp8")), torch.device("cuda"), BATCH)


class OtherLinear(nn.Linear):
    """Subclass whose product is not that of its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def test_kernels_that_include_a_projection_leave_it_to_a_layer_of_another_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(mlp, "HAS_TRITON", True)
    ran: list[str] = []

    def projected(x: Tensor, *rest: Any) -> Tensor:
        ran.append("projection and attention")
        return x

    def alone_(qkv: Tensor, *rest: Any) -> Tensor:
        ran.append("attention")
        return qkv[:, :32]

    monkeypatch.setattr(attention, "projected_attention", projected)
    monkeypatch.setattr(attention, "short_attention", alone_)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 16, 32, dtype=torch.bfloat16, device="cuda")
    fuses = []
    for kind in (nn.Linear, OtherLinear):
        layer, two = mlp.Mlp(32, 64, act_layer=Gelu), attention.Attention(32, num_heads=2)
        layer.fc1, two.qkv, two.proj = kind(32, 64), kind(32, 96), nn.Identity()
        two.short = True
        fuses.append(layer.fuses(x))
        assert two(x).shape == x.shape
    assert fuses == [True, False]
    assert ran == ["projection and attention", "attention"]


@needs_torchao
@ON_GPU
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_in_float8_as_in_bf16(compiled: bool) -> None:
    device, losses = torch.device("cuda", 0), {}
    for precision in ("bf16", "fp8"):
        config = config_of(precision, compile=compiled)
        torch.manual_seed(0)
        model, _ = build_model(config, device, BATCH)
        optimizer, _ = build_optimizer(model, OptimConfig(implementation="torch"), device)
        batch = batch_of(0, BATCH, 0)
        batch = type(batch)(*(part.to(device) for part in batch[:3]), batch.label, batch.keys)
        dist = replace(alone(), device=device)
        losses[precision] = [
            train_step(
                model,
                ForwardBackward(model, model),
                optimizer,
                [batch],
                [prepare_masks(config, dist, 0, 0, BATCH)],
                ScheduleValues(1e-3, 0.05, 0.99),
            ).loss.item()
            for _ in range(20)
        ]
    assert losses["fp8"][-1] < 0.8 * losses["fp8"][0]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.03)
