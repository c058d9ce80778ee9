"""Packed tokens: loss and gradients equal those of padded rows and of single images."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dali_pipelines.augmentations import PARAMS
from dali_pipelines.views import Views
from iwm.actions import action_from_params
from iwm.config import Config
from iwm.loss_tokens import loss_weights
from iwm.masking import Masks, mask_buffer_sizes, pack_masks, sample_masks, token_statistics
from iwm.model_config import ActionConfig, EncoderConfig, LossConfig, MaskingConfig, PredictorConfig
from iwm.models.attention import set_attention_impl
from iwm.models.world_model import WorldModel
from iwm.packing import (
    CAPACITY_SIGMAS,
    BufferSize,
    gather_tokens,
    joined_bytes,
    pack_tokens,
    scatter_tokens,
    split_bytes,
)
from iwm.recipes import RECIPES
from iwm.train_config import TrainConfig

GRID, BATCH = 6, 16
SMALL = Config(
    views=Views(size=GRID * 8),
    encoder=EncoderConfig(embed_dim=64, depth=3, num_heads=2, patch_size=8, init="xavier"),
    predictor=PredictorConfig(embed_dim=32, depth=2, num_heads=2),
    train=TrainConfig(compile=False, precision="fp32"),
)
KINDS = [("iwm", "feature"), ("iwm", "sequence"), ("ijepa", "none"), ("ijepa", "sequence")]


def build(kind: str = "iwm", conditioning: str = "feature") -> WorldModel:
    torch.manual_seed(0)
    config = replace(SMALL, masking=MaskingConfig(type=kind), action=ActionConfig(conditioning=conditioning))
    return WorldModel(config).setup(torch.device("cpu"), compiled=False)


def drawn(kind: str = "iwm", step: int = 0) -> Masks:
    return sample_masks(MaskingConfig(type=kind), GRID, 3, step, torch.arange(BATCH))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (2, BATCH, GRID * 8, GRID * 8, 3), dtype=torch.uint8, generator=generator)
    return pixels[0], pixels[1], torch.rand(BATCH, len(PARAMS), generator=generator) + 0.5


def added(present: Tensor) -> Tensor:
    """Return the mask that timm's attention adds to its scores, which excludes padding."""
    return torch.zeros(present.shape).masked_fill(~present, -torch.inf)[:, None, None]


def padded_loss(model: WorldModel, source: Tensor, target: Tensor, params: Tensor, masks: Masks) -> Tensor:
    """Compute the reference loss: rows padded to the whole grid, padding masked, one predictor pass per prediction."""
    tokens = model.encoder.embed(source)
    for block in model.encoder.blocks:
        tokens = block(tokens, attn_mask=added(masks.visible))
    context, action = model.encoder.norm(tokens), action_from_params(params, model.action_spec)
    predictor, predictions = model.predictor, []
    for queried in masks.predicted.unbind(1):
        seen = predictor.predictor_embed(context) + predictor.pos_embed
        tokens = torch.where(masks.visible[:, :, None], seen, predictor.mask_queries(action).to(seen.dtype))
        tokens = predictor.append_action_tokens(tokens, action)
        present = torch.nn.functional.pad(masks.visible | queried, (0, predictor.num_action_tokens), value=True)
        for block in predictor.blocks:
            tokens = block(tokens, attn_mask=added(present))
        predictions.append(predictor.predictor_proj(predictor.norm(tokens[:, : GRID**2])))
    predicted = torch.stack(predictions, dim=1)
    targets = model.target_features(target)[:, None].expand_as(predicted)
    return model.loss(predicted, targets, loss_weights(masks.predicted, model.config.loss))


def gradients(model: WorldModel, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("kind", "conditioning"), KINDS)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_and_padded_give_the_same_loss_and_gradients(
    kind: str, conditioning: str, fixed: bool, fused: bool, precision: str
) -> None:
    model, masks, images = build(kind, conditioning), drawn(kind), batch()
    set_attention_impl(model, fused)
    extra = model.predictor.num_action_tokens
    room = mask_buffer_sizes(MaskingConfig(type=kind), GRID, extra, BATCH, "masked") if fixed else None
    packed = pack_masks(masks, room, extra, LossConfig())
    assert (packed.predictor is None) == (kind == "iwm")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        ours, theirs = model(*images, packed), padded_loss(model, *images, masks)
    both = zip(gradients(model, ours), gradients(model, theirs), strict=True)
    if precision == "fp32":
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for mine, other in both:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    else:
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=0)
        apart = [((mine - other).norm() / other.norm()).item() for mine, other in both if other.norm() > 1e-4]
        assert max(apart) < 0.05, "bf16 rounds to 2⁻⁸, and sums in another order round otherwise"


def test_an_image_is_the_same_alone_and_in_company() -> None:
    model, masks, (source, _, _) = build(), drawn(), batch()
    together = model.encoder(
        source, pack_tokens(masks.visible, mask_buffer_sizes(MaskingConfig(), GRID, 0, BATCH, "masked").context)
    )[0]
    ends = masks.visible.sum(1).cumsum(0).tolist()
    for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        alone = model.encoder(source[row : row + 1], pack_tokens(masks.visible[row : row + 1], None))[0]
        torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fixed",
    [
        None,
        mask_buffer_sizes(MaskingConfig(), GRID, 0, BATCH, "masked").context,
        BufferSize(tokens=8, num_padding_sequences=1, growth=8),
        BufferSize(tokens=GRID**2 * BATCH + 800, num_padding_sequences=1, growth=8),
    ],
    ids=["none", "fitting", "too small", "too large"],
)
def test_every_visible_patch_is_packed_once_whatever_the_buffer(fixed: BufferSize | None) -> None:
    for step in range(50):
        visible = drawn(step=step).visible
        packing = pack_tokens(visible, fixed)
        real = packing.token_index[packing.token_index < visible.numel()]
        assert torch.equal(real, visible.flatten().nonzero()[:, 0])
        assert packing.cu_seqlens[-1] == len(packing.token_index)
        lengths = packing.cu_seqlens.diff()
        assert torch.equal(lengths[:BATCH].long(), visible.sum(1))
        assert lengths.max() <= packing.token_mask.shape[1] <= GRID**2
        assert torch.equal(packing.token_mask.sum(1), lengths.long())
        assert packing.token_mask.flatten()[packing.padded_index].all()
        assert len(packing.padded_index.unique()) == len(packing.padded_index)


def test_tensors_are_copied_in_one_piece_and_come_out_as_they_were() -> None:
    tensors = [
        torch.tensor([True, False, True]),
        torch.arange(6).view(2, 3).t(),  # not contiguous
        torch.empty(0, 4),
        torch.tensor(0.5),
        torch.arange(5, dtype=torch.int32),
    ]
    buffer = joined_bytes(tensors)
    assert buffer.shape == (16 + 48 + 0 + 16 + 32,)
    for tensor, copy in zip(tensors, split_bytes(buffer, tensors), strict=True):
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(copy, tensor)
        assert (copy.data_ptr() - buffer.data_ptr()) % 16 == 0 or copy.numel() == 0


def test_laying_and_picking_undo_each_other_and_so_do_their_gradients() -> None:
    visible = drawn().visible
    place = pack_tokens(visible, mask_buffer_sizes(MaskingConfig(), GRID, 0, BATCH, "masked").context).token_index
    grid = torch.randn(visible.numel(), 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(len(place), 5, dtype=torch.float64, requires_grad=True)
    back = scatter_tokens(gather_tokens(grid, place), place, torch.zeros_like(grid))
    assert torch.equal(back, grid * visible.flatten()[:, None])
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, place[-20:]), (grid,))
    assert torch.autograd.gradcheck(lambda x, onto: scatter_tokens(x, place[-20:], onto), (tokens[-20:], grid))


@pytest.mark.parametrize("name", sorted(name for name in RECIPES if "16" in name))
@pytest.mark.parametrize("images", [256, 512])
def test_at_most_one_token_in_25_is_filling(name: str, images: int) -> None:
    config = RECIPES[name]()
    n, separate = config.grid_size**2, config.masking.type == "ijepa"
    needed = token_statistics(config.masking, config.grid_size)
    buffers = mask_buffer_sizes(config.masking, config.grid_size, 0, images, config.loss.predict)
    context = buffers.context.tokens / images
    predictor = buffers.predictor.tokens / images if separate else n
    # With I-JEPA's own sampler one buffer serves steps with smaller and with larger blocks.
    limit = 1.04 if config.masking.sampler == "paper" else 1.16
    # The target encoder has no padding.
    assert 1 <= (context + n + predictor) / (needed.visible + n + (needed.seen if separate else n)) <= limit
    if config.masking.type == "iwm":
        assert 1 < context / needed.visible <= 1.04


def test_shapes_never_change_over_500_steps_of_real_masks() -> None:
    """At the paper's size one batch in 30,000 exceeds the buffer, so a few hundred fit almost certainly."""
    assert CAPACITY_SIGMAS == 4.0
    masking, images = MaskingConfig(), 256
    fixed = mask_buffer_sizes(masking, 14, 0, images, "masked")
    shapes = set()
    for step in range(500):
        masks = sample_masks(masking, 14, 0, step, torch.arange(images))
        shapes.add(tuple(part.shape for part in pack_tokens(masks.visible, fixed.context)))
    assert len(shapes) == 1


def test_a_batch_beyond_the_buffer_is_trained_on_whole() -> None:
    model, masks, images = build(), drawn(), batch()
    tight = mask_buffer_sizes(MaskingConfig(), GRID, 0, BATCH, "masked")._replace(
        context=BufferSize(tokens=64, num_padding_sequences=1, growth=16)
    )
    assert masks.visible.sum() > 64
    torch.testing.assert_close(
        model(*images, pack_masks(masks, tight, 0, LossConfig())), padded_loss(model, *images, masks)
    )


def test_buffers_that_are_exactly_full_hold_all_patches() -> None:
    masks, loss = drawn(), LossConfig(predict="all")
    packed = pack_masks(masks, mask_buffer_sizes(MaskingConfig(), GRID, 0, BATCH, "all"), 0, loss)
    assert (packed.loss.weight > 0).sum() == BATCH * GRID**2
