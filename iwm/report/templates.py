"""Jinja2 templates of the page, in the folder templates/ next to this file.

Everything that a template prints is escaped, unless it is Markup: text from files, names of metrics and keys included.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

ENVIRONMENT = Environment(
    loader=PackageLoader("iwm.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> Markup:
    """Return a template of templates/ filled with values. A name that has no value raises jinja2.UndefinedError."""
    return Markup(ENVIRONMENT.get_template(template).render(**values))
