"""Evaluations of runs whose shards lack labels, a validation split, or images: what can be done is done, and said."""

from __future__ import annotations

import html
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dali_pipelines.loader import ViewLoader
from iwm import protocols
from iwm.config import Config, ConfigError
from iwm.evaluate import main, parse
from iwm.evaluation.action_settings import CompositionSettings, InferActionSettings
from iwm.evaluation.common import load_eval_context
from iwm.evaluation.held_out import MissingDataError
from iwm.evaluation.registry import EVALUATORS, Evaluator
from iwm.evaluation.settings import (
    BankSettings,
    CorruptionSettings,
    EvalData,
    EvalSettings,
    ExplorerSettings,
    FeatureMapSettings,
    KNNSettings,
    LinearSettings,
    MarginalisationSettings,
    MRRSettings,
    RetrievalSettings,
    SimilaritySettings,
    SweepSettings,
)
from iwm.protocols import evaluate
from iwm.search_settings import GradientSettings
from iwm.training.checkpoint import load_checkpoint, save_checkpoint
from shards.make import ShardingOptions, make_shards
from shards.plan import ShardSize
from tests.evaluation.conftest import mistake, untrained

QUICK: dict[str, Any] = {"num_views": 8}
FEW = {
    "mrr": MRRSettings(Path(), bank=BankSettings(**QUICK)),
    "retrieval": RetrievalSettings(Path(), bank=BankSettings(num_images=6, **QUICK)),
    "parameter-sweep": SweepSettings(Path(), num_values=2, num_sigmas=2),
    "corruptions": CorruptionSettings(Path(), bank=BankSettings(**QUICK), num_queries=4, strengths=(1.0,)),
    "composition": CompositionSettings(Path(), bank=BankSettings(**QUICK), num_queries=4, passes=2),
    "infer-action": InferActionSettings(Path(), num_targets=2, gradient=GradientSettings(points=4, starts=1, steps=1)),
    "explorer": ExplorerSettings(Path(), num_values=2),
    "similarity": SimilaritySettings(Path(), num_views=2),
    "marginalisation": MarginalisationSettings(Path(), bank=BankSettings(**QUICK), predictions=(1,), nearest=2),
    "feature-maps": FeatureMapSettings(Path()),
    "knn": KNNSettings(Path(), k=(1,)),
}
"""Settings of every evaluator with their default numbers of images, or more than there are, and few views."""

FOR_FIGURES = ("retrieval", "explorer", "feature-maps")
"""Evaluators that need one image; the others have standard errors, or need labels."""


def _shards(folder: Path, split: str, images: int, column: str | None = None) -> Path:
    """Make a split of small pictures from a table without labels, or with one column of two classes."""
    rows = [f"path,{column}" if column else "path"]
    for number in range(images):
        path = folder / "source" / f"{split}-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number + 1000 * len(split)).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        rows.append(f"{path.name},{'ab'[number % 2]}" if column else path.name)
    table = folder / "source" / f"{split}.csv"
    table.write_text("\n".join(rows) + "\n")
    options = ShardingOptions(str(table), folder / "shards", split, workers=1, shard=ShardSize(min_shards=1))
    make_shards(options, Console(quiet=True))
    return folder / "shards"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder with a train split of two images, and nothing else."""
    return _shards(tmp_path_factory.mktemp("bare"), "train", 2)


@pytest.fixture
def bare_run(tmp_path: Path, config: Config, bare: Path) -> Path:
    return _run(tmp_path / "run", config, bare)


def _run(folder: Path, config: Config, shards: Path, val: str | None = "val") -> Path:
    return untrained(folder, replace(config, data=replace(config.data, shards=str(shards), val=val)))


def _only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make these the only evaluators that world-model runs."""
    monkeypatch.setattr(protocols, "EVALUATORS", {name: EVALUATORS[name] for name in names})


def _world_model(monkeypatch: pytest.MonkeyPatch, run: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", "world-model", "--checkpoint", str(run), *arguments])
    assert not main()  # exit status 0


def _read(run: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "eval" / f"{name}.json").read_bytes())
    return result


def _section(page: str, title: str) -> str:
    """Return the text of a section of a page; '' where it has none."""
    _, found, rest = page.partition(f"<h2>{title}</h2>")
    return _text(rest.partition("</section>")[0]) if found else ""


def _text(page: str) -> str:
    """Return the text of HTML."""
    return html.unescape(re.sub(r"<.*?>", "", page))


def test_world_model_succeeds_without_labels_and_without_held_out_images_and_says_so(
    bare_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _world_model(monkeypatch, bare_run)
    said = capsys.readouterr()
    first, *_ = said.out.splitlines()
    assert "has no split 'val': evaluated on split 'train', on which the model was trained" in first
    assert "--val-fraction 0.05" in first
    assert "note: 2 of at most 64 images: split 'train' has no more" in said.out.splitlines()
    left_out = [line for line in said.out.splitlines() if line.startswith("left out: ")]
    names = ["infer-action, regressor", "marginalisation, linear accuracy", "knn"]
    assert [line.split(": ")[1] for line in left_out] == names
    assert "trained and evaluated on the same images, split 'train'" in left_out[0]
    assert all("has no labels" in line for line in left_out[1:])
    assert said.err == ""
    done = {path.stem for path in (bare_run / "eval").glob("*.json")}
    assert done == set(EVALUATORS) - {"knn"} | {"world-model"}
    for name in sorted(set(EVALUATORS) - {"knn"}):
        assert _read(bare_run, name)["data"]["split"] == "train"
        assert not _read(bare_run, name)["data"]["held_out"]
        assert "--data.shards FOLDER" in _read(bare_run, name)["data"]["note"]
    assert _read(bare_run, "marginalisation")["linear"] is None
    assert list(_read(bare_run, "world-model")["left_out"]) == ["knn"]
    page = (bare_run / "report.html").read_text()
    assert 'class="warning"' in page
    assert "± 0.000, training images" in _text(page)
    assert ", held-out images" not in _text(page)
    assert "2 of at most 128 images" in _section(page, "Similarity of augmented views")
    assert re.search(r"Left out: split 'train' .*has no labels", _section(page, "Nearest neighbours"))
    assert re.search(r"Left out, linear accuracy: .*has no labels", _section(page, "Marginalised representations"))


def test_what_is_run_later_is_no_longer_left_out_and_an_earlier_result_says_that_it_is_one(
    tmp_path: Path, config: Config, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only(monkeypatch, "knn")
    whole = _shards(tmp_path, "train", 6, "label")
    _shards(tmp_path, "val", 4, "label")
    run = _run(tmp_path / "run", config, whole)

    def page() -> str:
        return (run / "report.html").read_text()

    evaluate("knn", KNNSettings(run, k=(1,)))
    assert "Earlier result" not in page()
    # The data of the last command have no labels, so the page still has the result above.
    _world_model(monkeypatch, run, "--data.shards", str(bare))
    earlier = r"Earlier result: the last world-model left this evaluator out: split 'train' .*has no labels"
    assert re.search(earlier, _section(page(), "Nearest neighbours"))
    evaluate("knn", KNNSettings(run, k=(1,), output=tmp_path / "elsewhere.json"))
    assert re.search(earlier, _section(page(), "Nearest neighbours"))
    evaluate("knn", KNNSettings(run, k=(1,)))
    assert "Left out" not in page()
    assert "Earlier result" not in page()


def test_a_label_that_the_user_names_and_the_shards_lack_is_an_error_after_the_others_ran(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _only(monkeypatch, "knn", "feature-maps")
    shards = _shards(tmp_path, "train", 6, "colour")
    _shards(tmp_path, "val", 4, "colour")
    run = _run(tmp_path / "run", config, shards)
    said = mistake(monkeypatch, "world-model", "--checkpoint", str(run), "--label", "mood")
    assert said.endswith("skipped, for the reasons above: knn")
    errors = capsys.readouterr().err
    assert "knn: split 'train' has no label column 'mood'; it has ['colour']; use another --label (iwm" in errors
    assert _read(run, "feature-maps")["data"] == {"shards": str(shards), "split": "val", "held_out": True}
    assert "mood" in _section((run / "report.html").read_text(), "Nearest neighbours")
    # Without --label, the default column is not there: that is no error.
    _world_model(monkeypatch, run)
    assert list(_read(run, "world-model")["left_out"]) == ["knn"]
    assert "['colour']" in _read(run, "world-model")["left_out"]["knn"]
    _world_model(monkeypatch, run, "--label", "colour")
    assert _read(run, "world-model")["left_out"] == {}


def test_marginalisation_refuses_only_labels_that_were_named(tmp_path: Path, config: Config) -> None:
    run = _run(tmp_path / "run", config, _shards(tmp_path, "train", 6, "colour"))
    _shards(tmp_path, "val", 4, "colour")
    settings = replace(FEW["marginalisation"], checkpoint=run)
    assert isinstance(settings, MarginalisationSettings)
    with pytest.raises(
        ConfigError, match=r"no label column 'mood'; it has .*; use another --probe.label, or use --no-"
    ):
        evaluate("marginalisation", replace(settings, probe=LinearSettings(label="mood")))
    result = evaluate("marginalisation", settings)
    assert result["linear"] is None
    assert "no label column 'label'" in result["left_out"]["linear accuracy"]
    result = evaluate("marginalisation", replace(settings, probe=LinearSettings(label="colour")))
    assert (result["left_out"], result["linear"]["label"]) == ({}, "colour")


@pytest.mark.parametrize("name", [name for name in EVALUATORS if name != "knn"])
def test_every_evaluator_uses_the_fewer_images_that_there_are(bare_run: Path, name: str) -> None:
    result = evaluate(name, replace(FEW[name], checkpoint=bare_run))
    [note] = result["notes"]
    assert note.startswith("2 of at most ")
    assert note in _text((bare_run / "report.html").read_text())


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_single_image_is_enough_for_figures_and_too_few_for_standard_errors(
    tmp_path: Path, config: Config, name: str
) -> None:
    run = _run(tmp_path / "run", config, _shards(tmp_path, "train", 4, "label"))
    _shards(tmp_path, "val", 1, "label")
    settings: EvalSettings = replace(FEW[name], checkpoint=run)
    if name in FOR_FIGURES:
        assert evaluate(name, settings)["notes"]
    else:
        with pytest.raises(MissingDataError, match=r"'val' of .* has 1 image, at least 2 are needed; use --data.split"):
            evaluate(name, settings)


def test_images_for_classifiers_are_as_many_as_there_are(tmp_path: Path, config: Config) -> None:
    run = _run(tmp_path / "run", config, _shards(tmp_path, "train", 6, "label"))
    _shards(tmp_path, "val", 2, "label")
    bank = BankSettings(num_images=2, num_views=8)
    settings = MarginalisationSettings(run, bank=bank, predictions=(1,), nearest=2, probe=LinearSettings())
    result = evaluate("marginalisation", settings)
    assert (result["linear"]["train_images"], result["linear"]["val_images"]) == (6, 2)
    assert result["notes"] == [
        "6 of at most 256 labelled images: split 'train' has no more",
        "2 of at most 128 labelled images: split 'val' has no more",
    ]
    assert evaluate("knn", KNNSettings(run))["val_images"] == 2


def test_a_classifier_is_not_evaluated_on_the_images_that_it_is_fitted_on(tmp_path: Path, config: Config) -> None:
    run = _run(tmp_path / "run", config, _shards(tmp_path, "train", 6, "label"), val=None)
    with pytest.raises(
        MissingDataError, match=r"on the same images, split 'train'; use --train NAME, --data.split NAME"
    ):
        evaluate("knn", KNNSettings(run))
    result = evaluate("marginalisation", replace(FEW["marginalisation"], checkpoint=run))
    assert "on the same images" in result["left_out"]["linear accuracy"]
    assert "use --probe.train NAME" in result["left_out"]["linear accuracy"]
    assert result["left_out"]["linear accuracy"].endswith("(iwm evaluate marginalisation)")


def _trained_on(run: Path, shards: Path) -> None:
    """Store the state of a loader of `shards` in the run's checkpoint, as training does."""
    checkpoint = load_checkpoint(run)
    loader = ViewLoader(shards, "train", replace(checkpoint.config.views, size=32), batch_size=2, seed=0)
    checkpoint.loader = {"seed": 0, "ranks": [loader.state_dict()]}
    save_checkpoint(run, checkpoint)


def test_images_count_as_held_out_where_the_model_was_trained_on_others(
    tmp_path: Path, config: Config, bare: Path
) -> None:
    own, moved = _shards(tmp_path / "own", "train", 4), tmp_path / "moved"
    run = _run(tmp_path / "run", config, own, val=None)
    _trained_on(run, own)
    own.rename(moved)
    cases: list[tuple[EvalData, bool]] = [
        (EvalData(str(moved)), False),
        (EvalData(str(moved), "train"), False),
        (EvalData(str(bare)), True),
        (EvalData(str(bare), "train"), True),
    ]
    for given, held_out in cases:
        data = load_eval_context(EvalSettings(run, data=given, device="cpu")).data
        assert (data.split, data.held_out) == ("train", held_out)
        # Other images under the name that was given need no explanation.
        assert (data.note is None) == (held_out and given.split is not None)


def test_the_only_split_of_other_shards_is_evaluated_and_several_need_a_choice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _shards(tmp_path, "holidays", 2)
    data = load_eval_context(EvalSettings(run, data=EvalData(str(other)), device="cpu")).data
    assert (data.split, data.held_out) == ("holidays", True)
    assert data.note == f"{other} has no split 'val': evaluated on split 'holidays'"
    _shards(tmp_path, "work", 2)
    said = mistake(monkeypatch, "mrr", "--checkpoint", str(run), "--data.shards", str(other))
    assert said == f"{other} has no split 'val' or 'train'; use --data.split with one of ['holidays', 'work']"


def test_a_training_split_that_is_named_gives_the_same_scores_and_the_warning(bare_run: Path, bare: Path) -> None:
    by_default = evaluate("mrr", replace(FEW["mrr"], checkpoint=bare_run))
    named = evaluate("mrr", replace(FEW["mrr"], checkpoint=bare_run, data=EvalData(str(bare), "train")))
    assert by_default["mrr"] == named["mrr"]
    assert named["data"]["note"].startswith("evaluated on split 'train', on which the model was trained")


def test_a_device_out_of_memory_is_told_with_an_option_that_the_evaluator_has(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB")

    _only(monkeypatch, "similarity", "mrr", "feature-maps")
    monkeypatch.setattr(Evaluator, "evaluate", full)
    assert mistake(monkeypatch, "world-model", "--checkpoint", str(run)).endswith("similarity, mrr, feature-maps")
    lines = capsys.readouterr().err.splitlines()
    options = ("--batch-size", "--bank.batch-size", "--num-images")
    assert [line.partition("lower ")[2].split()[0] for line in lines] == list(options)
    for name, option in zip(("similarity", "mrr", "feature-maps"), options, strict=True):
        assert parse([name, "--checkpoint", "x", option, "8"])[0] == name
