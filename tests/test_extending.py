"""The diffs of docs/extending.md, applied to a copy of the source, add two ops and a conditioning that work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from dali_pipelines.augmentations import DESTRUCTIVE_OPS, OPS, PhotometricConfig
from dali_pipelines.photometric import DESTRUCTIVE_MATHS
from dali_pipelines.replay import DESTRUCTIVE_MATHS as REPLAYED
from iwm.model_config import ActionConfig
from iwm.models.predictor import CONDITIONING

ROOT = Path(__file__).parents[1]
DIFF = re.compile(r"^`(\S+)`\n\n```diff\n(.*?)```$", re.DOTALL | re.MULTILINE)


def edits(section: str) -> list[tuple[str, str]]:
    """Return path and diff of each edit below a second-level heading."""
    text = (ROOT / "docs" / "extending.md").read_text()
    return DIFF.findall(text.split(f"\n## {section}\n")[1].split("\n## ")[0])


def apply(folder: Path, path: str, diff: str) -> None:
    lines = [(line[:1], line[1:]) for line in diff.splitlines()]
    before, after = ("".join(f"{text}\n" for sign, text in lines if sign in (" ", "", keep)) for keep in "-+")
    source = (folder / path).read_text()
    assert source.count(before) == 1, f"{path}: must contain the context of docs/extending.md exactly once:\n{before}"
    (folder / path).write_text(source.replace(before, after))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extended")
    for package in ("iwm", "dali_pipelines", "shards", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "*.tar", "results")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    for path, diff in (*edits("A photometric op"), *edits("A conditioning")):
        apply(folder, path, diff)
    return folder


def test_an_op_touches_three_files_and_a_conditioning_two() -> None:
    touched: dict[str, set[str]] = defaultdict(set)
    for section in ("A photometric op", "A conditioning"):
        touched[section] = {path for path, _ in edits(section)}
    names = ("augmentations", "photometric", "replay")
    assert touched["A photometric op"] == {f"dali_pipelines/{name}.py" for name in names}
    assert touched["A conditioning"] == {"iwm/models/predictor.py", "iwm/model_config.py"}


def test_duplicated_declarations_agree() -> None:
    assert set(DESTRUCTIVE_MATHS) == set(REPLAYED) == {op.name for op in DESTRUCTIVE_OPS}
    assert get_args(get_type_hints(ActionConfig)["conditioning"]) == tuple(CONDITIONING)
    assert len({kind.module_name for kind in CONDITIONING.values()}) == len(CONDITIONING)
    for op in OPS:
        assert 0 <= PhotometricConfig().probability(op) <= 1


def test_the_added_ops_and_the_added_conditioning_work(extended: Path, tmp_path: Path) -> None:
    script = ROOT / "tests" / "extended_run.py"
    paths = (extended, extended / "benchmarks", ROOT / "tests" / "dali_pipelines")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], cwd=extended, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "works"
