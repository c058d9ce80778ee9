"""Verification of shard folders: every kind of damage is found and named."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from shard_sources import encoded, jpeg, make, photo, read_tar, run_tool

from shards.errors import ShardError
from shards.format import Entry, Manifest, Shard, format_index, load_manifest, save_manifest, save_rejections
from shards.verify import check_quick, verify_shards
from shards.writer import TarWriter


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    rows = ["path,label,scene,mask"]
    for number in range(12):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        (folder / f"{number}.png").write_bytes(encoded(photo(number).convert("L"), "PNG"))
        rows.append(f"{number}.jpg,{'ab'[number % 2]},{number % 3},{number}.png")
    rows.append("missing.jpg,a,1,0.png")
    (folder / "list.csv").write_text("\n".join(rows))
    make(folder / "list.csv", folder / "out", min_shards=3)
    return folder / "out"


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def problems(out: Path, decode: bool = True) -> str:
    return "\n".join(verify_shards(out, decode=decode, workers=1, console=Console(quiet=True)))


def rewrite(out: Path, number: int, change) -> None:
    """Rewrite a shard with changed members and correct hashes in the manifest, so that only its content is wrong."""
    manifest = load_manifest(out, "train")
    old = manifest.shards[number]
    members = change(list(read_tar(out / old.name).items()))
    index: list[list[Entry]] = []
    buffer = io.BytesIO()
    tar = TarWriter(buffer)
    for name, data in members:
        key, _, component = name.partition(".")
        entry = tar.add(key, component, data)
        if index and index[-1][0].key == key and component != "jpg":
            index[-1].append(entry)
        else:
            index.append([entry])
    tar._write(bytes(1024))
    content = format_index(index)
    (out / old.name).write_bytes(buffer.getvalue())
    (out / old.index).write_bytes(content)
    new = dataclasses.replace(
        old,
        samples=len(index),
        bytes=tar.size,
        sha256=tar.sha256.hexdigest(),
        index_bytes=len(content),
        index_sha256=hashlib.sha256(content).hexdigest(),
    )
    shards = [new if shard == old else shard for shard in manifest.shards]
    save(out, manifest, shards)


def save(out: Path, manifest: Manifest, shards: list[Shard], **changes: int) -> None:
    sums = {"samples": sum(s.samples for s in shards), "bytes": sum(s.bytes for s in shards)}
    read = sums["samples"] + manifest.rejected
    save_manifest(out, dataclasses.replace(manifest, **{"shards": shards, "read": read, **sums, **changes}))


def replaced(component: str, data: bytes):
    """Return a function that replaces the content of one component of the first sample."""

    def change(members):
        place = next(i for i, (name, _) in enumerate(members) if name.partition(".")[2] == component)
        return [(name, data if i == place else old) for i, (name, old) in enumerate(members)]

    return change


def test_whole_shards_have_no_problems(out):
    assert problems(out) == ""
    check_quick(out, load_manifest(out, "train"))
    result = run_tool("verify", out, "--workers", 2)
    assert result.returncode == 0
    assert "train: 3 shards, 12 samples" in result.stdout
    assert "no problems" in result.stdout


def test_the_command_names_the_problem_and_fails(out):
    (out / "train-000001.tar").unlink()
    result = run_tool("verify", out)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {out}/train-000001.tar is missing")
    assert "Traceback" not in result.stderr


def test_a_folder_without_shards_is_refused(tmp_path):
    result = run_tool("verify", tmp_path)
    assert result.returncode == 1
    assert "has no manifest.json" in result.stderr


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def test_a_flipped_byte_is_found_by_its_hash(out):
    flip(out / "train-000001.tar", 900)
    assert "train-000001.tar: sha256 is" in problems(out, decode=False)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda out: (out / "train-000000.tar").unlink(), r"train-000000\.tar is missing"),
    (lambda out: (out / "train-000001.idx").unlink(), r"train-000001\.idx is missing"),
    (lambda out: (out / "train-000002.tar").write_bytes(b"x" * 512), r"train-000002\.tar has 512 bytes"),
    (lambda out: flip(out / "train-000001.idx", 40), r"train-000001\.idx.*index_sha256"),
])  # fmt: skip
def test_missing_resized_and_stale_files_are_found_by_both_checks(out, damage, message):
    damage(out)
    with pytest.raises(ShardError, match=message):
        check_quick(out, load_manifest(out, "train"))
    with pytest.raises(AssertionError, match=message):
        assert problems(out, decode=False) == ""


def test_tars_that_changed_places_are_found_even_at_the_same_size(out):
    members = read_tar(out / "train-000000.tar")
    other = [
        (name.replace(name.partition(".")[0], f"other{n // 4}"), data) for n, (name, data) in enumerate(members.items())
    ]
    buffer = io.BytesIO()
    tar = TarWriter(buffer)
    for name, data in other:
        tar.add(*name.split(".", 1), data)
    size = (out / "train-000000.tar").stat().st_size
    (out / "train-000000.tar").write_bytes(buffer.getvalue().ljust(size, b"\0"))
    with pytest.raises(ShardError, match=r"train-000000\.tar has no member .*\.jpg where its index points"):
        check_quick(out, load_manifest(out, "train"))


@pytest.mark.parametrize(("component", "data", "message"), [
    ("jpg", jpeg()[:-200], "damaged JPEG"),
    ("jpg", encoded(photo(), progressive=True), "not a baseline"),
    ("jpg", b"no image", "its jpg"),
    ("cls", b"2", r"label '2' \(cls\) is not an index into 2 classes"),
    ("scene.cls", b"x", r"label 'x' \(scene\.cls\)"),
    ("mask.png", b"no mask", r"its mask\.png cannot be decoded"),
    ("mask.png", encoded(Image.new("L", (10, 10)), "PNG"), r"its mask\.png is PNG L \(10, 10\)"),
])  # fmt: skip
def test_wrong_contents_are_found_behind_right_hashes(out, component, data, message):
    rewrite(out, 1, replaced(component, data))
    with pytest.raises(AssertionError, match=rf"train-000001\.tar, sample \d+: .*{message}"):
        assert problems(out) == ""


def test_a_sample_without_a_component_is_found(out):
    rewrite(out, 0, lambda members: [m for i, m in enumerate(members) if i != 1])
    assert "its components are ['jpg', 'scene.cls', 'mask.png']" in problems(out, decode=False)


def test_a_key_in_two_shards_is_found(out):
    first = list(read_tar(out / "train-000000.tar").items())[:4]
    rewrite(out, 1, lambda members: members + first)
    assert "occurs twice; remake the split" in problems(out, decode=False)


def test_a_key_that_a_shard_has_twice_is_found(out):
    rewrite(out, 0, lambda members: members + members[:4])
    assert "occurs twice; remake the split" in problems(out, decode=False)


def test_an_index_of_other_members_is_found_behind_right_hashes(out):
    manifest = load_manifest(out, "train")
    old = manifest.shards[0]
    content = (out / old.index).read_bytes().replace(b"jpg 512 ", b"jpg 513 ")
    (out / old.index).write_bytes(content)
    new = dataclasses.replace(old, index_sha256=hashlib.sha256(content).hexdigest())
    save(out, manifest, [new, *manifest.shards[1:]])
    assert "train-000000.idx does not describe the members" in problems(out, decode=False)


def test_sums_that_do_not_add_up_and_stray_files_are_found(out):
    manifest = load_manifest(out, "train")
    save(out, manifest, manifest.shards, read=99, samples=12)
    save_rejections(out, "train", [])
    shutil.copy(out / "train-000000.tar", out / "train-000077.tar")
    found = problems(out, decode=False)
    assert "read is 99, but the sum is 13" in found
    assert "rejected is 1, but the sum is 0" in found
    assert "train-000077.tar is not in the manifest" in found


def test_a_missing_list_of_rejections_is_found_and_the_rest_still_checked(out):
    (out / "rejected.jsonl").unlink()
    flip(out / "train-000002.tar", 900)
    found = problems(out, decode=False)
    assert "rejected.jsonl is missing" in found
    assert "train-000002.tar: sha256" in found


def test_splits_with_other_classes_are_found(out):
    manifest = load_manifest(out, "train")
    columns = [dataclasses.replace(manifest.columns[0], classes=["b", "a"]), *manifest.columns[1:]]
    save_manifest(out, dataclasses.replace(manifest, split="val", columns=columns, shards=[]))
    assert "split 'val' has other classes than 'train'" in problems(out, decode=False)


def test_the_quick_check_is_light(whole):
    """Check that it imports neither torch nor scipy: it runs at every training start in every process."""
    code = "import sys, shards.verify; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
