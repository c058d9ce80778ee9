"""What the explorer is given: every action of the lattice, ranked as MRR ranks, and answers that survive rounding."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipelines.augmentations import IDENTITY, PhotometricConfig
from dali_pipelines.replay import apply_photometric
from dali_pipelines.views import SCENARIOS, Views
from iwm.actions import action_between, action_spec, describe_action
from iwm.config import Config
from iwm.evaluate import main
from iwm.evaluation import explorer
from iwm.evaluation.bank import MIN_FACTOR, TIE_TOLERANCE
from iwm.evaluation.common import load_eval_context
from iwm.evaluation.compression import BankFeatures, compress, fit_pca_basis, rank_agreement
from iwm.evaluation.settings import MAX_VALUES
from iwm.model_config import ActionConfig
from iwm.protocols import evaluate
from shards.errors import UserError
from tests.evaluation.conftest import diverge, mistake, untrained


def _features(seed: int = 0) -> BankFeatures:
    """A bank of 200 points near a surface of 5 dimensions in 64, and two series of predictions about as near."""
    generator = torch.Generator().manual_seed(seed)
    surface = torch.randn(5, 64, generator=generator)
    bank = 3 + torch.randn(200, 5, generator=generator) @ surface + 0.05 * torch.randn(200, 64, generator=generator)
    return BankFeatures(bank, bank + 0.5 * torch.randn(2, 200, 64, generator=generator))


def test_ranks_survive_few_components_and_16_bits() -> None:
    features = [_features(0), _features(1)]
    turned = [fit_pca_basis(each, explained=0.999) for each in features]
    assert all(each.num_components < 64 for each in turned)
    compacts = [
        compress(each, found.components[:, : found.num_components])
        for each, found in zip(features, turned, strict=True)
    ]
    agreed = rank_agreement(features, compacts)
    assert agreed.mrr == pytest.approx(agreed.mrr_compressed, abs=0.01)
    assert agreed.same_rank > 0.9


def test_all_components_keep_distances_but_for_rounding() -> None:
    features = _features()
    found = fit_pca_basis(features, explained=1.0)
    stored = compress(features, found.components)
    points = stored.points.double() * stored.scale
    exact = torch.cdist(features.predictions[1].double(), features.bank.double())
    assert torch.allclose(torch.cdist(points[2], points[0]), exact, atol=64**0.5 * stored.scale)


def test_features_that_are_all_the_same_are_all_tied() -> None:
    features = BankFeatures(torch.ones(9, 4), torch.ones(1, 9, 4))
    stored = compress(features, fit_pca_basis(features, explained=0.99).components)
    assert stored.ranks.tolist() == features.ranks.tolist() == [[5.0] * 9]


def test_the_lattice_spans_the_jitter_and_leaves_out_what_is_never_changed() -> None:
    jitter = PhotometricConfig(jitter_probability=1.0, brightness=0.4, contrast=1.2, saturation=0.0, hue=0.1)
    made = explorer.action_grid(jitter, 3)
    assert made.axes["brightness"] == pytest.approx([0.6, 1.0, 1.4])
    assert made.axes["contrast"][0] == pytest.approx(MIN_FACTOR)
    assert made.axes["saturation"] == [1.0]
    assert made.axes["hue"] == pytest.approx([-0.1, 0.0, 0.1])
    assert list(made.axes) == ["brightness", "contrast", "saturation", "hue"]
    assert made.params.shape == (27, len(IDENTITY))
    assert len({tuple(row) for row in made.params.tolist()}) == 27
    # The last axis varies fastest: what the page counts on.
    assert made.params[:3, 3].tolist() == pytest.approx(made.axes["hue"])
    assert made.params[:9, 0].tolist() == pytest.approx([0.6] * 9)


@pytest.mark.parametrize("jitter", ["difference", "log_ratio"])
@pytest.mark.parametrize("flags", [False, True])
def test_words_of_the_axes_and_of_the_source_make_up_the_whole_action(jitter: str, flags: bool) -> None:
    views = SCENARIOS["default"]
    if flags:
        views = replace(views, target=replace(views.target, blur_probability=0.2))
    spec = action_spec(ActionConfig(jitter_encoding=jitter), views)
    made = explorer.action_grid(views.target, 3)
    words = explorer.axis_labels(made, spec)
    blurred = torch.tensor(explorer.source_params(views, 1.0)["blur"])
    places = np.unravel_index(range(81), (3, 3, 3, 3))
    for params, *at in zip(made.params, *places, strict=True):
        said = [words[axis][place] for axis, place in zip(made.axes, at, strict=True)]
        whole = action_between(blurred[None], params[None], spec)[0]
        assert ", ".join([*filter(None, said), "undo blur"]) == describe_action(whole, spec)


@pytest.mark.parametrize("conditioning", ["none", "feature", "sequence"])
def test_every_prediction_is_the_one_that_its_action_makes(tmp_path: Path, config: Config, conditioning: str) -> None:
    """Against a loop over single actions with sums of squares, for a source that is to be undone."""
    run = untrained(tmp_path / "run", replace(config, action=ActionConfig(conditioning=conditioning)))
    context = load_eval_context(explorer.ExplorerSettings(checkpoint=run))
    image = context.first_images(1)[0][0]
    made = explorer.action_grid(context.config.views.target, 2)
    states = explorer.source_params(Views(), 1.0)
    views, of_sources = made.params.to(image.device), torch.tensor(list(states.values()), device=image.device)
    answers = explorer.predict_views(context.model, image, views, of_sources, batch_size=5)
    grey = torch.tensor(states["grayscale"], device=image.device)[None]
    model = context.model
    with torch.no_grad():
        encoded = model.encode(apply_photometric(image[None], grey, context.config.views.jitter_impl), "teacher")
        copies = [apply_photometric(image[None], row[None], context.config.views.jitter_impl) for row in views]
        bank = torch.stack([model.target_features(copy)[0].mean(0) for copy in copies]).double()
        for i, row in enumerate(views):
            action = action_between(grey, row[None], model.action_spec)
            prediction = model.predict(encoded, action)[0].mean(0).double()
            distances = (bank - prediction).square().sum(1).sqrt()
            tolerance = TIE_TOLERANCE * bank[i].norm()
            nearer = (distances < distances[i] - tolerance).sum()
            tied = ((distances - distances[i]).abs() <= tolerance).sum()
            # Batches round differently than single images: a neighbour may change places with the true view.
            assert answers.features.ranks[1, i].item() == pytest.approx((nearer + (tied + 1) / 2).item(), abs=1)


def test_files_hold_what_the_page_needs_and_little_more(run: Path) -> None:
    result = evaluate("explorer", explorer.ExplorerSettings(checkpoint=run, num_images=2, num_values=3))
    written = json.loads((run / "eval" / "explorer.json").read_bytes())
    assert written["bank"] == 81
    assert [source["name"] for source in written["sources"]] == ["clean", "grayscale", "blur", "solarize"]
    assert [source["words"] for source in written["sources"]] == ["", "undo grayscale", "undo blur", "undo solarize"]
    assert len({photograph["key"] for photograph in written["photographs"]}) == 2
    for source in result["sources"]:
        assert source["mrr"] == pytest.approx(source["mrr_stored"], abs=0.01)
    arrays = np.load(run / "eval" / written["points"])
    assert arrays["points"].shape == (2, 5, 81, written["components"])
    assert arrays["points"].dtype == np.int16
    assert arrays["norms"].shape == (2, 81)
    context = load_eval_context(explorer.ExplorerSettings(checkpoint=run))
    images, keys = context.first_images(12)
    for photograph in written["photographs"]:
        with Image.open(run / "eval" / photograph["picture"]) as atlas:
            side = written["side"]
            assert atlas.size == (written["columns"] * side, -(-85 // written["columns"]) * side)
            column, row = 81 % written["columns"], 81 // written["columns"]
            clean = np.asarray(atlas.convert("RGB"), float)[row * side :, column * side :][:side, :side]
        image = images[keys.index(photograph["key"])].cpu().numpy()
        assert abs(clean - image).mean() < 8


def test_fewer_photographs_leave_no_pictures_of_more_behind(run: Path) -> None:
    for images in (3, 1):
        evaluate("explorer", explorer.ExplorerSettings(checkpoint=run, num_images=images, num_values=2))
    assert [path.name for path in (run / "eval").glob("*.webp")] == ["explorer-0.webp"]


def test_pictures_of_large_views_are_made_smaller() -> None:
    views = torch.randint(0, 256, (7, 96, 96, 3), dtype=torch.uint8)
    features = BankFeatures(torch.zeros(5, 2), torch.zeros(2, 5, 2))
    made = explorer.sprite_sheet(explorer.ViewPredictions(views[:5], views[5:], features), columns=3)
    assert made.size == (3 * explorer.SIDE, 3 * explorer.SIDE)


def test_a_run_without_conditioning_is_at_chance_by_construction(tmp_path: Path, config: Config) -> None:
    run = untrained(tmp_path / "run", replace(config, action=ActionConfig(conditioning="none")))
    result = evaluate("explorer", explorer.ExplorerSettings(checkpoint=run, num_images=2, num_values=3))
    assert result["sources"][0]["mrr"] == pytest.approx(result["chance"], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--num-values", "1"), "--num-values 1: must be from 2 to"),
        (("--explained-variance", "1.5"), "--explained-variance 1.5: must be above 0"),
        (("--scenario", "ijepa"), "--scenario: 'ijepa' is not a scenario with jitter"),
    ],
)
def test_a_mistake_ends_with_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    assert says in mistake(monkeypatch, "explorer", "--checkpoint", str(run), *arguments)


def test_a_model_that_diverged_is_an_error_and_writes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverge(run)
    monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", "explorer", "--checkpoint", str(run), "--num-images", "1"])
    with pytest.raises(UserError, match="not finite"):
        main()
    assert not list((run / "eval").iterdir())


def test_more_ops_than_the_papers_make_axes_of_their_own_and_fewer_values() -> None:
    assert explorer.fitting_values(SCENARIOS["default"].target, MAX_VALUES) == MAX_VALUES
    jitter = SCENARIOS["extended"].target
    values = explorer.fitting_values(jitter, 5)
    made = explorer.action_grid(jitter, values)
    assert (values, len(made.params)) == (3, 3**6)
    assert list(made.axes)[4:] == ["gamma", "temperature"]
    words = explorer.axis_labels(made, action_spec(ActionConfig(), SCENARIOS["extended"]))
    assert words["temperature"] == ["temperature -0.40 stops", "", "temperature +0.40 stops"]


def test_the_identity_is_a_view_of_an_odd_lattice() -> None:
    made = explorer.action_grid(SCENARIOS["strong"].target, 5)
    assert (made.params - torch.tensor(IDENTITY)).abs().sum(1).min() < 1e-6
