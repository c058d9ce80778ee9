"""Export a trained model: python tools/export.py RUN_OR_CHECKPOINT OUT [--encoder context]

Writes weights as safetensors (the encoder under the names of timm's VisionTransformer), everything else as JSON, and a
model card; `iwm.load(OUT)` uses the folder. docs/using-a-model.md describes it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from iwm.action_words import applicable, change_ranges, undoable
from iwm.config import ConfigError
from iwm.exported import ENCODER, ENCODER_ARGUMENTS, PREDICTOR, Exported, Which, write_exported
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from iwm.trained import TrainedModel, load_trained, newest_checkpoint
from iwm.training.checkpoint import CheckpointError, run_of


@dataclass(frozen=True)
class Options:
    """Export a trained model as safetensors with a model card."""

    source: Positional[Annotated[Path, arg(metavar="RUN_OR_CHECKPOINT")]]
    """A run's folder, of which the newest checkpoint is taken, or one checkpoint file."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write. One with another model in it is refused."""
    encoder: Which = "target"
    """`target`: the paper's teacher, which predictions are of. `context`: the one that gradients trained."""


def export(options: Options) -> None:
    """Write the folder. Raises CheckpointError, ConfigError or OSError, of which none leaves half a folder."""
    checkpoint = newest_checkpoint(options.source)
    model = load_trained(checkpoint, encoder=options.encoder)
    exported = Exported(
        model.config, model.which, model.origin, model.encoder.state_dict(), model.predictor.state_dict()
    )
    write_exported(exported, model_card(model, evaluated_mrr(checkpoint), options.out.name), options.out)


def evaluated_mrr(checkpoint: Path) -> dict[str, Any] | None:
    """RUN/eval/mrr.json, if it is of this very checkpoint: of its name, and made after it."""
    path = run_of(checkpoint) / "eval" / "mrr.json"
    if not path.exists() or path.stat().st_mtime < checkpoint.stat().st_mtime:
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        return result if Path(result["checkpoint"]).name == checkpoint.name else None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no evaluation result ({error!r}); delete it or evaluate again") from error


def model_card(model: TrainedModel, mrr: dict[str, Any] | None, name: str) -> str:
    """What it is, what it was trained on, how good a world model it is, how it is loaded: only what was run."""
    c, origin = model.config, model.origin
    vit = f"width {c.encoder.width}, depth {c.encoder.depth}, {c.encoder.heads} heads, patches of {c.encoder.patch} px"
    told = f"conditioning `{c.action.conditioning}`"
    example = _example(model)
    call = f"model.predict(images, {example})" if example else "model.predict(images)"
    return f"""# {name}

An Image World Model ([Garrido et al., 2024](https://arxiv.org/abs/2403.00504)): a ViT encoder, and a predictor that
maps an image's features to those of a transformed image, given the action that transforms it.

- Encoder: the {model.which} encoder. {vit}; {c.grid}×{c.grid} patches of a {c.views.size} px image, no class token,
  normalised by mean {IMAGENET_MEAN} and standard deviation {IMAGENET_STD}.
- Predictor: IWM({c.predictor.depth}, {c.predictor.width}), {c.predictor.heads} heads, {told}.
- Trained on split `{c.data.train}` of the shards `{_short(c.data.shards)}`: {origin.step:,} steps,
  {origin.samples:,} images seen, {c.data.batch} a step. Labels were not used. Made from `{origin.name}`.

## How good a world model

{_judged(model, mrr)}
## Use

```python
import iwm
model = iwm.load("{name}")
predicted = {call}
```

`images` are uint8 [b, {c.views.size}, {c.views.size}, 3] or float [b, 3, {c.views.size}, {c.views.size}] from 0 to 1.
`model.features(images)` and `model.pooled(images)` are the encoder alone. {_abilities(model)}

The encoder alone, without this package (float images, normalised as above):

```python
import json, timm, safetensors.torch
encoder = timm.models.vision_transformer.VisionTransformer(**json.load(open("{name}/{ENCODER_ARGUMENTS}")))
encoder.load_state_dict(safetensors.torch.load_file("{name}/{ENCODER}"))
```

`{PREDICTOR}` holds the world model; `config.json` the run's configuration and the layout of an action.
"""


def _judged(model: TrainedModel, mrr: dict[str, Any] | None) -> str:
    if mrr is None:
        return "Not measured.\n"
    context = {"target": "teacher", "context": "student"}[model.which]
    own, control = (mrr[key]["pooled"][context] for key in ("mrr", "shuffled_actions"))
    return (
        f"| MRR, {mrr['images']} images, bank of {mrr['bank']} | mean ± standard error |\n| --- | --- |\n"
        f"| this model | {own['mean']:.3f} ± {own['standard_error']:.3f} |\n"
        f"| the same with shuffled actions | {control['mean']:.3f} ± {control['standard_error']:.3f} |\n"
        f"| chance | {mrr['chance']:.3f} |\n\n"
        f"Pooled features, sources through the {model.which} encoder; split `{mrr['data']['split']}` of the shards "
        f"`{_short(Path(mrr['data']['shards']))}`.\n"
    )


def _short(shards: Path) -> str:
    """Enough of a path to know the data by."""
    return "/".join(shards.parts[-2:])


def _example(model: TrainedModel) -> str:
    """An action that this model was trained on, as code; '' where there is none."""
    if not model.action_names:
        return ""
    for name, (_, high) in change_ranges(model.config).items():
        if high > 0:
            return f"model.action({name}=+{high / 2:.2g})"
    undo = undoable(model.config.views)
    return f'model.action(undo=("{undo[0]}",))' if undo else ""


def _abilities(model: TrainedModel) -> str:
    if not model.action_names:
        return "The predictor is told no action: it predicts the unchanged image's features, whatever is asked."
    ranges = change_ranges(model.config).items()
    changes = [f"{name} {low:+.2f} to {high:+.2f}" for name, (low, high) in ranges if high > low]
    undo, apply = undoable(model.config.views), applicable(model.config.views)
    words = [
        f"Changes it was trained on: {', '.join(changes)} (hue in turns)." if changes else "",
        f"It was trained to undo {', '.join(undo)}." if undo else "",
        f"It was trained to apply {', '.join(apply)}." if apply else "",
    ]
    return " ".join(word for word in words if word)


def main() -> None:
    options = tyro.cli(Options, description=__doc__, prog="tools/export.py")
    try:
        export(options)
    except (CheckpointError, ConfigError, OSError) as error:
        sys.exit(f"tools/export.py: {error}")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
