"""Script for a process that cannot import this project: load an exported folder with stock timm, and save its outputs.

Arguments: the name for timm.create_model, a file of images, the output file.
"""

from __future__ import annotations

import sys

import timm
import torch
from PIL import Image

sys.modules.update(dict.fromkeys(("iwm", "dali_pipelines", "shards")))  # importing any of them raises ImportError


def main(name: str, image: str, out: str) -> None:
    """Save what `timm` makes of the image: pixels, features, pooled features, logits, and its intermediate layers."""
    model = timm.create_model(name, pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    x = timm.data.create_transform(**config)(Image.open(image))[None]
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    headless = timm.create_model(name, pretrained=True, num_classes=0).eval()
    layers = timm.create_model(name, pretrained=True, features_only=True).eval()
    finetuned = timm.create_model(name, pretrained=True, num_classes=7).eval()
    with torch.no_grad():
        outputs = {
            "pixels": (x * std + mean) * 255,
            "features": model.forward_features(x),
            "pooled": headless(x),
            "output": model(x),
            "layer": layers(x)[-1],
            "seven": finetuned(x),
        }
    torch.save({"classes": model.pretrained_cfg.get("label_names"), **outputs}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
