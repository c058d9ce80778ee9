"""A study of two small models, registered as a user would: also run as a command, iwm/ablate.py with it."""

from __future__ import annotations

from iwm.ablate import main
from iwm.ablation.studies import STUDIES, AblationStudy, Variant
from iwm.config import Config


def widths(recipe: Config) -> AblationStudy:
    return AblationStudy(
        "Two widths",
        (
            Variant("default", "narrow", ("--predictor.embed-dim", "32"), paper=0.5),
            Variant("default", "wide", ("--predictor.embed-dim", "64")),
        ),
    )


if __name__ == "__main__":
    STUDIES["widths"] = widths
    main()
