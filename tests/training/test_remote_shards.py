"""Training on shards at a URL: the parameters of a training on the folder, through faults, kills and lost caches."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from fault_server import serving

from iwm.training.checkpoint import list_checkpoints, load_newest
from tests.training.runs import assert_same, command, finish, metrics, start
from tests.training.test_resume import wait_for_step


def test_a_training_that_loses_its_cache_in_mid_epoch_ends_in_the_folders_parameters(
    tiny_shards: Path, tmp_path: Path
) -> None:
    steps = 60
    finish(command(tiny_shards, tmp_path / "disk", steps))
    cache = tmp_path / "cache"
    with serving(tiny_shards) as server:
        server.plan = [("train-000001.tar", "corrupt"), ("train-000002.tar", "reset"), ("train-000003.idx", "truncate")]
        line = command(server.url, tmp_path / "url", steps, "--data.cache", str(cache))
        killed = start(line)
        wait_for_step(tmp_path / "url", 15, killed)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        assert list_checkpoints(tmp_path / "url"), "nothing was saved before the kill"
        shutil.rmtree(cache)
        server.plan += [("train-000000.tar", "busy")]
        cache = tmp_path / "another"
        output = finish(
            command(server.url, tmp_path / "url", steps, "--data.cache", str(cache), "--data.cache-gb", "1")
        )
        assert not server.plan, "not all faults were met"
    assert "resuming from step" in output
    assert f"are copied to {cache}" in output
    assert "at most 1 GB at a time" in output
    assert "data.cache_gb: None → 1.0" in output
    one, other = load_newest(tmp_path / "disk"), load_newest(tmp_path / "url")
    assert one is not None
    assert other is not None
    assert_same(one.model, other.model)
    assert_same(one.optimizer, other.optimizer)
    assert other.config.data.shards == server.url
    assert {line["staged"] for line in metrics(tmp_path / "url") if "loss" in line} == {1.0}
    assert "staged" not in metrics(tmp_path / "disk")[0]


def test_processes_of_a_machine_share_a_cache(tiny_shards: Path, tmp_path: Path) -> None:
    with serving(tiny_shards) as server:
        finish(command(server.url, tmp_path / "run", 4, "--data.cache", str(tmp_path / "cache"), processes=2))
        tars = [answer.name for answer in server.served if answer.name.endswith(".tar")]
    assert len(tars) == len(set(tars)), "a shard was fetched by both"


def test_a_url_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    output = finish(command("nothing://bucket/shards", tmp_path / "run", 4), expect=1)
    assert "nothing://bucket/shards/manifest.json: Protocol not known" in output
    assert "Traceback" not in output


@pytest.mark.long
def test_fifty_faults_of_a_server_a_kill_and_s3_change_no_parameter(tmp_path: Path) -> None:
    output = finish([sys.executable, "benchmarks/remote_training.py", str(tmp_path / "out"), "--faults", "50"])
    assert output.count("bit for bit the same") == 3
