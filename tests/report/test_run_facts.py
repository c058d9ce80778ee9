"""The page says which run it shows: from its record, or, for a run of an older version, from its other files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from iwm.config_io import to_yaml
from iwm.recipes import demo, with_scenario
from iwm.report.run_facts import facts
from iwm.report.runs import read_run
from iwm.training.run_record import RECORD


def _run(folder: Path, config: str) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    line = {"step": 2000, "loss": 0.4, "samples": 128_000, "epoch": 31.25}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def _segment(first: int, last: int, seconds: float, device: str) -> dict[str, Any]:
    program = {"commit": "abc123", "versions": {"iwm": "1.2", "torch": "2.14"}}
    when = {"started": "2026-11-27T02:00:00+00:00", "first_step": first, "last_step": last, "seconds": seconds}
    return {**when, "device": device, "processes": 1, "cores": 2, **program}


def test_a_recorded_run_names_data_length_model_machine_duration_and_program(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", to_yaml(demo()))
    segments = [_segment(0, 500, 120.0, "cpu (x86_64)"), _segment(500, 2000, 600.0, "NVIDIA H100")]
    record = {"images": 4096, "parameters": {"encoder": 850_000, "predictor": 700_000}, "segments": segments}
    (run / RECORD).write_text(json.dumps(record))
    assert dict(facts(read_run(run))) == {
        "data": "data/demo/shards, split 'train': 4,096 images",
        "training": "2,000 steps of 64 images: 128,000 images seen, 31.25 epochs",
        "settings": "recipe demo",
        "views": "32 px, the paper's augmentations (A.1), conditioning feature",
        "model": "ViT 4×128, patch 8 (0.8 M parameters); predictor 6×96 (0.7 M parameters)",
        "hardware": "cpu (x86_64), 1 process, 2 cores; then NVIDIA H100, 1 process, 2 cores",
        "duration": "12 min for 2,000 steps in 2 starts; started 2026-11-27",
        "program": "commit abc123; iwm 1.2, torch 2.14",
    }


def test_a_run_of_an_older_version_says_what_its_files_do_not_record(tmp_path: Path) -> None:
    shown = dict(facts(read_run(_run(tmp_path / "run", to_yaml(demo())))))
    assert shown["data"] == "data/demo/shards, split 'train': 4,096 images"
    assert {shown[name] for name in ("hardware", "duration", "program")} == {"not recorded"}
    assert shown["model"] == "ViT 4×128, patch 8; predictor 6×96"


def test_other_settings_than_the_recipes_are_named(tmp_path: Path) -> None:
    base = demo()
    changed = replace(base, optim=replace(base.optim, lr=0.001), data=replace(base.data, shards="/a/b/c/photos"))
    shown = dict(facts(read_run(_run(tmp_path / "run", to_yaml(changed)))))
    assert shown["settings"] == "recipe demo, with data.shards …/c/photos, optim.lr 0.001"


def test_a_control_and_views_beyond_the_paper_are_named(tmp_path: Path) -> None:
    config = with_scenario(demo(), "geometric")
    changed = replace(config, action=replace(config.action, shuffle=True))
    shown = dict(facts(read_run(_run(tmp_path / "run", to_yaml(changed)))))
    assert shown["views"] == "32 px, scenario geometric, conditioning feature on shuffled actions"


def test_a_configuration_of_another_version_is_said_to_be_so(tmp_path: Path) -> None:
    shown = dict(facts(read_run(_run(tmp_path / "run", "optim:\n  speed: 3\n"))))
    assert shown["model"] == "config.yaml is not one of this version"
