"""Model cards: data, recipe, scores of this checkpoint alone, limits, and metadata that the Hub reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from iwm.config import Config, DataConfig
from iwm.export.__main__ import ExportOptions, export
from tests.downstream.conftest import untrained
from tests.export.test_export import mrr

Leverage = Callable[..., dict[str, Any]]


def exported(run: Path, out: Path, **options: Any) -> tuple[str, ModelCardData]:
    """Export a run; return the card's text and its metadata, as huggingface_hub reads them."""
    export(ExportOptions(run, out, **options))
    card = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
    return card.text, card.data


def evaluate_mrr(run: Path) -> None:
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "mrr.json").write_text(mrr("elsewhere/checkpoints/step-000000007.pt"))


def test_scores_of_the_checkpoint_are_in_the_card_and_in_its_metadata(
    leverage: Leverage, run: Path, tmp_path: Path
) -> None:
    result = leverage("linear", lr=(10.0,))
    evaluate_mrr(run)
    text, data = exported(run, tmp_path / "model")
    top1 = next(iter(result["trials"].values()))["top1"]["mean"]
    # pytest numbers the folders of the shards, from which their name comes.
    assert re.search(rf"\| boxes\d* \| {100 * top1:.1f} ± ", text)
    assert "| 37.5 | 48 | 120 |" in text
    measured = {(entry.task_type, entry.metric_type, entry.metric_name): entry for entry in data.eval_results or []}
    accuracy = measured["image-classification", "accuracy", "top-1 accuracy, linear"]
    assert isinstance(accuracy, EvalResult)
    assert accuracy.metric_value == round(top1, 4)
    scores = {name: entry.metric_value for (_, kind, name), entry in measured.items() if kind == "mrr"}
    assert scores == {"MRR": 0.25, "MRR with shuffled actions": 0.25, "MRR by chance": 0.024}


def test_results_of_other_checkpoints_and_older_ones_are_left_out(
    leverage: Leverage, run: Path, tmp_path: Path
) -> None:
    leverage("linear", lr=(10.0,))
    result = run / "eval" / "linear.json"
    content = json.loads(result.read_text())
    result.write_text(json.dumps({**content, "checkpoint": "elsewhere/checkpoints/step-000000003.pt"}))
    text, data = exported(run, tmp_path / "model")
    assert "Downstream evaluation" not in text
    assert data.eval_results is None
    result.write_text(json.dumps(content))
    assert "Downstream evaluation" in exported(run, tmp_path / "model")[0]
    os.utime(result, (0, 0))
    assert "Downstream evaluation" not in exported(run, tmp_path / "model")[0]


def test_a_finetuned_encoders_card_has_no_scores_of_the_encoder_before(
    leverage: Leverage, run: Path, tmp_path: Path
) -> None:
    leverage("linear", lr=(10.0,))
    leverage("finetune-encoder")
    evaluate_mrr(run)
    text, data = exported(run, tmp_path / "model", head=run / "eval" / "finetune-encoder")
    assert data.eval_results is None
    assert "MRR" not in text
    assert "Protocol `finetune-encoder`" in text


def test_data_recipe_and_licence_are_stated(run: Path, small: Config, tmp_path: Path) -> None:
    text, data = exported(run, tmp_path / "model", license="cc-by-4.0")
    assert "120 images." in text
    assert "448 images seen (3.7 epochs)" in text
    assert f"AdamW with learning rate {small.optim.lr:g}" in text
    assert data.license == "cc-by-4.0"
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-feature-extraction"
    text, data = exported(run, tmp_path / "model")
    assert data.license is None
    assert "License: not stated" in text


def test_a_linear_heads_export_is_a_classifier_on_the_hub(leverage: Leverage, run: Path, tmp_path: Path) -> None:
    leverage("linear", lr=(10.0,))
    _, data = exported(run, tmp_path / "model", head=run / "eval" / "linear")
    assert data.pipeline_tag == "image-classification"


def test_where_the_shards_are_gone_the_card_says_so(small: Config, tmp_path: Path) -> None:
    run = untrained(tmp_path / "run", replace(small, data=DataConfig(shards=str(tmp_path / "gone"))))
    assert "the number of images is not known" in exported(run, tmp_path / "model")[0]


def test_the_terminal_says_once_which_score_is_missing(run: Path, tmp_path: Path) -> None:
    def printed() -> list[str]:
        command = [sys.executable, "tools/export.py", str(run), str(tmp_path / "model")]
        root = Path(__file__).parents[2]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()

    missing = (
        f"the card has no MRR of step-000000007.pt: run iwm evaluate mrr --checkpoint {run} first, and export again"
    )
    assert printed() == [f"written: {tmp_path / 'model'}", missing]
    assert "Not measured: run `iwm evaluate mrr" in (tmp_path / "model" / "README.md").read_text()
    evaluate_mrr(run)
    assert printed() == [f"written: {tmp_path / 'model'}"]
