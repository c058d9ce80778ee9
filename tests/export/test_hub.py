"""Uploads to a Hub: the files of the folder arrive byte for byte, timm and iwm load them, and errors are one line."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import iwm
from iwm.export.__main__ import ExportOptions, export
from shards.errors import UserError
from tests.export.hub_server import TOKEN, HubServer, hub_server
from tests.export.test_export import make_run
from tests.export.test_timm_form import THREE_LAYERS, photo, without_iwm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


def environment(address: str, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    return inherited | ours | ({"HF_TOKEN": token} if token else {})


def command(folder: Path, env: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "iwm", "export", "run", "demo", *options]
    return subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True)


def test_the_folder_arrives_byte_for_byte_and_loads_from_there(hub: HubServer, tmp_path: Path) -> None:
    make_run(tmp_path / "run", THREE_LAYERS)
    env = environment(hub.address, tmp_path)
    done = command(tmp_path, env, "--push-to-hub", "demo", "--private", "--license", "cc-by-4.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"uploaded: {hub.address}/ada/demo"
    folder = tmp_path / "demo"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    (created,) = hub.created
    assert (created["name"], created["organization"], created["visibility"]) == ("demo", "ada", "private")
    assert set(hub.cards) == {(folder / "README.md").read_text()}

    image = photo(tmp_path / "photo.png")
    stock = without_iwm("hf-hub:ada/demo", image, tmp_path / "out.pt", **env)
    pixels = stock["pixels"].round().to(torch.uint8).permute(0, 2, 3, 1)
    torch.testing.assert_close(stock["features"], iwm.load(folder).features(pixels), atol=2e-5, rtol=1e-4)

    code = "\n".join(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S))
    assert "hf-hub:ada/demo" in code
    assert 'snapshot_download("ada/demo")' in code
    script = f"images = {str(image)!r}\n{code}\nprint(list(predicted.shape))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert loaded.stdout == "[1, 16, 48]\n", loaded.stderr


@pytest.mark.parametrize(
    ("name", "token", "told"),
    [
        ("a b/c", TOKEN, r"--push-to-hub a b/c: .*; give NAMESPACE/NAME"),
        ("ada/demo", None, r"--push-to-hub ada/demo: there is no token; run hf auth login, or set HF_TOKEN"),
        ("ada/demo", "hf_old", r"--push-to-hub ada/demo: the token was refused \(401\); run hf auth login with"),
    ],
)
def test_what_cannot_be_uploaded_is_told_in_one_line_before_the_export(
    hub: HubServer, tmp_path: Path, name: str, token: str | None, told: str
) -> None:
    make_run(tmp_path / "run")
    done = command(tmp_path, environment(hub.address, tmp_path, token), "--push-to-hub", name)
    assert done.returncode == 1
    assert re.fullmatch(f"iwm export: {told}[^\n]*\n", done.stderr), done.stderr
    assert not (tmp_path / "demo").exists()
    assert hub.created == []


def test_a_token_without_write_access_is_told_and_the_folder_stays(hub: HubServer, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    hub.writable = False
    done = command(tmp_path, environment(hub.address, tmp_path), "--push-to-hub", "others/demo")
    assert done.returncode == 1
    assert re.fullmatch(
        r"iwm export: --push-to-hub others/demo: the token may not write there \(403\)[^\n]*\n", done.stderr
    )
    assert (tmp_path / "demo" / "model.safetensors").exists()
    assert hub.files == {}


def test_without_a_network_one_line_tells_what_to_check(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = command(tmp_path, environment(address, tmp_path), "--push-to-hub", "ada/demo")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"iwm export: --push-to-hub ada/demo: {address} was not reached [^\n]*HF_ENDPOINT[^\n]*\n", done.stderr
    )


def test_private_needs_a_repository(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    done = command(tmp_path, dict(os.environ, PYTHONPATH=str(ROOT)), "--private")
    assert done.stderr.startswith("iwm export: --private is about a new repository; give --push-to-hub")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run")
    monkeypatch.delitem(sys.modules, "iwm.export.hub", raising=False)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(UserError, match=r"--push-to-hub: .*httpx2.*; run pip install 'iwm\[hub\]'"):
        export(ExportOptions(tmp_path / "run", tmp_path / "demo", push_to_hub="ada/demo"))
