"""Small real runs to make pages of, a browser to open them in, and results of one's own with their tables."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser

from iwm.config import Config
from iwm.evaluation import explorer
from iwm.evaluation.registry import EVALUATORS
from iwm.evaluation.settings import BankSettings, RetrievalSettings
from iwm.protocols import evaluate
from tests.evaluation.conftest import config, shards, untrained
from tests.report.explored import VALUES, Opened, Truth, open_page
from tools.screenshot import NoBrowser, chromium

__all__ = ["config", "shards", "untrained", "with_tables"]


def with_tables(result: dict[str, Any]) -> dict[str, Any]:
    """A result as iwm/evaluate.py writes it."""
    return {**result, "tables": [asdict(table) for table in EVALUATORS[result["protocol"]].tables(result)]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(chromium())
        except NoBrowser as error:
            pytest.skip(str(error))
        yield opened


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    """A run that was explored: two photographs, 3⁴ views. Its model is untrained, but heeds the action."""
    folder = untrained(tmp_path_factory.mktemp("explored") / "small", config)
    checkpoint = next((folder / "checkpoints").iterdir())
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["predictor.action_mixer.fc1.weight"][:, config.predictor.embed_dim :] *= 100
    torch.save(content, checkpoint)
    evaluate("explorer", explorer.ExplorerSettings(checkpoint=folder, num_images=2, num_values=VALUES))
    stored = folder / "eval" / "explorer.npz"
    arrays = dict(np.load(stored))
    arrays["points"][:, 0, 40] = arrays["points"][:, 0, 41]  # so that ties occur
    np.savez(stored, **arrays)
    bank = BankSettings(num_images=2, num_views=8)
    evaluate("retrieval", RetrievalSettings(checkpoint=folder, bank=bank, num_actions=1))
    return folder


@pytest.fixture(scope="module")
def truth(explored: Path) -> Truth:
    arrays = np.load(explored / "eval" / "explorer.npz")
    return Truth(json.loads((explored / "eval" / "explorer.json").read_bytes()), arrays["points"], arrays["norms"])


@pytest.fixture
def opened(browser: Browser, explored: Path) -> Iterator[Opened]:
    """The page on a desktop; after every test, without a word on the console or a request to anywhere."""
    opened = open_page(browser, explored, 1280, "light")
    yield opened
    opened.page.context.close()
    assert opened.errors == []
    assert opened.requests == []
