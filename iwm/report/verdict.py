"""Verdict on a run in one sentence: does the predictor find the right view, and is it the action that leads there?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from iwm.report.provenance import is_held_out

ERRORS = 3.0
"""Standard errors that a mean must lie above chance to count as better. Chance alone gives that in one of 700 runs."""
KEPT = 0.1
"""Share of the gain over chance below which a control counts as near chance: with many images a standard error becomes
so small that a control of no importance lies ERRORS above chance."""


@dataclass(frozen=True)
class Verdict:
    """Sentence on a run; `kind` is a CSS class: good, doubtful, bad or unknown."""

    kind: str
    text: str


@dataclass(frozen=True)
class _Score:
    """Mean over images with its standard error."""

    mean: float
    error: float

    def above(self, level: float) -> bool:
        return self.mean - level > ERRORS * self.error

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


NOT_EVALUATED = Verdict(
    "unknown", "Not evaluated yet: iwm evaluate world-model --checkpoint RUN tells whether the predictor has learnt."
)


def verdict(result: dict[str, Any] | None, conditioning: str | None) -> Verdict:
    """Return the verdict on a result of `mrr`, None without one (pooled, teacher).

    conditioning: action.conditioning of the run; None where it is not known.
    """
    if result is None:
        return NOT_EVALUATED
    mrr, control = (_score(result[part]) for part in ("mrr", "shuffled_actions"))
    chance: float = result["chance"]
    level = f"chance ({chance:.3f})"
    held_out = is_held_out(result)
    images = "" if held_out else " These are training images: held-out images may give less."
    if not all(map(math.isfinite, (mrr.mean, mrr.error, control.mean, control.error))):
        return Verdict("unknown", f"MRR {mrr.mean:.3f} has no finite standard error: too few images to judge it.")
    if conditioning == "none":
        text = f"The predictor receives no action (conditioning none), so its MRR {mrr} is at {level} by construction."
        return Verdict("unknown", text + images)
    if not mrr.above(chance):
        text = f"The predictor does not find the right view: MRR {mrr} is not above {level}."
        return Verdict("bad", text + images)
    times = mrr.mean / chance
    found = f"The predictor finds the right view: MRR {mrr}, {times:{'.0f' if times >= 10 else '.1f'}} times {level}"
    kept = (control.mean - chance) / (mrr.mean - chance)
    if not control.above(chance):
        kind, rest = "good", f"; with shuffled actions it falls to chance ({control.mean:.3f})."
    elif kept < KEPT:
        kind, rest = "good", f"; with shuffled actions it falls to near chance ({control.mean:.3f})."
    elif (mrr.mean - control.mean) <= ERRORS * math.hypot(mrr.error, control.error):
        kind, rest = "bad", f", but with shuffled actions it is as high ({control}): the action makes no difference."
    else:
        kind = "doubtful"
        rest = f", but with shuffled actions it is still {control}: {kept:.0%} of the gain does not need the action."
    return Verdict(kind if held_out else "doubtful" if kind == "good" else kind, found + rest + images)


def _score(part: dict[str, Any]) -> _Score:
    score = part["pooled"]["teacher"]
    return _Score(*(math.nan if score[name] is None else score[name] for name in ("mean", "standard_error")))
