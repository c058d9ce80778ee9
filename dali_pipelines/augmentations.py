"""Augmentation settings of the views, and the layout of the recorded `params`.

The DALI graph (photometric.py), the torch replay (replay.py), the actions (iwm/actions.py) and the docs all use these
declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from shards.errors import UserError

JitterImpl = Literal["linear", "torchvision"]
"""Definition of the jitter. From the same parameters the two lie 5 grey levels apart with A.1's strengths and 7 with
strong ones, where the jitter itself moves 26 and 35 (`python benchmarks/parity.py --definitions`)."""

ViewBackend = Literal["gpu", "cpu", "triton"]
"""Implementation of the two views.

`gpu`, `cpu`: all operators in DALI, on this device. `triton`: decoding, crop and resize in DALI on the pipeline's
device; both views' photometric ops by Triton kernels from the recorded parameters (photometric_kernels.py).
"""


class AugmentationError(UserError):
    """Invalid augmentation settings. The message names the field."""


class Op(NamedTuple):
    """Declaration of one photometric op. Its computation is in photometric.py and replay.py.

    `jitter` ops share one probability and keep the information; the action holds the change of their parameters.
    `destructive` ops have a probability each; the action holds a flag.
    """

    name: str
    """Name in actions, words and commands. PhotometricConfig has a jitter op's strength in the field `NAME`, and a
    destructive op's probability in `NAME_probability`."""
    kind: Literal["jitter", "destructive"]
    identity: float
    """Parameter that leaves the image unchanged: 1 for a factor, 0 for an angle or a destructive op."""
    in_words: Callable[[float], str]
    """Formatter of a parameter; for an angle also of a change."""
    strong: float = 0.0
    """Strength of a jitter op that changes an image clearly: of the paper's ops, that of the scenarios `strong` and
    `strong_jitter` (table S2)."""
    drawn_from: str | None = None
    """Field of PhotometricConfig with the range that a destructive op's parameter is sampled from; None: it is 1 or
    0."""
    levels: tuple[float, ...] = (1.0,)
    """Increasing parameters of a destructive op with which evaluations corrupt source images."""
    unit: str = ""
    """Unit of the parameter on charts; empty: the plain number."""
    unit_scale: float = 1.0
    """Factor from the parameter to `unit`."""
    in_paper: bool = False
    """True for the ops of the paper: every action has their entries. Others have entries only in runs whose views may
    apply them, so that adding an op changes no other run."""

    @property
    def field(self) -> str:
        """Name of the parameter in PHOTOMETRIC_FIELDS."""
        return self.drawn_from or self.name

    @property
    def is_factor(self) -> bool:
        """True where the parameter is a factor, whose change can be given as a ratio; False for an angle."""
        return self.kind == "jitter" and self.identity == 1.0

    @property
    def is_switch(self) -> bool:
        """True where the parameter is 1 if the op is applied, instead of a sampled number."""
        return self.kind == "destructive" and self.drawn_from is None


def _factor(value: float) -> str:
    return f"×{value:.2f}"


def _degrees(turns: float) -> str:
    return f"{turns * 360:+.0f}°"


def _stops(stops: float) -> str:
    return f"{stops:+.2f} stops"


def _pixels(sigma: float) -> str:
    return f"σ {sigma:.1f} px"


def _on_or_off(done: float) -> str:
    return "on" if done else "off"


OPS: tuple[Op, ...] = (
    Op("brightness", "jitter", 1.0, _factor, strong=0.5, in_paper=True),
    Op("contrast", "jitter", 1.0, _factor, strong=0.5, in_paper=True),
    Op("saturation", "jitter", 1.0, _factor, strong=0.4, in_paper=True),
    Op("hue", "jitter", 0.0, _degrees, strong=0.2, unit="turned by, degrees", unit_scale=360.0, in_paper=True),
    Op("gamma", "jitter", 1.0, _factor, strong=0.5),
    Op("temperature", "jitter", 0.0, _stops, strong=0.5, unit="red against green, stops"),
    Op("rotation", "jitter", 0.0, _degrees, strong=1 / 18, unit="counter-clockwise, degrees", unit_scale=360.0),
    Op("grayscale", "destructive", 0.0, _on_or_off, in_paper=True),
    Op(
        "blur",
        "destructive",
        0.0,
        _pixels,
        drawn_from="blur_sigma",
        levels=(0.5, 1.0, 2.0),
        unit="sigma, pixels",
        in_paper=True,
    ),
    Op("solarize", "destructive", 0.0, _on_or_off, in_paper=True),
)
"""All ops in the order in which they are applied, jitter first: the layout of params and of actions."""

OP_BY_NAME: dict[str, Op] = {op.name: op for op in OPS}

JITTER_OPS: tuple[Op, ...] = tuple(op for op in OPS if op.kind == "jitter")
DESTRUCTIVE_OPS: tuple[Op, ...] = tuple(op for op in OPS if op.kind == "destructive")
assert (*JITTER_OPS, *DESTRUCTIVE_OPS) == OPS

JITTER_FIELDS: tuple[str, ...] = tuple(op.field for op in JITTER_OPS)


# The defaults are those of the paper's source view. They are not in the docstring, which --help also shows for targets.
@dataclass(frozen=True)
class PhotometricConfig:
    """Photometric augmentations of one view (A.1).

    Brightness, contrast and saturation factors are sampled uniformly from [1 - s, 1 + s], where s is the strength. The
    hue shift is sampled uniformly from [-s, s] turns (0.1 is 36 degrees). The ops are applied in the order of the
    fields: brightness, contrast, saturation, hue, grayscale, blur, solarize. Ops that the paper lacks have strength 0
    and come after hue: gamma (a factor), temperature and rotation (from [-s, s]).
    """

    jitter_probability: float = 0.8
    """Probability of jitter, all four ops together (0 to 1)."""
    brightness: float = 0.4
    """Strength of brightness, the maximum change of the factor (0 or more)."""
    contrast: float = 0.4
    """Strength of contrast, the maximum change of the factor (0 or more)."""
    saturation: float = 0.2
    """Strength of saturation, the maximum change of the factor (0 or more)."""
    hue: float = 0.1
    """Strength of hue, the maximum shift (turns, 0 or more; 0.1 is 36 degrees)."""
    grayscale_probability: float = 0.2
    """Probability of conversion to grayscale (0 to 1)."""
    blur_probability: float = 0.2
    """Probability of Gaussian blur (0 to 1)."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation (pixels of the view, above 0), sampled uniformly."""
    solarize_probability: float = 0.2
    """Probability of solarization (0 to 1)."""
    gamma: float = 0.0
    """Strength of gamma, the maximum change of the exponent (0 or more). Not in the paper."""
    temperature: float = 0.0
    """Strength of colour temperature (stops, 0 or more): red is multiplied by 2^t and blue by 2^-t.
    Positive is warmer. Not in the paper."""
    rotation: float = 0.0
    """Strength of rotation about the centre, with mirrored borders (turns, 0 or more; 0.05 is 18 degrees).
    It moves positions, so that masks of segmentation would no longer fit. Not in the paper."""

    def check(self) -> None:
        """Raise AugmentationError, which names the field, where a value is out of range."""
        for name in ("jitter", *(op.name for op in DESTRUCTIVE_OPS)):
            probability = getattr(self, f"{name}_probability")
            if not 0 <= probability <= 1:
                raise AugmentationError(f"{name}_probability {probability} must be from 0 to 1")
        for name, strength in zip(JITTER_FIELDS, self.strengths, strict=True):
            if not strength >= 0:
                raise AugmentationError(f"{name} {strength} must not be negative")
        for op in DESTRUCTIVE_OPS:
            if op.drawn_from is not None:
                low, high = self.value_range(op)
                if not 0 < low <= high:
                    raise AugmentationError(f"{op.drawn_from} {low} {high} must be MIN MAX with 0 < MIN <= MAX")

    def without_destructive(self) -> PhotometricConfig:
        """Return the same settings without the destructive ops."""
        return self.with_fields({f"{op.name}_probability": 0.0 for op in DESTRUCTIVE_OPS})

    def with_fields(self, fields: Mapping[str, float]) -> PhotometricConfig:
        """Return the same settings with these strengths and probabilities, by field name."""
        changes: dict[str, Any] = dict(fields)
        return replace(self, **changes)

    def probability(self, op: Op) -> float:
        """Return the probability that an op is applied; jitter ops share one."""
        chance: float = getattr(self, "jitter_probability" if op.kind == "jitter" else f"{op.name}_probability")
        return chance

    def applies(self, op: Op) -> bool:
        """Return True where an op can change an image."""
        return self.probability(op) > 0 and (op.kind == "destructive" or getattr(self, op.name) > 0)

    def value_range(self, op: Op) -> tuple[float, float]:
        """Return the range that an op's parameter is sampled from; (1, 1) for an op without a parameter."""
        if op.kind == "jitter":
            return self.jitter_range(op.name)
        drawn_from: tuple[float, float] = (1.0, 1.0) if op.drawn_from is None else getattr(self, op.drawn_from)
        return drawn_from

    def jitter_range(self, name: str) -> tuple[float, float]:
        """Return the bounds of the uniform range of brightness, contrast, saturation (factors) or hue (turns)."""
        strength: float = getattr(self, name)
        return (max(0.0, 1.0 - strength), 1.0 + strength) if OP_BY_NAME[name].is_factor else (-strength, strength)

    @property
    def destructive(self) -> bool:
        """True where an op that loses information can be applied."""
        return max(map(self.probability, DESTRUCTIVE_OPS)) > 0

    @property
    def strengths(self) -> tuple[float, ...]:
        """Maximum changes of the parameters of JITTER_OPS, by which actions are normalised."""
        return tuple(getattr(self, op.name) for op in JITTER_OPS)


NO_PHOTOMETRIC = replace(PhotometricConfig().without_destructive(), jitter_probability=0.0)
"""I-JEPA's views, cropped and flipped only. Strengths stay those of the paper, so that actions can be scaled."""


_IDENTITY_OPS = NO_PHOTOMETRIC.with_fields(dict.fromkeys(JITTER_FIELDS, 0.0))

SINGLE_OP: dict[str, PhotometricConfig] = {
    **{op.name: _IDENTITY_OPS.with_fields({"jitter_probability": 1.0, op.name: op.strong}) for op in JITTER_OPS},
    **{op.name: _IDENTITY_OPS.with_fields({f"{op.name}_probability": 1.0}) for op in DESTRUCTIVE_OPS},
}
"""Settings that always apply a single op, with the strong strengths of table S2, to measure the effect of each op."""


GEOMETRY_FIELDS = ("crop_x", "crop_y", "crop_width", "crop_height", "image_width", "image_height", "flip")
"""Crop box and image size in whole pixels of the decoded image (exact in float32), then the flip flag (0 or 1)."""

PHOTOMETRIC_FIELDS: tuple[str, ...] = tuple(op.field for op in OPS)
"""Factors (identity 1), hue in turns (0), grayscale flag, blur sigma in pixels (0: no blur), solarize flag.

Where jitter is not applied, its identity values are recorded, so that params describe only the applied ops.
"""

COLUMNS: dict[str, int] = {op.name: column for column, op in enumerate(OPS)}
"""Column of each op in PHOTOMETRIC_FIELDS, by its name."""

PARAMS: tuple[str, ...] = (
    *GEOMETRY_FIELDS,
    *(f"target_{name}" for name in PHOTOMETRIC_FIELDS),
    *(f"source_{name}" for name in PHOTOMETRIC_FIELDS),
)
"""The columns of `params`, float32 [B, len(PARAMS)]."""

GEOMETRY = slice(0, len(GEOMETRY_FIELDS))
TARGET = slice(GEOMETRY.stop, GEOMETRY.stop + len(PHOTOMETRIC_FIELDS))
SOURCE = slice(TARGET.stop, TARGET.stop + len(PHOTOMETRIC_FIELDS))

IDENTITY: tuple[float, ...] = tuple(op.identity for op in OPS)
"""Photometric parameters that leave the image unchanged, in the order of PHOTOMETRIC_FIELDS."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G and B in the luma."""

FLOAT_TO_UINT8 = 255.999 / 255
"""Factor of torchvision's conversion of v in [0, 1] to uint8: trunc(255.999 v)."""

SOLARIZE_THRESHOLD = 128
"""Grey levels at or above this are inverted, as torchvision's RandomSolarize(128) does."""

MEAN_COLOUR = (124.0, 116.0, 104.0)
"""Grey levels of padding: ImageNet's mean, rounded, which is 0 after normalisation."""
