"""Glossary of the page: terms in plain sentences, and links to them from table heads, tiles and charts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Term:
    """One entry of the glossary. Its anchor is `glossary-` followed by `key`."""

    key: str
    name: str
    meaning: str
    spellings: tuple[str, ...] = ()
    """Further words that link to it, in lower case."""


GLOSSARY = (
    Term(
        "action",
        "action",
        "How one view of an image differs from another: brightness, contrast, saturation, hue, and whether grayscale, "
        "blur or solarize was applied. The predictor receives it as input.",
    ),
    Term(
        "bank",
        "bank",
        "The augmented views of one image that a prediction is ranked in. With more views, the true one is harder to "
        "find, and both MRR and chance are lower.",
    ),
    Term(
        "chance",
        "chance",
        "The score without any knowledge. For MRR in a bank of n views it is (1 + 1/2 + … + 1/n) / n, for accuracy the "
        "share of the most frequent class.",
    ),
    Term(
        "data-wait",
        "data wait",
        "The share of the time that training waited for images, from 0 to 1. Near 0, the data pipeline keeps up.",
    ),
    Term(
        "ema",
        "EMA",
        "Exponential moving average: after each step the teacher keeps this share of its weights and takes the rest "
        "from the student.",
    ),
    Term(
        "feature-std",
        "feature standard deviation",
        "Standard deviation of the teacher's features over images, averaged over dimensions. 0 means collapse: every "
        "image has the same features.",
        ("feature std",),
    ),
    Term(
        "held-out",
        "held-out images",
        "Images that the model was not trained on. Scores on training images may be too good.",
    ),
    Term(
        "mfu",
        "MFU",
        "Model FLOPs utilisation: arithmetic that the model needs, as a share of what the device's matrix products "
        "reach.",
    ),
    Term(
        "mrr",
        "MRR",
        "Mean reciprocal rank: the mean of 1/rank of the true view, when the views of a bank are sorted by their "
        "distance to the prediction. 1 is a perfect world model.",
        ("mean reciprocal rank",),
    ),
    Term(
        "per-token",
        "per token",
        "Distances between all tokens of two views, position by position, not between their averages.",
    ),
    Term(
        "pooled",
        "pooled",
        "Distances between features that are averaged over all tokens (patches) of a view.",
    ),
    Term(
        "rank-correlation",
        "rank correlation",
        "How well the order of retrieved values follows the order of true values: 1 the same order, 0 no relation, "
        "-1 reversed. Near 0, the predictor does not heed this part of the action.",
        ("correlation",),
    ),
    Term(
        "rankme",
        "RankMe",
        "Effective number of dimensions that the teacher's features use, from 1 (collapse) to the number of their "
        "dimensions. Compare only values over the same number of images.",
    ),
    Term(
        "recall",
        "Recall@k",
        "Share of predictions whose true view is among the k nearest of the bank.",
        ("recall@1", "recall@5"),
    ),
    Term(
        "shuffled-actions",
        "shuffled actions",
        "The control: each prediction gets another view's action. A predictor that heeds its action then scores no "
        "better than chance, and even a little below it, because it finds the other view.",
    ),
    Term(
        "skipped-steps",
        "skipped steps",
        "Steps whose gradient was not finite. They do not change the weights. A few are harmless; many in a row end "
        "the run with advice.",
        ("skipped", "non-finite steps skipped"),
    ),
    Term(
        "small-bank",
        "small bank",
        "The bank that training measures itself on, with fewer images and fewer views than an evaluation, so that it "
        "takes little time. Its MRR is higher than on a full bank.",
    ),
    Term(
        "standard-error",
        "standard error",
        "Uncertainty of a mean over images (after ±): the standard deviation over images, divided by the square root "
        "of their number.",
    ),
    Term(
        "student",
        "student",
        "The context encoder, which is trained by gradients and sees a part of the source image's patches.",
        ("context encoder",),
    ),
    Term(
        "teacher",
        "teacher",
        "The target encoder, a moving average of the student, which sees the whole target image. Its features are what "
        "the predictor predicts.",
        ("target encoder",),
    ),
)
"""Terms in alphabetical order of their names."""

_BY_SPELLING = {word.lower(): term.key for term in GLOSSARY for word in (term.name, *term.spellings)}
_SPELLINGS = re.compile(
    rf"(?<!\w)({'|'.join(map(re.escape, sorted(_BY_SPELLING, key=len, reverse=True)))})(?!\w)", re.IGNORECASE
)


def with_links(text: str) -> Markup:
    """Return text, escaped, whose first mention of each term of the glossary is a link to it."""
    return Markup().join(_linked(text))


def _linked(text: str) -> Iterator[Markup]:
    start, seen = 0, set[str]()
    for match in _SPELLINGS.finditer(text):
        key = _BY_SPELLING[match[0].lower()]
        if key not in seen:
            seen.add(key)
            yield escape(text[start : match.start()])
            yield Markup('<a class="term" href="#glossary-{}">{}</a>').format(key, match[0])
            start = match.end()
    yield escape(text[start:])
