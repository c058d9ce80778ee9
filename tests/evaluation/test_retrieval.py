"""Retrieval: chosen at random and reproducible; best and worst are that of a whole bank, labelled, apart."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from iwm.evaluate import main
from iwm.evaluation.common import EvalContext
from iwm.evaluation.retrieval import figure, retrieve
from iwm.evaluation.settings import BankSettings, RetrievalSettings
from tests.evaluation.oracles import Blind, Oracle, context_of

SETTINGS = RetrievalSettings(checkpoint=Path("unused"), bank=BankSettings(num_images=3, num_views=32), num_actions=2)


@dataclass(frozen=True, kw_only=True)
class _Photos(EvalContext):
    """Context whose images are given."""

    photos: Tensor

    def read_images(self, most: int) -> tuple[Tensor, list[str]]:
        return self.photos, [f"photo-{i}" for i in range(len(self.photos))]


def _context(model: Oracle, images: Tensor) -> EvalContext:
    return _Photos(**vars(context_of(model)), photos=images)


def test_a_perfect_model_retrieves_the_truth(smooth_images: Tensor) -> None:
    chosen, extremes = retrieve(_context(Oracle(), smooth_images), SETTINGS)
    assert [len(row.retrievals) for row in chosen] == [2, 2, 2]
    for row in chosen:
        for shown in row.retrievals:
            assert (shown.rank, shown.label) == (1, "")
            assert torch.equal(shown.retrieved, shown.truth)
            assert not torch.equal(shown.truth, row.source)
    assert [row.key for row in extremes] == [row.key for row in chosen]


def test_best_and_worst_are_of_all_actions_and_say_so(smooth_images: Tensor) -> None:
    _, extremes = retrieve(_context(Blind(), smooth_images), SETTINGS)
    for row in extremes:
        assert [(shown.label, shown.rank) for shown in row.retrievals] == [("best", 1), ("worst", 32)]
        best, worst = row.retrievals
        assert torch.equal(best.retrieved, best.truth)
        assert not torch.equal(worst.retrieved, worst.truth)


def test_another_seed_chooses_other_photographs_and_actions(smooth_images: Tensor) -> None:
    context = _context(Oracle(), smooth_images)
    actions = [
        [[shown.action for shown in row.retrievals] for row in retrieve(context, replace(SETTINGS, seed=seed))[0]]
        for seed in (0, 0, 1)
    ]
    assert actions[0] == actions[1] != actions[2]


def test_extremes_have_a_figure_and_a_place_of_their_own(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--bank.num-images", "2", "--bank.num-views", "16", "--seed", "3")
    monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", "retrieval", "--checkpoint", str(run), *arguments])
    main()
    result = json.loads((run / "eval" / "retrieval.json").read_bytes())
    assert {path.name for path in (run / "eval").iterdir()} == {"retrieval.json", "retrieval.zip"}
    assert [figure["folded"] for figure in result["figures"]] == [False, True]
    labels = [[shown["label"] for shown in row["actions"]] for row in result["extremes"]]
    assert labels == [["best", "worst"]] * 2
    assert not any("label" in shown for row in result["photographs"] for shown in row["actions"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "worst of 16" in printed
    assert "random, seed 3" in printed
    page = (run / "report.html").read_text()
    assert "Images and actions are random (seed 3)" in page
    assert "Not random" in page


def test_every_image_says_what_it_shows_and_a_retrieved_true_view_is_marked(
    smooth_images: Tensor,
) -> None:
    for model, hits in ((Oracle(), True), (Blind(), False)):
        rows, _ = retrieve(_context(model, smooth_images), SETTINGS)
        group = figure(rows, 32, "title", "caption").groups[0]
        photograph, *shown = (column.tiles[0] for block in group.blocks for column in block.columns)
        assert photograph.alt == f"photograph {rows[0].key}"
        for nearest, truth, retrieval in zip(shown[::2], shown[1::2], rows[0].retrievals, strict=True):
            assert torch.equal(nearest.image, retrieval.retrieved)
            assert torch.equal(truth.image, retrieval.truth)
            assert nearest.marked == hits == ("which is the true view" in nearest.alt)
            assert nearest.alt.startswith(f"photograph {rows[0].key}, {retrieval.action}: view nearest")
            assert truth.alt.endswith(f"true view, rank {retrieval.rank:g} of 32")
            assert (f"{retrieval.retrieved_action}; the true view has rank" in nearest.alt) != hits
