"""Model card of an exported model: training data, recipe, evaluation, use and limits, with the Hub's metadata.

The text is templates/card.md. The card contains only results that were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from iwm.actions import applicable_ops, jitter_ranges, removable_ops
from iwm.downstream.progress import TaskInfo, TrainedHead
from iwm.downstream.registry import lookup
from iwm.export.evaluations import CheckpointResults, DownstreamScore
from iwm.export.folder import HEAD_DESCRIPTION, TIMM_CONFIG
from iwm.export.graphs import GraphFormat, file_names
from iwm.export.model import PretrainedModel
from iwm.training.export_files import DESCRIPTION, ENCODER, HEAD, PREDICTOR
from shards.urls import is_url

ENVIRONMENT = Environment(
    loader=PackageLoader("iwm.export"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TAGS = ["timm", "self-supervised", "world-model", "vision-transformer", "arxiv:2403.00504"]


def model_card(
    model: PretrainedModel,
    results: CheckpointResults,
    name: str,
    *,
    images: int | None = None,
    license: str | None = None,
    formats: Sequence[GraphFormat] = (),
    hub: str | None = None,
) -> str:
    """Return the card as Markdown with YAML front matter.

    results: of the exported checkpoint. name: of the folder. images: number of images of the training data, None where
    it is not known. license: identifier of the Hub, None: not stated. formats: of the graphs in the folder. hub: name
    of the repository, None where the folder stays local.
    """
    head = model.head
    finetuned = head is not None and lookup(head.protocol).finetunes_encoder(head)
    linear = head is not None and lookup(head.protocol).linear
    downstream = () if finetuned else results.downstream
    mrr = None if model.predictor is None or results.mrr is None else _mrr(results.mrr, model.encoder_name)
    values = {
        "metadata": yaml.safe_dump(
            _metadata(name, license, head, mrr, downstream), sort_keys=False, allow_unicode=True
        ),
        "name": name,
        "model": model,
        "c": model.config,
        "size": model.config.views.size,
        "data": _short(model.config.data.shards),
        "images": images,
        "license": license,
        "finetuned": finetuned,
        "linear": linear,
        "mrr": mrr,
        "downstream": [_downstream_row(score) for score in downstream],
        "hub": hub,
        "calls": _calls(model),
        "abilities": _abilities(model) if model.predictor is not None else "",
        "contents": _contents(model, formats),
        "files": {"description": DESCRIPTION, "head_description": HEAD_DESCRIPTION},
        "head": head,
        **(_head(head) if head else {}),
    }
    return ENVIRONMENT.get_template("card.md").render(values)


def _metadata(
    name: str,
    license: str | None,
    head: TrainedHead | None,
    mrr: dict[str, Any] | None,
    downstream: Sequence[DownstreamScore],
) -> dict[str, Any]:
    """Return the front matter: the Hub's fields, and measured results as its `model-index`."""
    classifies = head is not None and lookup(head.protocol).linear
    fields: dict[str, Any] = {"license": license} if license else {}
    fields |= {
        "library_name": "timm",
        "pipeline_tag": "image-classification" if classifies else "image-feature-extraction",
        "tags": TAGS,
    }
    measured = [] if mrr is None else [_mrr_entry(mrr)]
    measured += [_downstream_entry(score) for score in downstream]
    return fields | ({"model-index": [{"name": name, "results": measured}]} if measured else {})


def _mrr_entry(mrr: dict[str, Any]) -> dict[str, Any]:
    names = {"own": "MRR", "control": "MRR with shuffled actions", "chance": "MRR by chance"}
    return {
        "task": {"type": "image-feature-extraction", "name": "Retrieval of the target under an action"},
        "dataset": {"type": mrr["shards"], "name": mrr["shards"], "split": mrr["split"]},
        "metrics": [
            {"type": "mrr", "name": text, "value": round(float(mrr[key].split()[0]), 3)} for key, text in names.items()
        ],
    }


def _downstream_entry(score: DownstreamScore) -> dict[str, Any]:
    record, task = score.record, score.record.tasks[score.task]
    segments = record.metric == "miou"
    return {
        "task": {"type": "image-segmentation" if segments else "image-classification", "name": record.protocol},
        "dataset": {"type": task.data, "name": task.data},
        "metrics": [
            {
                "type": "mean_iou" if segments else "accuracy",
                "name": f"{'mIoU' if segments else 'top-1 accuracy'}, {record.protocol}",
                "value": round(score.score.mean, 4),
            }
        ],
    }


def _mrr(result: dict[str, Any], which: str) -> dict[str, Any]:
    """Return what the card says of an MRR result."""
    own, control = (result[key]["pooled"][which] for key in ("mrr", "shuffled_actions"))
    return {
        "images": result["images"],
        "bank": result["bank"],
        "own": f"{own['mean']:.3f} ± {own['standard_error']:.3f}",
        "control": f"{control['mean']:.3f} ± {control['standard_error']:.3f}",
        "chance": f"{result['chance']:.3f}",
        "split": result["data"]["split"],
        "shards": _short(result["data"]["shards"]),
        "held_out": result["data"].get("held_out", True),
    }


def _downstream_row(score: DownstreamScore) -> list[str]:
    task, measured = score.record.tasks[score.task], score.score
    error = "" if measured.error is None else f" ± {100 * measured.error:.1f}"
    return [
        f"{score.record.protocol}, trial `{score.trial.name}`",
        _cell(task.data),
        f"{100 * measured.mean:.1f}{error}",
        _percent(task.chance),
        f"{task.val_images:,}",
        f"{task.train_images:,}",
    ]


def _head(head: TrainedHead) -> dict[str, Any]:
    """Return the template's values for the trained head: protocol, data and scores."""
    metric, title = ("miou", "mIoU") if head.segments else ("top1", "top-1")
    return {
        "head_part": lookup(head.protocol).card + (f" ({head.metadata['part']})" if head.segments else ""),
        "head_metric": title,
        "head_rows": [_head_row(name, task, metric) for name, task in head.tasks.items()],
        "head_chance": not head.segments,
    }


def _head_row(name: str, task: TaskInfo, metric: str) -> list[str]:
    data = task.data
    return [
        _cell(name),
        f"{len(task.classes)}",
        f"{100 * task.scores[metric]:.1f}",
        _percent(data.get("chance")),
        f"{data['val_images']:,} of split `{data['split']}`",
        f"{data['train_images']:,} of split `{data['train']}`, `{_short(data['shards'])}`",
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _percent(share: float | None) -> str:
    """Return a share in %, or a dash."""
    return "–" if share is None else f"{100 * share:.1f}"


def _calls(model: PretrainedModel) -> list[str]:
    """Return lines of code that use each part of the model."""
    calls = []
    if model.predictor is not None:
        example = _example(model)
        calls.append(
            f"predicted = model.predict(images, {example})" if example else "predicted = model.predict(images)"
        )
    if model.head is not None and model.head.segments:
        calls += ["classes = model.segment(images).argmax(1)  # indices into model.classes, [b, h, w]"]
    elif model.head is not None:
        task = next(iter(model.tasks)) if len(model.tasks) > 1 else None
        logits = "model.classify(images)" if task is None else f"model.classify(images, {task!r})"
        names = "model.classes" if task is None else f"model.tasks[{task!r}]"
        calls += [f"names = [{names}[number] for number in {logits}.argmax(1)]"]
    return calls


def _contents(model: PretrainedModel, formats: Sequence[GraphFormat]) -> list[tuple[str, str]]:
    """Return file names and their content."""
    linear = model.head is not None and lookup(model.head.protocol).linear
    rows = [
        (f"`{ENCODER}`, `{TIMM_CONFIG}`", f"the encoder{' with its linear head' if linear else ''}, in timm's form"),
        (f"`{DESCRIPTION}`", "the run's configuration, the layout of actions"),
    ]
    if model.predictor is not None:
        rows.append((f"`{PREDICTOR}`", "the predictor"))
    if model.head is not None:
        weights = "" if linear else f"`{HEAD}`, "
        rows.append((f"{weights}`{HEAD_DESCRIPTION}`", "the trained head: its task, classes and scores"))
    for name, what in file_names(formats, with_predictor=model.predictor is not None).items():
        rows.append((f"`{name}`", what))
    return rows


def _short(shards: str) -> str:
    """Return a URL, or the last two parts of a path, which identify the data."""
    return shards if is_url(shards) else "/".join(Path(shards).parts[-2:])


def _example(model: PretrainedModel) -> str:
    """Return code for an action that occurred in training; '' where there is none."""
    if not model.action_names:
        return ""
    for name, (_, high) in jitter_ranges(model.config).items():
        if high > 0:
            return f"model.action({name}=+{high / 2:.2g})"
    undo = removable_ops(model.config.views)
    return f'model.action(undo=("{undo[0]}",))' if undo else ""


def _abilities(model: PretrainedModel) -> str:
    if not model.action_names:
        return "The predictor takes no action (conditioning `none`)."
    ranges = jitter_ranges(model.config).items()
    changes = [f"{name} {low:+.2f} to {high:+.2f}" for name, (low, high) in ranges if high > low]
    undo, apply = removable_ops(model.config.views), applicable_ops(model.config.views)
    sentences = [
        f"Ranges of the jitter changes in training: {', '.join(changes)} (hue in turns)." if changes else "",
        f"The predictor was trained to undo {', '.join(undo)}." if undo else "",
        f"The predictor was trained to apply {', '.join(apply)}." if apply else "",
    ]
    return " ".join(sentence for sentence in sentences if sentence)
