"""Masks of sampler `official` have the statistics of I-JEPA's own sampler, and depend on (seed, step, index) alone."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from iwm.block_sizes import size_shares
from iwm.config import Config, ConfigError
from iwm.masking import Masks, mask_buffer_sizes, pack_masks, sample_masks, token_statistics
from iwm.model_config import LossConfig, MaskingConfig

GRID, GROUP, STEPS = 14, 128, 400
OFFICIAL = MaskingConfig(type="ijepa", sampler="official")
CUT = replace(OFFICIAL, cut=True)


def drawn(masking: MaskingConfig, step: int, first: int = 0, images: int = GROUP, grid: int = GRID) -> Masks:
    return sample_masks(masking, grid, 0, step, torch.arange(first, first + images))


@cache
def context_sizes() -> torch.Tensor:
    """Return the number of context patches before the cut, [steps, images]."""
    return torch.stack([drawn(OFFICIAL, step).visible.sum(1) for step in range(STEPS)]).double()


def test_contexts_and_targets_are_as_large_as_those_of_the_official_code() -> None:
    """The official collator, run for 1,000 batches of 128: 81.9 context patches, 50.5 after the cut, blocks of 33.3.

    Standard deviations: 13.0 within a batch, 4.5 between the means of batches, 7.3 of the least. Tolerances are four
    standard errors of both runs together.
    """
    context = context_sizes()
    assert context.mean().item() == pytest.approx(81.86, abs=4 * 4.5 * (1 / STEPS + 1 / 1000) ** 0.5)
    assert context.var(1).mean().sqrt().item() == pytest.approx(12.97, abs=0.3)
    assert context.mean(1).std().item() == pytest.approx(4.51, abs=0.8)
    assert context.amin(1).mean().item() == pytest.approx(50.54, abs=4 * 7.3 * (1 / STEPS + 1 / 1000) ** 0.5)
    assert context.amin(1).std().item() == pytest.approx(7.26, abs=1.2)
    targets = torch.tensor([drawn(OFFICIAL, step, images=1).predicted.sum(-1)[0, 0] for step in range(STEPS)]).double()
    assert targets.mean().item() == pytest.approx(33.34, abs=4 * 2.9 * (1 / STEPS + 1 / 1000) ** 0.5)
    assert (targets.min().item(), targets.max().item()) == (30, 40)


def test_sizes_of_blocks_are_as_frequent_as_in_the_official_code() -> None:
    official = {(5, 6): 137_728, (6, 5): 69_632, (6, 6): 103_424, (7, 5): 184_832, (8, 5): 16_384}
    shares = {target: share for (target, context), share in size_shares(OFFICIAL, GRID).items() if context == (13, 13)}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares.keys() == official.keys()
    for sides, count in official.items():
        error = (shares[sides] * (1 - shares[sides]) / 1000) ** 0.5
        assert count / 512_000 == pytest.approx(shares[sides], abs=4 * error), sides


def test_all_blocks_of_a_step_have_one_size_and_none_reaches_the_last_row_and_column() -> None:
    for step in range(20):
        masks = drawn(OFFICIAL, step, images=300)
        assert len(masks.predicted.sum(-1).unique()) == 1
        blocks = masks.predicted.unflatten(-1, (GRID, GRID))
        assert len(blocks.any(-1).sum(-1).unique()) == 1, "blocks of several heights"
        assert not blocks[..., -1, :].any()
        assert not blocks[..., -1].any()
        assert not (masks.visible & masks.predicted.any(1)).any()
        # The context block is a square of 13×13 in the corner, the only place that it has.
        context = (masks.visible | masks.predicted.any(1)).unflatten(-1, (GRID, GRID))
        assert context[:, :-1, :-1].all()


def test_every_place_of_a_block_is_equally_likely() -> None:
    tall = drawn(OFFICIAL, 3, images=40_000).predicted[:, 0].unflatten(1, (GRID, GRID)).any(2)
    tops = tall.int().argmax(1)
    places = GRID - int(tall[0].sum())
    counts = torch.bincount(tops, minlength=places).float()
    assert len(counts) == places
    expected = len(tops) / places
    assert ((counts - expected) ** 2 / expected).sum().item() < places + 6 * (2 * places) ** 0.5


@pytest.mark.parametrize("whole", [MaskingConfig(type="ijepa"), OFFICIAL])
def test_the_cut_keeps_the_first_patches_as_many_as_every_image_of_a_group_has(whole: MaskingConfig) -> None:
    before, after = (drawn(masking, 5, images=2 * GROUP) for masking in (whole, replace(whole, cut=True)))
    for old, new in ((before.visible[:, None], after.visible[:, None]), (before.predicted, after.predicted)):
        for group in range(2):
            images = slice(group * GROUP, (group + 1) * GROUP)
            least = int(old[images].sum(-1).min())
            assert (new[images].sum(-1) == least).all()
            for row, cut_row in zip(old[images].flatten(0, 1), new[images].flatten(0, 1), strict=True):
                assert torch.equal(row.nonzero()[:least], cut_row.nonzero())


@pytest.mark.parametrize("masking", [OFFICIAL, CUT, MaskingConfig(sampler="official")])
def test_masks_are_the_same_for_any_number_of_processes_and_micro_batches(masking: MaskingConfig) -> None:
    whole = drawn(masking, 2, images=400)
    for part in (1, 48, 100, 200):
        parts = [drawn(masking, 2, first, part) for first in range(0, 400 - part + 1, part)][:9]
        for number, of_part in enumerate(parts):
            own = slice(number * part, (number + 1) * part)
            assert torch.equal(of_part.visible, whole.visible[own])
            assert torch.equal(of_part.predicted, whole.predicted[own])
    scattered = torch.tensor([399, 3, 131, 130])
    assert torch.equal(sample_masks(masking, GRID, 0, 2, scattered).visible, whole.visible[scattered])


@pytest.mark.parametrize("group", [32, 128])
def test_the_group_of_the_cut_is_a_setting(group: int) -> None:
    visible = drawn(replace(CUT, cut_group=group), 1, images=256).visible.sum(1).unflatten(0, (-1, group))
    assert (visible == visible[:, :1]).all()
    assert len(visible[:, 0].unique()) > 1


def test_a_context_of_too_few_patches_is_drawn_again_and_then_overlaps_targets_from_the_last_on() -> None:
    """A small grid with large blocks, so that the draw often fails."""
    masking = MaskingConfig(
        type="ijepa", sampler="official", block_scale=(0.3, 0.35), context_scale=(0.5, 0.5), min_keep=8
    )
    masks = drawn(masking, 0, images=4000, grid=7)
    overlap = (masks.visible[:, None] & masks.predicted).any(-1)
    assert (masks.visible.sum(1) > 8).all()
    assert overlap.any(), "no draw failed, so the rule was not used"
    # An earlier block is overlapped only where all later ones were given up.
    assert overlap[:, 0].sum() <= overlap[:, -1].sum()
    assert not drawn(replace(masking, min_keep=0), 0, images=4000, grid=7).visible.sum(1).eq(0).any()


@pytest.mark.parametrize("masking", [OFFICIAL, CUT, replace(CUT, sampler="paper")])
@pytest.mark.parametrize("images", [64, 256])
def test_buffers_hold_every_step_and_statistics_are_those_of_the_masks(masking: MaskingConfig, images: int) -> None:
    sizes, shapes, visible, seen, predicted = mask_buffer_sizes(masking, GRID, 0, images, "masked"), set(), [], [], []
    for step in range(150):
        masks = drawn(masking, step, images=images)
        shapes.add(tuple(part.shape for part in pack_masks(masks, sizes, 0, LossConfig()).tensors()))
        visible.append(masks.visible.sum().item() / images)
        predicted.append(masks.predicted.sum().item() / images)
        seen.append((masks.visible[:, None] | masks.predicted).sum().item() / images)
    assert len(shapes) == 1, "a step needed a larger buffer"
    counted = token_statistics(masking, GRID)
    for found, mean in ((visible, counted.visible), (seen, counted.seen), (predicted, counted.predicted)):
        values = torch.tensor(found, dtype=torch.float64)
        assert values.mean().item() == pytest.approx(mean, abs=5 * values.std().item() / 150**0.5 + 0.01 * mean)


def test_settings_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"masking\.cut: masking\.type iwm predicts all"):
        replace(Config(), masking=MaskingConfig(cut=True)).check()
    with pytest.raises(ConfigError, match=r"masking\.min_keep 40: on a grid of 14×14 patches sampler official draws"):
        replace(Config(), masking=replace(OFFICIAL, min_keep=40)).check()
    with pytest.raises(ConfigError, match=r"masking\.cut_group 0: must be at least 1"):
        replace(Config(), masking=replace(OFFICIAL, cut_group=0)).check()
    replace(Config(), masking=CUT).check()
