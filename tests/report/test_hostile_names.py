"""Nothing from a run's files becomes markup, and no folder of the machine is on the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from iwm.config_io import to_yaml
from iwm.recipes import demo
from iwm.report.page import write_page, write_report
from iwm.report.short_paths import short_paths, short_paths_of_yaml
from tests.report.conftest import with_tables

HOSTILE = """<script>alert('1')</script>"'><img src=x onerror=alert(2)>{{ 7*7 }}{% x %}"""
IN_A_FILE_NAME = HOSTILE.replace("/", "∕")
FOLDER = "/home/someone/my photos/secret"


def _scores(value: float) -> dict[str, Any]:
    score = {"mean": value, "standard_error": 0.0125}
    return {distance: dict.fromkeys(("teacher", "student"), score) for distance in ("pooled", "per_token")}


def _run(parent: Path, name: str) -> Path:
    """Write a run whose every text is hostile and whose every path is absolute."""
    folder = parent / name
    (folder / "eval").mkdir(parents=True)
    config = to_yaml(demo()).replace("data/demo/shards", f"{FOLDER}/shards")
    (folder / "config.yaml").write_text(f"# {HOSTILE}\n{config}")
    lines = [{"step": step, "loss": 1 / step, HOSTILE: 1.0, "skipped": 3} for step in (1, 2, 3)]
    lines += [{"step": 3, f"null {HOSTILE}": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    part = {"started": HOSTILE, "first_step": 0, "last_step": 3, "seconds": 1.0, "device": HOSTILE, "processes": 1}
    part |= {"cores": 2, "commit": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    record = {"images": 5, "parameters": {"encoder": 7}, "segments": [part]}
    (folder / "run.json").write_text(json.dumps(record))
    origin = {
        "checkpoint": f"{FOLDER}/checkpoints/{HOSTILE.replace('/', '')}.pt",
        "data": {
            "shards": f"{FOLDER}/shards",
            "split": HOSTILE,
            "held_out": False,
            "note": f"{FOLDER}/shards has no split {HOSTILE}: see /var/lib/hidden/manifest.json",
        },
        "notes": [HOSTILE],
        "settings": {"output": f"{FOLDER}/eval/x.json", HOSTILE: HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "device": HOSTILE,
    }
    figures = {"images": 12, "bank": 256, "chance": 0.024, "mrr": _scores(0.3), "shuffled_actions": _scores(0.02)}
    recall = {"at_1": _scores(0.2), "at_5": _scores(0.5)}
    mrr = with_tables({"protocol": "mrr", **origin, **figures, "recall": recall})
    table = {"title": HOSTILE, "columns": [HOSTILE, "MRR"], "rows": [[HOSTILE, HOSTILE]], "caption": HOSTILE}
    mrr["tables"].append({**table, "caption": f"{HOSTILE}\n{HOSTILE}"})
    left_out = {"knn": f"{FOLDER}/shards: {HOSTILE}"}
    world_model = {"protocol": "world-model", **origin, "left_out": left_out, "tables": []}
    for file, result in {IN_A_FILE_NAME: mrr, "mrr": mrr, "world-model": world_model}.items():
        (folder / "eval" / f"{file}.json").write_text(json.dumps(result))
    return folder


class _Page(HTMLParser):
    """Tags and attributes of a page, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(params=[1, 2], ids=["one run", "two runs"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    runs = [_run(tmp_path, f"{i} {IN_A_FILE_NAME}") for i in range(request.param)]
    for run in runs:
        write_report(run)
    return write_page(runs, tmp_path / "page.html").read_text()


def test_hostile_names_are_text(page: str) -> None:
    parsed = _Page(page)
    assert parsed.tags.count("script") == 1
    assert "img" not in parsed.tags
    assert not {name for name in parsed.attributes if name.startswith("on")}
    assert parsed.text.count("<img src=x onerror=alert(2)>{{ 7*7 }}{% x %}") > 20


def test_no_folder_of_the_machine_is_named(page: str, tmp_path: Path) -> None:
    for hidden in ("/home", "someone", "my photos", "/var/lib", str(tmp_path)):
        assert hidden not in page
    assert "…/secret/shards" in page
    assert "…/hidden/manifest.json" in page


def test_paths_are_shortened_and_other_texts_stay() -> None:
    before = {"shards": "/a b/c/d", "note": "/a b/c/d has 3 images/s, see (/x/y/z.json); 1/2 and/or /n"}
    assert short_paths(before) == {"shards": "…/c/d", "note": "…/c/d has 3 images/s, see (…/y/z.json); 1/2 and/or /n"}
    assert short_paths({"steps": 3, "rows": [["data/photos", None]]}) == {"steps": 3, "rows": [["data/photos", None]]}
    assert short_paths_of_yaml("data:\n  shards: /a b/c/d\n  x: '/a: b/c/d'\n") == (
        "data:\n  shards: …/c/d\n  x: '…/c/d'\n"
    )
