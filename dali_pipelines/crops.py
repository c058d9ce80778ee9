"""The crop pipeline of training with labels: crop and flip, then what a protocol asks for (paper, A.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dali_pipelines import photometric, rand_augment
from dali_pipelines.augmentation import NO_COLOUR, AugmentationError, ColourDefinition, Photometric
from dali_pipelines.dali import Pipeline, pipeline_def
from dali_pipelines.decoder import GpuDecoder
from dali_pipelines.photometric import Backend, DataNode
from dali_pipelines.rand_augment import RandAugment
from dali_pipelines.reader import Interpolation, Source, decode_box, draw_crop, read, resize_box


@dataclass(frozen=True)
class Crops:
    """How a labelled image is shown in training. The defaults are the linear probe's (paper, A.2)."""

    size: int = 224
    """Side in pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Crop area as a share of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Crop aspect (width / height), drawn log-uniformly as torchvision does."""
    flip_probability: float = 0.5
    interpolation: Interpolation = "linear"
    """Of the resize. `cubic` is what timm, and MAE with it, finetunes with."""
    colour: Photometric = NO_COLOUR
    """Colour ops after the flip, as those of pretraining's source view (attentive probe)."""
    colour_definition: ColourDefinition = "linear"
    """Maths of their jitter; a run's is in its views.colour."""
    rand_augment: str | None = None
    """timm's string, as `rand-m9-mstd0.5-inc1`, done last; None: none."""

    def check(self) -> None:
        """Raise AugmentationError, which names the field, where crops cannot be made so."""
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise AugmentationError(f"crop_scale {low} {high} must be two rising shares of the image, above 0")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise AugmentationError("crop_ratio must be two rising numbers above 0")
        if not 0 <= self.flip_probability <= 1:
            raise AugmentationError(f"flip_probability {self.flip_probability} must be from 0 to 1")
        self.colour.check()
        if self.rand_augment is not None:
            rand_augment.parse(self.rand_augment)


def labelled_crops(source: Source, crops: Crops, **settings: Any) -> Pipeline:
    """Outputs: images (uint8 HWC, where `backend` says), origin and label, both in CPU memory.

    `settings`: the keywords of `_graph` and of every DALI pipeline. Raises AugmentationError as `crops.check` does.
    """
    crops.check()
    if source.component is None:
        raise ValueError("labelled crops need the name of a label column")
    layers = None if crops.rand_augment is None else rand_augment.parse(crops.rand_augment)
    return _graph(source, crops, layers, **settings)


@pipeline_def(enable_conditionals=True, exec_dynamic=True, enable_checkpointing=True)
def _graph(
    source: Source,
    crops: Crops,
    layers: RandAugment | None,
    *,
    backend: Backend,
    shuffle_buffer: int,
    order_seed: int,
    read_ahead: int,
    decoder: GpuDecoder,
) -> tuple[DataNode, ...]:
    encoded = read(source, shuffle_buffer=shuffle_buffer, seed=order_seed, prefetch=read_ahead)
    crop = draw_crop(encoded.jpeg, crops.crop_scale, crops.crop_ratio, crops.flip_probability)
    drawn = photometric.draw(crops.colour)
    box = decode_box(encoded.jpeg, crop, backend, decoder)
    shared = photometric.shared(resize_box(box, crop, crops.size, backend, crops.interpolation), backend)
    image = photometric.apply(shared, drawn, crops.colour, crops.colour_definition, backend)
    if layers is not None:
        drawn_layers = rand_augment.draw(layers)
        image = rand_augment.apply(image, drawn_layers, layers.increasing, crops.size, crops.interpolation, backend)
    return photometric.contiguous(image, backend), encoded.origin, encoded.label
