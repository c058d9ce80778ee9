"""Predictor finetuning: outputs, conditioning, task tokens and initialisation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dali_pipelines.views import SCENARIOS, Views
from iwm.actions import action_spec
from iwm.config import Config
from iwm.downstream.trials import sample_actions
from iwm.model_config import ActionConfig, EncoderConfig, PredictorConfig
from iwm.models.backbone import frozen_backbone
from iwm.models.external.loading import ExternalEncoder, MaeDecoder
from iwm.models.predictor import Predictor as Pretrained
from iwm.models.predictor_backbone import (
    PredictorBackbone,
    copy_pretrained,
    init_mae_decoder,
    init_predictor,
    init_predictor_for,
)
from iwm.models.world_model import WorldModel
from iwm.train_config import TrainConfig

CONFIG = Config(
    views=Views(size=32),
    encoder=EncoderConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8, init="xavier"),
    predictor=PredictorConfig(embed_dim=32, depth=3, num_heads=2),
    train=TrainConfig(compile=False),
)
CONDITIONINGS = ("none", "sequence", "feature")


def world_model(conditioning: str = "feature", views: Views = CONFIG.views) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(replace(CONFIG, action=ActionConfig(conditioning=conditioning), views=views)).requires_grad_(
        False
    )


def context(batch: int = 3, tokens: int = 16, width: int = 64) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1))


def actions(model: WorldModel, batch: int = 3) -> Tensor:
    return torch.randn(batch, model.action_spec.size, generator=torch.Generator().manual_seed(2))


def decoder(grid: int = 4) -> MaeDecoder:
    torch.manual_seed(0)
    made = MaeDecoder(width=64, own_width=32, depth=2, heads=4, hidden=64, grid=grid, pixels=192)
    torch.nn.init.normal_(made.mask_token)
    torch.nn.init.normal_(made.decoder_pos_embed)
    return made.requires_grad_(False)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("target_flags", [False, True])
def test_a_kept_predictor_begins_as_the_world_model(conditioning: str, target_flags: bool) -> None:
    views = replace(SCENARIOS["default"], size=32)
    model = world_model(conditioning, replace(views, target=views.source) if target_flags else views)
    predictor_backbone = PredictorBackbone(copy_pretrained(model.predictor))
    told = actions(model)
    torch.testing.assert_close(predictor_backbone(context(), told), model.predict(context(), told))
    torch.testing.assert_close(predictor_backbone(context()), model.predict(context(), torch.zeros_like(told)))
    assert predictor_backbone.conditioned == (conditioning != "none")
    assert (predictor_backbone(context(), told) == predictor_backbone(context())).all() == (conditioning == "none")
    assert (
        predictor_backbone.embed_dim,
        predictor_backbone.predictor_dim,
        predictor_backbone.num_prefix_tokens,
        predictor_backbone.num_heads,
    ) == (64, 32, 0, 2)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("query", ["image", "token"])
def test_everything_that_is_asked_learns_and_the_world_model_stays(conditioning: str, query: str) -> None:
    model = world_model(conditioning)
    predictor_backbone = PredictorBackbone(copy_pretrained(model.predictor), output=query, num_tasks=2)
    predictor_backbone(context(), actions(model), torch.tensor([0, 1, 1])).square().sum().backward()
    for name, parameter in predictor_backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        for parameter in predictor_backbone.parameters():
            parameter.zero_()
    assert model.predict(context(), actions(model)).abs().max() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_one_query_sees_the_whole_context_and_has_no_position(conditioning: str) -> None:
    model = world_model(conditioning)
    predictor_backbone, p, told = (
        PredictorBackbone(copy_pretrained(model.predictor), output="token"),
        model.predictor,
        actions(model),
    )
    asked = p.mask_token.expand(3, 1, -1)
    if p.action_mixer is not None:
        both = torch.cat((asked[:, 0], told), dim=1)
        asked = p.action_mixer.fc3(F.relu(p.action_mixer.fc2(F.relu(p.action_mixer.fc1(both)))))[:, None]
    tokens = [p.predictor_embed(context()) + p.pos_embed, asked]
    if p.action_tokens is not None:
        tokens.append(p.action_tokens(told))
    x = torch.cat(tokens, dim=1)
    for block in p.blocks:
        x = block(x)
    predicted = predictor_backbone(context(), told)
    assert predicted.shape == (3, 1, 64)
    torch.testing.assert_close(predicted, p.predictor_proj(p.norm(x[:, 16:17])), atol=1e-5, rtol=1e-4)


def test_each_image_has_the_token_of_its_task() -> None:
    model = world_model("sequence")
    predictor_backbone = PredictorBackbone(copy_pretrained(model.predictor), num_tasks=3)
    p = model.predictor
    x = torch.cat(
        (p.build_image_sequence(context(), torch.zeros(3, 7)), predictor_backbone.task_tokens[[2, 0, 2]][:, None]),
        dim=1,
    )
    for block in p.blocks:
        x = block(x)
    predicted = predictor_backbone(context(), None, torch.tensor([2, 0, 2]))
    torch.testing.assert_close(predicted, p.predictor_proj(p.norm(x[:, 16:32])), atol=1e-5, rtol=1e-4)
    assert not torch.equal(predicted, predictor_backbone(context(), None, torch.tensor([2, 1, 2])))
    assert torch.equal(predictor_backbone.task_tokens, PredictorBackbone(copy_pretrained(p), num_tasks=3).task_tokens)
    assert not torch.equal(
        predictor_backbone.task_tokens, PredictorBackbone(copy_pretrained(p), num_tasks=3, seed=1).task_tokens
    )
    for wrong in (PredictorBackbone(copy_pretrained(p)), predictor_backbone):
        with pytest.raises(ValueError, match=r"if the predictor has task tokens .*, and only then"):
            wrong(context(), None, None if wrong is predictor_backbone else torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_layers_are_the_queries_of_the_last_blocks_at_any_grid(conditioning: str) -> None:
    model = world_model(conditioning)
    p, told = model.predictor, actions(model)
    predictor_backbone = PredictorBackbone(copy_pretrained(p), return_layers_only=True, num_tasks=1)
    layers = predictor_backbone.get_intermediate_layers(
        context(3, 24), (4, 6), 2, told, torch.zeros(3, dtype=torch.int64)
    )
    square = p.pos_embed.unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    positions = F.interpolate(square, size=(4, 6), mode="bicubic", align_corners=False)[0].flatten(1).T
    asked = p.mask_token + positions
    asked = asked.expand(3, -1, -1) if p.action_mixer is None else p.action_mixer(asked, told)
    extra = [] if p.action_tokens is None else [p.action_tokens(told)] * 2
    x = torch.cat(
        (p.predictor_embed(context(3, 24)) + positions, asked, *extra, predictor_backbone.task_tokens.expand(3, 1, -1)),
        dim=1,
    )
    expected = []
    for block in p.blocks:
        x = block(x)
        expected.append(p.norm(x[:, 24:48]))
    torch.testing.assert_close(layers, expected[-2:], atol=1e-5, rtol=1e-4)
    sum(layer.square().sum() for layer in layers).backward()
    for name, parameter in predictor_backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("predictor_proj." not in name), name
    last = predictor_backbone.get_intermediate_layers(context(), (4, 4), 1, told, torch.zeros(3, dtype=torch.int64))[0]
    at_training_size = predictor_backbone(context(), told, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(predictor_backbone.predictor.predictor_proj(last), at_training_size)


def test_drop_path_is_linear_and_recomputed_activations_drop_the_same() -> None:
    model = world_model()
    gradients = []
    for grad_checkpointing in (False, True):
        predictor_backbone = PredictorBackbone(
            copy_pretrained(model.predictor), drop_path=0.4, grad_checkpointing=grad_checkpointing
        )
        rates = [part.drop_prob for part in predictor_backbone.modules() if isinstance(part, DropPath)]
        assert rates == [pytest.approx(rate) for rate in (0.2, 0.2, 0.4, 0.4)]
        torch.manual_seed(5)
        predictor_backbone(context()).square().sum().backward()
        gradients.append({name: p.grad for name, p in predictor_backbone.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])
    assert torch.equal(predictor_backbone.eval()(context()), model.predict(context(), torch.zeros(3, 7)))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_fresh_predictor_is_the_architectures_beginning_and_depends_on_its_seed_alone(conditioning: str) -> None:
    config = replace(CONFIG, action=ActionConfig(conditioning=conditioning))
    before = torch.get_rng_state()
    made, other = init_predictor(config, 3), init_predictor(config, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    beginning = Pretrained(config, made.action_size).state_dict()
    for name, value in made.state_dict().items():
        assert torch.equal(value, beginning[name]), name
        assert value.std() == 0 or not torch.equal(value, other.state_dict()[name]), name
    assert made.action_size == world_model(conditioning).predictor.action_size


def test_maes_decoder_is_kept_or_made_anew() -> None:
    d = decoder()
    tokens = context(3, 17)
    predictor_backbone = PredictorBackbone(copy_pretrained(d), drop_path=0.1)
    torch.testing.assert_close(predictor_backbone.eval()(tokens), d(tokens))
    assert (
        predictor_backbone.embed_dim,
        predictor_backbone.num_prefix_tokens,
        predictor_backbone.num_heads,
        predictor_backbone.conditioned,
    ) == (32, 1, 4, False)
    torch.testing.assert_close(predictor_backbone.get_intermediate_layers(tokens, (4, 4), 2)[-1], d(tokens))
    predictor_backbone(tokens).square().sum().backward()
    for name, parameter in predictor_backbone.named_parameters():
        assert (parameter.grad is not None) == ("decoder_pred" not in name and "pos_embed" not in name), name
    assert PredictorBackbone(copy_pretrained(d), output="token")(tokens).shape == (3, 1, 32)
    wide = predictor_backbone.get_intermediate_layers(context(3, 25), (4, 6), 1)
    assert wide[0].shape == (3, 24, 32)
    anew, again = init_mae_decoder(d, 1), init_mae_decoder(d, 1)
    for name, value in anew.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if not name.endswith("bias"):
            assert torch.equal(value, d.state_dict()[name]) == ("pos_embed" in name or "norm" in name), name
    assert anew.decoder_embed.weight.std().item() == pytest.approx((2 / 96) ** 0.5, rel=0.1)
    assert anew.decoder_embed.bias.abs().max() == 0


def test_a_predictor_is_made_for_an_encoder_that_has_none() -> None:
    vit = VisionTransformer(img_size=48, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=0)
    backbone = frozen_backbone(ExternalEncoder("dino", vit, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    predictor_backbone = PredictorBackbone(
        init_predictor_for(backbone, PredictorConfig(embed_dim=32, depth=2, num_heads=2), 0)
    )
    images = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    predicted = predictor_backbone(
        backbone.tokens(images)[:, backbone.num_prefix_tokens - predictor_backbone.num_prefix_tokens :]
    )
    assert predicted.shape == (2, 36, 64)
    assert not predictor_backbone.conditioned


def test_a_compiled_reader_predicts_the_same() -> None:
    model = world_model()
    del model.predictor.blocks[1:]
    predictor_backbone = PredictorBackbone(copy_pretrained(model.predictor)).setup(torch.device("cpu"), compiled=True)
    with torch.no_grad():
        torch.testing.assert_close(
            predictor_backbone(context()), model.predict(context(), torch.zeros(3, 7)), atol=1e-5, rtol=1e-4
        )


def test_drawn_actions_have_pretrainings_distribution() -> None:
    views = SCENARIOS["default"]
    spec = action_spec(ActionConfig(), views)
    drawn = sample_actions(views, spec, 4000, torch.Generator().manual_seed(0))
    again = sample_actions(views, spec, 4000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    entries = dict(zip(spec.names, drawn.unbind(1), strict=True))
    for name, probability in (("source_grayscale", 0.2), ("source_blur", 0.2), ("source_solarize", 0.1)):
        assert entries[name].mean().item() == pytest.approx(probability, abs=0.03)
    for name in ("brightness", "contrast", "saturation", "hue"):
        # Difference of two values, each jittered with probability 0.8 and uniform in ± strength: variance 2 · 0.8 / 3.
        assert entries[name].mean().item() == pytest.approx(0, abs=0.05)
        assert entries[name].var().item() == pytest.approx(1.6 / 3, rel=0.08)
    still = sample_actions(SCENARIOS["ijepa"], action_spec(ActionConfig(), SCENARIOS["ijepa"]), 8, torch.Generator())
    assert torch.equal(still, torch.zeros(8, 7))
