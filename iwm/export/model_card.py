"""Model card of an exported model: architecture, training data, evaluation and use.

It contains only results that were measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwm.actions import applicable_ops, jitter_ranges, removable_ops
from iwm.downstream.progress import TrainedHead
from iwm.downstream.registry import lookup
from iwm.export.folder import ENCODER_ARGUMENTS, HEAD_DESCRIPTION
from iwm.export.model import PretrainedModel
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from iwm.training.export_files import CONFIG, ENCODER, HEAD, PREDICTOR


def model_card(model: PretrainedModel, mrr: dict[str, Any] | None, name: str) -> str:
    """Return the card as Markdown. mrr: result of the MRR evaluation of this checkpoint, if there is one.

    name: name of the folder.
    """
    parts = (
        f"# {name}\n\n{_summary(model)}",
        _head(model.head) if model.head else "",
        f"## World model evaluation\n\n{_evaluation(model, mrr)}" if model.predictor is not None else "",
        f"## Use\n\n{_use(model, name)}",
    )
    return "\n".join(part for part in parts if part)


def _summary(model: PretrainedModel) -> str:
    """Return the introduction with encoder, predictor and pretraining."""
    c, origin = model.config, model.origin
    vit = (
        f"width {c.encoder.embed_dim}, depth {c.encoder.depth}, {c.encoder.num_heads} heads, "
        f"patch size {c.encoder.patch_size} px"
    )
    finetuned = ", finetuned" if model.head and lookup(model.head.protocol).finetunes_encoder(model.head) else ""
    lines = [
        f"- Encoder: the {model.encoder_name}{finetuned}. ViT of {vit}; {c.views.size} px images,",
        f"  {c.grid_size}×{c.grid_size} patches, no class token. Input normalisation: mean {IMAGENET_MEAN},",
        f"  standard deviation {IMAGENET_STD}.",
    ]
    if model.predictor is not None:
        conditioning = f"conditioning `{c.action.conditioning}`"
        shape = f"IWM({c.predictor.depth}, {c.predictor.embed_dim}), {c.predictor.num_heads} heads, {conditioning}"
        lines.append(f"- Predictor: {shape}.")
    lines += [
        f"- Pretraining: split `{c.data.train}` of the shards `{_short(c.data.shards)}`, without labels;",
        f"  {origin.step:,} steps, batch size {c.data.global_batch_size}, {origin.samples:,} images seen.",
        f"- Checkpoint: `{origin.name}`.",
    ]
    return (
        "An Image World Model ([Garrido et al., 2024](https://arxiv.org/abs/2403.00504)): a ViT encoder, and a "
        "predictor\nthat predicts the features of a transformed image from the features of the image and the action, "
        "which describes\nthe transformation.\n\n" + "\n".join(lines) + "\n"
    )


def _head(head: TrainedHead) -> str:
    """Return the section on the trained head: protocol, data and scores."""
    metric, title = ("miou", "mIoU") if head.segments else ("top1", "top-1")
    first = next(iter(head.tasks.values())).data
    rows = [
        f"| {name} | {len(task.classes)} | {100 * task.scores[metric]:.1f} | {_chance(task.data)} | "
        f"{task.data['val_images']:,} of split `{task.data['split']}` | {task.data['train_images']:,} of split "
        f"`{task.data['train']}`, `{_short(Path(task.data['shards']))}` |"
        for name, task in head.tasks.items()
    ]
    trained = lookup(head.protocol).card + (f" ({head.metadata['part']})" if head.segments else "")
    return (
        "## Trained head\n\n"
        f"Protocol `{head.protocol}`: {trained}. Trial `{head.trial}`, epoch {head.epoch:.4g}.\n\n"
        f"| task | classes | {title} in % | chance in % | held-out images | trained on |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n\n"
        + ("" if first.get("chance") is None else "Chance is the accuracy of always predicting the majority class.\n")
        + "Trial and epoch were chosen on these held-out images, so the score is optimistic.\nThe class names "
        f"{'(mask ids) ' if head.segments else ''}are in `{HEAD_DESCRIPTION}`, in the order of the logits.\n"
    )


def _chance(data: dict[str, Any]) -> str:
    """Return a task's chance in %, or a dash."""
    return "–" if data.get("chance") is None else f"{100 * data['chance']:.1f}"


def _use(model: PretrainedModel, name: str) -> str:
    """Return the section with example code, which runs as it is."""
    size = model.config.views.size
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
    abilities = f" {_abilities(model)}" if model.predictor is not None else ""
    sizes = " `segment` keeps the size of the images." if model.head and model.head.segments else ""
    return f"""```python
import iwm
model = iwm.load("{name}")
{chr(10).join(calls)}
```

`images` are paths, PIL images, or arrays or tensors of uint8, or float from 0 to 1; they are resized and cropped to
{size} px.{sizes} `model.features(images)` returns the encoder's features of every patch, `model(images)` one vector
for each image.{abilities}

{_in_timm(model)} without this package, in timm (its input is float images, normalised as above):

```python
import json, timm, safetensors.torch
encoder = timm.models.vision_transformer.VisionTransformer(**json.load(open("{name}/{ENCODER_ARGUMENTS}")))
encoder.load_state_dict(safetensors.torch.load_file("{name}/{ENCODER}"))
```

{_files(model)}
"""


def _in_timm(model: PretrainedModel) -> str:
    return (
        "The encoder with its linear head" if model.head and lookup(model.head.protocol).linear else "The encoder alone"
    )


def _files(model: PretrainedModel) -> str:
    files = [f"`{PREDICTOR}` contains the predictor"] if model.predictor is not None else []
    if model.head is not None and not lookup(model.head.protocol).linear:
        files.append(f"`{HEAD}` contains the trained head")
    return "; ".join([*files, f"`{CONFIG}` contains the run's configuration and the layout of actions."])


def _evaluation(model: PretrainedModel, mrr: dict[str, Any] | None) -> str:
    if mrr is None:
        return "Not measured.\n"
    trained = "" if mrr["data"].get("held_out", True) else " The model was trained on these images."
    own, control = (mrr[key]["pooled"][model.encoder_name] for key in ("mrr", "shuffled_actions"))
    return (
        f"| MRR, {mrr['images']} images, bank of {mrr['bank']} | mean ± standard error |\n| --- | --- |\n"
        f"| this model | {own['mean']:.3f} ± {own['standard_error']:.3f} |\n"
        f"| this model with shuffled actions | {control['mean']:.3f} ± {control['standard_error']:.3f} |\n"
        f"| chance | {mrr['chance']:.3f} |\n\n"
        f"Pooled features; sources are encoded by the {model.encoder_name}. "
        f"Split `{mrr['data']['split']}` of the shards\n`{_short(Path(mrr['data']['shards']))}`.{trained}\n"
    )


def _short(shards: Path) -> str:
    """Return the last two parts of a path, which identify the data."""
    return "/".join(shards.parts[-2:])


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
