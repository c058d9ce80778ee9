"""A run that starts from known weights has them in both encoders and its predictor, and accounts for every tensor."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import Tensor

from iwm.actions import action_spec
from iwm.config import Config
from iwm.export.folder import ExportedModel, write_export
from iwm.export.loading import read_checkpoint
from iwm.models.external.loading import load_external
from iwm.models.world_model import WorldModel
from iwm.training.checkpoint import load_newest, resolve
from iwm.training.initial_weights import grouped, load_initial_weights, read_initial_weights
from tests.models.published import (
    PUBLISHED,
    State,
    blocks,
    ijepa_predictor_state,
    pictures,
    published,
    reference,
    vit_state,
)
from tests.training.runs import arguments, assert_same, parse, tiny_config, train_here


def config_with(*more: str) -> Config:
    """Return a configuration that fits the files of published.py: a ViT 2×32 for 32 px."""
    return parse(arguments(Path("unused"), Path("unused"), 2, "--encoder.depth", "2", *more)).config


def initialised(path: Path, config: Config) -> tuple[WorldModel, list[str]]:
    torch.manual_seed(0)
    model = WorldModel(config)
    return model, load_initial_weights(read_initial_weights(path, config), model)


def line_of(messages: list[str], beginning: str) -> str:
    (line,) = (line for line in messages if line.strip().startswith(beginning))
    return line.strip().removeprefix(beginning).strip()


# The encoder of the file that is the student, where it is another one than the published encoder, which is the teacher.
OTHER_ENCODER = {"ijepa": "student", "moco_v3": "teacher", "dino, all of it": "student", "ibot, all of it": "student"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_encoder_is_in_both_encoders(name: str, tmp_path: Path) -> None:
    kind, path, state = published(name, tmp_path)
    model, messages = initialised(path, config_with())
    other = vit_state(class_token=kind != "ijepa", seed=9)
    states = {"student": state, "teacher": state} | ({OTHER_ENCODER[name]: other} if name in OTHER_ENCODER else {})
    for role, encoder in (("student", model.encoder), ("teacher", model.target_encoder)):
        own = {key: tensor for key, tensor in states[role].items() if key != "cls_token"}
        own["pos_embed"] = own["pos_embed"][:, -16:]
        assert_same(dict(encoder.state_dict()), {key: own[key] for key in encoder.state_dict()}, role)
        assert not encoder.pos_embed.requires_grad
    if kind == "ijepa":
        external = load_external(kind, path, heads=2)
        torch.testing.assert_close(model.target_encoder(pictures()), external(pictures()), atol=1e-5, rtol=1e-5)
        assert line_of(messages, "newly initialised:") == "predictor.action_mixer (6 tensors)"
    else:
        assert line_of(messages, "newly initialised:") == "predictor (25 tensors)"
        assert "cls_token" in line_of(messages, "not used:")
        assert "pos_embed of the class token" in line_of(messages, "not used:")


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("mae with decoder", "model.cls_token, model.mask_token, model.decoder_pos_embed, "
         "model.decoder_embed (2 tensors), model.decoder_norm (2 tensors), model.decoder_pred (2 tensors), "
         "model.decoder_blocks (24 tensors), args, epoch, pos_embed of the class token"),
        ("ijepa", "predictor.module.predictor_pos_embed, opt, scaler, epoch, loss, lr"),
        ("moco_v3", "epoch, arch, state_dict.module.base_encoder.cls_token, "
         "state_dict.module.base_encoder.head.0.weight, state_dict.module.momentum_encoder.cls_token, "
         "state_dict.module.momentum_encoder.head.0.weight, state_dict.module.predictor.0.weight, optimizer, "
         "pos_embed of the class token"),
        ("dino, all of it", "student.module.backbone.cls_token, student.module.head (2 tensors), "
         "teacher.backbone.cls_token, teacher.head (2 tensors), epoch, args, dino_loss, pos_embed of the class token"),
    ],
)  # fmt: skip
def test_everything_that_is_not_used_is_named(name: str, unused: str, tmp_path: Path) -> None:
    _, path, _ = published(name, tmp_path)
    assert line_of(initialised(path, config_with())[1], "not used:") == unused


def test_ijepas_predictor_computes_here_what_it_computes_there(tmp_path: Path) -> None:
    _, path, state = published("ijepa", tmp_path)
    model, messages = initialised(path, config_with("--action.conditioning", "none"))
    assert line_of(messages, "newly initialised:") == "nothing"
    p = ijepa_predictor_state()
    context = reference(state, pictures(), heads=2)
    seen = F.linear(context, p["predictor_embed.weight"], p["predictor_embed.bias"]) + p["predictor_pos_embed"]
    asked = (p["mask_token"] + p["predictor_pos_embed"]).expand(len(seen), -1, -1)
    x = blocks(torch.cat((seen, asked), dim=1), p, "predictor_blocks", heads=2)[:, 16:]
    x = F.layer_norm(x, (32,), p["predictor_norm.weight"], p["predictor_norm.bias"], eps=1e-6)
    expected = F.linear(x, p["predictor_proj.weight"], p["predictor_proj.bias"])
    predicted = model.predict(model.target_encoder(pictures()), torch.zeros(2, model.action_spec.size))
    torch.testing.assert_close(predicted, expected, atol=1e-4, rtol=1e-4)


def test_a_predictor_of_another_shape_is_listed_with_the_options_that_fit_it(tmp_path: Path) -> None:
    _, path, _ = published("ijepa", tmp_path)
    _, messages = initialised(path, config_with("--predictor.depth", "3", "--predictor.num-heads", "4"))
    fitting = line_of(messages, "predictor not loaded: it would fit with")
    assert fitting == "--predictor.depth 1 --predictor.num-heads 2"
    assert "predictor (20 tensors)" in line_of(messages, "not used:")
    assert line_of(messages, "newly initialised:") == "predictor (49 tensors)"
    _, messages = initialised(path, config_with(*fitting.split()))
    assert not any("not loaded" in line for line in messages)


def test_positions_are_interpolated_to_the_grid_of_the_run(tmp_path: Path) -> None:
    _, path, state = published("dino", tmp_path)
    model, messages = initialised(path, config_with("--views.size", "48"))
    grid = state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    for encoder in (model.encoder, model.target_encoder):
        torch.testing.assert_close(encoder.pos_embed.data, larger)
    assert "positions interpolated from 4×4 to 6×6" in "\n".join(messages)


@pytest.fixture(scope="module")
def own_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, whose encoders differ."""
    run = tmp_path_factory.mktemp("own") / "run"
    train_here(replace(tiny_config(tiny_shards, 2), train=replace(tiny_config(tiny_shards, 2).train, seed=3)), run)
    return run


def own_state(run: Path) -> State:
    saved = load_newest(run)
    assert saved is not None
    assert not torch.equal(saved.model["encoder.norm.bias"], saved.model["target_encoder.norm.bias"])
    return saved.model


@pytest.mark.parametrize("form", ["run", "checkpoint"])
def test_a_run_of_this_project_is_loaded_completely(form: str, own_run: Path) -> None:
    path = own_run if form == "run" else resolve(own_run)
    model, messages = initialised(path, tiny_config(Path("unused"), 2))
    assert_same(dict(model.state_dict()), own_state(own_run))
    assert line_of(messages, "newly initialised:") == "nothing"
    assert set(line_of(messages, "not used:").split(", ")) >= {"optimizer", "loader", "step", "samples"}


def exported(run: Path, out: Path, *, predictor: bool = True) -> State:
    """Export the run's teacher. Return its tensors."""
    content: ExportedModel = read_checkpoint(run, "teacher")
    write_export(content if predictor else replace(content, predictor=None), "card", out)
    return content.encoder


def test_an_exported_folder_fills_both_encoders_and_the_predictor(own_run: Path, tmp_path: Path) -> None:
    encoder = exported(own_run, tmp_path / "whole")
    model, messages = initialised(tmp_path / "whole", tiny_config(Path("unused"), 2))
    for part in (model.encoder, model.target_encoder):
        assert_same(dict(part.state_dict()), encoder)
    expected = {name: tensor for name, tensor in own_state(own_run).items() if name.startswith("predictor.")}
    assert_same({f"predictor.{name}": tensor for name, tensor in model.predictor.state_dict().items()}, expected)
    assert line_of(messages, "not used:") == "nothing"

    exported(own_run, tmp_path / "encoder", predictor=False)
    _, messages = initialised(tmp_path / "encoder", tiny_config(Path("unused"), 2))
    assert line_of(messages, "newly initialised:") == "predictor (25 tensors)"


def prediction(model: WorldModel, change: Tensor) -> Tensor:
    """Predict under an action that changes each parameter of the jitter by `change`."""
    spec = model.action_spec
    action = torch.zeros(2, spec.size)
    action[:, : len(change)] = change / torch.tensor(spec.scale)
    return model.predict(model.encoder(pictures()), action)


@pytest.mark.parametrize("conditioning", ["feature", "sequence"])
def test_another_strength_of_the_jitter_does_not_change_what_an_action_does(
    conditioning: str, tmp_path: Path, tiny_shards: Path
) -> None:
    config = tiny_config(tiny_shards, 1)
    config = replace(config, action=replace(config.action, conditioning=conditioning))
    train_here(config, tmp_path / "run")
    source = replace(config.views.source, brightness=0.8, hue=0.05)
    other = replace(config, views=replace(config.views, source=source))
    assert action_spec(other.action, other.views).scale != action_spec(config.action, config.views).scale
    change = torch.tensor([0.3, -0.1, 0.2, 0.05])
    (before, _), (after, messages) = (initialised(tmp_path / "run", each) for each in (config, other))
    torch.testing.assert_close(prediction(after, change), prediction(before, change), atol=1e-5, rtol=1e-4)
    assert any("rescaled from jitter strengths" in line for line in messages)


@pytest.mark.parametrize(
    ("options", "reason", "new"),
    [
        (["--action.conditioning", "sequence"], None, "predictor.action_tokens (2 tensors)"),
        (["--action.jitter-encoding", "log_ratio"], "encode the jitter as difference, this run's as log_ratio",
         "predictor.action_mixer (6 tensors)"),
        (["--views.target.blur-probability", "0.2"], "differ in target_blur, target_grayscale, target_solarize",
         "predictor.action_mixer (6 tensors)"),
    ],
)  # fmt: skip
def test_a_conditioning_on_other_actions_is_new_and_the_rest_of_the_predictor_is_not(
    options: list[str], reason: str | None, new: str, own_run: Path
) -> None:
    config = parse(arguments(Path("unused"), Path("unused"), 2, *options)).config
    model, messages = initialised(own_run, config)
    assert line_of(messages, "newly initialised:") == new
    assert "model.predictor.action_mixer (6 tensors)" in line_of(messages, "not used:")
    assert reason is None or reason in line_of(messages, "predictor.action_mixer not loaded:")
    assert_same(
        model.predictor.blocks[0].attn.qkv.weight.data, own_state(own_run)["predictor.blocks.0.attn.qkv.weight"]
    )


def stock_vit(folder: Path) -> timm.models.VisionTransformer:
    """Write the folder of a timm ViT that was trained on pixels from -1 to 1. Return the ViT."""
    torch.manual_seed(5)
    arguments = {"class_token": False, "global_pool": "avg", "fc_norm": False, "img_size": 32, "patch_size": 8}
    vit = timm.create_model("test_vit", num_classes=3, **arguments).eval()
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    save_for_hf(
        vit, str(folder), model_args=arguments, model_config={"pretrained_cfg": statistics}, safe_serialization="both"
    )
    return vit


def test_a_timm_folder_gives_its_features_with_its_own_normalisation_of_pixels(tmp_path: Path) -> None:
    vit = stock_vit(tmp_path / "timm")
    shape = ("--encoder.embed-dim", "64", "--encoder.depth", "6", "--encoder.mlp-ratio", "3")
    model, messages = initialised(tmp_path / "timm", config_with(*shape))
    expected = vit.forward_features((pictures() / 255 - 0.5).permute(0, 3, 1, 2) / 0.5)
    torch.testing.assert_close(model.target_encoder(pictures()), expected, atol=1e-5, rtol=1e-4)
    assert "trained on pixels with mean 0.5, 0.5, 0.5" in "\n".join(messages)
    assert line_of(messages, "not used:") == "head (2 tensors)"
    assert not any("assumed" in line for line in messages)

    (tmp_path / "timm" / "config.json").unlink()
    (tmp_path / "timm" / "model.safetensors").unlink()
    model, messages = initialised(tmp_path / "timm", config_with(*shape))
    assert_same(model.encoder.patch_embed.proj.weight.data, vit.patch_embed.proj.weight.data)
    assert "assumed: this run's number of heads" in "\n".join(messages)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in vit_state().items()}
    save_file(state, tmp_path / "vit.safetensors")
    model, _ = initialised(tmp_path / "vit.safetensors", config_with())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert_same(model.encoder.norm.weight.data, state["norm.weight"].float())


def test_names_are_grouped_by_the_largest_module_without_others() -> None:
    names = ["a.b.x", "a.b.y", "a.c", "d", "e.f.g.x", "e.f.g.y", "e.f.h"]
    assert grouped(names, {"a.c", "e.f.h"}) == ["a.b (2 tensors)", "d", "e.f.g (2 tensors)"]
    assert grouped(names, set(names)) == []
