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

from iwm import evaluate, protocols
from iwm.config import Config, DataConfig
from iwm.downstream import trainer, validation
from iwm.downstream.trials import FinetunedEncoder
from iwm.model_config import ActionConfig
from iwm.training import train_state
from shards.command_line import run_command
from tests.disks import small_disk
from tests.downstream.conftest import untrained
from tests.training.runs import start

Told = Callable[..., str]

SHORT = ("--steps", "2", "--batch-size", "20", "--data.num-threads", "1")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Return a function that runs the command, which must fail, and returns its one-line error."""

    def said(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", *map(str, words)])
        assert run_command(evaluate.main, "iwm/evaluate.py") == 1
        *above, line = capsys.readouterr().err.splitlines()
        assert not any("Error" in each for each in above), "more than one line"
        assert line.startswith("iwm/evaluate.py: ")
        return line

    return said


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """Write a state dict of timm's ViT for 48 px images."""
    file = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0).state_dict(), file)
    return file


def of_timm(vit: Path, boxes: Path, size: int = 48) -> list[object]:
    named = ["--external.format", "timm", "--external.name", "vit_tiny_patch16_224", "--external.image-size", size]
    return ["--checkpoint", vit, *named, "--data.shards", boxes, *SHORT]


@pytest.mark.parametrize("words", ["linear --lrs 1", "attentive --features student", "segmentation --lrs 1"])
def test_names_of_before_are_unknown_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", *words.split(), "--checkpoint", "nothing-here"])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    assert f"Unrecognized options: {words.split()[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("linear --batch-size 0", "--batch-size 0: must be at least 1"),
        ("linear --epochs nan", "--epochs nan: must be above 0"),
        ("linear --warmup-epochs 100", "--warmup-epochs 100.0 must be below --epochs 90.0"),
        ("linear --weight-decay -1", "--weight-decay -1.0: must be at least 0"),
        ("linear --selection-share 0", "--selection-share 0.0: must be above 0 and below 1"),
        ("multitask --lr 1 1", "--lr: give at least one value, each only once"),
        ("segmentation --encoder teacher teacher", "--encoder: give at least one value, each only once"),
        ("linear --momentum 1", "--momentum 1.0: must be at least 0 and below 1"),
        ("linear --lr 1 0", "--lr 1.0 0.0: each must be above 0"),
        ("linear --lr", "--lr: give at least one value, each only once"),
        ("linear --lr 1 1", "--lr: give at least one value, each only once"),
        ("linear --encoder", "--encoder: give at least one value, each only once"),
        ("finetune-predictor --outputs image image", "--outputs: give at least one value, each only once"),
        ("finetune-end-to-end --predictors", "--predictors: give at least one value, each only once"),
        ("multitask --predictors", "--predictors: give at least one value, each only once"),
        ("linear --seed -1", "--seed -1: must be at least 0"),
        ("linear --data.prefetch-queue-depth 0", "--data.prefetch-queue-depth 0: must be at least 1"),
        ("linear --data.num-threads -1", "--data.num-threads -1: must be at least 0"),
        ("linear --output result", "--output result must end in .json"),
        ("finetune-encoder --lr -1", "--lr -1.0: each must be above 0"),
        ("finetune-encoder --lr inf", "--lr inf: each must be above 0 and finite"),
        ("finetune-encoder --layer-decay 0", "--layer-decay 0.0: must be above 0 and at most 1"),
        ("finetune-encoder --drop-path 1", "--drop-path 1.0: must be at least 0 and below 1"),
        ("finetune-encoder --mixup.random-erasing 3", "--mixup.random-erasing 3.0: must be from 0 to 1"),
        ("finetune-encoder --seeds 0 0", "--seeds: give at least one value, each only once"),
        ("finetune-predictor --seeds -1", "--seeds -1: each must be at least 0"),
        ("finetune-predictor --pretrained-lr-mult -1", "--pretrained-lr-mult -1.0: must be at least 0"),
        ("finetune-end-to-end --encoder-lr-mult -1", "--encoder-lr-mult -1.0: must be at least 0"),
        ("segmentation --classes 1", "--classes 1: must be from 2 to 255"),
        ("segmentation --channels 0", "--channels 0: must be at least 1"),
        ("segmentation --parts encoder encoder", "--parts: give at least one value, each only once"),
        ("segmentation --epochs 3", "--epochs 3: --steps 160000 sets the length; omit --epochs, or add --steps None"),
        ("segmentation --drop-path 2", "--drop-path 2.0: must be at least 0 and below 1"),
    ],
)
def test_options_that_cannot_be_are_told_before_anything_is_read(told: Told, words: str, expected: str) -> None:
    assert f": {expected}" in told(*words.split(), "--checkpoint", "nothing-here")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "linear --micro-batch-size None --data.label colour",
            "no label column 'colour'; it has ['label', 'side']; use another",
        ),
        (
            "linear --micro-batch-size None --data.train nowhere",
            "has no split 'nowhere'; it has ['train', 'val']; use another --data.train",
        ),
        (
            "linear --micro-batch-size None --data.split nowhere",
            "has no split 'nowhere'; it has ['train', 'val']; use another --data.split, or make shards with a",
        ),
        (
            "segmentation --data.split nowhere",
            "it has ['train', 'val']; use another --data.split, or make shards with a",
        ),
        (
            "linear --micro-batch-size None --data.shards nowhere",
            "nowhere/manifest.json does not exist: make the shards",
        ),
        ("linear --micro-batch-size 3", "--micro-batch-size 3 does not divide the 20 images"),
        (
            "linear --micro-batch-size None --crops.crop-scale 0.5 0.1",
            "--crops: crop_scale 0.5 0.1 must be MIN MAX with 0 < MIN",
        ),
        (
            "linear --micro-batch-size None --crops.size 17",
            "--crops.size 17: crops have the encoder's image size, 32 px",
        ),
        (
            "attentive --crops.photometric.hue -1",
            "--crops: hue -1.0 must not be negative",
        ),
        ("segmentation --crops.flip-probability 2", "--crops: flip_probability 2.0 must be from 0 to 1"),
        ("segmentation --crops.photometric.blur-probability 2", "--crops: blur_probability 2.0 must be from 0 to 1"),
        ("finetune-encoder --crops.rand-augment rand-q9", "--crops: rand_augment 'rand-q9': section 'q9'"),
        (
            "finetune-encoder --batch-size 5",
            "5 images are an odd number; use an even --batch-size and --micro-batch-size",
        ),
        ("attentive --micro-batch-size 1", "--batch-size, --micro-batch-size: a process has one image per pass"),
        (
            "segmentation --micro-batch-size 1 --classes 4 --channels 8",
            "--batch-size, --micro-batch-size: a process has one image",
        ),
        (
            "segmentation --classes 2 --channels 8",
            "pixels have an id outside --classes 2: classes are 1 to 2, and 0 is ignored",
        ),
        ("multitask --tasks label", "--tasks: name at least two, each only once"),
        (
            "multitask --tasks label colour",
            "--tasks colour: split 'train' has no label column 'colour'; it has ['label', 'side']; use another --tasks",
        ),
        ("multitask --tasks label nowhere:label", "--tasks nowhere:label: nowhere/manifest.json does not exist"),
    ],
)
def test_what_does_not_go_with_the_data_is_told(told: Told, run: Path, words: str, expected: str) -> None:
    assert expected in told(words.split()[0], "--checkpoint", run, *SHORT, *words.split()[1:])


def test_the_command_itself_ends_with_one_line_and_status_1(tmp_path: Path) -> None:
    process = start([sys.executable, "iwm/evaluate.py", "linear", "--checkpoint", str(tmp_path / "nothing")])
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith(
        f"iwm/evaluate.py: --checkpoint {tmp_path}/nothing does not exist; correct the path"
    )
    assert "Traceback" not in output


def test_what_is_no_checkpoint_is_told_with_what_is_one(
    told: Told, leverage: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    text = tmp_path / "notes.pt"
    text.write_text("no checkpoint")
    leverage("linear", lr=(1.0,), steps=1)
    for path, expected in (
        (text, "is damaged or is not a checkpoint"),
        (run / "eval/linear/best.pt", "is another kind of file"),
        (tmp_path, "has no checkpoint in"),
    ):
        line = told("linear", "--checkpoint", path)
        assert f"{path} {expected}" in line
        assert "--checkpoint takes a run's folder" in line


def test_what_a_foreign_encoder_has_not_is_told(told: Told, vit: Path, boxes: Path) -> None:
    external = of_timm(vit, boxes)
    line = told("finetune-predictor", *external, "--predictors", "pretrained")
    assert f"--predictors pretrained: {vit} has no predictor; use --predictors random" in line
    line = told("linear", *external, "--encoder", "student", "--micro-batch-size", "None")
    assert "--encoder student: a timm encoder has no student; use --encoder teacher" in line
    line = told("linear", *of_timm(vit, boxes, size=50))
    assert "--external.image-size 50 is not a multiple of the encoder's patch size, 16 px" in line
    line = told("finetune-predictor", *external, "--random-predictor.embed-dim", 25)
    assert "--random-predictor.embed-dim 25 is not a multiple of --random-predictor.num-heads 12" in line
    line = told("finetune-predictor", *external, "--random-predictor.depth", 0)
    assert "--random-predictor.depth 0: must be above 0" in line
    line = told("linear", "--checkpoint", vit, "--external.format", "timm", "--external.name", "vit_tiny_patch16_224")
    assert "--external.format timm: the encoder has no data; use --data.shards FOLDER" in line
    line = told("linear", "--checkpoint", vit, "--external.format", "mae", "--data.shards", boxes)
    assert f"--external.format mae: {vit} is not a checkpoint in the format mae" in line
    line = told("linear", "--checkpoint", vit, *SHORT)
    assert "(no field 'format'); choose another file; --checkpoint takes" in line
    bare = ["--checkpoint", vit.with_suffix(""), *external[2:]]
    assert "has no suffix, so the folder of its results would have the same name; use --output" in told("linear", *bare)


def test_actions_cannot_be_drawn_for_a_predictor_that_is_told_none(
    told: Told, tmp_path: Path, boxes: Path, small: Config
) -> None:
    config = replace(small, data=DataConfig(shards=str(boxes)), action=ActionConfig(conditioning="none"))
    folder = untrained(tmp_path / "plain", config)
    line = told("finetune-predictor", "--checkpoint", folder, *SHORT, "--actions", "random")
    assert "--actions random: this predictor takes no action; use --actions null" in line


def test_other_settings_than_those_of_the_folders_training_are_named(
    told: Told, leverage: Callable[..., Any], run: Path, small: Config, boxes: Path
) -> None:
    leverage("linear", lr=(1.0,), steps=1)
    short = ("--steps", 1, "--batch-size", 20, "--micro-batch-size", "None", "--validate-every", 1)
    line = told("linear", "--checkpoint", run, *short, "--lr", 2, "--log-every", 7)
    assert f"{run}/eval/linear holds a training with other settings: lr (2.0,) (it was (1.0,))" in line
    assert "set them back, delete the folder, or choose another --output" in line
    assert "log_every" not in line, "this may change"
    # A checkpoint with the same name and other weights.
    torch.manual_seed(5)
    shutil.rmtree(run / "checkpoints")
    model = replace(small, data=DataConfig(shards=str(boxes)), encoder=replace(small.encoder, embed_dim=64))
    untrained(run, model)
    assert "checkpoint step-000000007.pt" in told("linear", "--checkpoint", run, *short, "--lr", 1)


def test_shards_without_masks_are_told(told: Told, run: Path, tiny_shards: Path) -> None:
    line = told("segmentation", "--checkpoint", run, *SHORT, "--data.shards", tiny_shards)
    assert f"{tiny_shards}: split 'train' has no segmentation masks; remake it from a source with masks" in line


def test_a_folder_in_use_is_left_alone(told: Told, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_state, "LOCK_WAIT", 0.0)
    folder = run / "eval/linear"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = told("linear", "--checkpoint", run, *SHORT)
    assert f"{folder} is in use by another training process; wait for it or choose another --output" in line


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("", "lower it, or use --activation-checkpointing"),
        ("--activation-checkpointing", "lower it, or train fewer trials at once, or use a GPU"),
    ],
)
def test_a_device_that_runs_out_of_memory_is_told_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, told: Told, run: Path, words: str, remedy: str
) -> None:
    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB")

    monkeypatch.setattr(FinetunedEncoder, "loss", full)
    line = told("finetune-encoder", "--checkpoint", run, *SHORT, *words.split())
    assert "--micro-batch-size 20: a pass of this size does not fit into the device's memory" in line
    assert remedy in line


def test_a_batch_that_processes_cannot_share_is_told(monkeypatch: pytest.MonkeyPatch, told: Told, run: Path) -> None:
    opened = protocols.open_run
    monkeypatch.setattr(protocols, "open_run", lambda *given: opened(*given[:-1], replace(given[-1], size=2)))
    line = told("linear", "--checkpoint", run, "--batch-size", 21)
    assert "--batch-size 21 cannot be split over 2 processes; choose a multiple of 2" in line


def test_a_full_disk_on_the_way_is_said_and_at_the_end_is_an_error_and_the_older_file_stays(
    monkeypatch: pytest.MonkeyPatch,
    leverage: Callable[..., Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The disk is full from step 5 on: last.pt of step 6 cannot be written; it has space again for the last one."""
    with small_disk(tmp_path / "disk", "3m") as disk:
        options: dict[str, Any] = {
            "lr": (1.0,), "steps": 8, "checkpoint_every": 2, "validate_every": 100.0, "output": disk / "linear.json"
        }  # fmt: skip
        filler, write = disk / "filler", trainer.save_state

        def fill(until: int) -> None:
            def written(folder: Path, name: str, content: dict[str, Any]) -> None:
                step = content.get("progress", {}).get("step", 8)
                if 4 < step < until:
                    filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 4096))
                elif filler.exists():
                    filler.unlink()
                write(folder, name, content)

            for module in (trainer, validation):
                monkeypatch.setattr(module, "save_state", written)

        fill(until=9)
        with pytest.raises(OSError, match=r"last\.pt could not be written .*older checkpoints are untouched"):
            leverage("linear", **options)
        assert "WARNING" in capfd.readouterr().out
        filler.unlink()
        assert torch.load(disk / "linear/last.pt", weights_only=True)["progress"]["step"] == 4
        fill(until=8)
        result = leverage("linear", **options)
        said = capfd.readouterr().out
    assert "resuming from step 4" in said
    assert "WARNING" in said
    assert result["steps"] == 8


def test_a_damaged_last_file_is_named(told: Told, leverage: Callable[..., Any], run: Path) -> None:
    leverage("linear", lr=(1.0,), steps=1)
    path = run / "eval/linear/last.pt"
    path.write_bytes(path.read_bytes()[:-100])
    line = told(
        "linear", "--checkpoint", run, "--steps", 1, "--batch-size", 20, "--micro-batch-size", "None", "--lr", 1
    )
    assert line.endswith("; delete it to restart this training")
    assert f"{path} is damaged or is not a checkpoint" in line
