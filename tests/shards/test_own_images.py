"""Images of the user's own: any folder or list becomes shards, with labels where its folders are classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from shard_sources import class_folders, encoded, imagenet_val_tar, jpeg, make, photo, run_tool, samples, tar_of

from shards.errors import ShardError
from shards.format import load_rejections
from shards.listing import Labels
from shards.sources.detect import SourceOptions, detect, list_source


def write(folder: Path, *names: str) -> Path:
    """Write an image for each name, and text for a name without an image's extension."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(seed) if name.endswith(".jpg") else b"text")
    return folder


def labelling(source: Path, labels: Labels = "auto") -> tuple[list[list[str]], str]:
    """Return the classes of each label column, and the line that is printed about them."""
    options = SourceOptions(labels=labels)
    listing = list_source(str(source), detect(str(source), options), options)
    return [column.classes for column in listing.columns], listing.labelling


@pytest.mark.parametrize(("names", "line"), [
    (["1.jpg", "2.jpg"], "no class folders; a CSV file"),
    (["a/1.jpg", "b/2.jpg", "3.jpg"], r"images lie outside class folders \(1, first: '3.jpg'\); --labels folders"),
    (["a/1.jpg", "a/2.jpg"], "all images are in the folder 'a'; --labels folders"),
    (["a/1.jpg", "b/c/2.jpg"], r"different depths \('a/1.jpg', 'b/c/2.jpg'\); --labels folders"),
    (["a/1", "b/2"], "no file has the extension of an image; --labels folders"),
])  # fmt: skip
def test_folders_that_are_no_classes_give_no_labels_and_the_reason(tmp_path, names, line):
    src = write(tmp_path / "src", *names)
    columns, said = labelling(src)
    assert columns == []
    assert re.match(f"no labels: .*{line}", said)


def test_files_that_are_no_images_do_not_change_the_decision(tmp_path):
    src = write(tmp_path / "src", "a/1.jpg", "b/2.jpg", "README", "Thumbs.db", "a/notes/list.txt")
    assert labelling(src) == ([["a", "b"]], "labels: 2 class folders; --labels none ignores them")
    manifest = make(src, tmp_path / "out")
    assert (manifest.samples, manifest.rejected) == (2, 3)
    assert "no class" in dict(load_rejections(tmp_path / "out", "train"))["README"]


def test_images_at_any_depth_become_samples_without_labels(tmp_path):
    src = write(tmp_path / "src", "1.jpg", "2019/june/2.jpg", "2020/3.jpg", "Thumbs.db")
    (src / "4.png").write_bytes(encoded(photo(), "PNG"))
    manifest = make(src, tmp_path / "out")
    assert manifest.columns == []
    found = samples(tmp_path / "out", manifest)
    assert sorted(found) == ["1", "2019%2Fjune%2F2", "2020%2F3", "4"]
    assert {tuple(parts) for parts in found.values()} == {("jpg",)}
    assert dict(load_rejections(tmp_path / "out", "train")) == {"Thumbs.db": "not an image of a known format"}


def test_labels_are_the_users_choice(tmp_path):
    classes = class_folders(tmp_path / "classes", {"ant": 2, "owl": 2})
    assert make(classes, tmp_path / "a", labels="none").columns == []
    deep = write(tmp_path / "deep", "a/1.jpg", "b/c/2.jpg", "3.jpg")
    manifest = make(deep, tmp_path / "b", labels="folders")
    assert (manifest.columns[0].classes, manifest.samples, manifest.rejected) == (["a", "b"], 2, 1)
    make(classes, tmp_path / "c")
    with pytest.raises(ShardError, match="--labels is another"):
        make(classes, tmp_path / "c", labels="none")
    with pytest.raises(ShardError, match=r"label columns are \[\].*see --labels"):
        make(deep, tmp_path / "c", "val")
    with pytest.raises(ShardError, match="use --labels none"):
        make(classes, tmp_path / "a", "val")


def test_splits_are_refused_whatever_the_labels(tmp_path):
    src = write(tmp_path / "src", "train/1.jpg", "val/2.jpg")
    for labels in ("auto", "folders", "none"):
        with pytest.raises(ShardError, match="splits, not classes: use one of them"):
            make(src, tmp_path / "out", labels=labels)
    assert make(src / "train", tmp_path / "out").samples == 1


def test_images_beside_tars_need_the_kind_of_source(tmp_path):
    src = write(tmp_path / "src", "1.jpg")
    (src / "old.tar").write_bytes(tar_of({"a.jpg": jpeg(5)}))
    with pytest.raises(ShardError, match="--source folder for the images, or --source webdataset"):
        make(src, tmp_path / "out")
    assert (
        make(src, tmp_path / "a", source="folder").samples,
        make(src, tmp_path / "b", source="webdataset").samples,
    ) == (1, 1)


# Lists


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write(tmp_path / "photos", "1.jpg", "a/2.jpg", "b/3 4.jpg")


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_list_of_absolute_paths_has_no_labels(photos, tmp_path):
    (tmp_path / "lists").mkdir()
    source = written(tmp_path / "lists" / "all.txt", *sorted(photos.rglob("*.jpg")), photos / "gone.jpg")
    manifest = make(source, tmp_path / "out")
    assert (manifest.columns, manifest.samples) == ([], 3)
    assert "line 1 is an absolute path; --labels folders" in labelling(source)[1]
    [(path, reason)] = load_rejections(tmp_path / "out", "train")
    assert path == str(photos / "gone.jpg")
    assert reason == f"no such file: {source.parent}{photos / 'gone.jpg'}, nor {photos / 'gone.jpg'}"
    assert labelling(source, "folders")[0] == [[str(photos), str(photos / "a"), str(photos / "b"), str(photos)[1:]]]


def test_a_leading_slash_is_relative_where_there_is_no_such_file(photos):
    source = written(photos / "list.txt", "/a/2.jpg", "/b/3 4.jpg")
    assert labelling(source) == (
        [["a", "b"]],
        "labels: the folder of each path, 2 classes; --labels none ignores them",
    )


@pytest.mark.parametrize(("lines", "line"), [
    (["a/2.jpg", "1.jpg"], "line 2 has no folder ('1.jpg'); a class number after each path gives labels"),
    (["./a/2.jpg", "./1.jpg"], "line 2 has no folder ('1.jpg'); a class number after each path gives labels"),
    (["a/2.jpg"], "all images are in the folder 'a'; --labels folders makes it the class"),
])  # fmt: skip
def test_a_list_without_classes_gives_no_labels_and_the_reason(photos, tmp_path, lines, line):
    source = written(photos / "list.txt", *lines)
    assert labelling(source) == ([], f"no labels: {line}")
    manifest = make(source, tmp_path / "out")
    assert (manifest.columns, manifest.samples, manifest.rejected) == ([], len(lines), 0)


def test_a_number_after_the_path_is_a_label_or_ignored(photos, tmp_path):
    source = written(photos / "list.txt", "a/2.jpg 3", "b/3 4.jpg 0", f"{photos}/1.jpg 1")
    assert labelling(source)[0] == [["0", "1", "2", "3"]]
    assert labelling(source, "folders")[0] == [[str(photos), "a", "b"]]
    manifest = make(source, tmp_path / "out", labels="none")
    assert (manifest.columns, manifest.samples, manifest.rejected) == ([], 3, 0)


def test_a_csv_names_absolute_and_relative_paths(photos, tmp_path):
    source = written(photos / "list.csv", "path", photos / "1.jpg", "a/2.jpg", "./b/3 4.jpg", "/a/2.jpg")
    manifest = make(source, tmp_path / "out")
    assert (manifest.columns, manifest.samples) == ([], 3)
    assert "a%2F2" in samples(tmp_path / "out", manifest)
    assert [path for path, _ in load_rejections(tmp_path / "out", "train")] == ["a/2.jpg"]  # the same key again
    with pytest.raises(ShardError, match=r"no column 'path'.*--source list"):
        make(written(photos / "bare.csv", "1.jpg"), tmp_path / "bare")


def test_other_columns_of_a_csv_are_ignored_on_request(photos, tmp_path):
    source = written(photos / "list.csv", "path,taken on,label", "1.jpg,monday,x", "a/2.jpg,,")
    with pytest.raises(ShardError, match="taken on"):
        make(source, tmp_path / "out")
    manifest = make(source, tmp_path / "out", labels="none")
    assert (manifest.columns, manifest.samples) == ([], 2)


# Sources with labels of their own


def test_labels_of_any_source_can_be_ignored(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"a.jpg": jpeg(), "a.cls": b"1", "b.jpg": jpeg(1)}))
    assert make(tmp_path / "a.tar", tmp_path / "tars", labels="none").samples == 2
    val = imagenet_val_tar(tmp_path / "val.tar")
    assert make(val, tmp_path / "val", labels="none").columns == []
    write(tmp_path, "1.jpg")
    (tmp_path / "test.json").write_text(json.dumps({"images": [{"id": 0, "file_name": "1.jpg"}]}))
    assert make(tmp_path / "test.json", tmp_path / "coco", labels="none", source="coco").samples == 1
    with pytest.raises(ShardError, match="--labels folders is for folders of images"):
        make(val, tmp_path / "no", labels="folders")
    with pytest.raises(ShardError, match="omit one of the two"):
        make(val, tmp_path / "no", labels="none", val_labels=tmp_path)


def test_webdataset_tars_with_json_but_no_label_need_no_labels(tmp_path):
    members = {}
    for key in "ab":
        members |= {f"{key}.jpg": jpeg(), f"{key}.json": b'{"url": "x"}', f"{key}.txt": b"a caption"}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    manifest = make(tmp_path / "a.tar", tmp_path / "out")
    assert (manifest.columns, manifest.samples) == ([], 2)
    with pytest.raises(ShardError, match="no field 'breed'"):
        make(tmp_path / "a.tar", tmp_path / "other", label_field="breed")


def test_the_command_says_what_it_decided_and_how_many_images_are_wanted(tmp_path):
    src = write(tmp_path / "src", "1.jpg", "a/2.jpg")
    done = run_tool(src, tmp_path / "out", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "no labels: images lie outside class folders (1, first: '1.jpg'); --labels folders" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("2 training images are few: the paper has 1,281,167.")
    assert run_tool("verify", tmp_path / "out", "--workers", 1).returncode == 0
    val = run_tool(src, tmp_path / "out", "--split", "val", "--workers", 1)
    assert "training images" not in val.stdout


@pytest.mark.parametrize(
    ("name", "message"), [("cat.JPG", "is one image; use its folder"), ("photos.zip", "is a zip archive; unpack it")]
)
def test_one_image_and_an_archive_are_told_what_to_give_instead(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ShardError, match=message):
        make(tmp_path / name, tmp_path / "out")
