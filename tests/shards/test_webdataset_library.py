"""The webdataset library: its tars are a source, and it reads the shards made from them."""

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from rich.console import Console

from shards.make import ShardingOptions, make_shards
from shards.plan import ShardSize


def jpeg(number: int) -> bytes:
    rows = np.linspace(0, 20 * number, 32)[:, None, None]
    buffer = io.BytesIO()
    Image.fromarray(np.broadcast_to(rows, (32, 40, 3)).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize("labels", ["cls", "json"])
def test_tars_of_the_library_become_shards_that_the_library_reads(tmp_path: Path, labels: str) -> None:
    (tmp_path / "src").mkdir()
    with webdataset.TarWriter(str(tmp_path / "src" / "data-000.tar")) as tar:
        for number in range(10):
            label = {"cls": number % 3} if labels == "cls" else {"json": {"label": number % 3}}
            tar.write({"__key__": f"sample{number}", "jpg": jpeg(number), **label})
    options = ShardingOptions(
        str(tmp_path / "src"), tmp_path / "out", "train", workers=1, shard=ShardSize(min_shards=2)
    )
    manifest = make_shards(options, Console(quiet=True))["train"]
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        .decode("rgb8")
        .to_tuple("__key__", "jpg", "cls")
    )
    found = {key: (pixels, label) for key, pixels, label in dataset}
    assert sorted(found) == [f"sample{number}" for number in range(10)]
    for number in range(10):
        pixels, label = found[f"sample{number}"]
        assert label == number % 3
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(jpeg(number)))))
