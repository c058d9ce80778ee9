"""Precise transformations (paper, appendix I, figures S9 to S11): one parameter at a time, along a grid.

A series is a row of views of one image that differ in a single parameter. Of jitter (and of grayscale, blur and
solarize where the action can ask for them) the source is the clean image and the action leads to each view: the nearest
view to the prediction should be that one. Grayscale, blur and solarize of the source are undone: the source is each
view and the action leads to the clean one, which should be the nearest every time.

Controls: for the first kind the same predictions with the series' actions exchanged at random, whose rank correlation
is 0 on average; for the second the same sources when the predictor is not told what was done to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from jaxtyping import Float, Int
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from dali_pipelines.augmentation import IDENTITY, PHOTOMETRIC_FIELDS, Views
from iwm.actions import DESTRUCTIVE, JITTER, action_between
from iwm.config import ConfigError
from iwm.evaluation.bank import DISTANCES, UNTOLD, Bank, Context, Distance, actions_to, embed_bank, predicted_distances
from iwm.evaluation.mosaic import Band, draw_bands
from iwm.evaluation.mrr import JITTERED, LEAST_FACTOR, TIE, bank_jitter
from iwm.evaluation.over_images import over_images
from iwm.evaluation.settings import Settings as Common
from iwm.evaluation.subject import Subject

FIELD = {name: name for name in (*JITTER, "grayscale", "solarize")} | {"blur": "blur_sigma"}
"""The field of PHOTOMETRIC_FIELDS that each op is written in."""


@dataclass(frozen=True)
class Settings(Common):
    """One parameter at a time along a grid: what the prediction retrieves. Writes pictures as RUN/eval/grids-1.png."""

    images: int = 64
    """Held-out images that the curves are means of."""
    values: int = 11
    """Values of brightness, contrast, saturation and hue over their range, at least 2."""
    sigmas: int = 6
    """Values of the blur's sigma, from none to the run's largest, at least 2."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(JITTERED))] = None
    """Row of table S2 whose target jitter is the range. Default: the run's own, or that of `default` without jitter."""
    shown: int = 3
    """Photographs drawn, chosen by the seed among `images`."""
    distance: Distance = "pooled"
    """What is compared: features averaged over tokens, or whole."""
    context: Context = "teacher"
    """The encoder that the source goes through."""
    chunk: int = 256
    """Views embedded and predicted at once; lower it when the device runs out of memory."""


@dataclass(frozen=True)
class Series:
    """Views of an image that differ in one parameter, and which way the predictor is asked to go."""

    op: str
    """One of JITTER and DESTRUCTIVE."""
    undo: bool
    """Whether the views are sources that are to be undone, rather than what is to be made of the clean image."""
    values: list[float]
    """Factors, turns, pixels, or 0 and 1; of what is to be undone the first is none."""
    views: Float[Tensor, "n 7"]
    trained: bool
    """Whether the run's own views ever varied it: of what was never seen nothing is expected."""

    @property
    def name(self) -> str:
        return f"undo {self.op}" if self.undo else self.op

    @property
    def wanted(self) -> list[int]:
        """The view that each prediction should be nearest to."""
        return [0] * len(self.values) if self.undo else list(range(len(self.values)))


def series_of(views: Views, target_flags: bool, settings: Settings) -> list[Series]:
    """Every series that means something to a run with these views. Raises ConfigError as `bank_jitter` does."""
    jitter = bank_jitter(views, settings.scenario)
    seen = max(views.source.jitter_probability, views.target.jitter_probability) > 0
    made = []
    for op in JITTER:
        low, high = jitter.jitter_range(op)
        low = low if op == "hue" else max(low, LEAST_FACTOR)
        if getattr(jitter, op) > 0:
            own = max(getattr(views.source, op), getattr(views.target, op)) > 0
            made.append(_series(op, torch.linspace(low, high, settings.values), undo=False, trained=seen and own))
    for op in DESTRUCTIVE:
        most = max(views.source.blur_sigma[1], views.target.blur_sigma[1])
        grid = torch.linspace(0, most, settings.sigmas) if op == "blur" else torch.tensor([0.0, 1.0])
        applied, undone = (getattr(view, f"{op}_probability") > 0 for view in (views.target, views.source))
        if target_flags:
            made.append(_series(op, grid, undo=False, trained=applied))
        made.append(_series(op, grid, undo=True, trained=undone))
    return sorted(made, key=lambda series: series.undo)


def _series(op: str, values: Float[Tensor, " n"], *, undo: bool, trained: bool) -> Series:
    views = torch.tensor(IDENTITY).repeat(len(values), 1)
    views[:, PHOTOMETRIC_FIELDS.index(FIELD[op])] = values
    return Series(op, undo, values.tolist(), views, trained)


@dataclass(frozen=True)
class Found:
    """What the predictions of one image's series are near to."""

    nearest: Int[Tensor, " n"]
    retrieved: Float[Tensor, " n"]
    """Value of the nearest view; the mean of those as near as it (see mrr.TIE)."""
    hit: Float[Tensor, " n"]
    """1 where the nearest is the wanted one; its share where several are as near."""


def found(distances: Float[Tensor, "n n"], norms: Float[Tensor, " n"], series: Series) -> Found:
    """Look the predictions up among the views of their series. NaN where a distance is not finite."""
    tied = (distances <= distances.amin(1, keepdim=True) + TIE * norms).double()
    share = tied / tied.sum(1, keepdim=True)
    values = torch.tensor(series.values, dtype=torch.float64, device=distances.device)
    wanted = torch.tensor(series.wanted, device=distances.device)
    return Found(distances.argmin(1).cpu(), (share @ values).cpu(), share.gather(1, wanted[:, None])[:, 0].cpu())


@torch.no_grad()
def ask(
    subject: Subject, image: Tensor, all_series: Sequence[Series], settings: Settings, generator: torch.Generator
) -> tuple[Bank, list[tuple[Found, Found]]]:
    """One image's views of all series, and for each series what was found when told, and in the control."""
    model, device = subject.model, image.device
    bank = embed_bank(model, image, torch.cat([series.views for series in all_series]).to(device), settings.chunk)
    norms = bank.norms[DISTANCES.index(settings.distance)]

    def distances(sources: Tensor, actions: Tensor) -> Float[Tensor, "s q k"]:
        how: dict[str, Any] = {"distances": (settings.distance,), "contexts": (settings.context,)}
        return predicted_distances(model, bank, sources, actions, chunk=settings.chunk, **how)[0, 0]

    made = sum(len(series.values) for series in all_series if not series.undo)
    applied = distances(image[None], actions_to(bank.params[:made], model.action_spec)[None])[0]
    views, clean = bank.params[made:], torch.tensor(IDENTITY, device=device).expand_as(bank.params[made:])
    orders = [action_between(source, clean, model.action_spec) for source in (views, clean)]
    undone = distances(bank.copies[made:], torch.stack(orders, dim=1))
    answers, first = [], 0
    for series in all_series:
        part = slice(first, first + len(series.values))
        if series.undo:
            told, control = undone[part.start - made : part.stop - made, :, part].unbind(1)
        else:
            told = applied[part, part]
            control = told[torch.randperm(len(series.values), generator=generator).to(device)]
        answers.append((found(told, norms[part], series), found(control, norms[part], series)))
        first = part.stop
    return bank, answers


def correlation(values: Sequence[float], retrieved: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation; 0 where the same is retrieved throughout, which orders nothing."""
    return 0.0 if (retrieved == retrieved[0]).all() else float(spearmanr(values, retrieved.numpy()).statistic)


def summarise(series: Series, answers: Sequence[Found]) -> dict[str, Any]:
    """Over images: mean and deviation of the value retrieved for each value, rank correlation and share of hits."""
    retrieved = torch.stack([each.retrieved for each in answers])
    rho = torch.tensor([correlation(series.values, each) for each in retrieved], dtype=torch.float64)
    return {
        "retrieved": retrieved.mean(0).tolist(),
        "deviation": retrieved.std(0).tolist(),
        "correlation": over_images(rho),
        "hits": over_images(torch.stack([each.hit for each in answers]).mean(1)),
    }


def evaluate(subject: Subject, settings: Settings, output: Path) -> dict[str, Any]:
    """Curves and scores of every series, and the pictures beside `output`. Raises ConfigError for what cannot be."""
    if settings.images < 2 or settings.values < 2 or settings.sigmas < 2 or settings.chunk < 1:
        raise ConfigError("--images, --values and --sigmas must be at least 2, and --chunk at least 1")
    if not 0 <= settings.shown <= settings.images:
        raise ConfigError(f"--shown {settings.shown}: from 0 to --images {settings.images}")
    all_series = series_of(subject.config.views, subject.model.action_spec.target_flags, settings)
    images, keys = subject.images(settings.images, option="--images")
    generator = torch.Generator().manual_seed(settings.seed)
    shown = torch.randperm(len(images), generator=generator)[: settings.shown].tolist()
    answers, pictures = [], {}
    for i in track(range(len(images)), "grids", transient=True):
        bank, found_in = ask(subject, images[i], all_series, settings, generator)
        answers.append(found_in)
        if i in shown:
            pictures[i] = output.with_name(f"{output.stem}-{shown.index(i) + 1}.png")
            draw_bands(_bands(bank, all_series, found_in), pictures[i])
    per_series = zip(all_series, zip(*answers, strict=True), strict=True)
    return {
        "images": len(images),
        "distance": settings.distance,
        "context": settings.context,
        "conditioning": subject.config.action.conditioning,
        "pictures": [{"key": keys[i], "picture": pictures[i].name} for i in shown],
        "series": [_record(series, found_in) for series, found_in in per_series],
    }


def _record(series: Series, answers: Sequence[tuple[Found, Found]]) -> dict[str, Any]:
    told, control = zip(*answers, strict=True)
    return {
        "name": series.name,
        "op": series.op,
        "undo": series.undo,
        "trained": series.trained,
        "values": series.values,
        "wanted": [series.values[i] for i in series.wanted],
        "told": summarise(series, told),
        "control": {"kind": "not told" if series.undo else "shuffled actions", **summarise(series, control)},
    }


def _bands(bank: Bank, all_series: Sequence[Series], answers: Sequence[tuple[Found, Found]]) -> list[Band]:
    """Each series as rows of views: the true ones, those retrieved, and, where it was to be undone, the control's."""
    bands, first = [], 0
    for series, (told, control) in zip(all_series, answers, strict=True):
        views = bank.copies[first : first + len(series.values)].cpu()
        first += len(series.values)
        ends = [words(series.op, series.values[i]) for i in (0, -1)]
        title = series.name if ends == ["off", "on"] else f"{series.name}: {ends[0]} to {ends[1]}"
        rows = {"source" if series.undo else "true": views, "retrieved": views[told.nearest]}
        if series.undo:
            rows["not told"] = views[control.nearest]
        bands.append(Band(title, rows))
    return bands


def words(op: str, value: float) -> str:
    """A value of a parameter in words: '×0.80', '+18°', 'σ 1.2 px', 'on'."""
    if op == "hue":
        return f"{value * 360:+.0f}°"
    if op == "blur":
        return f"σ {value:.1f} px"
    return f"×{value:.2f}" if op in JITTER else "on" if value else "off"


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    caption = (
        f"{result['images']} images, {result['distance'].replace('_', ' ')}, {result['context']}. "
        "Control: shuffled actions; of what is undone, the predictor not told of it."
    )
    if result["conditioning"] == "none":
        caption += f"\n{UNTOLD}"
    made = Table(title="What predictions along a grid retrieve", caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    for column in ("series", "correlation", "control", "exact", "control", "chance"):
        made.add_column(column, justify="left" if column == "series" else "right", no_wrap=True)
    for series in result["series"]:
        told, control = series["told"], series["control"]
        name = series["name"] if series["trained"] else f"{series['name']} (never trained)"
        scores = [part[score] for score in ("correlation", "hits") for part in (told, control)]
        cells = [f"{score['mean']:.2f}±{score['standard_error']:.2f}" for score in scores]
        made.add_row(name, *cells, f"{1 / len(series['values']):.2f}")
    return made
