"""The wheel, built and installed into an empty environment: it holds everything that the command `iwm` needs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.training.runs import TINY

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return next(folder.glob("iwm-*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=300)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    packages = Path(pytest.__file__).parents[1]
    own = next((folder / "lib").glob("python*")) / "site-packages"
    # The editable install's own .pth file is not read from there, so iwm can only be the wheel's.
    (own / "dependencies.pth").write_text(f"{packages}\n")
    return folder / "bin"


def run(environment: Path, folder: Path, *words: object) -> str:
    """Run a command of the environment in `folder`; return what it printed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(environment / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(
        command, cwd=folder, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}"
    return done.stdout


def test_the_wheel_holds_every_module_and_no_results(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("iwm", "dali_pipelines", "shards"):
        for file in (ROOT / folder).rglob("*.*"):
            if file.suffix != ".pyc":
                assert str(file.relative_to(ROOT)) in names
    assert {"iwm/_scripts/benchmarks/throughput.py", "iwm/_scripts/tools/make_tiles.py"} <= names
    assert not any("results" in name.split("/") for name in names)
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"iwm", "dali_pipelines", "shards"}


def test_every_command_runs_from_the_wheel(environment: Path, tiny_shards: Path, tmp_path: Path) -> None:
    place = run(environment, tmp_path, "python", "-c", "import iwm, shards; print(iwm.__file__, shards.__file__)")
    assert all(Path(file).is_relative_to(environment.parent) for file in place.split())
    assert run(environment, tmp_path, "iwm", "--version").startswith("iwm ")

    source = tiny_shards.parent / "val"
    run(environment, tmp_path, "iwm", "shards", source, "data/photos", "--split", "val")
    assert "val" in run(environment, tmp_path, "iwm", "verify", "data/photos", "--quick")
    tiny = [word for key, value in TINY.items() for word in (f"--{key}", value)]
    train = ["iwm", "train", "demo", "--data.shards", tiny_shards, "--schedule.steps", "2", *tiny]
    assert "runs/demo" in run(environment, tmp_path, *train)
    mrr = ["iwm", "evaluate", "mrr", "--checkpoint", "runs/demo", "--bank.num-images", "2", "--bank.num-views", "4"]
    assert "Mean reciprocal rank" in run(environment, tmp_path, *mrr)
    run(environment, tmp_path, "iwm", "report", "runs/demo")
    assert (tmp_path / "runs" / "demo" / "report.html").stat().st_size > 10_000
    run(environment, tmp_path, "iwm", "export", "runs/demo", "exported")
    assert (tmp_path / "exported" / "model.safetensors").exists()
    assert "conditioning" in run(environment, tmp_path, "iwm", "ablate", "--help")
    bench = ["iwm", "bench", "data", "--recipe", "demo", "--shards", tiny_shards, "--baseline", "none"]
    quick = ["--batch-size", "8", "--seconds", "0.2", "--repeats", "1"]
    assert "two views of 32 px on cpu" in run(environment, tmp_path, *bench, *quick)
