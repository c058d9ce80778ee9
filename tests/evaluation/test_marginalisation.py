"""Means of predictions: the mean they are said to be, what they retrieve, and what a classifier makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from dali_pipelines.augmentations import IDENTITY, PhotometricConfig
from dali_pipelines.replay import apply_photometric, sample_photometric
from dali_pipelines.views import SCENARIOS, Views
from iwm.actions import action_between
from iwm.config import Config, ConfigError
from iwm.evaluation.common import EvalContext, load_eval_context
from iwm.evaluation.held_out import MissingDataError
from iwm.evaluation.linear_accuracy import PooledFeatures, linear_accuracy
from iwm.evaluation.marginalisation import (
    COPIES,
    FIGURE_ROWS,
    NULL,
    average_predictions,
    jitter_strength,
    nearest_views,
)
from iwm.evaluation.settings import BankSettings, LinearSettings, MarginalisationSettings
from iwm.model_config import ActionConfig
from iwm.models.world_model import WorldModel
from iwm.protocols import evaluate
from shards.make import ShardingOptions, make_shards
from shards.plan import ShardSize
from shards.sources.detect import SourceOptions
from tests.evaluation.conftest import untrained

BANK = BankSettings(num_images=3, num_views=16, batch_size=7)


@pytest.fixture(scope="module")
def two_classes(tiny_shards: Path, config: Config) -> Config:
    """A run on shards with a train split and labels."""
    return replace(config, data=replace(config.data, shards=str(tiny_shards)))


def test_each_size_is_the_mean_of_the_first_predictions(config: Config) -> None:
    torch.manual_seed(0)
    model = WorldModel(config).eval()
    context = torch.randn(2, 16, 48)
    params = sample_photometric(SCENARIOS["strong"].target, 10, torch.Generator().manual_seed(0)).view(2, 5, -1)
    found = average_predictions(model, context, params, (1, 3, 5), batch_size=4)
    with torch.no_grad():
        for image in range(2):
            identity = torch.tensor(IDENTITY).expand(5, -1)
            actions = action_between(identity, params[image], model.action_spec)
            pooled = torch.cat([model.predict(context[image][None], action[None]).mean(1) for action in actions])
            for column, size in enumerate((1, 3, 5)):
                assert torch.allclose(found[image, column], pooled[:size].mean(0), atol=1e-5)


def test_a_perfect_world_models_mean_is_nearer_to_the_clean_image_the_more_is_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(60, 190, (1, 8, 8, 3), generator=generator, dtype=torch.uint8)
    views = Views(size=8)
    jitter = replace(views.target, jitter_probability=1.0)

    class Oracle(WorldModel):
        """Features are pixels; the predictor jitters the picture itself."""

        def predict(self, context: Tensor, action: Tensor) -> Tensor:
            params = torch.tensor(IDENTITY).repeat(len(action), 1)
            params[:, :4] += action[:, :4] * torch.tensor(self.action_spec.scale)
            return (
                apply_photometric(context.byte().view(-1, 8, 8, 3), params, "linear").float().view(len(action), 1, -1)
            )

    model = Oracle(
        Config(views=views, encoder=replace(Config().encoder, patch_size=4, embed_dim=48, depth=1, num_heads=2))
    )
    copies = apply_photometric(image.expand(64, -1, -1, -1), sample_photometric(jitter, 64, generator), "linear")
    params = sample_photometric(jitter, 256, generator)[None]
    found = average_predictions(model, image.float().view(1, 1, -1), params, (1, 256))[0]
    ranks = nearest_views(image.float().flatten(), copies.float().flatten(1), found).ranks
    assert ranks[1] <= 2
    assert ranks[1] < ranks[0]


def test_neighbours_are_in_order_and_equal_ones_share_their_rank() -> None:
    clean = torch.tensor([0.0, 0.0])
    copies = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    found = nearest_views(clean, copies, torch.tensor([[0.1, 0.0], [2.9, 0.0]]))
    assert found.order[0].tolist() == [0, 2, 3, 1]
    assert found.ranks.tolist() == [1, 3]
    collapsed = nearest_views(torch.ones(2), torch.ones(3, 2), torch.zeros(1, 2))
    assert collapsed.ranks.tolist() == [2.5]


def test_strength_is_the_share_of_the_largest_change_over_what_may_change() -> None:
    jitter = PhotometricConfig(1.0, brightness=0.5, contrast=0.0, saturation=0.4, hue=0.2)
    params = torch.tensor(IDENTITY).repeat(3, 1)
    params[1:, :4] = torch.tensor([(1.5, 1.0, 0.6, 0.2), (0.75, 1.0, 1.0, 0.0)])
    assert jitter_strength(params, jitter).tolist() == pytest.approx([0, 1, 0.5 / 3])


def test_the_protocol_writes_scores_and_figure_and_the_page_sets_the_papers_beside(
    two_classes: Config, tmp_path: Path
) -> None:
    run = untrained(tmp_path / "run", two_classes)
    probe = LinearSettings(train_images=40, val_images=None)
    settings = MarginalisationSettings(checkpoint=run, predictions=(1, 8), bank=BANK, nearest=2, probe=probe)
    result = evaluate("marginalisation", settings)
    assert set(result["clean"]["reciprocal_rank"]) == {"null", "1", "8", "copies"}
    assert set(result["linear"]["accuracy"]) == {"teacher", "null", "1", "8"}
    assert result["linear"]["classes"] == 2
    assert (result["linear"]["train_images"], result["linear"]["val_images"]) == (40, 24)
    assert all(score["gradient"] < 1e-5 for score in result["linear"]["accuracy"].values())
    assert 0 < result["strength"]["of_nearest"]["8"]["mean"] < 1
    assert result["strength"]["of_random"]["mean"] == pytest.approx(0.5, abs=0.1)
    assert result["paper"] == {"1": 64.5, "8": 64.3}
    groups = result["figures"][0]["groups"]
    assert len(groups) == min(FIGURE_ROWS, result["images"])
    for group in groups:
        alts = [column["tiles"][1]["alt"] for column in group["blocks"][0]["columns"]]
        assert alts[0].startswith(f"photograph {group['title']}: number 1 nearest to z_inv")
    page = (run / "report.html").read_text()
    assert "Marginalised representations" in page
    assert "paper, ImageNet" in page
    assert "64.5" in page


def test_without_conditioning_the_number_of_predictions_changes_nothing(config: Config, tmp_path: Path) -> None:
    run = untrained(tmp_path / "run", replace(config, action=ActionConfig(conditioning="none")))
    result = evaluate(
        "marginalisation", MarginalisationSettings(checkpoint=run, predictions=(1, 4), bank=BANK, linear=False)
    )
    ranks = result["clean"]["reciprocal_rank"]
    assert ranks["1"]["mean"] == pytest.approx(ranks["4"]["mean"], abs=1e-6)
    assert ranks[NULL]["mean"] == pytest.approx(ranks["4"]["mean"], abs=1e-6)
    assert ranks[COPIES] != ranks["4"]
    assert result["linear"] is None


@pytest.mark.parametrize("views", ["ijepa", "target destroyed"])
def test_runs_without_jitter_and_with_target_flags_are_evaluated(config: Config, tmp_path: Path, views: str) -> None:
    own = SCENARIOS["ijepa"] if views == "ijepa" else replace(SCENARIOS["strong"], target=SCENARIOS["strong"].source)
    sequence = replace(config, views=replace(own, size=32), action=ActionConfig(conditioning="sequence"))
    run = untrained(tmp_path / "run", sequence)
    result = evaluate(
        "marginalisation", MarginalisationSettings(checkpoint=run, predictions=(2,), bank=BANK, linear=False)
    )
    assert 0 < result["clean"]["reciprocal_rank"]["2"]["mean"] <= 1


@pytest.fixture
def context(two_classes: Config, tmp_path: Path) -> EvalContext:
    return load_eval_context(MarginalisationSettings(checkpoint=untrained(tmp_path / "run", two_classes), device="cpu"))


def test_linear_accuracy_is_whole_for_what_tells_the_classes_and_chance_for_what_does_not(
    context: EvalContext, tmp_path: Path
) -> None:
    def features(images: Tensor) -> Tensor:
        pixels = images.float()
        across = pixels.diff(dim=2).abs().mean((1, 2, 3)) - pixels.diff(dim=1).abs().mean((1, 2, 3))
        return torch.stack([across, torch.zeros_like(across)], dim=1)[..., None]

    settings = LinearSettings(train_images=None, val_images=None)
    kinds = PooledFeatures(("telling", "dead"), features)
    result = linear_accuracy(context, settings, kinds, seed=0, folder=tmp_path / "features")
    assert (result["train_images"], result["val_images"], result["chance"]) == (100, 24, 0.5)
    assert result["accuracy"]["telling"]["mean"] == 1
    assert result["accuracy"]["dead"]["mean"] == 0.5
    assert result["accuracy"]["dead"]["standard_error"] == pytest.approx((0.25 / 24) ** 0.5)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"probe": LinearSettings(label="colour")}, r"no label column 'colour'.*--no-linear"),
        ({"probe": LinearSettings(train="test")}, r"no split 'test'.*--no-linear"),
        ({"probe": LinearSettings(l2=())}, r"--probe.l2"),
        ({"probe": LinearSettings(train_images=1)}, r"--probe.train-images"),
        ({"predictions": (8, 1)}, r"--predictions 8 1: give ascending numbers"),
        ({"nearest": 17}, r"--nearest 17: must be from 1 to --bank.num-views 16"),
    ],
)
def test_settings_that_cannot_be_are_named_with_the_remedy(
    two_classes: Config, tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    run = untrained(tmp_path / "run", two_classes)
    few = LinearSettings(train_images=8, val_images=8)
    given = {"predictions": (1,), "bank": BANK, "probe": few, **settings}
    with pytest.raises(ConfigError, match=says):
        evaluate("marginalisation", MarginalisationSettings(checkpoint=run, **given))


def test_one_class_alone_is_refused_with_the_remedy_and_leaves_the_label_free_part(
    config: Config, tmp_path: Path
) -> None:
    for name in ("train", "val"):
        folder = tmp_path / name / "only"
        folder.mkdir(parents=True)
        for grey in (50, 200):
            Image.new("RGB", (32, 32), (grey, grey, grey)).save(folder / f"{grey}.png")
        make_shards(
            ShardingOptions(
                str(tmp_path / name),
                tmp_path / "shards",
                name,
                workers=1,
                shard=ShardSize(min_shards=1),
                extra=SourceOptions(labels="folders"),
            ),
            Console(quiet=True),
        )
    run = untrained(tmp_path / "run", replace(config, data=replace(config.data, shards=str(tmp_path / "shards"))))
    context = load_eval_context(MarginalisationSettings(checkpoint=run, device="cpu"))
    greys = PooledFeatures("a", lambda images: images.float().mean((1, 2, 3))[:, None, None])
    with pytest.raises(MissingDataError, match=r"all 2 images of split 'train' have one class.*--probe.label"):
        linear_accuracy(context, LinearSettings(), greys, 0, tmp_path / "features")
    assert not (tmp_path / "features").exists()
    result = evaluate("marginalisation", MarginalisationSettings(checkpoint=run, predictions=(1,), bank=BANK))
    assert (result["images"], result["linear"]) == (2, None)
    assert "one class" in result["left_out"]["linear accuracy"]


def test_banks_depend_on_the_seed_and_not_on_what_is_predicted(run: Path) -> None:
    def evaluated(predictions: tuple[int, ...], seed: int) -> float:
        settings = MarginalisationSettings(checkpoint=run, predictions=predictions, bank=BANK, seed=seed, linear=False)
        value: float = evaluate("marginalisation", settings)["strength"]["of_random"]["mean"]
        return value

    assert evaluated((1,), 0) == evaluated((1, 3), 0) != evaluated((1,), 1)
