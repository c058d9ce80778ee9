"""Undoing corruptions: can the predictor be told what was done to its source, and take it back (paper, section 4.3)?

The question is MRR's, from a corrupted source: grayscale, blur, solarize, each parameter of the jitter both ways, all
of it at once. The bank is the usual one of jittered copies of the clean image; the action leads from what was done to
the source to each copy. Beside it stand three figures on the same predictions' terms: the same when the predictor is
not told of the corruption (the action leads from the clean image), with another copy's action, and from the clean
source, which is the ceiling. Also `restored`: the reciprocal rank of the clean image itself, among the bank and it,
when the action undoes the corruption and does no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dali_pipelines.augmentation import IDENTITY, PHOTOMETRIC_FIELDS, Photometric, Views
from dali_pipelines.replay import draw_photometric, photometric
from iwm.actions import DESTRUCTIVE, JITTER, action_between
from iwm.config import ConfigError
from iwm.evaluation.bank import DISTANCES, UNTOLD, Context, Distance, actions_to, embed_bank, predicted_distances
from iwm.evaluation.grids import FIELD, words
from iwm.evaluation.mosaic import Band, draw_bands
from iwm.evaluation.mrr import LEAST_FACTOR, BankSettings, bank_jitter, chance, derangement, rank
from iwm.evaluation.over_images import over_images
from iwm.evaluation.settings import Settings as Common
from iwm.evaluation.subject import Subject

SCORES = ("told", "not_told", "shuffled", "restored")


@dataclass(frozen=True)
class Settings(Common):
    """MRR from a corrupted source, by op and strength. Writes RUN/eval/undo.png beside the JSON."""

    bank: BankSettings = field(default_factory=lambda: BankSettings(images=24))
    queries: int = 16
    """Copies of each bank that are asked for, 2 to --bank.size. The bank is drawn at random, so fewer widen the spread
    and change nothing else."""
    blur_sigmas: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Blurs to be undone, in pixels of the view."""
    shares: tuple[float, ...] = (0.5, 1.0)
    """Changes of brightness, contrast, saturation and hue to be undone, as shares of the bank's range; both ways."""
    shown: int = 4
    """Photographs drawn of every op at its greatest strength, chosen by the seed; 0 draws nothing."""
    distance: Distance = "pooled"
    """What is compared: features averaged over tokens, or whole."""
    context: Context = "teacher"
    """The encoder that the source goes through."""


@dataclass(frozen=True)
class Corruption:
    """What is done to the source."""

    op: str
    strength: str
    """In words: '×0.60', 'σ 2.0 px', 'on'."""
    params: tuple[float, ...]
    """In the order of PHOTOMETRIC_FIELDS."""
    drawn: bool
    """Whether each image has a jitter of its own, drawn from the bank's range, in place of that of `params`."""
    trained: bool
    """Whether the run's own sources ever had it."""


def corruptions(views: Views, settings: Settings) -> list[Corruption]:
    """Every corruption, by op and rising strength. A jitter parameter that the bank never changes is left out."""
    jitter, source = bank_jitter(views, settings.bank.scenario), views.source
    made = []
    for op in DESTRUCTIVE:
        for value in settings.blur_sigmas if op == "blur" else (1.0,):
            trained = getattr(source, f"{op}_probability") > 0
            made.append(Corruption(op, words(op, value), _params({op: value}), False, trained))
    for op in JITTER:
        trained = source.jitter_probability > 0 and getattr(source, op) > 0
        for value in _values(jitter, op, settings.shares):
            made.append(Corruption(op, words(op, value), _params({op: value}), False, trained))
    middle = sorted(settings.blur_sigmas)[len(settings.blur_sigmas) // 2]
    everything = {"grayscale": 1.0, "blur": middle, "solarize": 1.0}
    made.append(Corruption("all jitter", "drawn", _params({}), True, source.jitter_probability > 0))
    made.append(Corruption("everything", "drawn", _params(everything), True, all(each.trained for each in made)))
    return made


def _values(jitter: Photometric, op: str, shares: Sequence[float]) -> list[float]:
    nothing = IDENTITY[PHOTOMETRIC_FIELDS.index(op)]
    ends = jitter.jitter_range(op)
    values = sorted({nothing + share * (end - nothing) for end in ends for share in shares} - {nothing})
    return [value if op == "hue" else max(value, LEAST_FACTOR) for value in values]


def _params(values: dict[str, float]) -> tuple[float, ...]:
    fields = {FIELD[op]: value for op, value in values.items()}
    return tuple(fields.get(name, same) for name, same in zip(PHOTOMETRIC_FIELDS, IDENTITY, strict=True))


@dataclass(frozen=True)
class Undone:
    """One image, from every source: the clean one first, then the corruptions."""

    scores: Float[Tensor, "score s"]
    """Mean reciprocal ranks; axis 0 follows SCORES."""
    sources: UInt8[Tensor, "s h w 3"]
    restored: UInt8[Tensor, "s h w 3"]
    """The nearest view to the prediction that undoes the corruption and does no more."""


@torch.no_grad()
def undo(
    subject: Subject,
    image: UInt8[Tensor, "h w 3"],
    wanted: Sequence[Corruption],
    settings: Settings,
    generator: torch.Generator,
) -> Undone:
    """Corrupt an image in every way, and ask for the copies of its bank from each. The bank is embedded once."""
    model, size, q, device = subject.model, settings.bank.size, settings.queries, image.device
    spec, colour = model.action_spec, model.config.views.colour
    jitter = bank_jitter(subject.config.views, settings.bank.scenario)
    copies = draw_photometric(jitter, size, generator)
    done = torch.tensor([IDENTITY, *(each.params for each in wanted)])
    drawn = draw_photometric(jitter, 1, generator)[0, : len(JITTER)]
    done[[False, *(each.drawn for each in wanted)], : len(JITTER)] = drawn
    other = derangement(q, generator).to(device)
    copies, done, clean = copies.to(device), done.to(device), torch.tensor([IDENTITY], device=device)

    bank = embed_bank(model, image, torch.cat([copies, clean]), settings.bank.chunk)
    sources = photometric(image.expand(len(done), -1, -1, -1), done, colour)
    told = torch.stack([actions_to(copies[:q], spec, source) for source in done])
    not_told = actions_to(copies[:q], spec).expand_as(told)
    only_undo = action_between(done, clean.expand_as(done), spec)[:, None]
    distances = predicted_distances(
        model,
        bank,
        sources,
        torch.cat([told, not_told, only_undo], dim=1),
        distances=(settings.distance,),
        contexts=(settings.context,),
        chunk=settings.bank.chunk,
    )[0]
    norms = bank.norms[[DISTANCES.index(settings.distance)]]
    among = distances[..., :size]
    ranks = [rank(part, norms[:, :size])[0] for part in (among[..., :q, :], among[..., q : 2 * q, :])]
    ranks.append(rank(among[..., other, :], norms[:, :size])[0])
    # The clean image is the last of the bank: turned about, it is the first, which is what rank asks a single row for.
    ranks.append(rank(distances[..., -1:, :].flip(-1), norms.flip(-1))[0])
    scores = torch.stack([(1 / each).double().mean(-1) for each in ranks])
    return Undone(scores.cpu(), sources.cpu(), bank.copies[distances[0, :, -1].argmin(-1)].cpu())


def evaluate(subject: Subject, settings: Settings, output: Path) -> dict[str, Any]:
    """Scores by op and strength, and the picture beside `output`. Raises ConfigError for what cannot be."""
    _check(settings)
    wanted = corruptions(subject.config.views, settings)
    images, keys = subject.images(settings.bank.images)
    generator = torch.Generator().manual_seed(settings.seed)
    shown = torch.randperm(len(images), generator=generator)[: settings.shown].tolist()
    scores, pictured = [], {}
    for i in track(range(len(images)), "undo", transient=True):
        undone = undo(subject, images[i], wanted, settings, generator)
        scores.append(undone.scores)
        if i in shown:
            pictured[i] = undone
    by_source = torch.stack(scores, dim=-1)
    result: dict[str, Any] = {
        "chance": chance(settings.bank.size),
        "images": len(images),
        "bank": settings.bank.size,
        "queries": settings.queries,
        "distance": settings.distance,
        "context": settings.context,
        "conditioning": subject.config.action.conditioning,
        "clean": _scores(by_source[:, :1]),
        "ops": _by_op(wanted, by_source[:, 1:]),
        "picture": None,
        "photographs": [keys[i] for i in shown],
    }
    if shown:
        picture = output.with_suffix(".png")
        draw_bands(_bands([pictured[i] for i in shown], wanted), picture, across=3 * len(shown))
        result["picture"] = picture.name
    return result


def _check(settings: Settings) -> None:
    bank = settings.bank
    if bank.images < 2 or bank.size < 2 or bank.chunk < 1:
        raise ConfigError("--bank: images and size must be at least 2 and chunk at least 1")
    if not 2 <= settings.queries <= bank.size:
        raise ConfigError(f"--queries {settings.queries}: from 2 to --bank.size {bank.size}")
    if not 0 <= settings.shown <= bank.images:
        raise ConfigError(f"--shown {settings.shown}: from 0 to --bank.images {bank.images}")
    if not settings.blur_sigmas or min(settings.blur_sigmas) <= 0:
        raise ConfigError("--blur-sigmas: at least one, all above 0")
    if not all(0 < share <= 1 for share in settings.shares):
        raise ConfigError("--shares: above 0 and at most 1")


def _by_op(wanted: Sequence[Corruption], scores: Float[Tensor, "score c images"]) -> list[dict[str, Any]]:
    """The scores of each op over its strengths, and of each strength."""
    ops = []
    for op, group in groupby(range(len(wanted)), key=lambda c: wanted[c].op):
        which = list(group)
        strengths = [{"strength": wanted[c].strength, **_scores(scores[:, [c]])} for c in which]
        ops.append({"op": op, "trained": wanted[which[0]].trained, **_scores(scores[:, which]), "strengths": strengths})
    return ops


def _scores(scores: Float[Tensor, "score c images"]) -> dict[str, dict[str, float]]:
    """Mean over corruptions and images, and its standard error over images, which are the independent units."""
    return {name: over_images(per_image) for name, per_image in zip(SCORES, scores.mean(1), strict=True)}


def _bands(shown: Sequence[Undone], wanted: Sequence[Corruption]) -> list[Band]:
    """Each op at its greatest strength, a column per photograph."""
    last = {each.op: c for c, each in enumerate(wanted, start=1)}
    return [
        Band(
            op if wanted[c - 1].strength in ("on", "drawn") else f"{op} {wanted[c - 1].strength}",
            {
                "source": torch.stack([each.sources[c] for each in shown]),
                "retrieved": torch.stack([each.restored[c] for each in shown]),
                "truth": torch.stack([each.sources[0] for each in shown]),
            },
        )
        for op, c in last.items()
    ]


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    caption = (
        f"{result['images']} images, bank of {result['bank']}, {result['queries']} of it asked for; "
        f"{result['distance'].replace('_', ' ')}, {result['context']}; chance {result['chance']:.4f}"
    )
    if result["conditioning"] == "none":
        caption += f"\n{UNTOLD}"
    made = Table(title="MRR from a corrupted source", caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    for column in ("source", *(name.replace("_", " ") for name in SCORES)):
        made.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    made.add_row("clean, the ceiling", *_cells(result["clean"]), end_section=True)
    for op in result["ops"]:
        strengths = op["strengths"] if len(op["strengths"]) > 1 else []
        made.add_row(op["op"] if op["trained"] else f"{op['op']} (untrained)", *_cells(op))
        for each in strengths:
            made.add_row(f"  {each['strength']}", *_cells(each), style="dim")
    return made


def _cells(scores: dict[str, dict[str, float]]) -> list[str]:
    return [f"{scores[name]['mean']:.3f}±{scores[name]['standard_error']:.3f}" for name in SCORES]
