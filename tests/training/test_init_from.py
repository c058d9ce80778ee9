"""--init-from: refusals in one line with the options to set, training, and resuming without the file."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from iwm.config import ConfigError
from iwm.training import checkpoint as checkpoints
from iwm.training.initial_weights import read_initial_weights
from iwm.training.runtime import StopFlag
from iwm.training.train_state import build_train_state, find_resume_checkpoint
from tests.models.published import State, moco, published, vit_state
from tests.training.runs import alone, arguments, assert_same, metrics, parse, tiny_config, train_here

FITTING = ("--encoder.depth", "2")
"""Options with which a tiny run's encoder is that of the files of published.py."""


def refusal(path: Path, *options: str) -> str:
    """Return the message of the ConfigError, which is one line."""
    config = parse(arguments(Path("unused"), Path("unused"), 2, *options)).config
    with pytest.raises(ConfigError) as refused:
        read_initial_weights(path, config)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def test_another_encoder_is_refused_with_options_that_the_command_accepts(tmp_path: Path) -> None:
    torch.save({"model": vit_state(width=384, depth=1)}, tmp_path / "s.pth")
    message = refusal(tmp_path / "s.pth", "--encoder.mlp-ratio", "3")
    assert "its encoder has depth 1, width 384, an unknown number of heads and patches of 8 px" in message
    torch.save({"state_dict": vit_state(width=384, depth=2)}, tmp_path / "s.pth")
    message = refusal(tmp_path / "s.pth", "--encoder.mlp-ratio", "3", "--encoder.patch-size", "4")
    fitting = message.partition("; use ")[2].split()
    assert " ".join(fitting) == (
        "--encoder.embed-dim 384 --encoder.depth 2 --encoder.num-heads 6 --encoder.patch-size 8 --encoder.mlp-ratio 4.0"
    )
    config = parse(arguments(Path("unused"), Path("unused"), 2, *fitting)).config
    config.check()
    assert read_initial_weights(tmp_path / "s.pth", config).student.depth == 2


def test_the_options_include_an_image_size_for_the_patches_and_the_predictors(tmp_path: Path) -> None:
    _, path, _ = published("ijepa", tmp_path)
    message = refusal(path, "--views.size", "60", "--encoder.patch-size", "4", "--predictor.depth", "3")
    assert message.endswith(
        "use --encoder.depth 2 --encoder.patch-size 8 --views.size 32, and for its predictor --predictor.depth 1"
    )


@pytest.mark.parametrize(
    ("added", "removed", "named"),
    [
        ({"blocks.0.ls1.gamma": (32,), "blocks.0.ls2.gamma": (32,)}, (), r"LayerScale \(blocks.0.ls1.gamma\)"),
        ({"register_tokens": (1, 4, 32)}, (), "register tokens"),
        ({"blocks.1.attn.q_norm.weight": (16,)}, (), "norms of queries and keys"),
        ({"blocks.0.mlp.w12.weight": (256, 32)}, (), "a gated MLP"),
        ({"blocks.0.mlp.fc1.weight": (256, 32), "blocks.0.mlp.fc1.bias": (256,)}, (), "a gated MLP"),
        ({"norm_pre.weight": (32,), "norm_pre.bias": (32,)}, ("patch_embed.proj.bias",), "a norm before the blocks"),
        ({}, ("blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"), "no bias in blocks.0.attn.qkv"),
        ({"fc_norm.weight": (32,), "fc_norm.bias": (32,)}, ("norm.weight", "norm.bias"), "last norm after the pooling"),
        ({}, ("pos_embed",), "no added positions"),
        ({"blocks.0.adapter.weight": (4, 32)}, (), "blocks.0.adapter.weight is unexpected"),
        ({}, ("blocks.1.norm2.bias",), "blocks.1.norm2.bias is missing"),
        ({"pos_embed": (1, 16, 32)}, ("cls_token",), None),
        ({"pos_embed": (1, 16, 32)}, (), None),
        ({"pos_embed": (1, 15, 32)}, (), "not a square"),
        ({"patch_embed.proj.weight": (32, 1, 8, 8)}, (), "patches of 8×8 px with 1 channels"),
    ],
)
def test_an_encoder_that_computes_something_else_is_refused_with_the_reason(
    added: dict[str, tuple[int, ...]], removed: tuple[str, ...], named: str | None, tmp_path: Path
) -> None:
    state = {name: tensor for name, tensor in vit_state().items() if name not in removed}
    save_file(state | {name: torch.zeros(shape) for name, shape in added.items()}, tmp_path / "vit.safetensors")
    if named is None:
        config = parse(arguments(Path("unused"), Path("unused"), 2, *FITTING)).config
        assert read_initial_weights(tmp_path / "vit.safetensors", config).student.grid == 4
    else:
        assert re.search(named, refusal(tmp_path / "vit.safetensors", *FITTING))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architecture": "vit_base_patch16_clip_224"}, "which has LayerNorm with ε 1e-05"),
        ({"architecture": "vit_small_patch16_224", "model_args": {"act_layer": "quick_gelu"}}, "activation"),
        ({"architecture": "vit_base_patch16_rpn_224"}, "blocks of class ResPostBlock"),
        ({"architecture": "resnet18"}, "a timm ResNet, not a VisionTransformer"),
        ({"architecture": "vit_of_another_day"}, "has no architecture vit_of_another_day"),
        ({"architectures": ["ViTModel"]}, "is not timm's"),
        ({"architecture": "vit_small_patch16_224", "model_args": {"num_heads": 4}}, "--encoder.num-heads 4"),
    ],
)
def test_what_tensors_do_not_show_is_read_from_timms_configuration(
    config: dict[str, object], named: str, tmp_path: Path
) -> None:
    save_file(vit_state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert named in refusal(tmp_path, *FITTING)


def nothing(folder: Path) -> Path:
    return folder / "nowhere.pth"


def text(folder: Path) -> Path:
    (folder / "notes.txt").write_text("weights are elsewhere")
    return folder


def other(folder: Path) -> Path:
    torch.save({"generator": {"conv.weight": torch.zeros(2)}}, folder / "gan.pt")
    return folder / "gan.pt"


def two(folder: Path) -> Path:
    torch.save({"model": vit_state(), **moco(vit_state())}, folder / "two.pt")
    return folder / "two.pt"


def cut(folder: Path) -> Path:
    torch.save({"format": 2, "config": {}}, folder / "cut.pt")
    (folder / "cut.pt").write_bytes((folder / "cut.pt").read_bytes()[:-40])
    return folder / "cut.pt"


def newer(folder: Path) -> Path:
    torch.save({"format": 99, "config": {}}, folder / "newer.pt")
    return folder / "newer.pt"


def part_of_an_export(folder: Path) -> Path:
    save_file(vit_state(), folder / "encoder.safetensors")
    return folder / "encoder.safetensors"


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (nothing, "nowhere.pth does not exist"),
        (
            text,
            "holds no known weights but notes.txt; give a run's folder, one of its checkpoints",
        ),
        (other, "gan.pt is of no known format; it holds generator; give a run's folder"),
        (two, "two.pt looks like mae and moco_v3; it holds model, epoch, arch, state_dict, optimizer"),
        (cut, "cut.pt is damaged"),
        (newer, "was written by another version of this program"),
        (part_of_an_export, "is one file of an exported model; give its folder"),
    ],
)
def test_what_holds_no_known_weights_is_refused_in_one_line(
    made: Callable[[Path], Path], named: str, tmp_path: Path
) -> None:
    message = refusal(made(tmp_path))
    assert message.startswith("--init-from: ")
    assert named in message


def stop_at_once() -> StopFlag:
    stop = StopFlag()
    stop.signal = signal.SIGTERM
    return stop


@pytest.mark.parametrize("kind", ["own run", "ijepa"])
def test_a_run_starts_from_weights_and_resumes_exactly_after_they_are_gone(
    kind: str, tiny_shards: Path, tmp_path: Path
) -> None:
    fits = parse(arguments(tiny_shards, Path("unused"), 4, *FITTING)).config
    weights = tmp_path / "weights"
    if kind == "ijepa":
        weights.mkdir()
        _, path, _ = published("ijepa", weights)
    else:
        train_here(replace(fits, schedule=replace(fits.schedule, steps=1)), weights)
        path = weights
    config = replace(fits, init_from=path)
    train_here(config, tmp_path / "whole")
    train_here(config, tmp_path / "cut", stop_at_once())
    shutil.rmtree(weights)
    train_here(config, tmp_path / "cut")

    whole, cut = (checkpoints.load_newest(tmp_path / run) for run in ("whole", "cut"))
    assert whole is not None
    assert cut is not None
    assert whole.config.init_from == path
    assert_same((whole.model, whole.optimizer), (cut.model, cut.optimizer))
    first, *others = metrics(tmp_path / "cut")
    assert first["step"] == 0
    assert {"mrr_pooled", "mrr_chance", "rankme"} < first.keys()
    assert first == metrics(tmp_path / "whole")[0]
    assert [line["step"] for line in others if "mrr_pooled" in line] == [4]

    with pytest.raises(ConfigError, match=r"--init_from None \(the run has .*\); use the run's settings"):
        find_resume_checkpoint(tmp_path / "cut", fits)


def test_a_run_that_was_killed_before_its_first_checkpoint_has_one_first_measurement(
    tiny_shards: Path, tmp_path: Path
) -> None:
    _, path, _ = published("ijepa", tmp_path)
    config = replace(parse(arguments(tiny_shards, Path("unused"), 1, *FITTING)).config, init_from=path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "mrr_pooled": 0.5}\n')
    train_here(config, tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 1]


def test_a_run_from_scratch_and_an_old_checkpoint_know_nothing_of_it(tiny_shards: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_shards, 2)
    train_here(config, tmp_path)
    assert min(line["step"] for line in metrics(tmp_path)) > 0
    path = checkpoints.resolve(tmp_path)
    content = checkpoints.load_verified(path, checkpoints.FORMAT)
    del content["config"]["init_from"]
    checkpoints.save_atomic(path, {**content, "format": checkpoints.FORMAT})
    messages = build_train_state(config, tmp_path, alone()).startup_messages
    assert any("resuming from step 2" in line for line in messages)
    assert not any("initial weights" in line or "changed" in line for line in messages)


def test_the_first_lines_of_a_run_tell_where_its_weights_are_from(tiny_shards: Path, tmp_path: Path) -> None:
    _, path, _ = published("ijepa", tmp_path)
    config = replace(parse(arguments(tiny_shards, Path("unused"), 2, *FITTING)).config, init_from=path)
    state = build_train_state(config, tmp_path / "run", alone())
    lines = [line for line in state.startup_messages if str(path) in line or line.startswith("  ")]
    assert lines[0] == f"initial weights: {path} (format ijepa)"
    assert lines[1].startswith(
        "  tensors: context encoder 29 from encoder.module, target encoder 29 from target_encoder"
    )
    expected: State = vit_state(class_token=False)
    assert_same(state.model.target_encoder.norm.weight.data, expected["norm.weight"])
