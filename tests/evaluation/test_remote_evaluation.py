"""Evaluation on shards at a URL: the scores of the folder, and results that name the URL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import serving
from test_what_is_there import FEW

from iwm.evaluation.common import load_eval_context
from iwm.evaluation.settings import EvalData, EvalSettings
from iwm.protocols import evaluate
from iwm.ranges import ConfigError


def test_the_scores_are_those_of_the_folder_and_the_result_names_the_url(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    with serving(shards) as server:
        data = EvalData(server.url, cache=tmp_path / "cache")
        there = evaluate("mrr", replace(FEW["mrr"], checkpoint=run, data=data))
    here = evaluate("mrr", replace(FEW["mrr"], checkpoint=run))
    assert there["mrr"] == here["mrr"]
    assert there["data"]["shards"] == server.url
    assert list((tmp_path / "cache").glob("*/val-*.tar"))


def test_a_split_that_is_not_at_the_url_is_refused_by_the_url(run: Path, shards: Path, tmp_path: Path) -> None:
    with serving(shards) as server:
        data = EvalData(server.url, "test", cache=tmp_path)
        with pytest.raises(ConfigError, match=rf"--data\.split test: {server.url} has no split 'test'; use one of"):
            load_eval_context(EvalSettings(run, data=data, device="cpu"))
