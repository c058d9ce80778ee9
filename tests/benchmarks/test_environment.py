"""Environment info without tools and packages, and GPU samples where there is a GPU."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import clocks as sampling
import environment as facts
import pytest
from clocks import gpu_monitor
from environment import environment_info, packages


def test_a_machine_without_git_and_gpu_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment_info()
    assert found["commit"] == "unknown"
    assert found["driver"] is None
    assert found["cores"] > 0


@pytest.mark.parametrize(
    ("installed", "dali"),
    [
        ({"nvidia-dali-cuda120": "2.1"}, {"nvidia-dali-cuda120": "2.1"}),
        ({"nvidia-dali-cuda130": "2.4"}, {"nvidia-dali-cuda130": "2.4"}),
        ({}, {"nvidia-dali": None}),
    ],
)
def test_packages_are_named_by_what_is_installed(
    installed: dict[str, str], dali: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(facts, "version", version)
    found = packages()
    assert {name: value for name, value in found.items() if "dali" in name} == dali
    assert found["timm"] is None


NVIDIA_SMI = """#!/bin/sh
case "$2" in
  *event_reasons*,*|*,*event_reasons*) echo "a time, 1980, 2619, 412.50, 61, 99, 70123, 0x0000000000000004" ;;
  *event_reasons*) echo 0x0 ;;
  *) echo "[N/A]" ;;
esac
"""


def test_clocks_are_written_and_summarised_by_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sampling, "EVERY", 1000.0)
    with gpu_monitor(tmp_path / "gpu.csv") as (watch, reason):
        assert reason == ""
        watch.begin("train")
        assert watch.summary() is None
        for _ in range(2):
            watch.sample()
        found = watch.summary()
    assert found is not None
    assert found["samples"] == 2
    assert found["power_w"] == {"min": 412.5, "median": 412.5, "max": 412.5}
    assert found["throttled"] == {"power cap": 2}
    heading, before, *rows = (tmp_path / "gpu.csv").read_text().splitlines()
    assert heading.startswith("check,timestamp,sm_clock_mhz")
    assert before.startswith(",a time")
    assert [row.partition(",")[0] for row in rows] == ["train", "train"]


def test_a_machine_without_nvidia_smi_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with gpu_monitor(tmp_path / "gpu.csv") as (watch, reason):
        assert reason == "nvidia-smi was not found"
        assert watch.summary() is None
    assert not (tmp_path / "gpu.csv").exists()
