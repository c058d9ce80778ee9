"""Predictor finetuning (paper, 5.1, A.2, tables 3, 4, S1, S3 and S4): the world model kept, on a frozen encoder.

The predictor is asked for the whole target with the null action, and an attentive head reads what it says. Beside it
the control: the same predictor of random parameters. All arms share the frozen encoder's forward pass; --features,
--latents and --queries make every combination of table S3.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from rich.table import Table

from iwm.config import ConfigError
from iwm.downstream.arms import FinetunedPredictor
from iwm.downstream.bench import Bench, column_of
from iwm.downstream.classification import classes_of
from iwm.downstream.finetuning import Kind, PredictorFinetuning, attentive_head, predictor_of
from iwm.downstream.protocol import Made, run_labelled
from iwm.downstream.results import arms_table
from iwm.downstream.settings import crops_of, need_each_once
from iwm.downstream.study import FrozenEncoders
from iwm.evaluation.bank import Context
from iwm.models.reader import Reader
from iwm.training.signals import StopWish

TOKENS = {"image": "all", "token": "one"}
"""What a result calls the two queries."""


@dataclass(frozen=True)
class Settings(PredictorFinetuning):
    """The world model on the frozen encoder with an attentive head, beside a predictor of random parameters."""

    predictors: tuple[Kind, ...] | None = None
    """Predictors that are finetuned; default: `pretrained` and `random`, of encoders that have none `random`."""
    features: tuple[Context, ...] = ("teacher",)
    """Frozen encoders that they are put on: `teacher` (target encoder), `student` (context encoder)."""
    latents: tuple[Literal["null", "random"], ...] = ("null",)
    """What they are told in training: the null action, or actions drawn as in pretraining."""
    queries: tuple[Literal["image", "token"], ...] = ("image",)
    """What they are asked for: the whole target, or one token that stands for no patch."""

    def check(self) -> None:
        super().check()
        for name in ("predictors", "features", "latents", "queries"):
            chosen = getattr(self, name)
            if chosen is not None:
                need_each_once(f"--{name}", chosen)


def evaluate(bench: Bench, settings: Settings, wish: StopWish) -> dict[str, Any] | None:
    """Train and judge; None where `wish` ended it early. Raises ConfigError and ShardError."""
    pretrained, device = bench.pretrained, bench.here.device
    kinds = settings.predictors or (("pretrained", "random") if pretrained.predictor is not None else ("random",))
    shared = FrozenEncoders({which: pretrained.encoder(which) for which in settings.features})
    column, crops = column_of(bench), crops_of(settings.crops, pretrained)
    names = classes_of(column, bench.here).names
    made = {}
    for kind, which, latents, query, seed in product(
        kinds, settings.features, settings.latents, settings.queries, settings.seeds
    ):
        predictor = predictor_of(pretrained, kind, seed, settings.fresh)
        reader = Reader(
            predictor, query=query, drop_path=settings.drop_path, checkpointing=settings.activation_checkpointing
        )
        drawn_by = None
        if latents == "random":
            if not reader.conditioned or pretrained.config is None or pretrained.spec is None:
                raise ConfigError("--latents random: this predictor is told no action; say --latents null")
            drawn_by = (pretrained.config.views, pretrained.spec)
        head = attentive_head(reader, pretrained, len(names), seed)
        arm = FinetunedPredictor(reader, head, which, pretrained.teacher.prefix, drawn_by).to(device)
        optimizer = settings.optimizer_of(arm, kind)
        facts = {
            "lr": settings.lr,
            "seed": seed,
            "features": which,
            "predictor": kind,
            "latents": latents,
            "tokens": TOKENS[query],
        }
        varied = [
            word
            for word, among in (
                (which, settings.features),
                (f"{latents} latents", settings.latents),
                (query, settings.queries),
            )
            if len(among) > 1
        ]
        made[", ".join((kind, *varied, f"seed {seed}"))] = Made(arm, optimizer, facts)
    return run_labelled(
        bench, column, crops, settings.mixing, names, made, shared, wish, cached=settings.keep_features, timed=True
    )


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    return arms_table(result, "Predictor finetuning on a frozen encoder: accuracy of the last epoch ± standard error")
