"""World model: visible patches only, one predictor pass, timm-compatible weights, EMA and losses."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import timm.models.vision_transformer as vit
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dali_pipelines.augmentations import GEOMETRY, PARAMS
from dali_pipelines.views import Views
from iwm.config import Config
from iwm.loss_tokens import loss_weights
from iwm.masking import Masks, PackedMasks, pack_masks, sample_masks, token_statistics
from iwm.model_config import (
    ActionConfig,
    EncoderConfig,
    Initialisation,
    LossConfig,
    MaskingConfig,
    PredictorConfig,
)
from iwm.models.attention import set_attention_impl
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD, patchify, timm_arguments
from iwm.models.flops import embedding_flops, predictor_flops, training_flops, transformer_flops
from iwm.models.layers import sincos_positions
from iwm.models.world_model import WorldModel
from iwm.packing import pack_tokens
from iwm.recipes import RECIPES
from iwm.train_config import TrainConfig

SMALL = Config(
    views=Views(size=32),
    encoder=EncoderConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8, init="xavier"),
    predictor=PredictorConfig(embed_dim=32, depth=2, num_heads=2),
    train=TrainConfig(compile=False),
)


def small(**changes: object) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(replace(SMALL, **changes)).setup(torch.device("cpu"), compiled=False)


def images(batch: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def masks(batch: int, masking: MaskingConfig = SMALL.masking, grid: int = 4) -> Masks:
    return sample_masks(masking, grid, 0, 0, torch.arange(batch))


def packed(masks: Masks, extra: int = 0, loss: LossConfig = SMALL.loss) -> PackedMasks:
    return pack_masks(masks, None, extra, loss)


def params(batch: int) -> torch.Tensor:
    return torch.rand(batch, len(PARAMS), generator=torch.Generator().manual_seed(2)) + 0.5


def test_initial_deviations_are_those_of_the_named_recipe() -> None:
    def deviations(init: Initialisation) -> dict[str, list[float]]:
        encoder = EncoderConfig(embed_dim=256, depth=3, num_heads=4, patch_size=8, init=init)
        model = small(encoder=encoder, predictor=PredictorConfig(embed_dim=256, depth=2, num_heads=4))
        blocks = [*model.encoder.blocks, *model.predictor.blocks]
        layers = {"qkv": [b.attn.qkv for b in blocks], "proj": [b.attn.proj for b in blocks]}
        layers |= {"fc1": [b.mlp.fc1 for b in blocks], "fc2": [b.mlp.fc2 for b in blocks]}
        layers["other"] = [model.encoder.patch_embed.proj, model.predictor.predictor_embed]
        return {name: [layer.weight.std().item() for layer in part] for name, part in layers.items()}

    number = [1, 2, 3, 1, 2]
    ijepa, beit = deviations("ijepa"), deviations("beit")
    for name, values in ijepa.items():
        assert values == pytest.approx([0.02] * len(values), rel=0.02)
        divided = [0.02 / (2 * i) ** 0.5 for i in number] if name in ("proj", "fc2") else [0.02] * len(values)
        assert beit[name] == pytest.approx(divided, rel=0.02)
    assert deviations("xavier")["qkv"] == pytest.approx([(2 / (256 + 768)) ** 0.5] * 5, rel=0.02)


@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_encoder_is_a_stock_timm_vit(patch: int, channels_last: bool) -> None:
    config = EncoderConfig(embed_dim=64, depth=2, num_heads=2, patch_size=patch)
    model = WorldModel(replace(SMALL, encoder=config, views=Views(size=patch * 4)))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    stock = vit.VisionTransformer(**timm_arguments(config, patch * 4))
    stock.load_state_dict(model.encoder.state_dict(), strict=True)
    pixels = images(3, patch * 4)
    normalised = pixels.float().div(255).sub(torch.tensor(IMAGENET_MEAN)).div(torch.tensor(IMAGENET_STD))
    expected = stock.eval().forward_features(normalised.permute(0, 3, 1, 2))
    torch.testing.assert_close(model.encode(pixels, "student"), expected, atol=2e-5, rtol=1e-4)


def test_patches_run_row_major_and_row_column_channel_inside() -> None:
    pixels = images(2)
    patches = patchify(pixels, 8).reshape(2, 4, 4, 8, 8, 3)
    assert torch.equal(patches[1, 2, 3], pixels[1, 16:24, 24:32])


def test_positions_tell_columns_from_rows() -> None:
    positions = sincos_positions(64, 4).reshape(4, 4, 64)
    assert torch.equal(positions[0, :, :32], positions[3, :, :32])
    assert torch.equal(positions[:, 0, 32:], positions[:, 3, 32:])
    assert len(positions.flatten(0, 1).unique(dim=0)) == 16


def test_masked_patches_of_the_source_are_never_seen() -> None:
    model, seen = small(), masks(6).visible
    source = images(6)
    blanked = patchify(source, 8).clone()
    blanked[~seen] = 0
    blanked = blanked.reshape(6, 4, 4, 8, 8, 3).transpose(2, 3).reshape(6, 32, 32, 3)
    features, without = (model.encoder(pixels, pack_tokens(seen, None)) for pixels in (source, blanked))
    assert torch.equal(features, without)


def test_one_grid_pass_is_the_concatenation_of_context_and_queries() -> None:
    """Attention is permutation-equivariant: the single pass must equal I-JEPA's concatenation of both."""
    model = small()
    predictor, m = model.predictor, masks(1)
    action = torch.randn(1, model.action_spec.size)
    context = torch.randn(1, int(m.visible.sum()), 64)
    predicted = predictor.predict_masked(context, packed(m), action)
    seen = predictor.predictor_embed(context) + predictor.pos_embed[m.visible[0]]
    tokens = torch.cat((seen, predictor.mask_queries(action)[:, m.predicted[0, 0]]), dim=1)
    for block in predictor.blocks:
        tokens = block(tokens)
    expected = predictor.predictor_proj(predictor.norm(tokens))[:, seen.shape[1] :]
    torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=1e-4)


def test_ijepa_predicts_each_block_without_seeing_the_others() -> None:
    masking = MaskingConfig(type="ijepa")
    model = small(masking=masking, action=ActionConfig(conditioning="none"))
    m = masks(2, masking)
    context = model.encoder(images(2), pack_tokens(m.visible, None))
    action = torch.zeros(2, model.action_spec.size)
    predicted = model.predictor.predict_masked(context, packed(m), action)
    n_context, n_queried = int(m.visible[0].sum()), int(m.predicted[0, 0].sum())
    seen = model.predictor.predictor_embed(context[:1, :n_context]) + model.predictor.pos_embed[m.visible[0]]
    tokens = torch.cat((seen, model.predictor.mask_queries(action)[:1, m.predicted[0, 0]]), dim=1)
    assert tokens.shape[1] == n_context + n_queried
    for block in model.predictor.blocks:
        tokens = block(tokens)
    expected = model.predictor.predictor_proj(model.predictor.norm(tokens))[0, n_context:]
    torch.testing.assert_close(predicted[0, :n_queried], expected, atol=1e-5, rtol=1e-4)
    assert model(images(2), images(2), params(2), packed(m)).isfinite()


@pytest.mark.parametrize("conditioning", ["none", "sequence", "feature"])
def test_the_action_reaches_the_prediction_only_where_there_is_conditioning(conditioning: str) -> None:
    model = small(action=ActionConfig(conditioning=conditioning))
    context = model.encode(images(2), "teacher")
    null = torch.zeros(2, model.action_spec.size)
    for entry in range(model.action_spec.size):
        changed = null.clone()
        changed[:, entry] = 1.0
        same = torch.equal(model.predict(context, null), model.predict(context, changed))
        assert same == (conditioning == "none"), f"entry {entry}"


def test_the_action_weighs_as_much_in_the_whole_image_task_as_in_training() -> None:
    """If context and mask tokens are equal, the whole-image task is the training task with every token twice.

    Attention then gives the same predictions. With the action tokens only once, it would not.
    """
    model = small(action=ActionConfig(conditioning="sequence"))
    predictor, m = model.predictor, masks(1)
    with torch.no_grad():
        for parameter in (predictor.predictor_embed.weight, predictor.predictor_embed.bias, predictor.mask_token):
            parameter.zero_()
    context, action = torch.randn(1, 16, 64), torch.randn(1, model.action_spec.size)
    whole = predictor.predict_image(context, action)
    trained = predictor.predict_masked(context[:, m.visible[0]], packed(m, predictor.num_action_tokens), action)
    torch.testing.assert_close(whole[:, m.predicted[0, 0]], trained, atol=1e-5, rtol=1e-4)


def test_feature_conditioning_is_three_layers_over_the_concatenation() -> None:
    mix = small().predictor.action_mixer
    assert mix is not None
    tokens, action = torch.randn(5, 32), torch.randn(3, 7)
    both = torch.cat((tokens[None].expand(3, -1, -1), action[:, None].expand(-1, 5, -1)), dim=-1)
    expected = mix.fc3(F.relu(mix.fc2(F.relu(mix.fc1(both)))))
    torch.testing.assert_close(mix(tokens, action), expected)


def test_the_target_encoder_gets_no_gradient_and_all_trained_parameters_do() -> None:
    model = small()
    model(images(4), images(4), params(4), packed(masks(4))).backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_the_target_encoder_moves_by_one_minus_the_momentum() -> None:
    model = small()
    before = [p.clone() for p in model.target_encoder.parameters()]
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(1.0)
    model.update_target(0.9)
    for old, new, student in zip(before, model.target_encoder.parameters(), model.encoder.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["l2", "smooth_l1"])
def test_the_loss_counts_the_chosen_tokens_of_every_image_alike(kind: str, reduction: str) -> None:
    model = small(loss=LossConfig(type=kind, reduction=reduction))
    predictions, targets = torch.randn(2, 16, 64), torch.randn(2, 16, 64)
    counted = torch.zeros(2, 16, dtype=torch.bool)
    counted[0, :3] = counted[1, :7] = True
    compare = F.mse_loss if kind == "l2" else F.smooth_l1_loss
    per_image = [
        sum(compare(predictions[i, j], targets[i, j]) for j in range(16) if counted[i, j])
        / (int(counted[i].sum()) if reduction == "mean" else 1)
        for i in range(2)
    ]
    weights = loss_weights(counted[:, None], model.config.loss)[:, 0]
    torch.testing.assert_close(model.loss(predictions, targets, weights), torch.stack(per_image).mean())


def test_predicting_all_patches_counts_the_visible_ones_too() -> None:
    batch = (images(4), images(4), params(4))
    everywhere, masked = (
        small(loss=loss)(*batch, packed(masks(4), loss=loss)) for loss in (LossConfig(predict="all"), LossConfig())
    )
    assert not torch.equal(everywhere, masked)


def test_targets_are_layer_normed_unless_told_otherwise() -> None:
    normed = small().target_features(images(2))
    torch.testing.assert_close(normed.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(-1, unbiased=False), torch.ones(2, 16), atol=1e-3, rtol=0)
    model = small(loss=LossConfig(normalize_targets=False))
    assert torch.equal(model.target_features(images(2)), model.encode(images(2), "teacher"))


def test_fused_and_plain_attention_give_the_same_loss_and_gradients() -> None:
    model = small()
    batch = (images(4), images(4), params(4), packed(masks(4)))
    gradients = []
    for fused in (False, True):
        set_attention_impl(model, fused)
        model.zero_grad()
        model(*batch).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, fast, atol=1e-5, rtol=1e-3)


def _counted(function: Callable[..., object], *arguments: object) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("conditioning", ["none", "sequence", "feature"])
def test_analytic_flops_are_what_torch_counts(conditioning: str) -> None:
    config = replace(SMALL, action=ActionConfig(conditioning=conditioning))
    model, m = small(action=ActionConfig(conditioning=conditioning)), masks(1)
    seen = int(m.visible.sum())
    encoder = _counted(model.encoder, images(1), pack_tokens(m.visible, None))
    predicted = int(m.predicted.sum())
    assert encoder == transformer_flops(seen, 64, 2, 4.0) + embedding_flops(config, seen)
    context, action = torch.randn(1, seen, 64), torch.randn(1, model.action_spec.size)
    predictor = _counted(model.predictor.predict_masked, context, packed(m), action)
    expected = predictor_flops(config, seen, 16, predicted)
    # The batch-independent half of the first conditioning layer is counted once per batch, not per image.
    assert predictor - (2 * 16 * 32 * 32 if conditioning == "feature" else 0) == expected
    expected_step = 3 * (encoder - embedding_flops(config, seen)) + 2 * embedding_flops(config, seen)
    assert training_flops(config, seen).context_encoder == expected_step


def test_a_training_step_costs_what_is_claimed() -> None:
    """Compare with torch's count of forward and backward. Only attention, padded on a CPU, exceeds it."""
    model, m = small(), masks(16)
    set_attention_impl(model, fused=False)  # for which every torch release counts the products
    with FlopCounterMode(display=False) as counter:
        model(images(16), images(16), params(16), packed(m)).backward()
    needed = training_flops(SMALL, m.visible.sum().item() / 16).total
    assert counter.get_total_flops() / 16 == pytest.approx(needed, rel=0.02)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_consistent_and_builds(name: str) -> None:
    config = RECIPES[name]()
    config.check()
    with torch.device("meta"):
        model = WorldModel(config)
    assert len(model.predictor.blocks) == config.predictor.depth
    assert 0 < token_statistics(config.masking, config.grid_size).visible < config.grid_size**2


def test_the_papers_model_costs_what_the_field_says() -> None:
    """ViT-B/16 alone is 86 M parameters and 17.5 GFLOP multiply-adds forward (35 GFLOP), 196 tokens, no class token."""
    config = RECIPES["iwm_b16_equi_18x384"]()
    flops = training_flops(config)
    whole = transformer_flops(196, 768, 12, 4.0) + embedding_flops(config, 196)
    assert whole == pytest.approx(35e9, rel=0.02)
    assert 0.96 < flops.target_encoder / whole < 0.98, "the last MLP runs on the predicted patches alone"
    assert 110e9 < flops.total < 140e9
    with torch.device("meta"):
        model = WorldModel(config)
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(86e6, rel=0.01)


def test_the_shuffled_control_is_told_the_next_images_action() -> None:
    batch, drawn, chosen = images(3), params(3), packed(masks(3))
    model, control = small(), small(action=replace(SMALL.action, shuffle=True))
    view_params = drawn.clone()
    view_params[:, GEOMETRY.stop :] = drawn[:, GEOMETRY.stop :].roll(-1, 0)
    with torch.no_grad():
        expected = model(batch, batch.flip(0), view_params, chosen)
        torch.testing.assert_close(control(batch, batch.flip(0), drawn, chosen), expected, rtol=0, atol=0)
        assert not torch.equal(model(batch, batch.flip(0), drawn, chosen), expected)
