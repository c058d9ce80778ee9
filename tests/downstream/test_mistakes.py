"""A user's mistake ends with one line that names file or option and the remedy, exit status 1, and no traceback."""

from __future__ import annotations

import fcntl
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from iwm import evaluate
from iwm.config import Action, Config, Data
from iwm.downstream import loop
from iwm.downstream.arms import FinetunedEncoder
from tests.disks import small_disk
from tests.downstream.conftest import untrained
from tests.training.runs import start

Told = Callable[..., str]

SHORT = ("--steps", "2", "--batch", "20", "--data.threads", "1")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What the command says at its end; it fails with one line."""

    def said(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            evaluate.main()
        line = left.value.code
        assert isinstance(line, str), "an exit without a message"
        assert "\n" not in line
        assert line.startswith("iwm/evaluate.py: ")
        return line

    return said


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A file of timm's ViT for 48 px."""
    file = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0).state_dict(), file)
    return file


def of_timm(vit: Path, boxes: Path, size: int = 48) -> list[object]:
    named = ["--foreign.kind", "timm", "--foreign.name", "vit_tiny_patch16_224", "--foreign.image-size", size]
    return ["--checkpoint", vit, *named, "--data.shards", boxes, *SHORT]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("linear --batch 0", "--batch 0 must be positive"),
        ("linear --epochs nan", "--epochs nan must be positive"),
        ("linear --warmup-epochs 100", "--warmup-epochs 100.0 must be below --epochs 90.0"),
        ("linear --weight-decay -1", "--weight-decay -1.0 must not be negative"),
        ("linear --momentum 1", "--momentum 1.0 must be from 0 to below 1"),
        ("linear --lrs 1 0", "--lrs: learning rates above 0"),
        ("linear --lrs", "--lrs: learning rates above 0"),
        ("linear --lrs 1 1", "--lrs: at least one, each once"),
        ("linear --features", "--features: at least one, each once"),
        ("finetune-predictor --queries image image", "--queries: at least one, each once"),
        ("finetune-end-to-end --predictors", "--predictors: at least one, each once"),
        ("multitask --predictors", "--predictors: at least one, each once"),
        ("linear --seed -1", "--seed -1 must not be negative"),
        ("linear --data.prefetch 0", "--data.prefetch 0 must be positive"),
        ("linear --data.threads -1", "--threads and --data.threads must not be negative"),
        ("linear --output result", "--output result must end in .json"),
        ("finetune-encoder --lr -1", "--lr: learning rates above 0"),
        ("finetune-encoder --lr inf", "--lr: learning rates above 0"),
        ("finetune-encoder --layer-decay 0", "--layer-decay 0.0 must be above 0 and at most 1"),
        ("finetune-encoder --drop-path 1", "--drop-path 1.0 must be from 0 to below 1"),
        ("finetune-encoder --mixing.erasing 3", "--mixing.erasing 3.0 is a probability"),
        ("finetune-encoder --seeds 0 0", "--seeds: at least one, each once"),
        ("finetune-predictor --seeds -1", "--seeds: at least one, each once, from 0 on"),
        ("finetune-predictor --pretrained-share -1", "--pretrained-share -1.0 must not be negative"),
        ("finetune-end-to-end --encoder-share -1", "--encoder-share -1.0 must not be negative"),
        ("segmentation --classes 1", "--classes 1: from 2 to 255"),
        ("segmentation --channels 0", "--channels 0 must be positive"),
        ("segmentation --parts encoder encoder", "--parts: at least one, each once"),
        ("segmentation --epochs 3", "--epochs 3: the length is --steps 160000; say --steps None too"),
        ("segmentation --drop-path 2", "--drop-path 2.0 must be from 0 to below 1"),
    ],
)
def test_options_that_cannot_be_are_told_before_anything_is_read(told: Told, words: str, expected: str) -> None:
    assert f": {expected}" in told(*words.split(), "--checkpoint", "nothing-here")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "linear --micro-batch None --data.label colour",
            "no label column 'colour'; it has ['label', 'side']; name",
        ),
        ("linear --micro-batch None --data.train nowhere", "has no split 'nowhere'; it has ['train', 'val']"),
        ("linear --micro-batch None --data.split nowhere", "has no split 'nowhere'; it has ['train', 'val']"),
        ("linear --micro-batch None --data.shards nowhere", "nowhere/manifest.json does not exist: make the shards"),
        ("linear --micro-batch 3", "--micro_batch 3 does not divide the 20 images"),
        ("linear --micro-batch None --crops.crop-scale 0.5 0.1", "--crops: crop_scale 0.5 0.1 must be two rising"),
        ("linear --micro-batch None --crops.size 17", "--crops.size 17: images are shown at the encoder's size, 32 px"),
        ("attentive --crops.colour.hue -1", "--crops: brightness, contrast, saturation and hue must not be negative"),
        ("segmentation --crops.flip-probability 2", "--crops: flip_probability 2.0 must be from 0 to 1"),
        ("segmentation --crops.colour.blur-probability 2", "--crops: blur_probability 2.0 must be from 0 to 1"),
        ("finetune-encoder --crops.rand-augment rand-q9", "--crops: rand_augment 'rand-q9': section 'q9'"),
        ("finetune-encoder --batch 5", "the 5 that a process has at once are odd: choose an even --batch"),
        ("attentive --micro-batch 1", "--batch, --micro-batch: a process has one image at once"),
        ("segmentation --micro-batch 1 --classes 4 --channels 8", "--batch, --micro-batch: a process has one image"),
        ("segmentation --classes 2 --channels 8", "have an id that is no class of --classes 2"),
        ("multitask --tasks label", "--tasks: name at least two, each once"),
        ("multitask --tasks label colour", "--tasks colour: split 'train' has no label column 'colour'"),
        ("multitask --tasks label nowhere:label", "--tasks nowhere:label: nowhere/manifest.json does not exist"),
    ],
)
def test_what_does_not_go_with_the_data_is_told(told: Told, run: Path, words: str, expected: str) -> None:
    assert expected in told(words.split()[0], "--checkpoint", run, *SHORT, *words.split()[1:])


def test_the_command_itself_ends_with_one_line_and_status_1(tmp_path: Path) -> None:
    process = start([sys.executable, "iwm/evaluate.py", "linear", "--checkpoint", str(tmp_path / "nothing")])
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith(f"iwm/evaluate.py: {tmp_path}/nothing does not exist; --checkpoint takes")
    assert "Traceback" not in output


def test_what_is_no_checkpoint_is_told_with_what_is_one(
    told: Told, leverage: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    text = tmp_path / "notes.pt"
    text.write_text("no checkpoint")
    leverage("linear", lrs=(1.0,), steps=1)
    for path, expected in (
        (text, "is damaged or is no checkpoint"),
        (run / "eval/linear/best.pt", "is another kind of file"),
        (tmp_path, "has no checkpoint in"),
    ):
        line = told("linear", "--checkpoint", path)
        assert f"{path} {expected}" in line
        assert "--checkpoint takes a run's folder" in line


def test_what_a_foreign_encoder_has_not_is_told(told: Told, vit: Path, boxes: Path) -> None:
    foreign = of_timm(vit, boxes)
    line = told("finetune-predictor", *foreign, "--predictors", "pretrained")
    assert f"--predictors pretrained: {vit} has no predictor; say --predictors random" in line
    line = told("linear", *foreign, "--features", "student", "--micro-batch", "None")
    assert "--features student: a timm encoder has no student; leave it at teacher" in line
    line = told("linear", *of_timm(vit, boxes, size=50))
    assert "--foreign.image-size 50 is no multiple of the encoder's patch of 16 px" in line
    line = told("finetune-predictor", *foreign, "--fresh.width", 25)
    assert "--fresh: predictor.width 25 is not a multiple of predictor.heads" in line
    line = told("linear", "--checkpoint", vit, "--foreign.kind", "timm", "--foreign.name", "vit_tiny_patch16_224")
    assert "--foreign.kind timm: it has no data of its own; give --data.shards" in line
    line = told("linear", "--checkpoint", vit, "--foreign.kind", "mae", "--data.shards", boxes)
    assert f"--foreign.kind mae: {vit} is no mae checkpoint" in line
    line = told("linear", "--checkpoint", vit, *SHORT)
    assert "it has no field 'format'; --checkpoint takes" in line
    bare = ["--checkpoint", vit.with_suffix(""), *foreign[2:]]
    assert "has no ending to leave out in the name of its results' folder; say --output" in told("linear", *bare)


def test_actions_cannot_be_drawn_for_a_predictor_that_is_told_none(
    told: Told, tmp_path: Path, boxes: Path, small: Config
) -> None:
    config = replace(small, data=Data(shards=boxes), action=Action(conditioning="none"))
    folder = untrained(tmp_path / "plain", config)
    line = told("finetune-predictor", "--checkpoint", folder, *SHORT, "--latents", "random")
    assert "--latents random: this predictor is told no action; say --latents null" in line


def test_other_settings_than_those_of_the_folders_training_are_named(
    told: Told, leverage: Callable[..., Any], run: Path, small: Config, boxes: Path
) -> None:
    leverage("linear", lrs=(1.0,), steps=1)
    short = ("--steps", 1, "--batch", 20, "--micro-batch", "None", "--validate-every", 1)
    line = told("linear", "--checkpoint", run, *short, "--lrs", 2, "--log-every", 7)
    assert f"{run}/eval/linear holds a training with other settings: lrs (2.0,) (it was (1.0,))" in line
    assert "set them back, delete the folder, or choose another --output" in line
    assert "log_every" not in line, "this may change"
    # A checkpoint of the same name with other weights.
    torch.manual_seed(5)
    shutil.rmtree(run / "checkpoints")
    model = replace(small, data=Data(shards=boxes), encoder=replace(small.encoder, width=64))
    untrained(run, model)
    assert "checkpoint step-000000007.pt" in told("linear", "--checkpoint", run, *short, "--lrs", 1)


def test_shards_without_masks_are_told(told: Told, run: Path, tiny_shards: Path) -> None:
    line = told("segmentation", "--checkpoint", run, *SHORT, "--data.shards", tiny_shards)
    assert f"{tiny_shards}: split 'train' has no segmentation masks; make it again from a source that has them" in line


def test_a_folder_in_use_is_left_alone(told: Told, run: Path) -> None:
    folder = run / "eval/linear"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = told("linear", "--checkpoint", run, *SHORT)
    assert f"{folder} is in use by another training process; wait for it or choose another --output" in line


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("", "lower it, or say --activation-checkpointing"),
        ("--activation-checkpointing", "lower it, or train fewer arms at once, or use a GPU"),
    ],
)
def test_a_device_that_runs_out_of_memory_is_told_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, told: Told, run: Path, words: str, remedy: str
) -> None:
    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB")

    monkeypatch.setattr(FinetunedEncoder, "losses", full)
    line = told("finetune-encoder", "--checkpoint", run, *SHORT, *words.split())
    assert "--micro-batch 20: a pass of so many images is more than the device can hold" in line
    assert remedy in line


def test_a_batch_that_processes_cannot_share_is_told(monkeypatch: pytest.MonkeyPatch, told: Told, run: Path) -> None:
    opened = evaluate.open_bench
    monkeypatch.setattr(evaluate, "open_bench", lambda *given: opened(*given[:-1], replace(given[-1], size=2)))
    line = told("linear", "--checkpoint", run, "--batch", 21)
    assert "--batch 21 cannot be split over 2 processes; choose a multiple of 2" in line


def test_a_full_disk_on_the_way_is_said_and_at_the_end_is_an_error_and_the_older_file_stays(
    monkeypatch: pytest.MonkeyPatch,
    leverage: Callable[..., Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The disk fills up after step 4: step 6's last.pt cannot be written, and there is room again for the end's."""
    with small_disk(tmp_path / "disk", "3m") as disk:
        options: dict[str, Any] = {
            "lrs": (1.0,), "steps": 8, "checkpoint_every": 2, "validate_every": 100.0, "output": disk / "linear.json"
        }  # fmt: skip
        filler, write = disk / "filler", loop.state.write

        def fill(until: int) -> None:
            def written(folder: Path, name: str, content: dict[str, Any]) -> None:
                step = content.get("progress", {}).get("step", 8)
                if 4 < step < until:
                    filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 4096))
                elif filler.exists():
                    filler.unlink()
                write(folder, name, content)

            monkeypatch.setattr(loop.state, "write", written)

        fill(until=9)
        with pytest.raises(OSError, match=r"last\.pt could not be written .*older checkpoints are untouched"):
            leverage("linear", **options)
        assert "WARNING" in capfd.readouterr().out
        filler.unlink()
        assert torch.load(disk / "linear/last.pt", weights_only=True)["progress"]["step"] == 4
        fill(until=8)
        result = leverage("linear", **options)
        said = capfd.readouterr().out
    assert "going on from step 4" in said
    assert "WARNING" in said
    assert result["steps"] == 8


def test_a_damaged_last_file_is_named(told: Told, leverage: Callable[..., Any], run: Path) -> None:
    leverage("linear", lrs=(1.0,), steps=1)
    path = run / "eval/linear/last.pt"
    path.write_bytes(path.read_bytes()[:-100])
    line = told("linear", "--checkpoint", run, "--steps", 1, "--batch", 20, "--micro-batch", "None", "--lrs", 1)
    assert f"{path} is damaged or is no checkpoint" in line
    assert line.endswith("; delete it to begin this training anew")
