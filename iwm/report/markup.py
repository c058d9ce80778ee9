"""The few shapes that the page's sections are made of."""

from __future__ import annotations

from html import escape


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def grid(charts: str) -> str:
    return f'<div class="charts">{charts}</div>'
