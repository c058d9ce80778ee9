"""Held-out images of one source: the key alone decides, and both splits have the classes of the whole source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shard_sources import class_folders, contents, imagenet_train_tar, jpeg, make, run_tool, samples

from shards.errors import ShardError
from shards.format import list_splits, load_manifest, load_rejections
from shards.hold_out import key_position


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    src = class_folders(tmp_path_factory.mktemp("source") / "src", {"ant": 20, "bee": 20})
    (src / "readme.txt").write_text("text")
    return src


def keys(out: Path, split: str) -> set[str]:
    return set(samples(out, load_manifest(out, split)))


def test_the_key_alone_decides(source, tmp_path):
    make(source, tmp_path / "a", val_fraction=0.3)
    train, val = keys(tmp_path / "a", "train"), keys(tmp_path / "a", "val")
    assert train | val == {f"{name}%2F{n:03d}" for name in ("ant", "bee") for n in range(20)}
    assert val == {key for key in train | val if key_position(key) < 0.3}
    assert 4 <= len(val) <= 20
    # Another seed, another order, other images, another kind of source.
    lines = [str(path.relative_to(source)) for path in sorted(source.rglob("*.jpg"), reverse=True)[5:]]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    make(tmp_path / "list.txt", tmp_path / "b", val_fraction=0.3, images=source, seed=7)
    assert keys(tmp_path / "b", "val") < val
    assert keys(tmp_path / "b", "train") < train
    make(source, tmp_path / "c", val_fraction=0.5)
    assert keys(tmp_path / "c", "val") > val


def test_positions_are_uniform_and_never_change():
    positions = [key_position(f"owl%2F{number}") for number in range(2000)]
    assert key_position("owl%2F0") == 0.5297913977050482
    assert all(0 <= position < 1 for position in positions)
    assert all(150 <= sum(low <= 10 * position < low + 1 for position in positions) <= 250 for low in range(10))


def test_both_splits_have_all_classes_and_the_sources_rejections_are_counted_once(source, tmp_path):
    (tmp_path / "list.csv").write_text(
        "path,label,scene\n" + "".join(f"ant/{n:03d}.jpg,c{n},{n % 2}\n" for n in range(20)) + "ant/gone.jpg,c0,0\n"
    )
    make(tmp_path / "list.csv", tmp_path / "out", val_fraction=0.2, images=source)
    train, val = (load_manifest(tmp_path / "out", split) for split in ("train", "val"))
    assert train.columns == val.columns
    assert len(train.columns[0].classes) == 20
    assert (train.samples + val.samples, train.read + val.read) == (20, 21)
    assert train.settings["val_fraction"] == val.settings["val_fraction"] == 0.2
    assert [path for path, _ in load_rejections(tmp_path / "out", "train")] == ["ant/gone.jpg"]
    assert load_rejections(tmp_path / "out", "val") == []


def test_any_source_and_a_subset_of_it_can_be_divided(source, tmp_path):
    tar = imagenet_train_tar(tmp_path / "train.tar", per_class=8)
    make(tar, tmp_path / "tar", val_fraction=0.4)
    assert list_splits(tmp_path / "tar") == ["train", "val"]
    (tmp_path / "some.txt").write_text("\n".join(f"ant/{n:03d}.jpg" for n in range(12)))
    make(source, tmp_path / "out", val_fraction=0.4, subset=tmp_path / "some.txt")
    assert len(keys(tmp_path / "out", "train") | keys(tmp_path / "out", "val")) == 12
    make(f"{tmp_path}/out/train-*.tar", tmp_path / "again", val_fraction=0.8)
    assert keys(tmp_path / "again", "val") < keys(tmp_path / "out", "train")


def test_a_rerun_has_nothing_to_do_and_another_fraction_is_refused(source, tmp_path):
    out = tmp_path / "out"
    make(source, out, val_fraction=0.3)
    before = contents(out)
    done = run_tool(source, out, "--val-fraction", 0.3, "--min-shards", 2)
    assert re.findall(r"already has the split '(\w+)' with the same settings: nothing to do", done.stdout) == [
        "val",
        "train",
    ]
    for fraction in (0.4, None):
        with pytest.raises(ShardError, match=rf"val_fraction = 0\.3, this run has {fraction}; .*--overwrite"):
            make(source, out, val_fraction=fraction)
    assert contents(out) == before
    make(source, out, val_fraction=0.4, overwrite=True)
    assert keys(out, "val") == {key for key in keys(out, "train") | keys(out, "val") if key_position(key) < 0.4}


def test_a_finished_split_of_other_settings_is_found_before_anything_is_made(source, tmp_path):
    make(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ShardError, match=r"has split .train. made with val_fraction = None, this run has 0\.3"):
        make(source, tmp_path / "out", val_fraction=0.3)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(("fraction", "empty"), [(0.0001, "val"), (0.9999, "train")])
def test_an_empty_split_is_refused_with_a_fraction_that_is_accepted(source, tmp_path, fraction, empty):
    with pytest.raises(ShardError, match=rf"--val-fraction {fraction} leaves no image for '{empty}'") as error:
        make(source, tmp_path / "out", val_fraction=fraction)
    assert not (tmp_path / "out").exists()
    named = float(re.search(r"use ([\d.]+), or add images", str(error.value))[1])
    make(source, tmp_path / "out", val_fraction=named)
    assert len(keys(tmp_path / "out", empty)) == 1


def test_one_image_cannot_be_divided(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "1.jpg").write_bytes(jpeg())
    with pytest.raises(ShardError, match="omit it, or add images"):
        make(tmp_path / "src", tmp_path / "out", val_fraction=0.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match="the source has no samples"):
        make(tmp_path / "empty", tmp_path / "out", val_fraction=0.5)


@pytest.mark.parametrize(("options", "message"), [
    ({"split": "test", "val_fraction": 0.1}, "makes the splits 'train' and 'val': omit --split test"),
    ({"val_fraction": 0}, "--val-fraction must be above 0 and below 1"),
    ({"val_fraction": 1.0}, "--val-fraction must be above 0 and below 1"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(source, tmp_path, options, message):
    with pytest.raises(ShardError, match=message):
        make(source, tmp_path / "out", **options)
