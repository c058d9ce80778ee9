"""Listing of every kind of source: completeness, labels, and rejections with their reasons."""

from __future__ import annotations

import gzip
import json
import os
from urllib.parse import unquote

import pytest
from shard_sources import (
    SYNSETS,
    class_folders,
    contents,
    development_kit,
    encoded,
    imagenet_train_tar,
    imagenet_val_tar,
    jpeg,
    make,
    photo,
    samples,
    tar_of,
)

from shards.errors import ShardError
from shards.format import load_rejections
from shards.listing import fit_key, sample_key
from shards.sources.detect import SourceOptions, detect


def labels(out, manifest):
    """Return key → class name."""
    classes = manifest.columns[0].classes
    return {key: classes[int(parts["cls"])] for key, parts in samples(out, manifest).items()}


def test_a_folder_gives_its_first_level_as_classes_and_keeps_bytes_at_any_depth(tmp_path):
    src = class_folders(tmp_path / "src", {"owl": 2, "Ant": 2, "empty": 0})
    (src / "owl" / "night" / "late").mkdir(parents=True)
    (src / "owl" / "night" / "late" / "x.y.JPG").write_bytes(jpeg(50))
    (src / "owl" / ".hidden.jpg").write_bytes(jpeg(51))
    (src / ".cache").mkdir()
    (src / "stray.jpg").write_bytes(jpeg(52))
    (src / "owl" / "notes.txt").write_text("not an image")
    manifest = make(src, tmp_path / "out", labels="folders")
    assert manifest.columns[0].classes == ["Ant", "empty", "owl"]
    assert labels(tmp_path / "out", manifest) == {
        "Ant%2F000": "Ant",
        "Ant%2F001": "Ant",
        "owl%2F000": "owl",
        "owl%2F001": "owl",
        "owl%2Fnight%2Flate%2Fx%2Ey": "owl",
    }
    assert samples(tmp_path / "out", manifest)["owl%2Fnight%2Flate%2Fx%2Ey"]["jpg"] == jpeg(50)
    rejected = dict(load_rejections(tmp_path / "out", "train"))
    assert sorted(rejected) == ["owl/notes.txt", "stray.jpg"]
    assert "no class" in rejected["stray.jpg"]
    assert manifest.read == 7 == manifest.samples + manifest.rejected


def test_links_are_followed_and_loops_end(tmp_path):
    src = class_folders(tmp_path / "src", {"owl": 1})
    class_folders(tmp_path / "far", {"pictures": 2})
    (src / "owl" / "linked").symlink_to(tmp_path / "far" / "pictures")
    (src / "owl" / "loop").symlink_to(src / "owl")
    (src / "owl" / "broken.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(src / "owl" / "pipe.jpg")
    manifest = make(src, tmp_path / "out")
    assert manifest.samples == 3
    assert {path: reason.split()[1] for path, reason in load_rejections(tmp_path / "out", "train")} == {
        "owl/broken.jpg": "a",
        "owl/loop": "to",
        "owl/pipe.jpg": "not",
    }


@pytest.mark.parametrize(("build", "message"), [
    (lambda src: src.mkdir(), "class folders"),
    (lambda src: class_folders(src, {"train": 1, "val": 1}), "splits, not classes"),
    (lambda src: class_folders(src, {"owl": 0}), "no samples"),
])  # fmt: skip
def test_a_folder_of_another_layout_is_refused(tmp_path, build, message):
    build(tmp_path / "src")
    with pytest.raises(ShardError, match=message):
        make(tmp_path / "src", tmp_path / "out", labels="folders")
    assert not (tmp_path / "out").exists()


def test_the_later_of_two_equal_keys_is_rejected(tmp_path):
    src = class_folders(tmp_path / "src", {"owl": 2})
    (src / "owl" / "000.png").write_bytes(encoded(photo(), "PNG"))
    manifest = make(src, tmp_path / "out")
    assert manifest.samples == 2
    [(path, reason)] = load_rejections(tmp_path / "out", "train")
    assert path == "owl/000.png"
    assert "owl/000.jpg" in reason


def test_keys_are_safe_and_can_be_turned_back():
    names = ["a/b", "a_b", "a%2Fb", "ä ö.x", "~t", "b\n", "back\\slash", os.fsdecode(b"\xff\xfe")]
    keys = [sample_key(name) for name in names]
    assert len(set(keys)) == len(names)
    for key, name in zip(keys, names, strict=True):
        assert not set(key) & set("./ \n~")
        assert key.isascii()
        assert os.fsencode(unquote(key, errors="surrogateescape")) == os.fsencode(name)
    long = [fit_key("k" * 200 + end, 96) for end in "ab"]
    assert [len(key) for key in long] == [96, 96]
    assert long[0] != long[1]


def test_very_long_and_foreign_names_reach_the_shards(tmp_path):
    src = tmp_path / "src"
    folder = src / "owl" / ("deep" * 30) / "œuvre d'art"
    folder.mkdir(parents=True)
    for name in ("a b.jpg", "a" * 120 + "1.jpg", "a" * 120 + "2.jpg"):
        (folder / name).write_bytes(jpeg())
    assert make(src, tmp_path / "out").samples == 3


def test_the_imagenet_training_tar_is_read_in_place(tmp_path):
    tar = imagenet_train_tar(tmp_path / "ILSVRC2012_img_train.tar")
    assert detect(str(tar), SourceOptions()) == "imagenet-train"
    manifest = make(tar, tmp_path / "out")
    assert manifest.columns[0].classes == SYNSETS
    assert labels(tmp_path / "out", manifest) == {f"{s}_{n}": s for s in SYNSETS for n in range(3)}
    assert samples(tmp_path / "out", manifest)["n01443537_2"]["jpg"] == jpeg(12)


def test_the_development_kits_ids_are_mapped_to_synsets_by_file_name(tmp_path):
    tar = imagenet_val_tar(tmp_path / "ILSVRC2012_img_val.tar")
    kit = development_kit(tmp_path / "kit", [1, 2, 3, 3, 2, 2])
    expected = {f"ILSVRC2012_val_{n:08d}": SYNSETS[place] for n, place in enumerate([2, 0, 1, 1, 0, 0], start=1)}
    files = {str(path.relative_to(kit.parent)): path.read_bytes() for path in kit.rglob("*") if path.is_file()}
    packed = tmp_path / "ILSVRC2012_devkit_t12.tar"
    packed.write_bytes(tar_of(files))
    plain = tmp_path / "synsets.txt"
    plain.write_text("\n".join(expected.values()))
    truth = kit / "data" / "ILSVRC2012_validation_ground_truth.txt"
    for number, val_labels in enumerate((kit, packed, truth, plain)):
        out = tmp_path / f"out{number}"
        manifest = make(tar, out, "val", val_labels=val_labels)
        assert labels(out, manifest) == expected, val_labels
        assert manifest.columns[0].classes == SYNSETS


def test_the_validation_tar_needs_labels_that_fit(tmp_path):
    tar = imagenet_val_tar(tmp_path / "val.tar")
    kit = development_kit(tmp_path / "kit", [1, 2, 3, 3, 2, 4])
    few = tmp_path / "few.txt"
    few.write_text("n01440764\n")
    words = tmp_path / "words.txt"
    words.write_text("tench\n" * 6)
    ids = tmp_path / "ids.txt"
    ids.write_text("1\n" * 6)
    for val_labels, message in (
        (None, "--val-labels"),
        (kit, "'4'"),
        (few, "1 labels"),
        (words, "synset"),
        (ids, "meta.mat"),
        (tmp_path / "nothing.txt", "nothing.txt"),
    ):
        with pytest.raises(ShardError, match=message):
            make(tar, tmp_path / "out", "val", val_labels=val_labels)
    with pytest.raises(ShardError, match="--val-labels is for"):
        make(imagenet_train_tar(tmp_path / "train.tar"), tmp_path / "out", val_labels=few)


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_a_cut_off_imagenet_tar_is_refused(tmp_path, keep):
    for tar in (imagenet_train_tar(tmp_path / "train.tar"), imagenet_val_tar(tmp_path / "val.tar")):
        data = tar.read_bytes()
        tar.write_bytes(data[: int(keep * len(data)) // 512 * 512])
        with pytest.raises(ShardError, match=r"cut off|end mark"):
            make(tar, tmp_path / "out", val_labels=tmp_path if tar.name == "val.tar" else None)


def test_a_tar_cut_off_between_two_members_is_refused(tmp_path):
    members = {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(n) for n in range(4)}
    whole = tar_of(members)
    second = whole.index(b"ILSVRC2012_val_00000002.JPEG")
    (tmp_path / "val.tar").write_bytes(whole[:second])
    with pytest.raises(ShardError, match="end mark"):
        make(tmp_path / "val.tar", tmp_path / "out", val_labels=tmp_path)


def test_a_csv_gives_every_label_column_and_masks(tmp_path):
    (tmp_path / "images").mkdir()
    rows = ["path,label,scene,count,mask"]
    for n in range(4):
        (tmp_path / "images" / f"{n}.jpg").write_bytes(jpeg(n))
        (tmp_path / "images" / f"{n}.png").write_bytes(encoded(photo(n).convert("L"), "PNG"))
        rows.append(
            f"images/{n}.jpg,{'owl' if n % 2 else 'ant'},{'forest, wet' if n else 'town'!r},{n * 2},images/{n}.png"
        )
    rows[1:] = [row.replace("'forest, wet'", '"forest, wet"').replace("'town'", "town") for row in rows[1:]]
    rows += ["images/none.jpg,owl,town,1,images/0.png", "images/0.jpg,,town,1,images/0.png", "images/1.jpg,owl"]
    (tmp_path / "list.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    manifest = make(tmp_path / "list.csv", tmp_path / "out")
    assert [(c.name, c.component, c.classes) for c in manifest.columns] == [
        ("label", "cls", ["ant", "owl"]),
        ("scene", "scene.cls", ["forest, wet", "town"]),
        ("count", "count.cls", [str(n) for n in range(7)]),
    ]
    assert manifest.masks
    found = samples(tmp_path / "out", manifest)
    assert sorted(found) == [f"images%2F{n}" for n in range(4)]
    assert list(found["images%2F3"]) == ["jpg", "cls", "scene.cls", "count.cls", "mask.png"]
    assert [found["images%2F3"][c] for c in ("cls", "scene.cls", "count.cls")] == [b"1", b"0", b"6"]
    assert (manifest.read, manifest.rejected) == (7, 3)


def test_a_csv_of_paths_alone_gives_shards_without_labels(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "list.csv").write_text(f"path\n{tmp_path / '0.jpg'}\n")
    manifest = make(tmp_path / "list.csv", tmp_path / "out")
    assert manifest.columns == []
    assert [list(parts) for parts in samples(tmp_path / "out", manifest).values()] == [["jpg"]]


@pytest.mark.parametrize(("text", "message"), [
    ("file,label\na.jpg,1\n", "no column 'path'"),
    ("path,label,label\na.jpg,1,2\n", "twice"),
    ("path,my label\na.jpg,1\n", "my label"),
    ("", "no column 'path'"),
    ("path,label\nmissing.jpg,1\n", "no samples"),
])  # fmt: skip
def test_a_csv_that_cannot_be_used_is_refused(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ShardError, match=message):
        make(tmp_path / "list.csv", tmp_path / "out")


def test_foreign_webdataset_tars_with_cls_or_json(tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(2):
        members = {}
        for n in range(3):
            key = f"sub/{number}-{n}"
            members |= {f"{key}.JPG": jpeg(n), f"{key}.json": json.dumps({"label": f"c{n}", "url": "x"}).encode()}
        members |= {"alone.cls": b"1", f"{number}-two.jpg": jpeg(), f"{number}-two.png": encoded(photo(), "PNG")}
        (tars / f"part-{number}.tar").write_bytes(tar_of(members))
    assert detect(str(tars), SourceOptions()) == "webdataset"
    manifest = make(f"{tars}/part-{{0..1}}.tar", tmp_path / "out")
    assert manifest.columns[0].classes == ["c0", "c1", "c2"]
    assert labels(tmp_path / "out", manifest) == {f"sub%2F{t}-{n}": f"c{n}" for t in range(2) for n in range(3)}
    assert (manifest.samples, manifest.rejected) == (6, 4)
    with pytest.raises(ShardError, match=r"part-2\.tar"):
        make(f"{tars}/part-{{0..2}}.tar", tmp_path / "out2")


def test_integer_labels_of_webdataset_tars_stand_for_themselves(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"a.jpg": jpeg(), "a.cls": b"7", "b.jpg": jpeg(1), "b.cls": b"2"}))
    manifest = make(tmp_path / "a.tar", tmp_path / "out")
    assert manifest.columns[0].classes == [str(n) for n in range(8)]
    assert {key: parts["cls"] for key, parts in samples(tmp_path / "out", manifest).items()} == {"a": b"7", "b": b"2"}


def test_webdataset_labels_that_differ_in_kind_are_rejected(tmp_path):
    members = {"a.jpg": jpeg(), "a.cls": b"0", "b.jpg": jpeg(), "c.jpg": jpeg(), "c.cls": b"\xff", "d.jpg": jpeg()}
    members |= {"d.cls": b" 1\n", "e.jpg": jpeg(), "e.cls": b""}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    manifest = make(tmp_path / "a.tar", tmp_path / "out")
    assert sorted(samples(tmp_path / "out", manifest)) == ["a", "d"]
    reasons = dict(load_rejections(tmp_path / "out", "train"))
    assert sorted(reasons) == ["a.tar/b", "a.tar/c", "a.tar/e"]
    (tmp_path / "b.tar").write_bytes(tar_of({"a.jpg": jpeg(), "a.my scene.cls": b"0"}))
    with pytest.raises(ShardError, match="my scene"):
        make(tmp_path / "b.tar", tmp_path / "out2")


def test_our_own_shards_can_be_sharded_again_without_loss(tmp_path):
    src = class_folders(tmp_path / "src", {"owl": 3, "ant": 3})
    first = make(src, tmp_path / "out")
    make(src, tmp_path / "out", "val")
    again = make(f"{tmp_path}/out/train-*.tar", tmp_path / "again", seed=5)
    assert again.columns == first.columns
    assert samples(tmp_path / "again", again) == samples(tmp_path / "out", first)
    with pytest.raises(ShardError, match=r"splits \['train', 'val'\]"):
        make(tmp_path / "out", tmp_path / "mixed")


def test_splits_of_one_folder_share_their_classes(tmp_path):
    train = class_folders(tmp_path / "train", {"ant": 2, "bee": 2, "owl": 2})
    val = class_folders(tmp_path / "val", {"owl": 2})
    other = class_folders(tmp_path / "other", {"yak": 1})
    make(train, tmp_path / "out")
    manifest = make(val, tmp_path / "out", "val", labels="folders")
    assert manifest.columns[0].classes == ["ant", "bee", "owl"]
    assert set(labels(tmp_path / "out", manifest).values()) == {"owl"}
    elsewhere = make(val, tmp_path / "elsewhere", "val", classes_from=tmp_path / "out", labels="folders")
    assert elsewhere.columns == manifest.columns
    before = contents(tmp_path / "out")
    with pytest.raises(ShardError, match="class 'yak'"):
        make(other, tmp_path / "out", "test", labels="folders")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("src", ["nothing", "nothing.csv", "nothing.tar", "nothing-{0..1}.tar", "none-*.tar"])
def test_a_source_that_is_not_there_is_named(tmp_path, src):
    with pytest.raises(ShardError, match=r"nothing|none"):
        make(tmp_path / src, tmp_path / "out")


def test_a_compressed_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar_of({"a.jpg": jpeg()})))
    with pytest.raises(ShardError, match="uncompressed"):
        make(tmp_path / "a.tar", tmp_path / "out")
