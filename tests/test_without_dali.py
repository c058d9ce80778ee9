"""Missing packages: `iwm.load` needs no DALI, commands name a missing package and read their options without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nvidia.dali", "simplejpeg", "tyro", "rich", "tensorboard")

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""

USE = """
import sys
import PIL.Image
import torch
import iwm

model = iwm.load(sys.argv[1])
images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
action = model.action(brightness=0.2, hue=0.05)
assert model.features(images).shape == (2, 16, 128)
assert model(images).shape == (2, 128)
PIL.Image.fromarray(images[0].numpy()).resize((70, 50)).save(sys.argv[2])
assert model([sys.argv[2], images[0].numpy(), PIL.Image.new("LA", (40, 60))]).shape == (3, 128)
assert model.predict(images, action).shape == (2, 16, 128)
assert iwm.__version__
print(sorted(set(sys.modules) & {packages}))
"""


def run(command: list[str], folder: Path, packages: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run Python with `packages` blocked from import."""
    blocked = folder / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(BLOCK.format(packages=set(packages)))
    paths = os.pathsep.join(filter(None, (str(blocked), str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, text=True, capture_output=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export an untrained model of the recipe `demo`, as tools/export.py does."""
    import torch

    from iwm.export.folder import ExportedModel, Provenance, write_export
    from iwm.models.world_model import WorldModel
    from iwm.recipes import demo

    torch.manual_seed(0)
    model, folder = WorldModel(demo()), tmp_path_factory.mktemp("exported") / "model"
    encoder, predictor = model.target_encoder.state_dict(), model.predictor.state_dict()
    write_export(
        ExportedModel(demo(), "teacher", Provenance("demo/fresh.pt", 0, 0), encoder, predictor), "card", folder
    )
    return folder


def test_a_model_is_loaded_and_used_without_dali_and_the_commands_packages(exported: Path, tmp_path: Path) -> None:
    done = run(["-c", USE.format(packages=set(PACKAGES)), str(exported), str(tmp_path / "a.jpg")], tmp_path, PACKAGES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command",
    [
        ["iwm/train.py", "demo", "--data.shards", "SHARDS"],
        ["iwm/evaluate.py", "mrr", "--checkpoint", "SHARDS"],
        ["iwm/ablate.py", "conditioning", "demo"],
        ["benchmarks/throughput.py", "data"],
    ],
    ids=lambda command: command[0],
)
def test_a_command_that_needs_dali_ends_with_one_line_that_names_the_extra(
    command: list[str], tiny_shards: Path, tmp_path: Path
) -> None:
    done = run([str(tiny_shards) if word == "SHARDS" else word for word in command], tmp_path, ("nvidia.dali",))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{command[0]}: NVIDIA DALI is not installed")
    assert "'iwm[cuda13]'" in line
    assert "'iwm[cuda12]'" in line


@pytest.mark.parametrize(
    "command",
    [
        ["iwm/train.py", "demo"],
        ["iwm/evaluate.py", "mrr", "--checkpoint", "runs/demo"],
        ["iwm/evaluate.py", "linear", "--checkpoint", "runs/demo"],
        ["iwm/ablate.py", "conditioning", "demo"],
        ["tools/make_shards.py", "images", "shards", "--split", "train"],
        ["tools/export.py", "runs/demo", "exported"],
        ["-m", "iwm.report", "runs/demo"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_command_reads_its_options_before_torch_is_imported(command: list[str], tmp_path: Path) -> None:
    done = run([*command, "--no-such-option"], tmp_path, ("torch", "timm", "nvidia.dali"))
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr
