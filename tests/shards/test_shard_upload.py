"""Shard folders at URLs: the same files as on a disk, a manifest only when all are there, and resuming after a kill."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import fsspec
import pytest
from fault_server import serving
from rich.console import Console
from shard_sources import ROOT, class_folders, make, run_tool

from shards import upload, urls
from shards.errors import ShardError
from shards.make import ShardingOptions, make_shards
from shards.plan import ShardSize
from shards.remote_folder import RemoteFolder
from shards.remote_options import RemoteOptions
from shards.verify_remote import verify_remote


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("source") / "src", {"elk": 10, "owl": 8})


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("local") / "out"
    make(source, folder, min_shards=6)
    return visible(folder)


@pytest.fixture
def out(s3: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL of its own for each test, and an empty current folder."""
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    boto3.client("s3").put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    return f"s3://bucket/{request.node.name}"


def visible(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a shard folder that is not hidden, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def stored(out: str) -> dict[str, bytes]:
    """Return the content of all objects below the URL, by name, as S3's own client reads them."""
    client, prefix = boto3.client("s3"), out.removeprefix("s3://bucket/") + "/"
    found = client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return {
        entry["Key"].removeprefix(prefix): client.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read()
        for entry in found
    }


def versions(out: str) -> dict[str, int]:
    """Return how often each object below the URL was written."""
    counts: dict[str, int] = {}
    for entry in boto3.client("s3").list_object_versions(
        Bucket="bucket", Prefix=out.removeprefix("s3://bucket/") + "/"
    )["Versions"]:
        name = entry["Key"].rpartition("/")[2]
        counts[name] = counts.get(name, 0) + 1
    return counts


def command(source: Path, out: str, *more: str) -> list[str]:
    options = ["--min-shards", "6", "--workers", "1", *more]
    return [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(source), out, *options]


def test_what_is_uploaded_equals_what_is_made_on_a_disk(source, local, out):
    make(source, out, min_shards=6)
    assert stored(out) == local
    assert not list(Path().iterdir())  # the work folder is gone


def test_the_manifest_is_written_last(source, out):
    names: list[str] = []
    original = urls.upload

    def recorded(path: Path, url: str) -> None:
        names.append(path.name)
        original(path, url)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload, "upload", recorded)
        patch.setattr("shards.remote_folder.upload", recorded)
        make(source, out, min_shards=6)
    assert names[-2:] == ["rejected.jsonl", "manifest.json"]
    assert sorted(names[:-2]) == sorted(name for name in stored(out) if name.startswith("train-"))


def test_a_second_split_joins_the_first_and_takes_its_classes(source, out, tmp_path):
    make(source, out, min_shards=6)
    make(class_folders(tmp_path / "val", {"owl": 3}), out, "val", labels="folders")
    make(source, tmp_path / "local", min_shards=6)
    make(tmp_path / "val", tmp_path / "local", "val", labels="folders")
    assert stored(out) == visible(tmp_path / "local")
    with pytest.raises(ShardError, match=r"class 'yak' .* is not among the 2 classes"):
        make(class_folders(tmp_path / "other", {"owl": 3, "yak": 3}), out, "test")


def test_a_finished_split_is_not_made_again_and_other_settings_are_refused(source, out):
    make(source, out, min_shards=6)
    before = versions(out)
    make(source, out, min_shards=6)
    assert versions(out) == before
    with pytest.raises(ShardError, match=rf"^{out} has split 'train' made with seed = 0, this run has 1; use another"):
        make(source, out, min_shards=6, seed=1)
    assert versions(out) == before


def test_overwrite_replaces_a_split_and_leaves_the_others(source, out, tmp_path):
    for folder in (out, tmp_path / "local"):
        make(source, folder, min_shards=6)
        make(source, folder, "val", min_shards=2)
        make(source, folder, min_shards=3, seed=1, overwrite=True)
    assert stored(out) == visible(tmp_path / "local")
    assert versions(out)["val-000000.tar"] == 1


def test_a_damaged_upload_is_named_and_can_be_replaced(source, local, out):
    make(source, out, min_shards=6)
    boto3.client("s3").put_object(
        Bucket="bucket", Key=f"{out.removeprefix('s3://bucket/')}/train-000002.tar", Body=b"x"
    )
    with pytest.raises(ShardError, match=r"train-000002.tar has 1 bytes, expected .*--overwrite"):
        make(source, out, min_shards=6)
    make(source, out, min_shards=6, overwrite=True)
    assert stored(out) == local


def test_local_shards_are_kept_on_request(source, local, out, tmp_path):
    work = tmp_path / "work"
    make(source, out, min_shards=6, remote=RemoteOptions(work_dir=work, keep_local=True))
    assert visible(work) == local == stored(out)


def test_a_kill_during_the_upload_leaves_no_manifest_and_the_same_command_resumes(source, local, out, s3):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(source, out), env=environment, stdout=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 300
    while len(stored(out)) < 3:
        assert time.monotonic() < end
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    arrived = stored(out)
    assert 3 <= len(arrived) < len(local)
    assert not {"manifest.json", "rejected.jsonl"} & arrived.keys()
    (work,) = Path().iterdir()
    made = {path.name: path.stat().st_ino for path in work.glob("train-*")}
    assert made.keys() >= arrived.keys()
    again = run_tool(*command(source, out, "--keep-local")[2:])
    assert again.returncode == 0, again.stderr
    assert stored(out) == local
    assert set(versions(out).values()) == {1}  # nothing was uploaded twice
    assert all((work / name).stat().st_ino == inode for name, inode in made.items() if name in arrived)


@pytest.mark.long
def test_killed_ten_times_the_upload_is_the_same(source, local, out):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    generator = random.Random(0)
    for moment in range(1, 11):
        process = subprocess.Popen(
            command(source, out, "--workers", "2"), env=environment, stdout=subprocess.PIPE, start_new_session=True
        )
        while len(stored(out)) < moment:
            assert process.poll() is None
        time.sleep(generator.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        arrived = stored(out)
        assert "manifest.json" not in arrived or arrived == local
        assert arrived.items() <= local.items()
    again = run_tool(*command(source, out, "--workers", "2")[2:])
    assert again.returncode == 0, again.stderr
    assert stored(out) == local
    assert not list(Path().iterdir())


def test_a_kill_before_the_manifest_is_written_makes_no_shard_again(source, local, out, monkeypatch):
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shards.remote_folder.RemoteFolder.publish", killed)
        with pytest.raises(KeyboardInterrupt):
            make(source, out, min_shards=6)
    assert len(stored(out)) == 12
    console = Console(record=True, width=200)
    with monkeypatch.context() as patch:
        patch.setattr("shards.make.write_shard", killed)
        make_shards(ShardingOptions(str(source), out, workers=1, shard=ShardSize(min_shards=6)), console)
    assert "already has the split 'train' with the same settings: nothing to make" in console.export_text()
    assert stored(out) == local
    assert set(versions(out).values()) == {1}


@pytest.mark.parametrize("remote_source", [False, True])
def test_a_kill_after_the_manifest_is_written_leaves_nothing_to_do_but_to_clean(
    source, out, monkeypatch, tmp_path, remote_source
):
    make(source, tmp_path / "tars", min_shards=6)
    with serving(tmp_path / "tars", ranges=False) as server:
        place = f"{server.url}/train-{{000000..000005}}.tar" if remote_source else source
        original = RemoteFolder.publish

        def killed(*arguments: object) -> None:
            original(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RemoteFolder, "publish", killed)
            with pytest.raises(KeyboardInterrupt):
                make(place, out, min_shards=6)
        before = stored(out)
        assert "manifest.json" in before
        assert list(Path().iterdir())
        make(place, out, min_shards=6)
    assert stored(out) == before
    assert set(versions(out).values()) == {1}
    assert not list(Path().iterdir())


def test_shards_of_an_upload_from_elsewhere_are_not_taken_for_ours(source, local, out):
    boto3.client("s3").put_object(
        Bucket="bucket", Key=f"{out.removeprefix('s3://bucket/')}/train-000009.tar", Body=b"x"
    )
    with pytest.raises(ShardError, match=r"train-000009.tar belongs to no manifest: .*--work-dir.*--overwrite"):
        make(source, out, min_shards=6)
    assert not list(Path().iterdir())
    make(source, out, min_shards=6, overwrite=True)
    assert stored(out) == local


def test_a_store_that_takes_nothing_ends_the_run_with_one_line(source, out, monkeypatch):
    monkeypatch.setattr(urls, "PAUSES", (0.01,))
    with pytest.raises(ShardError, match=r"^cannot write s3://no-bucket/out/train-.*: its bucket .* does not"):
        make(source, "s3://no-bucket/out", min_shards=6)
    with pytest.raises(ShardError, match="OUT http://host/out is on a web server, which takes no files"):
        make(source, "http://host/out")
    with pytest.raises(ShardError, match="OUT hf://datasets/a/b: the Hub makes a commit of each file"):
        make(source, "hf://datasets/a/b")
    (Path("mine")).mkdir()
    (Path("mine") / "thesis.txt").write_text("text")
    with pytest.raises(ShardError, match="--work-dir mine has other files, and shards are deleted there"):
        make(source, out, remote=RemoteOptions(work_dir=Path("mine")))
    with pytest.raises(ShardError, match="--work-dir is for an OUT at a URL"):
        make(source, Path("out"), remote=RemoteOptions(work_dir=Path("work")))
    with pytest.raises(ShardError, match="--staging is for a SRC at URLs"):
        make(source, Path("out"), remote=RemoteOptions(staging=Path("work")))


@pytest.mark.parametrize("place", ["file://{}/deep/out", "memory://out-of-a-test"])
def test_other_file_systems_take_a_folder_too(source, local, out, tmp_path, place):
    url = place.format(tmp_path)
    make(source, url, min_shards=6)
    store, path = fsspec.core.url_to_fs(url)
    assert {name: store.cat_file(f"{path}/{name}") for name in local} == local
    assert verify(url) == []


def test_verify_reads_a_folder_at_a_url(source, out):
    make(source, out, min_shards=6)
    assert verify(out, quick=True) == verify(out) == []
    key = f"{out.removeprefix('s3://bucket/')}/train-000001.tar"
    client = boto3.client("s3")
    data = bytearray(client.get_object(Bucket="bucket", Key=key)["Body"].read())
    data[700] ^= 1
    client.put_object(Bucket="bucket", Key=key, Body=bytes(data))
    client.put_object(Bucket="bucket", Key=key.replace("000001", "000077"), Body=b"x")
    stray = f"{out}/train-000077.tar is not in the manifest: remove it"
    assert verify(out, quick=True) == [stray]
    problems = verify(out)
    assert problems[0] == stray
    assert problems[1].startswith(f"{out}/train-000001.tar: sha256 is ")
    client.delete_object(Bucket="bucket", Key=key)
    assert verify(out, quick=True)[0].startswith(f"{out}/train-000001.tar is missing, but the manifest lists it")
    with pytest.raises(ShardError, match=r"^s3://bucket/nothing has no manifest.json: correct the folder"):
        verify("s3://bucket/nothing")


def test_verify_reads_a_folder_on_a_web_server(source, tmp_path):
    make(source, tmp_path / "out", min_shards=6)
    with serving(tmp_path / "out", ranges=False) as server:
        assert verify(server.url, quick=True) == verify(server.url) == []
        (tmp_path / "out" / "train-000003.idx").unlink()
        quick = run_tool("verify", server.url, "--quick")
        assert quick.returncode == 1
        assert quick.stderr.startswith(f"error: {server.url}/train-000003.idx is missing, but the manifest lists it")


def verify(url: str, quick: bool = False) -> list[str]:
    return verify_remote(url, quick=quick, workers=1, console=Console(quiet=True))


def test_a_source_at_a_url_goes_to_a_folder_at_a_url(source, out, tmp_path):
    make(source, tmp_path / "first", min_shards=6)
    make(tmp_path / "first", tmp_path / "local", seed=3)
    with serving(tmp_path / "first", ranges=False) as server:
        make(f"{server.url}/train-{{000000..000005}}.tar", out, seed=3)
        before = stored(out)
        assert before.keys() - visible(tmp_path / "local").keys() == {".train.source.json"}
        assert visible(tmp_path / "local").items() <= before.items()
        assert not list(Path().iterdir())
        server.served.clear()
        make(f"{server.url}/train-{{000000..000005}}.tar", out, seed=3)
        assert not server.served  # finished: nothing is copied again
        with pytest.raises(ShardError, match="made with seed = 3, this run has 4"):
            make(f"{server.url}/train-{{000000..000005}}.tar", out, seed=4)
        assert not server.served
    assert stored(out) == before
    assert not list(Path().iterdir())
