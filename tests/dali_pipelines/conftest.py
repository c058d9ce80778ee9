from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_shards import photographs_and_noise, write_split


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 47 photographs and random images of about 160 pixels in 5 uneven tars (split `train`)."""
    folder = tmp_path_factory.mktemp("shards")
    write_split(folder, "train", photographs_and_noise(47), per_shard=(11, 9, 13, 4, 10))
    return folder


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable GPU here")),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
