"""Masks follow I-JEPA's description and depend only on (seed, step, sample)."""

import pytest
import torch

from iwm.hashing import hashed_uniform
from iwm.masking import sample_masks, token_statistics
from iwm.model_config import MaskingConfig

GRID = 14
ONE_BLOCK = MaskingConfig(num_blocks=1)


def masks_of_one_block(samples: int = 20_000) -> torch.Tensor:
    return sample_masks(ONE_BLOCK, GRID, 0, 0, torch.arange(samples)).predicted[:, 0].unflatten(1, (GRID, GRID))


def test_a_block_is_a_rectangle_of_the_described_area_and_aspect() -> None:
    block = masks_of_one_block()
    height, width = block.any(2).sum(1), block.any(1).sum(1)
    assert torch.equal(height * width, block.sum((1, 2))), "a block is not a full rectangle"
    area, aspect = height * width / GRID**2, height / width
    # Blocks have whole patches: sides differ by at most half a patch, area and aspect ratio by about a tenth.
    assert area.min() >= 0.15 * 0.85
    assert area.max() <= 0.2 * 1.15
    assert area.mean().item() == pytest.approx(0.175, abs=0.002)
    assert aspect.min() >= 0.75 * 0.8
    assert aspect.max() <= 1.5 * 1.25
    assert aspect.mean().item() == pytest.approx(1.125, abs=0.02)


def test_every_position_a_block_fits_in_is_equally_likely() -> None:
    block = masks_of_one_block(60_000)
    tall = block.any(2)
    height, top = tall.sum(1), tall.int().argmax(1)
    for size in height.unique().tolist():
        tops = top[height == size]
        places = GRID - size + 1
        counts = torch.bincount(tops, minlength=places).float()
        assert len(counts) == places
        expected = len(tops) / places
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_square < places + 6 * (2 * places) ** 0.5, f"height {size}: {counts.tolist()}"


def test_the_last_row_and_column_are_reached_as_often_as_the_first() -> None:
    block = masks_of_one_block(60_000).float().mean(0)
    torch.testing.assert_close(block, block.flip(0), atol=0.01, rtol=0)
    torch.testing.assert_close(block, block.flip(1), atol=0.01, rtol=0)


def test_what_is_visible_is_exactly_what_no_block_covers() -> None:
    masks = sample_masks(MaskingConfig(), GRID, 0, 0, torch.arange(1000))
    assert torch.equal(masks.visible, ~masks.predicted[:, 0])
    assert masks.predicted.shape == (1000, 1, GRID**2)
    # On average about half of a 14×14 image stays visible.
    assert 95 < token_statistics(MaskingConfig(), GRID).visible < 110


@pytest.mark.parametrize("kind", ["iwm", "ijepa"])
@pytest.mark.parametrize("grid", [3, 4, 8, 14])
def test_every_sample_keeps_a_visible_patch(kind: str, grid: int) -> None:
    masking = MaskingConfig(type=kind)
    visible = sample_masks(masking, grid, 1, 2, torch.arange(50_000)).visible.sum(1)
    assert visible.min() >= 1


def test_ijepa_context_is_a_large_square_without_the_target_blocks() -> None:
    masks = sample_masks(MaskingConfig(type="ijepa"), GRID, 0, 0, torch.arange(2000))
    assert masks.predicted.shape == (2000, 4, GRID**2)
    assert not (masks.visible & masks.predicted.any(1)).any()
    context = masks.visible | masks.predicted.any(1)
    assert context.float().mean() > 0.85
    assert context.float().mean() < 1.0


def test_masks_depend_on_seed_step_and_sample_alone() -> None:
    def masks(seed: int, step: int, first: int) -> torch.Tensor:
        return sample_masks(MaskingConfig(), GRID, seed, step, torch.arange(first, first + 8)).visible

    whole = masks(0, 5, 0)
    assert torch.equal(whole, masks(0, 5, 0))
    assert torch.equal(whole[4:], masks(0, 5, 4)[:4]), "a sample's mask depends on the other samples of its process"
    for other in (masks(1, 5, 0), masks(0, 6, 0), masks(0, 5, 8)):
        assert not torch.equal(whole, other)


def test_hashed_numbers_are_uniform_and_uncorrelated() -> None:
    draws = hashed_uniform(0, 0, torch.arange(100_000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(0), torch.full((4,), 0.5, dtype=torch.float64), atol=0.005, rtol=0)
    torch.testing.assert_close(draws.var(0), torch.full((4,), 1 / 12, dtype=torch.float64), atol=0.002, rtol=0)
    assert (torch.corrcoef(draws.T) - torch.eye(4)).abs().max() < 0.015
    assert torch.corrcoef(torch.stack((draws[:-1, 0], draws[1:, 0])))[0, 1].abs() < 0.015
