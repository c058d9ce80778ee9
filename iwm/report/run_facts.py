"""Facts on a run, from its files: data, length, settings, model, hardware, duration, program."""

from __future__ import annotations

from typing import Any

from dali_pipelines.views import SCENARIOS, Views
from iwm.config import Config
from iwm.config_io import config_diff
from iwm.recipes import RECIPES
from iwm.report.runs import ReportError, RunResults, setting_text
from iwm.report.short_paths import short_path

NOT_RECORDED = "not recorded"
FEW_CHANGES = 6
"""Largest number of changed settings that are named; with more, only their number is."""


def facts(run: RunResults) -> list[tuple[str, str]]:
    """Return names and texts of the facts on a run. What its files do not record is said to be so."""
    try:
        config, problem = run.parse_config(), "no config.yaml"
    except ReportError:
        config, problem = None, "config.yaml is not one of this version"
    segments = run.record["segments"] if run.record else []
    return [
        ("data", _data(run, config) if config else problem),
        ("training", _length(run)),
        ("settings", _recipe(config) if config else problem),
        ("views", _views(config) if config else problem),
        ("model", _model(run, config) if config else problem),
        ("hardware", _hardware(run, segments)),
        ("duration", _duration(segments)),
        ("program", _program(run, segments)),
    ]


def _last(run: RunResults, name: str) -> float | None:
    points = run.metrics.get(name)
    return points[-1][1] if points else None


def _data(run: RunResults, config: Config) -> str:
    samples, epoch = _last(run, "samples"), _last(run, "epoch")
    images = run.record["images"] if run.record else round(samples / epoch) if samples and epoch else None
    name = short_path(config.data.shards)
    return f"{name}, split '{config.data.train}'" + ("" if images is None else f": {images:,} images")


def _length(run: RunResults) -> str:
    samples, epoch = _last(run, "samples"), _last(run, "epoch")
    steps = max((points[-1][0] for points in run.metrics.values()), default=None)
    if steps is None:
        return NOT_RECORDED
    if samples is None or epoch is None:
        return f"{steps:,.0f} steps"
    return f"{steps:,.0f} steps of {samples / steps:,.0f} images: {samples:,.0f} images seen, {epoch:.4g} epochs"


def _recipe(config: Config) -> str:
    """Return the recipe with the fewest other settings, and these settings."""
    changes = {name: config_diff(make(), config) for name, make in RECIPES.items()}
    name, changed = min(changes.items(), key=lambda pair: len(pair[1]))
    if not changed:
        return f"recipe {name}"
    if len(changed) > FEW_CHANGES:
        return f"nearest recipe: {name}, with {len(changed)} other settings (see Configuration)"
    settings = ", ".join(f"{field} {setting_text(value)}" for field, (_, value) in changed.items())
    return f"recipe {name}, with {settings}"


def _views(config: Config) -> str:
    named = {"the paper's augmentations (A.1)": Views()} | {f"scenario {name}": SCENARIOS[name] for name in SCENARIOS}
    ours = (config.views.target, config.views.source)
    same = next((name for name, views in named.items() if (views.target, views.source) == ours), "own augmentations")
    shuffled = " on shuffled actions" if config.action.shuffle else ""
    return f"{config.views.size} px, {same}, conditioning {config.action.conditioning}{shuffled}"


def _model(run: RunResults, config: Config) -> str:
    encoder, predictor = config.encoder, config.predictor
    count = run.record["parameters"] if run.record else {}
    sizes = {name: f" ({value / 1e6:.1f} M parameters)" for name, value in count.items()}
    return (
        f"ViT {encoder.depth}×{encoder.embed_dim}, patch {encoder.patch_size}{sizes.get('encoder', '')}; "
        f"predictor {predictor.depth}×{predictor.embed_dim}{sizes.get('predictor', '')}"
    )


def _hardware(run: RunResults, segments: list[dict[str, Any]]) -> str:
    kinds = dict.fromkeys(
        f"{part['device']}, {part['processes']} process{'es' if part['processes'] > 1 else ''}, {part['cores']} cores"
        for part in segments
    )
    if kinds:
        return "; then ".join(kinds)
    devices = {result["device"]: None for result in run.evaluations.values() if "device" in result}
    return f"{NOT_RECORDED}; evaluated on {', '.join(devices)}" if devices else NOT_RECORDED


def _duration(segments: list[dict[str, Any]]) -> str:
    if not segments:
        return NOT_RECORDED
    steps = segments[-1]["last_step"] - segments[0]["first_step"]
    starts = f" in {len(segments)} starts" if len(segments) > 1 else ""
    since = segments[0]["first_step"]
    part = f", recorded from step {since:,} on" if since else ""
    seconds = sum(part["seconds"] for part in segments)
    return f"{_time(seconds)} for {steps:,} steps{starts}{part}; started {segments[0]['started'][:10]}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _program(run: RunResults, segments: list[dict[str, Any]]) -> str:
    if segments:
        commits = dict.fromkeys(part["commit"] for part in segments if part["commit"])
        commit = f"commit {', then '.join(commits)}; " if commits else ""
        return commit + _versions(segments[-1]["versions"])
    found = [result["versions"] for result in run.evaluations.values() if "versions" in result]
    return f"{NOT_RECORDED}; evaluated with {_versions(found[-1])}" if found else NOT_RECORDED


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())
