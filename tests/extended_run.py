"""Script of test_extending.py for a copy of the source with posterize, fade and token conditioning."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from baselines.ijepa_step import blockwise_flops, cut
from baselines.torchvision_loader import colours
from pipeline_profile import colour_cuts
from pipeline_shards import photographs_and_noise, write_split
from torch.utils.flop_counter import FlopCounterMode

import iwm
from dali_pipelines.augmentations import NO_PHOTOMETRIC, PARAMS, SINGLE_OP, SOURCE, TARGET, PhotometricConfig
from dali_pipelines.loader import ViewBatch, ViewLoader
from dali_pipelines.photometric_kernels import missing_ops
from dali_pipelines.replay import apply_photometric, sample_photometric
from dali_pipelines.views import Views
from iwm.ablation.studies import STUDIES
from iwm.actions import action_from_params, action_schema, action_spec, describe_action, make_action
from iwm.config import Config, ConfigError
from iwm.evaluation.corruptions import make_corruptions
from iwm.evaluation.explorer import source_params
from iwm.evaluation.parameter_sweep import change_in_words, make_sweeps
from iwm.evaluation.settings import CorruptionSettings, SweepSettings
from iwm.masking import Masks, pack_masks
from iwm.model_config import ActionConfig, EncoderConfig, MaskingConfig, PredictorConfig
from iwm.models.attention import set_attention_impl
from iwm.models.flops import predictor_flops, training_flops
from iwm.models.world_model import WorldModel
from iwm.recipes import RECIPES
from iwm.train_config import OptimConfig, TrainConfig
from iwm.training.distributed import DistEnv
from iwm.training.optim import ScheduleValues, build_optimizer
from iwm.training.step import ForwardBackward, prepare_masks, sample_step_masks, train_step

NEW = PhotometricConfig(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, (0.1, 2.0), 0.0, fade=0.4, posterize_probability=0.5)
VIEWS = Views(size=48, source=NEW, target=replace(NO_PHOTOMETRIC, fade=0.4))


def check_pipeline(batch: ViewBatch) -> None:
    """Check that the pipeline samples and records both ops, and that the replay computes the same view."""
    sampled = {name: batch.params[:, PARAMS.index(f"source_{name}")] for name in ("fade", "posterize")}
    assert sampled["fade"].unique().numel() == len(batch.params)
    assert 0.6 <= sampled["fade"].min() < 0.8 < 1.2 < sampled["fade"].max() <= 1.4
    assert sampled["posterize"].unique().tolist() == [0.0, 1.0]
    view = apply_photometric(batch.target, batch.params[:, SOURCE], "linear")
    assert (view != batch.source).float().mean() < 1e-3
    assert (view != batch.target).float().mean() > 0.5
    assert (batch.source[sampled["posterize"] > 0] % 32 == 0).all()
    replayed = sample_photometric(NEW, 200, torch.Generator().manual_seed(0))
    assert replayed.shape[1] == SOURCE.stop - SOURCE.start == TARGET.stop - TARGET.start == 12
    assert replayed.std(0).count_nonzero() == 2


def check_action(batch: ViewBatch) -> None:
    """Check the entries of both ops in the action, its words and its schema."""
    config = Config(views=VIEWS)
    spec = action_spec(config.action, VIEWS)
    flags = ("source_grayscale", "source_blur", "source_solarize", "source_posterize")
    assert spec.names == ("brightness", "contrast", "saturation", "hue", "fade", *flags)
    action = dict(zip(spec.names, action_from_params(batch.params, spec).unbind(1), strict=True))
    params = dict(zip(PARAMS, batch.params.unbind(1), strict=True))
    torch.testing.assert_close(action["fade"] * 0.4, params["target_fade"] - params["source_fade"])
    assert torch.equal(action["source_posterize"], params["source_posterize"])
    made = make_action(config, spec, {"fade": 0.3}, undo=("posterize",), apply=())
    assert describe_action(made, spec) == "fade +0.30, undo posterize"
    assert action_schema(config, spec)[4] == {"name": "fade", "scale": 0.4, "range": [-1.0, 1.0]}
    log = replace(spec, jitter_encoding="log_ratio")
    ratio = action_from_params(batch.params, log)[:, 4] * 0.4
    torch.testing.assert_close(ratio, (params["target_fade"] / params["source_fade"]).log())


def check_evaluation() -> None:
    """Check both ops in sweeps, corruptions, the explorer and the profile; torchvision and Triton refuse them."""
    checkpoint = Path("unused")
    strong = replace(NEW, fade=0.5)
    views = replace(VIEWS, source=strong, target=replace(strong, posterize_probability=0.0))
    sweeps = {sweep.name: sweep for sweep in make_sweeps(views, False, SweepSettings(checkpoint=checkpoint))}
    assert {"fade", "undo posterize"} <= set(sweeps)
    assert (sweeps["fade"].values[0], sweeps["fade"].values[-1]) == (0.5, 1.5)
    assert [sweeps[name].trained for name in ("fade", "undo posterize", "undo blur")] == [True, True, False]
    assert (change_in_words("fade", 1.2), change_in_words("posterize", 1.0)) == ("×1.20", "on")
    corruptions = make_corruptions(views, CorruptionSettings(checkpoint=checkpoint))
    assert {"fade", "posterize"} <= {corruption.op for corruption in corruptions}
    assert list(source_params(VIEWS, 1.0)) == ["clean", "grayscale", "blur", "solarize", "posterize"]
    assert [name for name, _ in colour_cuts(VIEWS)][-2:] == ["source: fade", "source: posterize"]
    assert {"fade", "posterize"} <= set(SINGLE_OP)
    with pytest.raises(ConfigError, match="fade, posterize"):
        colours(NEW, "tensor")
    assert missing_ops(VIEWS) == ["fade", "posterize"]
    assert missing_ops(Views()) == []


def check_conditioning(batch: ViewBatch) -> None:
    """Check that token conditioning trains with both mask types, and its numbers of tokens and FLOPs."""
    for masking in ("iwm", "ijepa"):
        config = Config(
            views=VIEWS,
            encoder=EncoderConfig(embed_dim=32, depth=1, num_heads=2, patch_size=8),
            predictor=PredictorConfig(embed_dim=16, depth=1, num_heads=2),
            action=ActionConfig(conditioning="token"),
            masking=MaskingConfig(type=masking),
            optim=OptimConfig(implementation="torch"),
            train=TrainConfig(compile=False, precision="fp32"),
        )
        config.check()
        dist = DistEnv(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
        model = WorldModel(config).setup(dist.device, compiled=False)
        set_attention_impl(model, fused=False)
        predictor = model.predictor
        assert (predictor.conditioned, predictor.num_action_tokens) == (True, 1)
        assert {"predictor.action_token.weight", "predictor.action_token.bias"} <= set(model.state_dict())
        before = predictor.action_token.weight.clone()
        optimizer, _ = build_optimizer(model, config.optim, dist.device)
        masks = [prepare_masks(config, dist, 0, 0, len(batch.source))]
        values = ScheduleValues(lr=1e-2, weight_decay=0.0, ema=0.99)
        result = train_step(model, ForwardBackward(model, model), optimizer, [batch], masks, values)
        assert not result.skipped
        assert (predictor.action_token.weight != before).any(dim=1)[[4, 8]].all(), "neither fade nor posterize"

    sampled = sample_step_masks(config, dist, 0, 0, 1)
    whole = Masks(sampled.visible, ~sampled.visible[:, None])
    context, action = torch.randn(1, int(sampled.visible.sum()), 32), torch.randn(1, 9)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predictor.predict_masked(context, pack_masks(whole, None, 1, config.loss), action)
    n = config.grid_size**2
    expected = predictor_flops(config, context.shape[1], n, int(whole.predicted.sum()))
    assert counter.get_total_flops() == expected
    unconditioned = replace(config, action=ActionConfig(conditioning="none"))
    several = cut(sample_step_masks(config, dist, 0, 0, 4))
    assert blockwise_flops(config, several) > blockwise_flops(unconditioned, several)
    assert training_flops(config).predictor > training_flops(unconditioned).predictor
    assert "token" in STUDIES["conditioning"](RECIPES["demo"]()).columns


def main(folder: Path) -> None:
    assert Path(iwm.__file__).parents[1] == Path.cwd(), "not the copy"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    write_split(folder, "train", photographs_and_noise(24), per_shard=(24,))
    batch = next(ViewLoader(folder, "train", VIEWS, batch_size=24, seed=0, num_threads=1))
    check_pipeline(batch)
    check_action(batch)
    check_evaluation()
    check_conditioning(batch)
    print("works")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
