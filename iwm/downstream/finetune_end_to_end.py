"""End-to-end finetuning (paper, A.2, tables 4, S1 and S4): encoder and predictor together, an attentive head on top."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from rich.table import Table

from iwm.downstream.arms import FinetunedWorldModel
from iwm.downstream.bench import Bench, column_of
from iwm.downstream.classification import classes_of
from iwm.downstream.finetuning import Finetuning, Kind, attentive_head, predictor_of
from iwm.downstream.optim import adamw
from iwm.downstream.protocol import Made, run_labelled
from iwm.downstream.results import arms_table
from iwm.downstream.settings import crops_of, need_each_once, need_layer_decay, need_share
from iwm.downstream.study import FrozenEncoders
from iwm.evaluation.bank import Context
from iwm.models.layer_numbers import layer_scales
from iwm.models.reader import Reader
from iwm.training.signals import StopWish


@dataclass(frozen=True)
class Settings(Finetuning):
    """Encoder and predictor together: AdamW, one layer decay over both, a share of the learning rate for each."""

    predictors: tuple[Kind, ...] | None = None
    """Predictors that are finetuned; default: `pretrained`, of encoders that have none `random`."""
    features: Context = "teacher"
    """Encoder that is finetuned: `teacher` (target encoder) or `student` (context encoder)."""
    lr: float = 2e-3
    encoder_share: float = 0.1
    """Share of the learning rate that the encoder gets."""
    predictor_share: float = 0.1
    """Share that a pretrained predictor gets; a random one gets all of it, as the head."""
    layer_decay: float = 0.9
    """Each layer's learning rate is so much of the one above, over encoder and predictor together."""
    weight_decay: float = 0.1

    def check(self) -> None:
        super().check()
        need_layer_decay(self.layer_decay)
        if self.predictors is not None:
            need_each_once("--predictors", self.predictors)
        need_share("--encoder-share", self.encoder_share)
        need_share("--predictor-share", self.predictor_share)


def evaluate(bench: Bench, settings: Settings, wish: StopWish) -> dict[str, Any] | None:
    """Train and judge; None where `wish` ended it early. Raises ConfigError and ShardError."""
    pretrained, device = bench.pretrained, bench.here.device
    encoder = pretrained.encoder(settings.features)
    kinds = settings.predictors or (("pretrained",) if pretrained.predictor is not None else ("random",))
    column, crops = column_of(bench), crops_of(settings.crops, pretrained)
    names, checkpointing = classes_of(column, bench.here).names, settings.activation_checkpointing
    made = {}
    for kind, seed in product(kinds, settings.seeds):
        predictor = predictor_of(pretrained, kind, seed, settings.fresh)
        reader = Reader(predictor, drop_path=settings.drop_path, checkpointing=checkpointing)
        head = attentive_head(reader, pretrained, len(names), seed)
        arm = FinetunedWorldModel(encoder.trained(checkpointing=checkpointing), reader, head).to(device)
        shares = {"backbone": settings.encoder_share, "head": 1.0}
        shares["reader"] = settings.predictor_share if kind == "pretrained" else 1.0
        scales = {
            name: scale * shares[name.partition(".")[0]]
            for name, scale in layer_scales(arm, settings.layer_decay).items()
        }
        facts = {"lr": settings.lr, "seed": seed, "features": settings.features, "predictor": kind}
        made[f"{kind}, seed {seed}"] = Made(
            arm, adamw(arm, settings.lr, settings.weight_decay, scales.__getitem__), facts
        )
    return run_labelled(bench, column, crops, settings.mixing, names, made, FrozenEncoders({}), wish, timed=True)


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    return arms_table(result, "End-to-end finetuning: accuracy of the last epoch ± standard error")
