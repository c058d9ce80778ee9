"""Tars at URLs and from commands: the same shards as from a disk, and no tar that is cut off goes unnoticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fault_server import Served, serving
from rich.console import Console
from shard_sources import ROOT, class_folders, jpeg, make, samples, tar_of

from shards import urls
from shards.errors import ShardError
from shards.make import ShardingOptions, make_shards
from shards.remote_options import RemoteOptions
from shards.sources.remote_tars import find_tars
from tests.disks import small_disk

SHARDS = {"min_shards": 3}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars in the layout of timm/imagenet-1k-wds, and one of its validation split."""
    folder = tmp_path_factory.mktemp("source") / "imagenet-1k-wds"
    folder.mkdir()
    for number, name in enumerate(["train-0000", "train-0001", "train-0002", "validation-00"]):
        members = {}
        for image in range(6):
            key = f"n01440764_{10 * number + image}"
            label = (number + 5 * image) % 7
            document = {"label": label, "width": 80, "height": 60, "filename": f"{key}.JPEG"}
            members[f"{key}.cls"] = str(label).encode()
            members[f"{key}.jpg"] = jpeg(10 * number + image)
            members[f"{key}.json"] = json.dumps(document).encode()
        if name == "train-0001":
            members["broken.jpg"] = b"no image"
            members["broken.cls"] = b"0"
        (folder / f"imagenet1k-{name}.tar").write_bytes(tar_of(members))
    (folder / "_info.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def local(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "out"
    manifest = make(f"{tars}/imagenet1k-train-{{0000..0002}}.tar", out, **SHARDS)
    assert (manifest.read, manifest.rejected, len(manifest.column("label").classes)) == (19, 1, 7)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    """Return the content of every file of a shard folder but the record of its remote source, by name."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.endswith(".source.json")}


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "PAUSES", (0.01, 0.01))


@pytest.mark.parametrize("ranges", [False, True])
def test_tars_of_a_web_server_give_the_shards_of_the_same_tars_on_a_disk(tars, local, tmp_path, ranges):
    with serving(tars, ranges=ranges) as server:
        make(f"{server.url}/imagenet1k-train-{{0000..0002}}.tar", tmp_path / "out", **SHARDS)
    assert contents(tmp_path / "out") == local


@pytest.mark.parametrize("pattern", ["imagenet1k-train-{0000..0002}.tar", "imagenet1k-train-*.tar"])
def test_tars_of_an_object_store_give_the_shards_of_the_same_tars_on_a_disk(
    tars, local, tmp_path, s3, pattern, monkeypatch
):
    monkeypatch.setattr(urls, "BLOCK", 10_000)  # several requests for each tar
    store = fsspec.filesystem("s3")
    store.put(f"{tars}/", "bucket/wds/", recursive=True)
    make(f"s3://bucket/wds/{pattern}", tmp_path / "out", **SHARDS)
    assert contents(tmp_path / "out") == local


def test_a_folder_that_the_store_lists_is_read_by_the_hub_s_names(tars, local, tmp_path):
    store = fsspec.filesystem("memory")
    for path in sorted(tars.glob("*train*")):
        store.pipe_file(f"/datasets/timm/{path.name}", path.read_bytes())
    make("memory://datasets/timm", tmp_path / "out", **SHARDS)
    assert contents(tmp_path / "out") == local


def test_both_splits_of_imagenet_1k_wds_share_their_classes(tars, tmp_path):
    store = fsspec.filesystem("memory")
    for path in sorted(tars.iterdir()):
        store.pipe_file(f"/both/{path.name}", path.read_bytes())
    train = make("memory://both/imagenet1k-train-{0000..0002}.tar", tmp_path / "out")
    val = make("memory://both/imagenet1k-validation-{00..00}.tar", tmp_path / "out", "val")
    assert (train.samples, val.samples, val.columns) == (18, 6, train.columns)
    assert samples(tmp_path / "out", val)["n01440764_31"] == {"jpg": jpeg(31), "cls": b"1"}


def test_the_output_of_commands_gives_the_shards_of_the_same_tars_on_a_disk(tars, local, tmp_path):
    make(f"pipe:cat {tars}/imagenet1k-train-{{0000..0002}}.tar", tmp_path / "out", **SHARDS)
    assert contents(tmp_path / "out") == local


def test_a_finished_split_is_recognised_without_its_source_and_another_source_is_refused(tars, local, tmp_path):
    folder = shutil.copytree(tars, tmp_path / "source")
    with serving(folder, ranges=False) as server:
        source = f"{server.url}/imagenet1k-train-{{0000..0002}}.tar"
        make(source, tmp_path / "out", **SHARDS)
        server.served.clear()
        make(source, tmp_path / "out", **SHARDS)
        assert not server.served
        with pytest.raises(ShardError, match="made with seed = 0, this run has 1; use another OUT, or --overwrite"):
            make(source, tmp_path / "out", **SHARDS, seed=1)
        assert not server.served
        with pytest.raises(ShardError, match="made from other contents"):
            make(source.replace("0002}", "0001}"), tmp_path / "out", **SHARDS)
        assert make(source, tmp_path / "out", **SHARDS, seed=1, overwrite=True).seed == 1
        shutil.copy(folder / "imagenet1k-validation-00.tar", folder / "imagenet1k-train-0002.tar")
        with pytest.raises(ShardError, match="made from other contents"):
            make(source, tmp_path / "out", **SHARDS, seed=1)


def test_shards_of_this_project_at_a_url_keep_their_class_names(tmp_path):
    make(class_folders(tmp_path / "src", {"owl": 5, "elk": 4}), tmp_path / "first")
    make(tmp_path / "first", tmp_path / "local")
    with serving(tmp_path / "first", ranges=False) as server:
        make(f"{server.url}/train-{{000000..000001}}.tar", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_body_that_breaks_off_is_asked_for_again(tars, local, tmp_path, short_pauses):
    with serving(tars) as server:
        server.plan = [("imagenet1k-train-0001.tar", "truncate")] * 2
        make(f"{server.url}/imagenet1k-train-{{0000..0002}}.tar", tmp_path / "out", **SHARDS)
    assert contents(tmp_path / "out") == local
    size = (tars / "imagenet1k-train-0001.tar").stat().st_size
    assert Served("imagenet1k-train-0001.tar", "truncate", size // 2) in server.served  # the rest, not all of it


def test_a_body_that_breaks_off_is_sent_again_by_a_server_without_ranges(tars, local, tmp_path, short_pauses):
    with serving(tars, ranges=False) as server:
        server.plan = [("imagenet1k-train-0001.tar", "truncate")] * 2
        make(f"{server.url}/imagenet1k-train-{{0000..0002}}.tar", tmp_path / "out", **SHARDS)
    assert contents(tmp_path / "out") == local


def test_a_body_that_always_breaks_off_is_refused_and_whole_tars_are_kept(tars, local, tmp_path, short_pauses):
    with serving(tars, ranges=False) as server:
        source = f"{server.url}/imagenet1k-train-{{0000..0002}}.tar"
        server.plan = [("imagenet1k-train-0001.tar", "truncate")] * 1000
        with pytest.raises(ShardError, match=r"cannot read http://127.0.0.1:\d+/imagenet1k-train-0001.tar: "):
            make(source, tmp_path / "out", **SHARDS)
        server.plan.clear()
        journal = tmp_path / "out" / ".train.source" / "staged.jsonl"
        whole = {json.loads(line)[1] for line in journal.read_text().splitlines()} if journal.exists() else set()
        server.served.clear()
        make(source, tmp_path / "out", **SHARDS)
        fetched = {answer.name for answer in server.served if answer.name.endswith(".tar")}
        assert "imagenet1k-train-0001.tar" in fetched
        assert not fetched & whole
    assert contents(tmp_path / "out") == local


def test_a_tar_that_is_cut_off_on_the_server_is_refused_by_name(tars, tmp_path):
    folder = shutil.copytree(tars, tmp_path / "source")
    tar = folder / "imagenet1k-train-0002.tar"
    tar.write_bytes(tar.read_bytes()[:-10240])
    with (
        serving(folder, ranges=False) as server,
        pytest.raises(
            ShardError, match=r"^http://127.0.0.1:\d+/imagenet1k-train-0002.tar (has no tar end mark|is not)"
        ),
    ):
        make(f"{server.url}/imagenet1k-train-{{0000..0002}}.tar", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {}/imagenet1k-train-0000.tar; exit 3", "pipe:cat .*exit 3 ended with status 3 after"),
        ("cat {}/imagenet1k-train-0000.tar; exit 141", "ended with status 141"),
        ("cat {}/nothing-0000.tar", "pipe:cat .*nothing-0000.tar ended with status 1 after 0 bytes"),
        ("head -c 9000 {}/imagenet1k-train-0000.tar", "^pipe:head -c 9000 .*(is not an uncompressed tar|no tar end)"),
        ("cat {}/imagenet1k-train-0000.tar | gzip", "^pipe:cat .*gzip is not an uncompressed tar"),
        ("true", "^pipe:true is not an uncompressed tar"),
    ],
)
def test_a_command_that_fails_or_gives_half_a_tar_is_refused_by_name(tars, tmp_path, command, message):
    with pytest.raises(ShardError, match=message):
        make(f"pipe:{command.format(tars)}", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_is_not_there_is_refused_before_anything_is_copied(tars, tmp_path, s3, short_pauses):
    fsspec.filesystem("s3").pipe_file("bucket/some/a-0.tar", b"x")
    for source, message in [
        ("s3://bucket/some/a-{0..1}.tar", "s3://bucket/some/a-1.tar does not exist"),
        ("s3://bucket/some/b-*.tar", r"b-\*.tar matches no file"),
        ("s3://bucket/empty", "cannot list s3://bucket/empty: it does not exist"),
        ("s3://bucket/some/a.tar.gz", "is compressed; decompress it first, or with pipe:"),
        ("s3://bucket/some/a-0.tar::s3://bucket/some/a-0.tar", "a-0.tar is named 2 times"),
        ("s3://bucket/some/a-0.tar::/data/a-1.tar", "/data/a-1.tar is not a URL"),
        ("s3://bucket/${NOTHING}/a-0.tar", "missing environment variable wds_WDS_NOTHING"),
    ]:
        with pytest.raises(ShardError, match=message):
            make(source, tmp_path / "out")
    with (
        serving(tars, ranges=False) as server,
        pytest.raises(ShardError, match=r"none.tar: it does not exist; correct the URL"),
    ):
        make(f"{server.url}/none.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_with_its_remedy(tars, tmp_path):
    with small_disk(tmp_path / "disk", "40k") as disk, serving(tars, ranges=False) as server:
        source = f"{server.url}/imagenet1k-train-{{0000..0002}}.tar"
        console = Console(record=True, width=200)
        options = ShardingOptions(source, tmp_path / "out", workers=1, remote=RemoteOptions(staging=disk))
        with pytest.raises(ShardError, match=r"^cannot write to .*disk.*: No space left on device; free disk space"):
            make_shards(options, console)
        assert "GB to write, only 0.0 GB free on the disk of" in console.export_text()


def test_a_server_that_refuses_asks_for_credentials(tars, tmp_path, short_pauses):
    with serving(tars, ranges=False) as server:
        server.status = 403
        with pytest.raises(ShardError, match=r"a-0.tar: 403, message='Forbidden'.*; set the store's credentials"):
            make(f"{server.url}/a-0.tar", tmp_path / "out")
        server.status = 503
        with pytest.raises(ShardError, match=r"a-0.tar: 503, .*; the server did not answer; rerun"):
            make(f"{server.url}/a-0.tar", tmp_path / "out")


def test_tars_of_the_same_name_in_two_folders_are_told_apart(tars, tmp_path):
    store = fsspec.filesystem("memory")
    for number in range(2):
        store.pipe_file(f"/two/{number}/a.tar", (tars / f"imagenet1k-train-000{number}.tar").read_bytes())
    assert [tar.name for tar in find_tars("memory://two/{0..1}/a.tar")] == ["000000/a.tar", "000001/a.tar"]
    assert make("memory://two/{0..1}/a.tar", tmp_path / "out").samples == 12


def test_a_killed_copy_is_resumed_tar_by_tar(tars, local, tmp_path):
    (tmp_path / "fifo").mkdir()
    fifo = tmp_path / "fifo" / "imagenet1k-train-0002.tar"
    os.mkfifo(fifo)
    for number in range(2):
        shutil.copy(tars / f"imagenet1k-train-000{number}.tar", tmp_path / "fifo")
    command = [
        sys.executable,
        str(ROOT / "tools" / "make_shards.py"),
        f"pipe:cat {fifo.parent}/imagenet1k-train-{{0000..0002}}.tar",
    ]
    options = [str(tmp_path / "out"), "--min-shards", "3", "--workers", "1", "--staging", str(tmp_path / "staging")]
    process = subprocess.Popen(
        command + options, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, start_new_session=True
    )
    staged = tmp_path / "staging" / ".train.source"
    end = time.monotonic() + 300
    while not (staged / "staged.jsonl").exists() or len((staged / "staged.jsonl").read_text().splitlines()) < 2:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, 9)
    process.communicate()
    fifo.unlink()
    shutil.copy(tars / fifo.name, fifo)
    for number in range(2):
        (fifo.parent / f"imagenet1k-train-000{number}.tar").unlink()  # not read again
    again = subprocess.run(
        command + options, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "copying 1 tars (0.0 MB and 1 of unknown size, 2 more are there)" in again.stdout
    assert contents(tmp_path / "out") == local
    assert not staged.exists()
