"""Shards at a URL: copied once, verified before use, fetched again after faults, evicted when room is needed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from fault_server import FAULTS, Fault, FaultServer, serving

from shards import urls
from shards.cache import SplitCache, local_folder, source_of
from shards.errors import ShardError
from shards.format import MANIFEST, load_manifest

GO_ON = threading.Event()
"""Never set: staging that is not stopped."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses and time limits."""
    monkeypatch.setattr(urls, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(urls, "TIME_LIMIT", 1.0)


def opened(url: str, cache: Path, limit_gb: float | None = None) -> SplitCache:
    folder = local_folder(url, cache, limit_gb)
    source = source_of(folder)
    assert source is not None
    return SplitCache(folder, source, load_manifest(folder, "train"))


def test_a_folder_is_its_own_place_and_a_url_gets_one_by_its_manifest(tiny_shards: Path, tmp_path: Path) -> None:
    assert local_folder(str(tiny_shards), tmp_path, None) == tiny_shards
    with serving(tiny_shards) as server:
        folder = local_folder(server.url, tmp_path, None)
    assert folder.parent == tmp_path
    assert (folder / MANIFEST).read_bytes() == (tiny_shards / MANIFEST).read_bytes()


def test_shards_arrive_byte_for_byte_and_once(tiny_shards: Path, tmp_path: Path) -> None:
    with serving(tiny_shards) as server:
        cache = opened(server.url, tmp_path)
        assert cache.staged_share() == 0
        sizes = [cache.use(number, GO_ON) for number in range(4)]
        again = [cache.use(number, GO_ON) for number in range(4)]
        assert cache.staged_share() == 1
    assert sizes == [shard.bytes for shard in cache.shards]
    assert again == [0] * 4
    for shard in cache.shards:
        assert (cache.folder / shard.name).read_bytes() == (tiny_shards / shard.name).read_bytes()
        assert (cache.folder / shard.index).read_bytes() == (tiny_shards / shard.index).read_bytes()
    assert max(Counter(answer.name for answer in server.served).values()) == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_overcome(tiny_shards: Path, tmp_path: Path, fault: Fault) -> None:
    with serving(tiny_shards) as server:
        server.plan = [(suffix, fault) for suffix in ("000000.tar", "000001.idx")]
        cache = opened(server.url, tmp_path)
        cache.use(0, GO_ON)
        assert sum(answer.fault == fault for answer in server.served) == 2
    assert (cache.folder / cache.shards[0].name).read_bytes() == (tiny_shards / cache.shards[0].name).read_bytes()


def test_a_shard_that_stays_wrong_is_refused_by_name_and_not_marked(tiny_shards: Path, tmp_path: Path) -> None:
    with serving(tiny_shards) as server:
        server.plan = [("train-000002.tar", "corrupt")] * 2
        cache = opened(server.url, tmp_path)
        with pytest.raises(ShardError, match=rf"{server.url}/train-000002\.tar is not the file of the manifest"):
            cache.use(2, GO_ON)
        assert not cache.is_staged(2)
        assert cache.use(2, GO_ON) == cache.shards[2].bytes


def test_a_server_that_stays_away_is_named_with_the_remedy(tiny_shards: Path, tmp_path: Path) -> None:
    with serving(tiny_shards) as server:
        cache = opened(server.url, tmp_path)
        server.plan = [("train-000001.tar", "busy")] * 4
        with pytest.raises(ShardError, match=r"cannot read http.*train-000001\.tar: 503.*rerun the same command"):
            cache.use(1, GO_ON)
    with pytest.raises(ShardError, match=r"cannot read http://127\.0\.0\.1:\d+/manifest\.json: .*rerun"):
        local_folder(f"{server.url}/", tmp_path, None)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nothing://x/y", r"nothing://x/y/manifest\.json: Protocol not known: nothing; use s3://, gs://, hf://"),
        ("abfs://x/y", r"abfs://x/y/manifest\.json: .*adlfs.*; install that package"),
    ],
)
def test_a_url_that_nothing_reads_is_refused(tmp_path: Path, location: str, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        local_folder(location, tmp_path, None)


def test_a_missing_folder_is_refused_at_once(tiny_shards: Path, tmp_path: Path) -> None:
    missing = pytest.raises(ShardError, match=r"/none/manifest\.json: it does not exist; correct the URL")
    with serving(tiny_shards) as server, missing:
        local_folder(f"{server.url}/none", tmp_path, None)


STAGE = """
import sys, threading
from pathlib import Path
from shards.cache import SplitCache, local_folder, source_of
from shards.format import load_manifest
folder = local_folder(sys.argv[1], Path(sys.argv[2]), None)
cache = SplitCache(folder, source_of(folder), load_manifest(folder, "train"))
for number in range(len(cache.shards)):
    cache.use(number, threading.Event())
"""


def processes(server: FaultServer, cache: Path, count: int) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-c", STAGE, server.url, str(cache)]) for _ in range(count)]


def test_processes_of_a_machine_fetch_a_shard_once(tiny_shards: Path, tmp_path: Path) -> None:
    with serving(tiny_shards) as server:
        assert [process.wait(120) for process in processes(server, tmp_path, 3)] == [0, 0, 0]
        fetched = Counter(answer.name for answer in server.served if answer.name != MANIFEST)
    assert set(fetched) == {name for i in range(4) for name in (f"train-{i:06d}.tar", f"train-{i:06d}.idx")}
    assert set(fetched.values()) == {1}


def test_kill_9_while_a_shard_is_fetched_leaves_nothing_that_counts(tiny_shards: Path, tmp_path: Path) -> None:
    with serving(tiny_shards) as server:
        server.plan = [("train-000001.tar", "stall")]
        (process,) = processes(server, tmp_path, 1)
        while not any(answer.fault for answer in server.served):
            assert process.poll() is None
        process.kill()
        process.wait()
        cache = opened(server.url, tmp_path)
        assert [cache.is_staged(number) for number in range(4)] == [True, False, False, False]
        cache.use(1, GO_ON)
    assert (cache.folder / cache.shards[1].name).read_bytes() == (tiny_shards / cache.shards[1].name).read_bytes()


def test_a_tar_of_the_cache_that_was_deleted_or_cut_is_fetched_again(tiny_shards: Path, tmp_path: Path) -> None:
    with serving(tiny_shards) as server:
        cache = opened(server.url, tmp_path)
        for number in range(2):
            cache.use(number, GO_ON)
        cache.done()
        tars = [cache.folder / shard.name for shard in cache.shards]
        tars[0].unlink()
        tars[1].write_bytes(tars[1].read_bytes()[:1000])
        cache = opened(server.url, tmp_path)
        assert not cache.is_staged(0)
        assert not cache.is_staged(1)


def test_shards_in_use_stay_and_the_least_recently_used_makes_room(tiny_shards: Path, tmp_path: Path) -> None:
    size = load_manifest(tiny_shards, "train").shards[0].bytes
    with serving(tiny_shards) as server:
        cache = opened(server.url, tmp_path, limit_gb=2.5 * size / 1e9)
        other = opened(server.url, tmp_path)
        for number in (0, 1):
            assert cache.make_room(number, 0)
            cache.use(number, GO_ON)
        assert not cache.make_room(2, 0)
        cache.done_with(1)
        cache.done_with(0)
        other.use(0, GO_ON)
        assert cache.make_room(2, 0)
        assert [cache.is_staged(number) for number in (0, 1)] == [True, False]
        tar = cache.folder / cache.shards[1].name
        assert (tar.stat().st_size, tar.stat().st_blocks) == (cache.shards[1].bytes, 0)
        cache.use(2, GO_ON)
        assert not cache.make_room(3, 0), "the other process uses the shard that is left"


FILES = (
    """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, HARD))
limit = 1.0
"""
    + STAGE.replace("None)", "limit)")
    + "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
)


@pytest.mark.parametrize(("soft", "hard", "code"), [(256, 4096, 0), (256, 512, 1)])
def test_a_bounded_cache_may_open_all_tars(tiny_shards: Path, tmp_path: Path, soft: int, hard: int, code: int) -> None:
    script = FILES.replace("SOFT", str(soft)).replace("HARD", str(hard))
    with serving(tiny_shards) as server:
        done = subprocess.run(
            [sys.executable, "-c", script, server.url, tmp_path], capture_output=True, text=True, check=False
        )
    assert done.returncode == code, done.stderr
    if code:
        assert "the system allows 512 files (ulimit -Hn)" in done.stderr
    else:
        assert int(done.stdout) == 1024 + 4


def test_shards_that_were_made_again_get_a_folder_of_their_own(tiny_shards: Path, tmp_path: Path) -> None:
    remade = tmp_path / "remade"
    remade.mkdir()
    (remade / MANIFEST).write_bytes((tiny_shards / MANIFEST).read_bytes())
    with serving(remade) as server:
        first = local_folder(server.url, tmp_path / "cache", None)
        (remade / MANIFEST).write_bytes((remade / MANIFEST).read_bytes() + b"\n")
        again = subprocess.run(
            [sys.executable, "-c", STAGE.partition("cache = ")[0] + "print(folder)", server.url, tmp_path / "cache"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert again.stdout.strip() != str(first)
