"""RandAugment against timm: every op at every magnitude, the sampled distributions, and the parsed strings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from pipeline_shards import jpeg, photographs_and_noise, write_split
from scipy.stats import binomtest, chi2_contingency, ks_2samp
from timm.data import auto_augment
from torch.utils.dlpack import from_dlpack

from dali_pipelines import rand_augment
from dali_pipelines.augmentations import AugmentationError
from dali_pipelines.crops import CropSettings, Interpolation, RandAugment, parse_rand_augment
from dali_pipelines.loader import CropLoader
from dali_pipelines.rand_augment import IDENTITY_OP, OPS, RandAugmentParams

STRING = "rand-m9-mstd0.5-inc1"
SIZE = 96
MAGNITUDES = (0.0, 2.0, 5.0, 7.3, 9.0, 9.6, 10.0)
RESAMPLING: dict[Interpolation, Any] = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}

TOLERANCE = {
    **dict.fromkeys(("Invert", "Posterize", "Solarize", "SolarizeAdd"), 0.0),
    # About 1% of the values round differently from Pillow's floats.
    **dict.fromkeys(("AutoContrast", "Color", "Contrast", "Brightness"), 0.05),
    # OpenCV rounds the new level; Pillow first rounds down the number of pixels per level.
    "Equalize": 0.8,
    # DALI rounds, Pillow rounds down: half a level. At the edge of a rotated image DALI blends into the fill.
    **dict.fromkeys(("Sharpness", "TranslateXRel", "TranslateYRel"), 0.7),
    **dict.fromkeys(("Rotate", "ShearX", "ShearY"), 1.0),
}
"""Maximum of an image's mean error (grey levels); for rotation and shears against Pillow's linear interpolation."""

CUBIC_TOLERANCE = 4.0
"""Tolerance of rotation and shears against Pillow's cubic interpolation, which DALI's warp does not have."""


def photographs() -> list[np.ndarray]:
    """Return three photographs, and one of them with little contrast: uint8 [SIZE, SIZE, 3]."""
    sources = (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee())
    images = [np.array(Image.fromarray(image[:300, :400]).resize((SIZE, SIZE))) for image in sources]
    return [*images, images[0] // 3 + 60]


Case = tuple[int, str, float, float]
"""Index of the image, op, magnitude, sign."""


def made(
    images: list[np.ndarray], cases: list[Case], increasing: bool, interpolation: Interpolation, device: str
) -> list[np.ndarray]:
    """Run the graph with given ops and levels."""
    on_gpu = device == "cuda"
    columns = {
        "op": [np.array(list(OPS).index(op), np.int32) for _, op, _, _ in cases],
        "level": [np.array(sign * magnitude, np.float32) for _, _, magnitude, sign in cases],
    }

    @pipeline_def(
        batch_size=len(cases),
        num_threads=1,
        device_id=0 if on_gpu else None,
        exec_dynamic=True,
        enable_conditionals=True,
    )
    def graph() -> Any:
        image = fn.external_source(repeat([images[case[0]] for case in cases]), layout="HWC")
        drawn = RandAugmentParams(*(fn.external_source(repeat(columns[name])) for name in RandAugmentParams._fields))
        backend = "gpu" if on_gpu else "cpu"
        image = image.gpu() if on_gpu else image
        return rand_augment.apply(image, [drawn], increasing, SIZE, interpolation, backend)

    pipeline = graph()
    pipeline.build()
    (outputs,) = pipeline.run()
    return list(from_dlpack(outputs.as_tensor()).cpu().numpy())


class Directed:
    """Replacement of the module `random` in timm that makes ops go in a given direction."""

    def __init__(self, sign: float) -> None:
        self._sign = sign

    def random(self) -> float:
        return 0.25 if self._sign > 0 else 0.75


def timms(image: np.ndarray, case: Case, increasing: bool, interpolation: Interpolation) -> np.ndarray:
    """Apply timm's op through Pillow."""
    _, op, magnitude, sign = case
    name = f"{op}Increasing" if increasing and f"{op}Increasing" in auto_augment.NAME_TO_OP else op
    hparams = {"img_mean": (124, 116, 104), "interpolation": RESAMPLING[interpolation]}
    augment = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
    if op == "Posterize" and augment.level_fn(magnitude, hparams) == (0,):
        return np.zeros_like(image)  # no bits kept: black in older Pillow, an error in current Pillow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_augment, "random", Directed(sign))
        return np.array(augment(Image.fromarray(image)))


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize("increasing", [True, False])
def test_every_op_at_every_magnitude_is_timms(increasing: bool, interpolation: Interpolation, device: str) -> None:
    images = photographs()
    cases = [
        (i, op, magnitude, sign)
        for op in OPS
        for i in range(len(images))
        for magnitude in MAGNITUDES
        for sign in (1.0, -1.0)
    ]
    for case, ours in zip(cases, made(images, cases, increasing, interpolation, device), strict=True):
        theirs = timms(images[case[0]], case, increasing, interpolation)
        if case[1] == "Sharpness":  # Pillow does not change the outermost pixels
            ours, theirs = ours[1:-1, 1:-1], theirs[1:-1, 1:-1]
        tolerance = TOLERANCE[case[1]]
        if interpolation == "cubic" and case[1] in ("Rotate", "ShearX", "ShearY"):
            tolerance = CUBIC_TOLERANCE
        assert np.abs(ours.astype(float) - theirs).mean() <= tolerance + (device == "cuda"), case


def test_ops_that_do_anything_are_seen_to() -> None:
    """Check that every op changes the image by more than the tolerances of the test above."""
    images = photographs()
    cases: list[Case] = [(3 if op == "AutoContrast" else 0, op, 9.0, 1.0) for op in OPS]
    for case, ours in zip(cases, made(images, cases, True, "cubic", "cpu"), strict=True):
        least = 2 * (CUBIC_TOLERANCE if case[1] in ("Rotate", "ShearX", "ShearY") else TOLERANCE[case[1]])
        assert np.abs(ours.astype(float) - images[case[0]]).mean() > least, case


def ours_drawn(spec: RandAugment, images: int) -> np.ndarray:
    """Sample op and level of each layer of each image: [images, layers, 2]."""

    @pipeline_def(batch_size=500, num_threads=1, device_id=None, seed=3, exec_dynamic=True)
    def graph() -> Any:
        layers = rand_augment.sample(spec)
        return fn.stack(*(fn.stack(*(fn.cast(node, dtype=types.FLOAT) for node in layer)) for layer in layers))

    pipeline = graph()
    pipeline.build()
    return np.concatenate([np.array(pipeline.run()[0].as_tensor()) for _ in range(images // 500)])


def timms_drawn(string: str, images: int) -> list[list[tuple[str, float]]]:
    """Return op and magnitude of each op that timm applies to each image."""
    transform = auto_augment.rand_augment_transform(string, {"img_mean": (124, 116, 104)})
    done: list[list[tuple[str, float]]] = []

    def note(name: str) -> Callable[[float, Any], tuple[()]]:
        def level(magnitude: float, _: Any) -> tuple[()]:
            done[-1].append((name.removesuffix("Increasing"), magnitude))
            return ()

        return level

    for op in transform.ops:
        op.level_fn, op.aug_fn = note(op.name), lambda image, **_: image
    auto_augment.random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the generator that timm samples from
    for _ in range(images):
        done.append([])
        transform(None)
    return done


def test_ops_and_magnitudes_are_drawn_as_timm_draws_them() -> None:
    ours = ours_drawn(parse_rand_augment(STRING), 6000)
    theirs = timms_drawn(STRING, 6000)
    assert ours.shape == (6000, 2, 2)
    done = ours[..., 0] < IDENTITY_OP
    counts = [Counter(done.sum(1).tolist()), Counter(map(len, theirs))]
    assert chi2_contingency([[count[n] for n in range(3)] for count in counts]).pvalue > 1e-3
    our_ops = Counter(list(OPS)[int(op)] for op in ours[..., 0][done])
    their_ops = Counter(op for image in theirs for op, _ in image)
    assert set(our_ops) == set(their_ops) == set(OPS)
    assert chi2_contingency([[count[op] for op in OPS] for count in (our_ops, their_ops)]).pvalue > 1e-3
    magnitudes = abs(ours[..., 1][done])
    assert ks_2samp(magnitudes, [magnitude for image in theirs for _, magnitude in image]).pvalue > 1e-3
    assert magnitudes.max() == 10.0
    assert binomtest(int((ours[..., 1] > 0).sum()), ours[..., 1].size, 0.5).pvalue > 1e-3
    both = done.all(1)
    assert abs(np.corrcoef(ours[both][:, 0, 1], ours[both][:, 1, 1])[0, 1]) < 0.1
    assert 0.03 < (ours[both][:, 0, 0] == ours[both][:, 1, 0]).mean() < 0.12, "with replacement: 1 in 15"


def test_without_a_deviation_the_magnitude_is_the_strings() -> None:
    drawn = ours_drawn(parse_rand_augment("rand-m7-n3-p1.0"), 500)
    assert drawn.shape == (500, 3, 2)
    assert (abs(drawn[..., 1]) == 7).all()
    assert (drawn[..., 0] < IDENTITY_OP).all()


def test_the_string_is_read_as_timm_reads_it() -> None:
    assert parse_rand_augment(STRING) == RandAugment(magnitude=9, layers=2, probability=0.5, std=0.5, increasing=True)
    assert parse_rand_augment("rand") == RandAugment(magnitude=10, layers=2, probability=0.5, std=0.0, increasing=False)
    assert parse_rand_augment("rand-n3-inc0-p0.25-m5") == RandAugment(5, 3, 0.25, 0.0, False)
    for string in (STRING, "rand", "rand-n3-p0.25-m5"):  # older timm reads inc0 as inc1
        theirs, ours = auto_augment.rand_augment_transform(string, {}), parse_rand_augment(string)
        op = theirs.ops[0]
        assert (theirs.num_layers, op.magnitude, op.prob) == (ours.layers, ours.magnitude, ours.probability)
        assert op.magnitude_std == ours.std
        assert any("Increasing" in op.name for op in theirs.ops) == ours.increasing


@pytest.mark.parametrize(
    ("string", "named"),
    [
        ("randaugment-m9", "must begin with 'rand'"),
        ("augmix-m3", "must begin with 'rand'"),
        ("rand-m9-mmax20", "section 'mmax20'"),
        ("rand-m9-tweights", "section 'tweights'"),
        ("rand-m9-inc", "section 'inc'"),
        ("rand-m9.5", "section 'm9.5' needs a whole number"),
        ("rand-m12", "m can be at most 10"),
        ("rand-m9-mstd101", "mstd at most 100"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(string: str, named: str) -> None:
    with pytest.raises(AugmentationError, match=named):
        parse_rand_augment(string)


def test_the_loader_refuses_such_a_string_before_it_begins(tmp_path: Path) -> None:
    write_split(tmp_path, "train", photographs_and_noise(2, side=40), per_shard=(2,))
    with pytest.raises(AugmentationError, match="section 'x3'"):
        CropLoader(tmp_path, "train", CropSettings(rand_augment="rand-x3"), label="row", batch_size=2, seed=0)


def test_the_loader_does_to_a_crop_what_one_of_timms_ops_does(tmp_path: Path) -> None:
    """Apply one op per image at a known magnitude: each result must be one of the 29 possible ones."""
    square = [jpeg(np.asarray(image)) for image in photographs()] * 12
    write_split(tmp_path, "train", square, per_shard=(len(square),))
    plain = CropSettings(size=SIZE, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_probability=0.0)

    def batch(crops: CropSettings) -> dict[int, torch.Tensor]:
        images, labels, _ = next(
            CropLoader(tmp_path, "train", crops, label="row", batch_size=len(square), seed=0, num_threads=1)
        )
        return {int(label): image.clone() for label, image in zip(labels, images, strict=True)}

    before = batch(plain)
    after = batch(replace(plain, rand_augment="rand-m9-n1-p1.0-inc1"))
    found = Counter()
    for row, image in after.items():
        errors = {
            (op, sign): np.abs(
                timms(before[row].numpy(), (0, op, 9.0, sign), True, "linear") - image.numpy().astype(float)
            ).mean()
            for op in OPS
            for sign in (1.0, -1.0)
        }
        (op, sign), error = min(errors.items(), key=lambda item: item[1])
        found[op] += 1
        assert error <= 1.2, (row, op, sign)
    assert len(found) > 8


def test_a_loader_with_rand_augment_goes_on_bit_for_bit(tmp_path: Path) -> None:
    write_split(tmp_path, "train", photographs_and_noise(24, side=60), per_shard=(24,))
    crops = CropSettings(size=32, rand_augment=STRING)

    def loader(state: dict[str, Any] | None = None) -> CropLoader:
        return CropLoader(tmp_path, "train", crops, label="row", batch_size=8, seed=0, num_threads=1, state=state)

    whole = loader()
    for _ in range(4):
        next(whole)
    restored = loader(whole.state_dict())
    for _ in range(4):
        assert torch.equal(next(whole).images, next(restored).images)
