"""Exported heads: a loaded model predicts what the trained trial predicted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
from torch import Tensor

import iwm
from iwm.config import Config, ConfigError, DataConfig
from iwm.downstream import experiment, multitask, segmentation
from iwm.downstream.progress import BEST, FORMAT, save_state
from iwm.downstream.settings import DataSettings, ExternalModel
from iwm.downstream.study import Study
from iwm.export.__main__ import ExportOptions, export
from iwm.export.model import PretrainedModel
from iwm.model_config import PredictorConfig
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from iwm.training.checkpoint import CheckpointError, load_verified
from tests.downstream.conftest import untrained
from tests.export.local_dir import needs_local_dir

Leverage = Callable[..., dict[str, Any]]
Asked = Callable[[Tensor, int], Tensor]


def pictures(height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(0, 256, (3, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def trained(leverage: Leverage, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    """Return a function that runs a protocol and returns the trained trial: `trained("linear", …)(images, task)`."""

    def run_protocol(name: str, **options: Any) -> Asked:
        captured: dict[str, Any] = {}
        # Protocols with one label column call run_trials through run_classification.
        caller = {"multitask": multitask, "segmentation": segmentation}.get(name, experiment)
        run = caller.run_trials

        def capture(context: Any, open_tasks: Any, specs: Any, encoders: Any, stop: Any, **more: Any) -> Any:
            captured.update(specs=specs, encoders=encoders)
            # Measuring the speed would update the running means of norms.
            return run(context, open_tasks, specs, encoders, stop, **{**more, "timed": False})

        monkeypatch.setattr(caller, "run_trials", capture)
        result = leverage(name, validate_every=100.0, **options)
        study = (
            Study({result["chosen"]: captured["specs"][result["chosen"]].trial}, captured["encoders"], [0]).eval().cpu()
        )
        return lambda images, task: study.predict(images, task, [0])[0]

    return run_protocol


def exported(run: Path, name: str, out: Path) -> PretrainedModel:
    export(ExportOptions(run, out, head=run / "eval" / name))
    return iwm.load(out)


PROTOCOLS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"lr": (1.0, 10.0)}),
    ("linear", {"lr": (10.0,), "encoder": ("student",)}),
    ("attentive", {"lr": (1e-3,)}),
    ("finetune-encoder", {}),
    ("finetune-predictor", {"outputs": ("image", "token"), "actions": ("random",)}),
    ("finetune-end-to-end", {}),
    ("multitask", {"tasks": ("side", "label"), "cache_features": True, "controls": True}),
    ("linear", {"lr": (1.0,), "batch_norm": True}),
]


@pytest.mark.parametrize(("name", "options"), PROTOCOLS)
def test_the_loaded_model_says_what_the_trained_arm_said(
    trained: Callable[..., Asked], run: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    trial = trained(name, **options)
    model = exported(run, name, tmp_path / "model")
    tasks = {"side": ("left", "right"), "label": ("blue", "green", "red")}
    tasks = tasks if name == "multitask" else {"label": tasks["label"]}
    assert model.tasks == tasks
    for number, (task, classes) in enumerate(tasks.items()):
        said = model.classify(pictures(), task)
        assert said.shape == (3, len(classes))
        torch.testing.assert_close(said, trial(pictures(), number), atol=1e-5, rtol=1e-4)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    if len(tasks) == 1:
        as_float = pictures().permute(0, 3, 1, 2) / 255
        assert torch.equal(model.classify(as_float), model.classify(pictures()))
        assert model.classes == tasks["label"]


@pytest.mark.parametrize("conditioning", ["none", "sequence"])
def test_predictors_of_every_conditioning_are_built_again(
    trained: Callable[..., Asked], small: Config, boxes: Path, tmp_path: Path, conditioning: Literal["none", "sequence"]
) -> None:
    config = replace(small, data=DataConfig(shards=str(boxes)), action=replace(small.action, conditioning=conditioning))
    run = untrained(tmp_path / "other", config)
    trial = trained("finetune-predictor", checkpoint=run)
    model = exported(run, "finetune-predictor", tmp_path / "model")
    torch.testing.assert_close(model.classify(pictures()), trial(pictures(), 0), atol=1e-5, rtol=1e-4)


@needs_local_dir
@pytest.mark.parametrize(
    ("name", "options"), [("linear", {}), ("linear", {"batch_norm": True}), ("finetune-encoder", {})]
)
def test_stock_timm_takes_the_encoder_with_its_linear_head(
    trained: Callable[..., Asked], run: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    trial = trained(name, **options)
    exported(run, name, tmp_path / "model")
    stock = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert stock.num_classes == 3
    normalised = (pictures() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    said = stock.eval()(normalised.permute(0, 3, 1, 2))
    torch.testing.assert_close(said, trial(pictures(), 0), atol=1e-4, rtol=1e-3)


def test_the_world_model_stays_beside_a_head_and_goes_with_a_finetuned_encoder(
    trained: Callable[..., Asked], run: Path, tmp_path: Path
) -> None:
    trained("finetune-predictor", predictors=("pretrained",), lr=(0.1,))
    trained("finetune-end-to-end")
    plain = iwm.load(run)
    beside = exported(run, "finetune-predictor", tmp_path / "beside")
    action = plain.action(brightness=0.2)
    torch.testing.assert_close(beside.predict(pictures(), action), plain.predict(pictures(), action))
    both = exported(run, "finetune-end-to-end", tmp_path / "both")
    assert (both.features(pictures()) - plain.features(pictures())).abs().max() > 0
    assert not (tmp_path / "both" / "predictor.safetensors").exists()
    with pytest.raises(ConfigError, match=r"encoder was finetuned.*export the run without --head"):
        both.predict(pictures())


@pytest.mark.parametrize(
    ("part", "layer_norm"),
    [("encoder", "shared"), ("encoder", "own"), ("predictor", "last"), ("predictor", "none"), ("end-to-end", "own")],
)
def test_a_segmenter_says_the_class_of_every_pixel_at_any_size(
    trained: Callable[..., Asked], run: Path, tmp_path: Path, part: str, layer_norm: str
) -> None:
    trial = trained(
        "segmentation",
        parts=(part,),
        layer_norm=layer_norm,
        classes=4,
        reduce_zero_label=False,
        channels=8,
        lr=(1e-3,),
        steps=2,
        batch_size=8,
    )
    model = exported(run, "segmentation", tmp_path / "model")
    assert model.classes == ("0", "1", "2", "3")
    for height, width in ((32, 32), (40, 24)):
        images = pictures(height, width)
        said = model.segment(images)
        expected = torch.nn.functional.interpolate(trial(images, 0), (height, width), mode="bilinear")
        torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-3)
    assert model.segment(pictures(37, 29)).shape == (3, 4, 37, 29)
    with pytest.raises(ConfigError, match="head is for segmentation; call segment"):
        model.classify(pictures())
    one = pictures(37, 29)[0]
    torch.testing.assert_close(model.segment([one, one])[:1], model.segment(one), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"one batch cannot have images of 37 × 29 and 32 × 32"):
        model.segment([one, pictures()[0]])


def test_a_segmenter_of_before_there_was_a_choice_of_norms_is_exported(
    leverage: Leverage, run: Path, tmp_path: Path
) -> None:
    leverage("segmentation", parts=("predictor",), classes=4, reduce_zero_label=False, channels=8, steps=1)
    folder = run / "eval" / "segmentation"
    new = exported(run, "segmentation", tmp_path / "new").segment(pictures())
    content = load_verified(folder / BEST, FORMAT)
    del content["settings"]["layer_norm"]
    save_state(folder, BEST, content)
    torch.testing.assert_close(exported(run, "segmentation", tmp_path / "old").segment(pictures()), new)
    description = json.loads((tmp_path / "old" / "head.json").read_text())
    del description["layer_norm"]
    (tmp_path / "old" / "head.json").write_text(json.dumps(description))
    torch.testing.assert_close(iwm.load(tmp_path / "old").segment(pictures()), new)


def test_of_several_tasks_the_joint_predictor_is_exported_and_its_tasks_have_names(
    trained: Callable[..., Asked], run: Path, tmp_path: Path
) -> None:
    trained("multitask", tasks=("side", "label"), cache_features=True)
    model = exported(run, "multitask", tmp_path / "model")
    assert json.loads((tmp_path / "model" / "head.json").read_text())["trial"] == "multitask"
    with pytest.raises(ConfigError, match=r"give the task, for example task='side'; this model has side, label"):
        model.classify(pictures())
    with pytest.raises(ConfigError, match=r"model.tasks\['side'\]"):
        _ = model.classes


@pytest.mark.parametrize(("name", "options"), [PROTOCOLS[0], PROTOCOLS[3], PROTOCOLS[4], PROTOCOLS[6]])
def test_the_card_says_how_good_it_is_and_its_code_runs(
    leverage: Leverage, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    result = leverage(name, **options)
    exported(run, name, tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    best = result["trials"][result["chosen"]]["best"]["score"]
    if name != "multitask":
        assert (
            f"| label | 3 | {100 * best:.1f} | 37.5 | 48 of split `val` | {result['train_images']} of split `train`"
            in card
        )
        assert ("training images that were held out" in card) == (result["selection"] == "train")
        assert ("Nothing was chosen on these" in card) == (result["selection"] == "none")
    assert f"Protocol `{name}`" in card
    assert ("MRR" in card or "World model evaluation" in card) == (name != "finetune-encoder")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": pictures()}
    for code in re.findall(r"```python\n(.*?)```", card, re.S):
        exec(code, names)
    assert set(names["names"]) <= {"red", "green", "blue", "left", "right"}


def test_a_model_without_a_head_says_how_to_get_one(run: Path) -> None:
    model = iwm.load(run)
    assert model.tasks == {}
    for asked in (lambda: model.classify(pictures()), lambda: model.segment(pictures()), lambda: model.classes):
        with pytest.raises(ConfigError, match=r"no head; train one and export it with .* --head RUN/eval/linear"):
            asked()


def test_a_head_goes_with_its_own_checkpoint_and_encoder(
    leverage: Leverage, run: Path, small: Config, tmp_path: Path
) -> None:
    leverage("linear", encoder=("student",))
    head, checkpoint = run / "eval" / "linear", run / "checkpoints" / "step-000000007.pt"
    with pytest.raises(ConfigError, match="was trained on the student; omit --encoder"):
        export(ExportOptions(run, tmp_path / "model", encoder="teacher", head=head))
    shutil.copy(checkpoint, checkpoint.with_name("step-000000009.pt"))
    export(ExportOptions(run, tmp_path / "model", head=head))
    assert iwm.load(tmp_path / "model").origin.name.endswith("step-000000007.pt")
    other = untrained(tmp_path / "other", replace(small, encoder=replace(small.encoder, init="ijepa")))
    with pytest.raises(CheckpointError, match=r"was trained on another step-000000007.pt than"):
        export(ExportOptions(other, tmp_path / "model", head=head))
    checkpoint.unlink()
    with pytest.raises(CheckpointError, match=r"was trained on step-000000007.pt, which .* does not contain"):
        export(ExportOptions(run, tmp_path / "model", head=head))


def test_one_line_tells_what_cannot_be_exported(leverage: Leverage, run: Path, tmp_path: Path, boxes: Path) -> None:
    file = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0).state_dict(), file)
    leverage(
        "finetune-predictor",
        checkpoint=file,
        external=ExternalModel(format="timm", name="vit_tiny_patch16_224", image_size=48),
        data=DataSettings(shards=str(boxes), num_threads=1),
        random_predictor=PredictorConfig(embed_dim=24, depth=1, num_heads=3),
        steps=1,
    )
    with pytest.raises(ConfigError, match="trained on a timm encoder; only heads trained on a run can be exported"):
        export(ExportOptions(run, tmp_path / "model", head=tmp_path / "vit" / "eval" / "finetune-predictor"))
    command = [sys.executable, "tools/export.py", str(run), str(tmp_path / "model"), "--head", str(run / "eval")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"tools/export.py: .*eval has no trained head .*RUN/eval/linear\n", done.stderr)
    assert not (tmp_path / "model").exists()
