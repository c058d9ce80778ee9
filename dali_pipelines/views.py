"""Settings of the two views of an image, and named sets of them (paper, section 3, A.1 and table S2)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dali_pipelines.augmentations import (
    JITTER_FIELDS,
    JITTER_OPS,
    NO_PHOTOMETRIC,
    OPS,
    AugmentationError,
    JitterImpl,
    Op,
    PhotometricConfig,
)


@dataclass(frozen=True)
class Views:
    """Source and target view of an image (section 3 and A.1): a shared crop and flip, then photometric ops for each."""

    size: int = 224
    """Side of both views (pixels), a multiple of encoder.patch_size."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Range of the crop's area as a share of the image (0 to 1)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio (width / height), sampled log-uniformly as in torchvision."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip (0 to 1), the same flip for both views."""
    target: PhotometricConfig = field(default_factory=lambda: PhotometricConfig().without_destructive())
    source: PhotometricConfig = field(default_factory=PhotometricConfig)
    jitter_impl: JitterImpl = "linear"
    """Computation of the jitter, in fixed order.
    `torchvision`: as ColorJitter, clamped after each step, with the hue in HSV.
    `linear`: two affine maps, one for brightness and contrast, one for saturation and hue.
    The latter rotates colours about the grey axis.
    With A.1's strengths the two are 5 grey levels apart on average, where the jitter changes 26."""

    @property
    def action_ops(self) -> tuple[Op, ...]:
        """Ops that have entries in the action, in the order of OPS: the paper's, and others that a view may apply."""
        return tuple(op for op in OPS if op.in_paper or self.source.applies(op) or self.target.applies(op))

    @property
    def destructive_ops(self) -> tuple[Op, ...]:
        """Destructive ops among `action_ops`."""
        return tuple(op for op in self.action_ops if op.kind == "destructive")

    def check(self) -> None:
        """Raise AugmentationError, which names the field, where a value is out of range."""
        check_crop(self.crop_scale, self.crop_ratio, self.flip_probability)
        for name, view in (("target", self.target), ("source", self.source)):
            try:
                view.check()
            except AugmentationError as error:
                raise AugmentationError(f"{name}: {error}") from error


def check_crop(scale: tuple[float, float], ratio: tuple[float, float], flip: float) -> None:
    """Raise AugmentationError, which names the field, where the settings of crop or flip are out of range."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise AugmentationError(f"crop_scale {scale[0]} {scale[1]} must be MIN MAX with 0 < MIN <= MAX <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise AugmentationError(f"crop_ratio {ratio[0]} {ratio[1]} must be MIN MAX with 0 < MIN <= MAX")
    if not 0 <= flip <= 1:
        raise AugmentationError(f"flip_probability {flip} must be from 0 to 1")


def _scenario(jitter: float, strengths: dict[str, float], blur: float, gray: float, solar: float) -> Views:
    chances = {"grayscale_probability": gray, "blur_probability": blur, "solarize_probability": solar}
    return _with(NO_PHOTOMETRIC.with_fields({"jitter_probability": jitter, **strengths, **chances}))


def _with(source: PhotometricConfig) -> Views:
    return Views(source=source, target=source.without_destructive())


_DEFAULT = dict(zip(JITTER_FIELDS, PhotometricConfig().strengths, strict=True))
_STRONG = {op.name: op.strong for op in JITTER_OPS if op.in_paper}

SCENARIOS: dict[str, Views] = {
    "default": _scenario(0.8, _DEFAULT, 0.2, 0.2, 0.1),
    "jitter": _scenario(0.8, _DEFAULT, 0.0, 0.0, 0.0),
    "more_destructive": _scenario(0.8, _DEFAULT, 0.4, 0.4, 0.2),
    "strong": _scenario(0.8, _STRONG, 0.2, 0.2, 0.1),
    "strong_jitter": _scenario(0.8, _STRONG, 0.0, 0.0, 0.0),
    "destructive": _scenario(0.0, _DEFAULT, 0.2, 0.2, 0.1),
    "ijepa": Views(source=NO_PHOTOMETRIC, target=NO_PHOTOMETRIC),
    "extended": _with(PhotometricConfig(gamma=0.4, temperature=0.4)),
    "geometric": Views(target=replace(Views().target, rotation=1 / 18)),
}
"""The six rows of table S2, I-JEPA's views, and two beyond the paper, with A.1's ops: `extended` also with gamma and
colour temperature in both views, `geometric` with a rotation of the target by up to 20 degrees. The table's solarize
probability is 0.1; A.1, PhotometricConfig and the last two have 0.2."""
