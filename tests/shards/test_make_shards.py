"""Making of splits: complete, reproducible, readable by DALI, never mixed with another run's shards."""

from __future__ import annotations

import dataclasses
import re
import resource
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import wds2idx
from nvidia.dali import fn, pipeline_def
from shard_sources import class_folders, contents, encoded, imagenet_train_tar, jpeg, make, photo, run_tool, samples

from shards.errors import ShardError
from shards.format import load_manifest, load_rejections, save_manifest
from shards.listing import TarReader
from shards.samples import FileRef
from tests.disks import small_disk


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make 40 images in four classes, of which one is damaged and one needs conversion."""
    src = class_folders(tmp_path_factory.mktemp("source") / "src", {"ant": 10, "bee": 10, "cow": 10, "dog": 8})
    (src / "dog" / "png.png").write_bytes(encoded(photo(99), "PNG"))
    (src / "dog" / "cut.jpg").write_bytes(jpeg()[:-100])
    return src


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    make(source, out, min_shards=5)
    return out


def test_everything_read_is_written_or_rejected(source, reference):
    manifest = load_manifest(reference, "train")
    assert (manifest.read, manifest.samples, manifest.rejected) == (40, 39, 1)
    assert sum(shard.samples for shard in manifest.shards) == 39
    [(path, reason)] = load_rejections(reference, "train")
    assert path == "dog/cut.jpg"
    assert "Premature end" in reason
    found = samples(reference, manifest)
    assert found["ant%2F003"] == {"jpg": (source / "ant" / "003.jpg").read_bytes(), "cls": b"0"}
    assert found["dog%2Fpng"]["cls"] == b"3"


def test_a_finished_folder_holds_nothing_but_the_shards_and_their_lists(reference):
    names = {"manifest.json", "rejected.jsonl", ".manifest.json.lock"}
    names |= {f"train-{number:06d}.{kind}" for number in range(5) for kind in ("tar", "idx")}
    assert set(contents(reference)) == names


def test_the_bytes_do_not_depend_on_the_number_of_workers(source, reference, tmp_path):
    result = run_tool(source, tmp_path / "out", "--split", "train", "--min-shards", 5, "--workers", 3)
    assert result.returncode == 0, result.stderr
    assert "read 40 = written 39 + rejected 1" in result.stdout
    assert contents(tmp_path / "out") == contents(reference)


def test_shards_carry_no_times_and_no_owners(reference):
    with tarfile.open(reference / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_samples_are_shuffled_over_all_shards_by_the_seed(source, reference, tmp_path):
    def keys(out):
        return list(samples(out, load_manifest(out, "train")))

    order = keys(reference)
    assert order != sorted(order)
    first = [key.partition("%2F")[0] for key in order[:16]]
    assert len(set(first)) >= 3
    make(source, tmp_path / "other", min_shards=5, seed=1)
    assert keys(tmp_path / "other") != order
    assert sorted(keys(tmp_path / "other")) == sorted(order)


def test_shards_are_cut_by_size_and_small_sets_still_give_several(source, tmp_path):
    assert len(make(source, tmp_path / "few", min_shards=1).shards) == 1
    assert len(make(source, tmp_path / "many", min_shards=64).shards) == 39  # one sample each; one was rejected
    tool = run_tool(source, tmp_path / "small", "--split", "train", "--shard-mb", 0.02, "--min-shards", 1)
    sizes = [shard.bytes for shard in load_manifest(tmp_path / "small", "train").shards]
    assert tool.returncode == 0
    assert len(sizes) > 3
    assert max(sizes) < 45_000  # about 0.02 MB, rounded up to tar's records of 10,240


def test_the_index_is_what_wds2idx_writes(reference, tmp_path):
    for tar in sorted(reference.glob("*.tar")):
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "x.idx"), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_bytes() == (tmp_path / "x.idx").read_bytes()


def test_dali_reads_the_samples_labels_and_keys(reference):
    manifest = load_manifest(reference, "train")
    tars = [str(reference / shard.name) for shard in manifest.shards]
    indices = [str(reference / shard.index) for shard in manifest.shards]

    @pipeline_def(batch_size=manifest.samples, num_threads=1, device_id=None)
    def pipeline():
        jpg, cls = fn.readers.webdataset(
            paths=tars, index_paths=indices, ext=["jpg", "cls"], missing_component_behavior="error"
        )
        return jpg, cls, fn.decoders.image(jpg), fn.get_property(jpg, key="source_info")

    graph = pipeline()
    graph.build()
    jpg, cls, image, info = graph.run()
    expected = samples(reference, manifest)
    for place in range(manifest.samples):
        name = bytes(np.asarray(info.at(place))).decode().rpartition(":")[2]
        key, _, component = name.partition(".")
        assert component == "jpg"
        assert bytes(np.asarray(jpg.at(place))) == expected[key]["jpg"]
        assert bytes(np.asarray(cls.at(place))) == expected[key]["cls"]
        assert image.at(place).shape == (60, 80, 3)


def test_a_finished_split_is_left_alone(source, reference, tmp_path):
    make(source, tmp_path / "out", min_shards=5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    result = run_tool(source, tmp_path / "out", "--split", "train", "--min-shards", 5)
    assert "nothing to do" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(("options", "name"), [
    ({"resize": 32}, "resize"),
    ({"seed": 3}, "seed"),
    ({"min_side": 20}, "min_side"),
])  # fmt: skip
def test_a_folder_of_other_settings_is_refused_by_name(source, reference, options, name):
    before = contents(reference)
    with pytest.raises(ShardError, match=rf"made with {name} = .*--overwrite"):
        make(source, reference, **{"min_shards": 5, **options})
    assert contents(reference) == before


def test_newer_codecs_do_not_spoil_finished_shards(source, reference):
    manifest = load_manifest(reference, "train")
    before = contents(reference)["manifest.json"]
    save_manifest(reference, dataclasses.replace(manifest, settings={**manifest.settings, "software": {"pillow": "1"}}))
    assert make(source, reference, min_shards=5).shards == manifest.shards
    save_manifest(reference, manifest)
    assert contents(reference)["manifest.json"] == before


def test_a_source_that_has_changed_is_refused(source, tmp_path):
    src = class_folders(tmp_path / "src", {"ant": 3, "bee": 3})
    make(src, tmp_path / "out")
    (src / "ant" / "new.jpg").write_bytes(jpeg())
    with pytest.raises(ShardError, match="files or labels of the source have changed"):
        make(src, tmp_path / "out")


def test_overwrite_replaces_a_split_and_leaves_the_others(source, tmp_path):
    out = tmp_path / "out"
    make(source, out, "train", min_shards=9)
    make(source, out, "val")
    val = {name: data for name, data in contents(out).items() if name.startswith("val")}
    manifest = make(source, out, "train", overwrite=True, min_shards=3, resize=32)
    assert len(manifest.shards) == 3 == len(list(out.glob("train-*.tar"))) == len(list(out.glob("train-*.idx")))
    assert {name: data for name, data in contents(out).items() if name.startswith("val")} == val
    assert load_manifest(out, "val").samples == 39
    assert len(load_rejections(out, "val")) == len(load_rejections(out, "train")) == 1


def test_shards_that_belong_to_no_manifest_are_not_written_over(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"somebody's work")
    with pytest.raises(ShardError, match=r"train-000000\.tar belongs to no manifest"):
        make(source, tmp_path / "out")
    assert (tmp_path / "out" / "train-000000.tar").read_bytes() == b"somebody's work"


def test_a_damaged_finished_split_is_not_called_finished(source, tmp_path):
    make(source, tmp_path / "out", min_shards=5)
    (tmp_path / "out" / "train-000002.tar").unlink()
    with pytest.raises(ShardError, match=r"train-000002\.tar is missing"):
        make(source, tmp_path / "out", min_shards=5)
    make(source, tmp_path / "out", min_shards=5, overwrite=True)
    assert (tmp_path / "out" / "train-000002.tar").exists()


def test_a_shard_of_nothing_but_rejects_is_left_out(tmp_path):
    src = class_folders(tmp_path / "src", {"ant": 1})
    (src / "ant" / "bad.jpg").write_bytes(b"bad")
    manifest = make(src, tmp_path / "out", min_shards=2)
    assert (len(manifest.shards), manifest.samples, manifest.rejected) == (1, 1, 1)


def test_a_source_of_nothing_but_rejects_is_an_error(tmp_path):
    (tmp_path / "src" / "ant").mkdir(parents=True)
    (tmp_path / "src" / "ant" / "bad.jpg").write_bytes(b"bad")
    with pytest.raises(ShardError, match=r"all 1 samples were rejected.*bad\.jpg.*not an image"):
        make(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_that_cannot_be_read_stops_the_run_by_name(tmp_path):
    with TarReader() as reader:
        for offset in (None, 0):
            with pytest.raises(ShardError, match=r"cannot read .*gone\.jpg: No such file.*rerun the same command"):
                reader.read(FileRef(str(tmp_path / ("" if offset is None else "gone.jpg")), "gone.jpg", offset, 10))


def test_a_source_that_shrinks_during_the_run_stops_it(tmp_path):
    tar = imagenet_train_tar(tmp_path / "train.tar")
    with TarReader() as reader, pytest.raises(ShardError, match="has changed since the run began"):
        reader.read(FileRef(str(tar), "n.tar/n.JPEG", tar.stat().st_size - 5, 10))


def test_a_file_that_may_not_be_written_further_leaves_whole_shards_only(source, reference, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))

    result = run_tool(source, tmp_path / "out", "--split", "train", "--min-shards", 5, preexec_fn=limit)
    assert result.returncode == 1
    assert re.fullmatch(r"error: cannot write to .*: File too large; free disk space.*\n", result.stderr)
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not list((tmp_path / "out" / ".train.unfinished").glob("*.partial"))
    assert run_tool(source, tmp_path / "out", "--split", "train", "--min-shards", 5).returncode == 0
    assert contents(tmp_path / "out") == contents(reference)


def test_a_full_disk_stops_the_run_and_free_space_lets_it_resume(source, reference, tmp_path):
    with small_disk(tmp_path / "disk", "100k") as disk:
        result = run_tool(source, disk / "out", "--split", "train", "--min-shards", 5, "--workers", 1)
        assert result.returncode == 1
        assert re.search(r"error: cannot write to .*: No space left on device; free disk space", result.stderr)
        assert "Traceback" not in result.stderr
        standing = {path.name: path.read_bytes() for path in (disk / "out").glob("*.tar")}
        assert 0 < len(standing) < 5
        assert standing.items() <= contents(reference).items()
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert run_tool(source, disk / "out", "--split", "train", "--min-shards", 5).returncode == 0
        assert contents(disk / "out") == contents(reference)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--split", "a/b"], "--split must be"),
    (["--split", "train", "--workers", "0"], "--workers must be at least 1"),
    (["--split", "train", "--resize", "4"], "--resize must be at least --min-side"),
    (["--split", "train", "--seed", "-1"], "--seed must be"),
])  # fmt: skip
def test_options_out_of_range_end_in_one_line(source, tmp_path, arguments, message):
    result = run_tool(source, tmp_path / "out", *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: " + message)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_inside_the_source_is_refused(source):
    with pytest.raises(ShardError, match="is inside SRC"):
        make(source, source / "shards")


def test_an_output_that_cannot_be_made_ends_in_one_line(source, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_tool(source, tmp_path / "file" / "out", "--split", "train")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot write to {tmp_path / 'file'}")
    assert "Traceback" not in result.stderr


def test_help_names_every_option():
    text = " ".join(run_tool("--help").stdout.split())
    for option in (
        "--split",
        "--resize",
        "--workers",
        "--seed",
        "--source",
        "--val-labels",
        "--overwrite",
        "verify OUT",
    ):
        assert option in text
