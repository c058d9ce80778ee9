"""The few shapes that the page's sections are made of."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def with_contents(sections: str) -> str:
    """Sections after links that lead to them."""
    links = []

    def anchored(found: re.Match[str]) -> str:
        anchor = "-".join(re.findall(r"\w+", found[1].lower()))
        links.append(f'<a href="#{anchor}">{found[1]}</a>')
        return f'<section id="{anchor}"><h2>{found[1]}</h2>'

    body = re.sub(r"<section><h2>(.*?)</h2>", anchored, sections)
    return f'<nav aria-label="Contents">{"".join(links)}</nav>{body}' if len(links) > 1 else body


def details(title: str, content: str, kind: str = "") -> str:
    """Folded away under its title; `kind` is a class for the page's style."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<details{attribute}><summary>{escape(title)}</summary>{content}</details>"


def grid(charts: str) -> str:
    return f'<div class="charts">{charts}</div>'


def figure(picture: Path, alt: str, caption: str) -> str:
    """A PNG file, held by the page itself, over its caption."""
    data = base64.b64encode(picture.read_bytes()).decode()
    image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def mean_and_error(score: Mapping[str, float], digits: int = 3, times: float = 1) -> str:
    """A figure over images with its standard error; `times` 100 for percent."""
    return f"<b>{times * score['mean']:.{digits}f}</b> ± {times * score['standard_error']:.{digits}f}"


def table(head: Iterable[str], rows: Iterable[str]) -> str:
    """A table that scrolls sideways by itself; `rows` are the cells of each row as HTML."""
    titles = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    # A region that scrolls must be reachable by keyboard.
    return f'<div class="wide" tabindex="0"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
