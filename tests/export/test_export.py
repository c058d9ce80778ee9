"""Exported models and iwm.load: timm loads the encoder, predictions equal the run's, errors name the problem."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import iwm
from dali_pipelines.augmentations import COLUMNS, IDENTITY, NO_PHOTOMETRIC, PhotometricConfig
from dali_pipelines.replay import apply_photometric
from dali_pipelines.views import Views
from iwm.action_space import action_space
from iwm.actions import action_between, action_spec, describe_action
from iwm.config import Config, ConfigError
from iwm.evaluation.action_pairs import ActionPairs
from iwm.evaluation.action_settings import InferActionSettings
from iwm.evaluation.infer_action import pair_energy
from iwm.export.__main__ import ExportOptions, export
from iwm.model_config import ActionConfig, EncoderConfig, PredictorConfig
from iwm.models.action_search import search_by_gradient
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from iwm.models.world_model import WorldModel
from iwm.search_settings import GradientSettings
from iwm.train_config import TrainConfig
from iwm.training.checkpoint import Checkpoint, CheckpointError, load_world_model, save_checkpoint, versions
from tests.export.local_dir import needs_local_dir

CONFIG = Config(
    views=Views(size=32),
    encoder=EncoderConfig(embed_dim=48, depth=2, num_heads=2, patch_size=8, init="xavier"),
    predictor=PredictorConfig(embed_dim=48, depth=1, num_heads=2),
    train=TrainConfig(compile=False, precision="fp32"),
)


def make_run(folder: Path, config: Config = CONFIG) -> Path:
    """Write a run's folder with one checkpoint, of step 7, whose teacher differs from its student."""
    torch.manual_seed(0)
    model = WorldModel(config)
    with torch.no_grad():
        for parameter in model.target_encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_checkpoint(folder, Checkpoint(config, 7, 448, 0, model.state_dict(), {}, {}, {}, versions()))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    export(ExportOptions(run, tmp_path / "model"))
    return tmp_path / "model"


def pictures(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/export.py", *map(str, arguments)]
    return subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )


@needs_local_dir
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_stock_timm_has_the_features_of_the_encoder_that_was_exported(run: Path, tmp_path: Path, which: str) -> None:
    export(ExportOptions(run, tmp_path / which, which))
    stock = timm.create_model(f"local-dir:{tmp_path / which}", pretrained=True)
    normalised = (pictures() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    expected = stock.eval().forward_features(normalised.permute(0, 3, 1, 2))
    torch.testing.assert_close(iwm.load(tmp_path / which).features(pictures()), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(load_world_model(run)[0].encode(pictures(), which), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("conditioning", ["none", "sequence", "feature"])
def test_a_run_its_checkpoint_and_its_export_predict_what_the_trained_model_does(
    tmp_path: Path, conditioning: str
) -> None:
    run = make_run(tmp_path / "run", replace(CONFIG, action=ActionConfig(conditioning=conditioning)))
    export(ExportOptions(run, tmp_path / "model"))
    whole, _ = load_world_model(run)
    action = torch.randn(3, whole.action_spec.size)
    given = None if conditioning == "none" else action
    expected = whole.predict(whole.encode(pictures(), "teacher"), action)
    for source in (run, run / "checkpoints" / "step-000000007.pt", tmp_path / "model"):
        model = iwm.load(source)
        torch.testing.assert_close(model.predict(pictures(), given), expected)
        torch.testing.assert_close(model.targets(pictures()), whole.target_features(pictures()))
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.action_names == (() if given is None else whole.action_spec.names)
    if conditioning == "none":
        with pytest.raises(ConfigError, match="conditioning none"):
            model.predict(pictures(), action)
        with pytest.raises(ConfigError, match="conditioning none"):
            model.action(brightness=0.1)


def test_one_image_takes_several_actions_and_one_action_several_images(exported: Path) -> None:
    model = iwm.load(exported)
    actions = torch.stack([model.action(brightness=0.2), model.action(hue=-0.1), model.action()])
    together = model.predict(pictures(1), actions)
    one_by_one = torch.cat([model.predict(pictures(1), action) for action in actions])
    torch.testing.assert_close(together, one_by_one)
    torch.testing.assert_close(model.predict(pictures(), actions[2]), model.predict(pictures()))
    with pytest.raises(ConfigError, match="3 actions for 2 images"):
        model.predict(pictures(2), actions)


def test_float_images_are_the_same_images(exported: Path) -> None:
    model = iwm.load(exported)
    as_float = pictures().permute(0, 3, 1, 2) / 255
    assert torch.equal(model.features(as_float), model.features(pictures()))
    torch.testing.assert_close(model.pooled(pictures()), model.features(pictures()).mean(1))


@pytest.mark.parametrize("jitter", ["difference", "log_ratio"])
def test_words_make_the_action_of_the_views_that_they_describe(tmp_path: Path, jitter: str) -> None:
    views = replace(CONFIG.views, target=PhotometricConfig(blur_probability=0.0))
    config = replace(CONFIG, action=ActionConfig(jitter_encoding=jitter), views=views)
    model = iwm.load(make_run(tmp_path / "run", config))
    made = model.action(brightness=0.3, hue=-0.05, undo=("grayscale", "blur"), apply=("solarize",))
    source, target = torch.tensor([IDENTITY]), torch.tensor([IDENTITY])
    changes = {"brightness": 1.3, "hue": -0.05, "solarize": 1.0}
    for view, values in ((source, {"grayscale": 1.0, "blur": 0.7}), (target, changes)):
        for name, value in values.items():
            view[:, COLUMNS[name]] = value
    spec = action_spec(config.action, config.views)
    torch.testing.assert_close(made, action_between(source, target, spec)[0])
    assert not model.action().any()
    same = torch.tensor([IDENTITY])
    torch.testing.assert_close(model.action(), action_between(same, same, spec)[0])
    with pytest.raises(ConfigError, match=r"apply 'blur'.*grayscale, solarize"):
        model.action(apply=("blur",))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"brightness": 0.9}, r"brightness \+0.9 is outside .* from -0.80 to \+0.80"),
        ({"hue": float("nan")}, "hue"),
        ({"gamma": 0.1}, "'gamma' does not exist; choose from brightness, contrast, saturation, hue"),
        ({"undo": ("sepia",)}, "undo 'sepia'; it was trained to undo: grayscale, blur, solarize"),
        ({"undo": "blur"}, r"undo=\('blur',\)"),
        ({"apply": ("blur",)}, "trained to apply: nothing"),
    ],
)
def test_words_outside_training_are_refused(exported: Path, words: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        iwm.load(exported).action(**words)


def test_a_model_trained_without_jitter_says_so(tmp_path: Path) -> None:
    still = replace(NO_PHOTOMETRIC, brightness=0.0, grayscale_probability=0.2)
    run = make_run(tmp_path / "run", replace(CONFIG, views=replace(CONFIG.views, source=still, target=NO_PHOTOMETRIC)))
    export(ExportOptions(run, tmp_path / "model"))
    with pytest.raises(ConfigError, match="only 0, because it never changed in training"):
        iwm.load(tmp_path / "model").action(contrast=0.1)
    assert "undo grayscale" in (tmp_path / "model" / "README.md").read_text()


def test_actions_that_do_not_fit_are_refused(exported: Path) -> None:
    for action in (torch.zeros(3), torch.zeros(1, 1, 7), torch.zeros(7, dtype=torch.int64)):
        with pytest.raises(ConfigError, match=r"float \[7\] or \[b, 7\] \(brightness, "):
            iwm.load(exported).predict(pictures(), action)


def test_parameters_can_be_trained_when_asked_for(exported: Path) -> None:
    model = iwm.load(exported).requires_grad_()
    model.predict(pictures(), model.action(brightness=0.1)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.predictor.parameters())


def test_the_description_says_what_an_action_is(exported: Path) -> None:
    content = json.loads((exported / "iwm.json").read_text())
    entries = {entry["name"]: entry for entry in content["action"]["entries"]}
    assert tuple(entries) == action_spec(CONFIG.action, CONFIG.views).names
    assert entries["brightness"]["scale"] == 0.4
    assert entries["brightness"]["range"] == pytest.approx([-2, 2])
    assert entries["source_blur"]["range"] == [0, 1]
    assert content["patch_grid"] == [4, 4]
    assert content["origin"] == {"name": "run/step-000000007.pt", "step": 7, "samples": 448}


def mrr(checkpoint: str, **data: object) -> str:
    score = {"pooled": {name: {"mean": 0.25, "standard_error": 0.01} for name in ("teacher", "student")}}
    data = {"shards": "shards/photos", "split": "val", **data}
    content = {"mrr": score, "shuffled_actions": score, "chance": 0.024, "images": 64, "bank": 256, "data": data}
    return json.dumps({**content, "protocol": "mrr", "checkpoint": checkpoint})


def test_the_card_has_only_what_was_run_on_this_checkpoint(run: Path, tmp_path: Path) -> None:
    card = tmp_path / "model" / "README.md"
    export(ExportOptions(run, card.parent))
    assert "Not measured" in card.read_text()
    assert "448 images seen" in card.read_text()
    (run / "eval").mkdir()
    evaluation = run / "eval" / "mrr.json"
    evaluation.write_text(mrr("elsewhere/run/checkpoints/step-000000003.pt"))
    export(ExportOptions(run, card.parent))
    assert "Not measured" in card.read_text()
    evaluation.write_text(mrr("elsewhere/run/checkpoints/step-000000007.pt"))
    export(ExportOptions(run, card.parent))
    assert "0.250 ± 0.010" in card.read_text()
    assert "trained on these images" not in card.read_text()
    evaluation.write_text(mrr("elsewhere/run/checkpoints/step-000000007.pt", held_out=False))
    export(ExportOptions(run, card.parent))
    assert "The model was trained on these images." in card.read_text()
    os.utime(evaluation, (0, 0))
    export(ExportOptions(run, card.parent))
    assert "Not measured" in card.read_text()


@pytest.mark.parametrize("conditioning", ["none", "feature"])
def test_the_cards_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conditioning: str) -> None:
    export(
        ExportOptions(
            make_run(tmp_path / "run", replace(CONFIG, action=ActionConfig(conditioning=conditioning))), tmp_path / "m"
        )
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"images": pictures()}
    for code in re.findall(r"```python\n(.*?)```", (tmp_path / "m" / "README.md").read_text(), re.S):
        exec(code, names)
    assert isinstance(names["predicted"], torch.Tensor)
    assert isinstance(names["encoder"], VisionTransformer)


def test_another_models_folder_is_left_alone_and_nothing_half_written_stays(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    first = tool(run, out)
    assert first.returncode == 0
    assert "written" in first.stdout
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused = tool(run, out, "--encoder", "student")
    assert refused.returncode != 0
    assert len(refused.stderr.strip().splitlines()) == 1
    assert f"{out} contains another model or other files" in refused.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_what_cannot_be_loaded_is_named(exported: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        iwm.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a run's folder"):
        iwm.load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="give its folder"):
        iwm.load(exported / "model.safetensors")
    with pytest.raises(CheckpointError, match="contains only the teacher encoder; export the student encoder too"):
        iwm.load(exported, encoder="student")
    tensors = load_file(exported / "predictor.safetensors")
    del tensors["mask_token"]
    save_file(tensors, exported / "predictor.safetensors")
    with pytest.raises(CheckpointError, match="mask_token"):
        iwm.load(exported)
    (exported / "predictor.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"predictor.safetensors is damaged"):
        iwm.load(exported)
    (exported / "predictor.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not a complete exported model"):
        iwm.load(exported)
    (exported / "encoder.safetensors").touch()
    with pytest.raises(CheckpointError, match="is an exported model of format 1, not 2; export the model again"):
        iwm.load(exported)


def test_importing_iwm_imports_no_torch() -> None:
    command = [sys.executable, "-c", "import sys, iwm; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 0


def test_the_inferred_action_is_that_of_the_evaluators_search(run: Path, exported: Path) -> None:
    model, config = load_world_model(run)
    sources, space = pictures(), action_space(config, model.action_spec)
    action = space.at(torch.rand(3, model.action_spec.size, generator=torch.Generator().manual_seed(2)))
    params = space.applied(torch.tensor([IDENTITY] * 3), action)
    targets = apply_photometric(sources, params, config.views.jitter_impl)
    pairs = ActionPairs(sources, torch.arange(3), targets, torch.arange(3), params, params, action)
    energy = pair_energy(model, pairs, "teacher", InferActionSettings(run))
    _, expected = search_by_gradient(energy, space, GradientSettings())
    for loaded in (iwm.load(run), iwm.load(exported)):
        found = loaded.infer_action(sources, targets)
        torch.testing.assert_close(found.action, expected.actions, atol=1e-3, rtol=0)
        torch.testing.assert_close(found.distance, expected.distances, atol=1e-4, rtol=0)
        assert found.words == [describe_action(each, loaded.action_spec) for each in found.action]
        predicted = loaded.predict(sources, found.action)
        distance = (predicted - loaded.targets(targets)).double().flatten(1).norm(dim=1)
        torch.testing.assert_close(found.distance, distance, atol=1e-4, rtol=0)
    with torch.inference_mode():
        one = loaded.infer_action(sources[0], targets)
    assert one.action.shape == (3, model.action_spec.size)
    torch.testing.assert_close(one.action[0], expected.actions[0], atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match="infer_action: 2 sources and 3 targets; give one of either"):
        loaded.infer_action(sources[:2], targets)


def test_a_model_without_actions_infers_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", replace(CONFIG, action=ActionConfig(conditioning="none")))
    with pytest.raises(ConfigError, match=r"conditioning none.*use a run with action\.conditioning feature"):
        iwm.load(run).infer_action(pictures(1), pictures(1))
