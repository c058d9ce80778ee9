"""Shards made on a Ray cluster: the bytes of worker processes, lost workers and nodes, mistakes in one line."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from ray_nodes import RayNode, count_slowly, descendants, die, fail, ray_head, ray_node, refuse
from rich.console import Console
from shard_sources import contents, encoded, photo, slow_images
from test_shard_interruption import is_gone, kill_once, records, wait_for

from shards.errors import ShardError
from shards.images import codec_versions
from shards.ray_task import NodeRequirements
from shards.ray_workers import ATTEMPTS, RayDistributor
from shards.workers import ProgressCount

ROOT = Path(__file__).parents[2]
SHARDS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slow_images(tmp_path_factory.mktemp("source") / "src")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNode]:
    with ray_head(cpus=2) as head:
        yield head


def start(source: Path, out: Path, environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    """Start the command in the source's folder, with relative paths; Ray's nodes have another working folder."""
    options = () if "--min-shards" in more else ("--min-shards", str(SHARDS))
    arguments = [source.name, os.path.relpath(out, source.parent), *options, *more]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "make_shards.py"), *arguments],
        cwd=source.parent,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def of_processes(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the content of a shard folder that worker processes have made without interruption."""
    out = tmp_path_factory.mktemp("processes") / "out"
    finish(start(source, out, dict(os.environ)))
    return contents(out)


def test_shards_are_those_of_processes_and_images_are_counted_once_though_a_worker_dies(
    source, of_processes, cluster, tmp_path
):
    out = tmp_path / "out"
    run = start(source, out, cluster.environment, "--distributor", "ray")
    wait_for(lambda: records(out) >= 1 and cluster.workers())
    os.kill(cluster.workers()[0], signal.SIGKILL)
    output = finish(run)
    assert f"Ray: cluster at {cluster.environment['RAY_ADDRESS']}: 1 node, 2 CPUs\n" in output
    assert ": its worker or node died; trying again\n" in output
    assert "\n37/37 images, " in output
    assert ", 1 rejected\n" in output
    assert contents(out) == of_processes


def test_a_run_goes_on_with_another_distributor(source, of_processes, cluster, tmp_path):
    out = tmp_path / "out"
    kill_once(source, out, random.Random(0), 2)
    run = start(source, out, cluster.environment, "--distributor", "ray", "--workers", "1")
    before = records(out)
    wait_for(lambda: records(out) > before)
    os.killpg(run.pid, signal.SIGTERM)
    output, errors = run.communicate(timeout=600)
    assert run.returncode == 128 + signal.SIGTERM
    assert f"resuming: {before} of {SHARDS} shards are finished" in output
    assert errors == "stopped; finished shards are kept; rerun the same command to resume\n"
    assert not cluster.workers()
    assert not list(out.rglob("*.partial"))
    assert f"resuming: {records(out)} of {SHARDS}" in finish(start(source, out, dict(os.environ)))
    assert contents(out) == of_processes


@pytest.fixture
def distributor(cluster: RayNode, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayDistributor]:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_TMPDIR"):
        monkeypatch.setenv(name, cluster.environment[name])
    distributor = RayDistributor(None, Console(quiet=True))
    yield distributor
    distributor.close()


def test_progress_of_a_lost_attempt_counts_once(distributor, tmp_path):
    reports = list(distributor.run(partial(count_slowly, tmp_path), [0], 1, str, tmp_path))
    assert [sum(column) for column in zip(*reports, strict=True)] == [3, 1]
    assert len(reports) > 1
    assert min(reports) >= ProgressCount(0, 0)


def test_errors_of_a_task_are_one_line(distributor, tmp_path, capsys):
    with pytest.raises(ShardError) as error:
        list(distributor.run(refuse, [7], 1, str, tmp_path))
    assert str(error.value) == "cannot read image 7: correct it"
    with pytest.raises(ShardError) as error:
        list(distributor.run(fail, [7], 1, "shard {}".format, tmp_path))
    assert str(error.value) == "the Ray task on shard 7 failed, see the error above; rerun the same command to resume"
    assert "ZeroDivisionError: in task 7" in capsys.readouterr().err
    with pytest.raises(ShardError) as error:
        list(distributor.run(die, [7], 1, "shard {}".format, tmp_path))
    assert str(error.value) == (
        f"the Ray task on shard 7 was lost {ATTEMPTS} times, the last time because its worker or node died: "
        "use fewer --workers if memory ran out; rerun the same command to resume"
    )
    assert not list(tmp_path.iterdir())


def test_a_node_without_the_folder_or_with_other_codecs_is_named(tmp_path):
    with pytest.raises(ShardError, match=rf"^node \S+ does not see {tmp_path / 'out'}, .* OUT must be a folder that"):
        NodeRequirements(tmp_path / "out" / "check", str(tmp_path), codec_versions()).check()
    others = {**codec_versions(), "pillow": "1.0"}
    with pytest.raises(ShardError, match=r"^node \S+ has pillow \S+, this machine 1.0, which may give other bytes: "):
        NodeRequirements(tmp_path, str(tmp_path), others).check()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: correct or unset it, or use ray start"),
        ("nonsense", "no Ray cluster answers at RAY_ADDRESS=nonsense: correct or unset it, or use ray start"),
        ("auto", "RAY_ADDRESS=auto, and no Ray cluster runs on this machine: unset it, or use ray start"),
        (
            "ray://head:10001",
            "RAY_ADDRESS=ray://head:10001 is Ray Client's: run this command on a node of the cluster, or with "
            "ray job submit, and unset RAY_ADDRESS",
        ),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_line(tmp_path, monkeypatch, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    distributor = RayDistributor(None, Console(quiet=True))
    with pytest.raises(ShardError) as error:
        list(distributor.run(die, [7], 1, str, tmp_path))
    assert str(error.value) == message


def test_without_ray_the_extra_is_named(source, tmp_path):
    program = "import sys; sys.modules['ray'] = None; from shards.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out"), "--distributor", "ray"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert run.stderr == "error: --distributor ray needs the package ray: pip install 'iwm[ray]', on every node\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_node_is_killed_in_the_middle_of_a_shard(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    for number in range(24):
        (source / f"{number:02d}.png").write_bytes(encoded(photo(number, (2400, 1800)), "PNG", compress_level=1))
    options = ("--min-shards", "4", "--resize", "320")
    finish(start(source, tmp_path / "of-processes", dict(os.environ), *options))
    out = tmp_path / "out"
    with ray_head(cpus=1) as head, ray_node(head.environment, cpus=1) as node:
        run = start(source, out, head.environment, *options, "--distributor", "ray")
        wait_for(lambda: node.workers() or run.poll() is not None)
        node.kill()
        output = finish(run)
    assert ": 2 nodes, 2 CPUs\n" in output
    assert "; trying again\n" in output
    assert "\n24/24 images, " in output
    assert contents(out) == contents(tmp_path / "of-processes")


@pytest.mark.long
def test_a_node_that_does_not_share_the_folder_ends_the_run(source, tmp_path):
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("a mount namespace is not permitted here (it needs root)")
    out = tmp_path / "shared" / "out"
    out.parent.mkdir()
    with ray_head(cpus=0) as head, ray_node(head.environment, cpus=1, hide=out.parent):
        run = start(source, out, head.environment, "--distributor", "ray")
        _, errors = run.communicate(timeout=600)
    assert run.returncode == 1
    assert errors.startswith("error: node ")
    assert "/shared/out/.train.unfinished, or the run that made it has ended: OUT must be a folder that all " in errors
    assert errors.count("\n") == 1


@pytest.mark.long
def test_a_shard_for_which_memory_runs_out_is_named(source, tmp_path):
    # Memory counts as used up from the beginning.
    with ray_head(cpus=1, RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="50") as head:
        run = start(source, tmp_path / "out", head.environment, "--distributor", "ray")
        _, errors = run.communicate(timeout=600)
    assert run.returncode == 1
    last = errors.splitlines()[-1]
    assert last.startswith("error: the Ray task on shard train-00000")
    assert last.endswith(
        f"was lost {ATTEMPTS} times, the last time because the memory of its node ran out and Ray killed its worker: "
        "use fewer --workers; rerun the same command to resume"
    )


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_cluster_of_one_run_ends_with_it(source, of_processes, tmp_path, number):
    out = tmp_path / "out"
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"}
    run = start(source, out, environment, "--distributor", "ray")
    wait_for(lambda: records(out) >= 2)
    below = descendants(run.pid)
    assert below
    os.killpg(run.pid, number)
    run.communicate(timeout=600)
    wait_for(lambda: all(map(is_gone, below)))
    assert number == signal.SIGKILL or not list(out.rglob("*.partial"))
    output = finish(start(source, out, environment, "--distributor", "ray"))
    assert "Ray: no cluster is running, started one on this machine: 1 node, " in output
    assert contents(out) == of_processes
