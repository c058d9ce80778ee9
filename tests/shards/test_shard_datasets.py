"""Shards from tiny copies of the paper's data sets in their distributed form; errors name the cause."""

from __future__ import annotations

import io
import json
import re
import shlex

import numpy as np
import pytest
import tyro
from PIL import Image
from shard_sources import ROOT, class_folders, encoded, imagenet_train_tar, jpeg, make, run_tool, samples, tar_of
from tyro.conf import OmitArgPrefixes

from shards.errors import ShardError
from shards.format import load_manifest, load_rejections
from shards.make import ShardingOptions


def labels(out, manifest):
    """Return key → class name."""
    classes = manifest.columns[0].classes
    return {key: classes[int(parts["cls"])] for key, parts in samples(out, manifest).items()}


def write_images(folder, names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(seed))


# SimCLR's lists of ImageNet


def test_a_subset_takes_the_images_named_from_imagenets_tar_and_keeps_all_classes(tmp_path):
    tar = imagenet_train_tar(tmp_path / "ILSVRC2012_img_train.tar")
    subset = tmp_path / "1percent.txt"
    subset.write_text("n01484850_2.JPEG\nn01440764_0.JPEG\n\nn01440764_0.JPEG\n")
    manifest = make(tar, tmp_path / "out", subset=subset)
    assert labels(tmp_path / "out", manifest) == {"n01484850_2": "n01484850", "n01440764_0": "n01440764"}
    assert manifest.columns[0].classes == ["n01440764", "n01443537", "n01484850"]
    assert manifest.settings["subset"].startswith("2 names, SHA-256 ")
    assert manifest.read == 2


def test_names_of_a_subset_may_have_folders_and_endings_or_not(tmp_path):
    src = class_folders(tmp_path / "src", {"ant": 3, "owl": 3})
    subset = tmp_path / "some.txt"
    subset.write_text("ant/000.jpg\n/owl/001\ntrain/owl/002.JPEG\n")
    assert set(labels(tmp_path / "a", make(src, tmp_path / "a", subset=subset))) == {
        "ant%2F000",
        "owl%2F001",
        "owl%2F002",
    }
    make(src, tmp_path / "whole")
    again = make(f"{tmp_path}/whole/train-*.tar", tmp_path / "b", subset=subset)
    assert samples(tmp_path / "b", again) == samples(tmp_path / "a", load_manifest(tmp_path / "a", "train"))


@pytest.mark.parametrize(("names", "message"), [
    ("ant/000.jpg\nant/007.jpg\nyak/1.jpg\n", r"2 of 3 names are not in .*first: ant/007\.jpg, yak/1\.jpg"),
    ("000.jpg\n", "name its folder too"),
    ("\n\n", "empty"),
])  # fmt: skip
def test_a_subset_that_does_not_belong_to_the_source_is_refused(tmp_path, names, message):
    src = class_folders(tmp_path / "src", {"ant": 3, "owl": 3})
    (tmp_path / "some.txt").write_text(names)
    with pytest.raises(ShardError, match=message):
        make(src, tmp_path / "out", subset=tmp_path / "some.txt")
    with pytest.raises(ShardError, match=r"gone\.txt: no such file"):
        make(src, tmp_path / "out", subset=tmp_path / "gone.txt")
    assert not (tmp_path / "out").exists()


def test_another_subset_is_another_split(tmp_path):
    src = class_folders(tmp_path / "src", {"ant": 3, "owl": 3})
    subset = tmp_path / "some.txt"
    subset.write_text("ant/000.jpg\nowl/000.jpg\n")
    make(src, tmp_path / "out", subset=subset)
    assert make(src, tmp_path / "out", subset=subset).samples == 2
    with pytest.raises(ShardError, match="made with subset = 2 names"):
        make(src, tmp_path / "out")


# iNaturalist 2018


def inat(folder, split, classes=4, **changes):
    """Write `split`2018.json and its images in train_val2018/SUPER CATEGORY/CATEGORY, like the unpacked archives."""
    names = {n: f"train_val2018/Aves/{n % 2}/{split}{n}.jpg" for n in range(3)}
    write_images(folder, names.values())
    document = {
        "info": {"year": 2018},
        "images": [{"id": n, "file_name": name, "width": 80, "height": 60} for n, name in names.items()],
        "categories": [{"id": n, "name": f"species {n}", "supercategory": "Aves"} for n in range(classes)],
        "annotations": [{"id": 100 + n, "image_id": n, "category_id": n % 2} for n in names],
        "licenses": [],
        **changes,
    }
    (folder / f"{split}2018.json").write_text(json.dumps(document))
    return folder / f"{split}2018.json"


def test_inaturalists_annotations_give_category_ids_as_classes_also_those_without_images(tmp_path):
    train = make(inat(tmp_path, "train"), tmp_path / "out", "train")
    assert train.settings["source"] == "coco"
    assert train.columns[0].classes == ["0", "1", "2", "3"]
    assert labels(tmp_path / "out", train) == {
        f"train_val2018%2FAves%2F{n % 2}%2Ftrain{n}": str(n % 2) for n in range(3)
    }
    val = make(inat(tmp_path, "val"), tmp_path / "out", "val")
    assert val.columns == train.columns
    elsewhere = tmp_path / "annotations"
    elsewhere.mkdir()
    (tmp_path / "val2018.json").rename(elsewhere / "val2018.json")
    moved = make(elsewhere / "val2018.json", tmp_path / "moved", "val", images=tmp_path)
    assert samples(tmp_path / "moved", moved) == samples(tmp_path / "out", val)


@pytest.mark.parametrize(("changes", "message"), [
    ({"annotations": []}, r"3 of 3 images have no annotation .*train2018\.json"),
    ({"annotations": [{"image_id": n, "category_id": 9} for n in range(3)]}, "category 9"),
    ({"annotations": [{"image_id": 77, "category_id": 0}]}, "image 77"),
    ({"annotations": [{"image_id": 0, "category_id": 0}] * 2}, "several annotations"),
    ({"categories": [{"id": "owl"}]}, "'owl' is not a non-negative integer"),
    ({"images": [{"id": 0}]}, "file_name"),
])  # fmt: skip
def test_annotations_that_do_not_fit_together_are_refused(tmp_path, changes, message):
    with pytest.raises(ShardError, match=message):
        make(inat(tmp_path, "test", **changes), tmp_path / "out")


def test_an_image_that_annotations_name_and_nobody_unpacked_is_rejected_and_told(tmp_path):
    source = inat(tmp_path, "train")
    (tmp_path / "train_val2018/Aves/1/train1.jpg").unlink()
    assert make(source, tmp_path / "out").samples == 2
    [(path, reason)] = load_rejections(tmp_path / "out", "train")
    assert path == "train_val2018/Aves/1/train1.jpg"
    assert "no such file" in reason
    with pytest.raises(ShardError, match=r"no samples; 3 rejected \(first: .* no such file"):
        make(source, tmp_path / "none", images=tmp_path / "out")


# SUN397


def test_sun397s_partitions_give_nested_folders_as_classes(tmp_path):
    names = ["a/abbey/sun_1.jpg", "b/balcony/interior/sun_2.jpg", "b/balcony/exterior/sun_3.jpg"]
    write_images(tmp_path / "SUN397", [*names, "a/abbey/sun_other.jpg"])
    (tmp_path / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/b/balcony/exterior\n/b/balcony/interior\n")
    partition = tmp_path / "Training_01.txt"
    partition.write_text("".join(f"/{name}\r\n" for name in names))
    manifest = make(partition, tmp_path / "out", images=tmp_path / "SUN397")
    assert manifest.settings["source"] == "list"
    assert manifest.columns[0].classes == ["a/abbey", "b/balcony/exterior", "b/balcony/interior"]
    assert labels(tmp_path / "out", manifest) == {
        "a%2Fabbey%2Fsun_1": "a/abbey",
        "b%2Fbalcony%2Finterior%2Fsun_2": "b/balcony/interior",
        "b%2Fbalcony%2Fexterior%2Fsun_3": "b/balcony/exterior",
    }


# Places205


def test_places205s_lists_are_known_though_they_are_called_csv(tmp_path):
    names = ["a/abbey/gsun_1.jpg", "y/yard/gsun_2.jpg", "a/abbey/gsun_3.jpg"]
    write_images(tmp_path / "images256", names)
    source = tmp_path / "train_places205.csv"
    source.write_text("".join(f"{name} {0 if 'abbey' in name else 2}\n" for name in names))
    manifest = make(source, tmp_path / "out", images=tmp_path / "images256")
    assert manifest.settings["source"] == "list"
    assert manifest.columns[0].classes == ["0", "1", "2"]
    assert labels(tmp_path / "out", manifest) == {
        "a%2Fabbey%2Fgsun_1": "0",
        "y%2Fyard%2Fgsun_2": "2",
        "a%2Fabbey%2Fgsun_3": "0",
    }


def test_named_images_are_read_in_place_from_an_uncompressed_tar(tmp_path):
    names = ["a/abbey/gsun_1.jpg", "y/yard/gsun_2.jpg"]
    write_images(tmp_path / "images256", names)
    images = {f"./data/vision/{name}": (tmp_path / "images256" / name).read_bytes() for name in names}
    (tmp_path / "images.tar").write_bytes(tar_of(images))
    source = tmp_path / "val_places205.csv"
    source.write_text("".join(f"{name} {number}\n" for number, name in enumerate([*names, "y/yard/gone.jpg"])))
    packed = make(source, tmp_path / "packed", images=tmp_path / "images.tar" / "data" / "vision")
    plain = make(source, tmp_path / "plain", images=tmp_path / "images256")
    assert samples(tmp_path / "packed", packed) == samples(tmp_path / "plain", plain)
    [(path, reason)] = load_rejections(tmp_path / "packed", "train")
    assert path == "y/yard/gone.jpg"
    assert reason.endswith("images.tar/data/vision/y/yard/gone.jpg")
    with pytest.raises(ShardError, match="no samples"):
        make(source, tmp_path / "out", images=tmp_path / "images.tar" / "data")


@pytest.mark.parametrize(("text", "message"), [
    ("a/1.jpg 0\na/2.jpg\n", "line 2: no class number"),
    ("1.jpg\n", r"line 1: '1\.jpg' has no class"),
    (" \n", "empty"),
])  # fmt: skip
def test_a_list_without_classes_is_refused_with_its_line(tmp_path, text, message):
    write_images(tmp_path, ["a/1.jpg", "a/2.jpg", "1.jpg"])
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ShardError, match=message):
        make(tmp_path / "list.txt", tmp_path / "out", labels="folders")


# ADE20k


def ade(root, split="training", count=3):
    """Write ADEChallengeData2016: images/SPLIT and annotations/SPLIT, ids 0 to 150."""
    for folder in ("images", "annotations"):
        (root / folder / split).mkdir(parents=True)
    for n in range(1, count + 1):
        name = f"ADE_{split[:5]}_{n:08d}"
        (root / "images" / split / f"{name}.jpg").write_bytes(jpeg(n))
        ids = Image.fromarray(np.random.default_rng(n).integers(0, 151, (60, 80), dtype=np.uint8))
        (root / "annotations" / split / f"{name}.png").write_bytes(encoded(ids, "PNG"))
    return root / "images" / split, root / "annotations" / split


def test_ade20ks_images_and_masks_become_one_sample_each_with_every_id(tmp_path):
    images, masks = ade(tmp_path)
    (images / ".DS_Store").write_text("x")
    (masks / "ADE_train_00000009.png").write_bytes((masks / "ADE_train_00000001.png").read_bytes())
    manifest = make(images, tmp_path / "out", masks=masks)
    assert (manifest.columns, manifest.masks, manifest.samples) == ([], True, 3)
    found = samples(tmp_path / "out", manifest)
    assert sorted(found) == [f"ADE_train_{n:08d}" for n in (1, 2, 3)]
    for key, parts in found.items():
        assert list(parts) == ["jpg", "mask.png"]
        assert parts["jpg"] == (images / f"{key}.jpg").read_bytes()
        mask, truth = (
            Image.open(io.BytesIO(data)) for data in (parts["mask.png"], (masks / f"{key}.png").read_bytes())
        )
        assert np.array_equal(np.asarray(mask), np.asarray(truth))
    [(path, reason)] = load_rejections(tmp_path / "out", "train")
    assert path == "ADE_train_00000009.png"
    assert "without an image" in reason


def test_images_without_masks_are_refused_with_their_number_and_names(tmp_path):
    images, masks = ade(tmp_path)
    (masks / "ADE_train_00000002.png").unlink()
    with pytest.raises(ShardError, match=r"1 of 3 images .* have no mask in .*ADE_train_00000002\.jpg"):
        make(images, tmp_path / "out", masks=masks)
    ade(tmp_path, "validation")
    with pytest.raises(ShardError, match="are splits"):
        make(tmp_path / "images", tmp_path / "out", masks=tmp_path / "annotations")
    with pytest.raises(ShardError, match="are splits"):
        make(tmp_path / "images", tmp_path / "out")
    with pytest.raises(ShardError, match="inside --masks"):
        make(images, masks / "out", masks=masks)


def test_options_that_a_source_has_no_use_for_are_refused(tmp_path):
    src = class_folders(tmp_path / "src", {"ant": 1})
    with pytest.raises(ShardError, match="--images is for"):
        make(src, tmp_path / "out", images=tmp_path)
    source = inat(tmp_path, "train")
    with pytest.raises(ShardError, match="--masks is for"):
        make(source, tmp_path / "out", masks=src)
    with pytest.raises(ShardError, match="nowhere: no such folder or tar"):
        make(source, tmp_path / "out", images=tmp_path / "nowhere")
    with pytest.raises(ShardError, match="is not a folder"):
        make(src, tmp_path / "out", masks=tmp_path / "nowhere")


def test_the_command_of_the_documentation_makes_and_verifies_ade20k(tmp_path):
    images, masks = ade(tmp_path)
    out = tmp_path / "shards"
    assert run_tool(images, out, "--split", "train", "--masks", masks, "--workers", 1).returncode == 0
    assert run_tool("verify", out, "--workers", 1).returncode == 0
    (masks / "ADE_train_00000001.png").unlink()
    refused = run_tool(images, out, "--split", "other", "--masks", masks)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: 1 of 3 images")
    assert len(refused.stderr.splitlines()) == 1


def test_every_command_of_the_documentation_is_understood():
    text = (ROOT / "docs" / "datasets.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python tools/make_shards\.py (.*)$", text, re.MULTILINE)
    assert len(commands) == 15
    for command in commands:
        tyro.cli(OmitArgPrefixes[ShardingOptions], args=shlex.split(command))
